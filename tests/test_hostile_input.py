"""Arbitrary text, bytes and numbers wherever they come in: no exception but the one line, no more than linear time.

INPUTS=5000 pytest tests/test_hostile_input.py tries that many of each kind.
"""

import io
import json
import logging
import math
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.console import Answerer
from src.data import encode_prompts, format_target, load_examples, parse_row
from src.engine.learner import Learner
from src.engine.models import save_model
from src.engine.sampling import Sampler
from src.errors import UserError, open_streams, printable, say
from src.rewards import REWARD_FUNCTIONS, parse_completion
from src.run.checkpoint import damage, find_checkpoints, load_state, newest_checkpoint, save_checkpoint
from src.run.tracking import RunLog
from src.tiny import make_tiny
from tests.helpers import LONG, no_hang, score, state, tiny_model, word_tokenizer

many = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=int(os.environ.get("INPUTS", 60)),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PIECES = ["<reasoning>", "</reasoning>", "<output>", "</output>", "<answer>", "</answer>", "<<", ">>", "####", "="]
PIECES += [
    "\x85",
    "\u2028",
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "\u202e",
    "\ud800",
    "\udfff",
    "\x00",
    "\r",
    "\n",
    "\t",
    "\ufeff",
]
PIECES += [
    "1,000",
    "1e999",
    "-",
    ".",
    "7" * 400,
    "0x1F",
    "½",
    "٣",
    "Ⅷ",
    "$",
    "%",
    "\\frac{1}{",
    "\\boxed{",
    "{{ 7*7 }}",
]
PIECES += [
    "<|im_end|>",
    "<|im_start|>assistant",
    "<end>",
    "e\u0301" * 9,
    "\u200d",
    "🤖",
    "nan",
    "inf",
    "None",
    "+",
    "*",
    "(",
]
TEXT = st.one_of(
    st.text(st.characters(codec=None), max_size=60),  # lone surrogates included
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=25).map("".join),
)
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class TestData:
    @many
    @given(TEXT, TEXT, st.sampled_from(["gsm8k", "boxed", "whole", r"(\d+)"]))
    def test_any_row_is_an_example_or_dropped_with_a_short_reason(self, question, answer, pattern) -> None:
        for text in (answer, f"{answer} #### 7"):
            try:
                example = parse_row(question, text, pattern)
            except ValueError as reason:
                assert 0 < len(str(reason)) < 60 and "\n" not in str(reason)
            else:
                assert example.question.strip() and example.answer
                if example.reasoning:
                    assert parse_completion(format_target(example)).answer == example.answer

    @many
    @given(st.data())
    def test_any_file_gives_examples_or_one_line(self, tmp_path: Path, data: st.DataObject) -> None:
        cell = st.one_of(
            TEXT, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(st.integers(), max_size=2)
        )
        rows = st.lists(st.dictionaries(st.sampled_from(["question", "answer", "id"]), cell), max_size=4)
        lines = rows.map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
        path = tmp_path / data.draw(st.sampled_from(["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"]))
        path.write_bytes(
            data.draw(st.one_of(lines, st.binary(max_size=200), TEXT.map(lambda t: t.encode("utf-8", "replace"))))
        )
        try:
            examples, dropped = load_examples(str(path), "train")
            assert examples and dropped.total() >= 0
        except UserError as error:
            assert "\n" not in str(error)


class TestRewards:
    @many
    @given(TEXT, TEXT)
    def test_every_reward_of_any_text_is_between_0_and_1(self, completion, answer) -> None:
        for text in (
            completion,
            f"<reasoning>{completion}</reasoning> <output>{answer}</output> <answer>{completion}</answer>",
        ):
            assert all(type(r) is float and 0 <= r <= 1 for r in score([text], [answer])[0])


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    tokenizer = word_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=300)
    return Answerer(Sampler(model, [tokenizer.eos_token_id], tokenizer.pad_token_id), tokenizer, 3)


class TestPrompt:
    @many
    @given(question=TEXT)
    def test_any_question_is_answered_or_refused_in_one_line(self, answerer: Answerer, question: str) -> None:
        try:
            answer = answerer.answer(question, temperature=1.0)
            assert 1 <= answer.tokens <= 3 and json.loads(json.dumps(answer.completion)) == answer.completion
        except UserError as error:
            assert "\n" not in str(error)

    def test_a_megabyte_is_refused_at_once(self, answerer: Answerer) -> None:
        with no_hang(), pytest.raises(UserError, match="but the model takes 300 tokens in all"):
            answerer.answer("7 " * 500_000)

    @many
    @given(pieces=st.lists(TEXT, max_size=5))
    def test_no_control_of_any_completion_reaches_the_terminal(self, pieces: list[str]) -> None:
        out = io.StringIO()
        with redirect_stdout(out):
            for piece in pieces:
                say(piece, end="")
        assert not CONTROLS.search(out.getvalue()) and out.getvalue() == printable("".join(pieces))


class TestLogs:
    @pytest.fixture(autouse=True)
    def streams(self) -> Iterator[None]:
        """As a script has them, whose log records show no control."""
        open_streams()
        yield
        logging.setLogRecordFactory(logging.LogRecord)

    @many
    @given(text=TEXT)
    def test_any_text_is_logged_as_json_that_gives_it_back(self, tmp_path: Path, text: str) -> None:
        for name in ("metrics.jsonl", "samples.jsonl", "settings.json"):
            (tmp_path / name).unlink(missing_ok=True)
        log = RunLog(tmp_path)
        log.begin("a", {}, ())
        row = {"question": text, "answer": text, "completion": text, "reward": 0.5, "rewards": {}}
        log.samples(1, [row])
        log.metrics("grpo", 1, {"loss": math.nan, "kl": math.inf, "reward": 0.5})
        log.close()
        [line] = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line) == {"step": 1, **row}
        assert not CONTROLS.search((tmp_path / "train.log").read_text(encoding="utf-8"))
        [line] = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line) == {"phase": "grpo", "step": 1, "reward": 0.5}

    @many
    @given(TEXT)
    def test_what_is_printed_has_no_control_and_keeps_the_rest(self, text: str) -> None:
        assert not CONTROLS.search(printable(text))
        if text.isprintable():
            assert printable(text) == text


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, path = tiny_model(), tmp_path_factory.mktemp("checkpoints") / "step_000001"
    write = partial(save_model, model, word_tokenizer())
    save_checkpoint(path, write, Learner(model, 1.0, 1).optimizer.state_tensors(), state())
    assert damage(path) is None
    return path


class TestCheckpoints:
    @many
    @given(data=st.data())
    def test_any_damage_to_any_file_is_found_and_named(self, whole: Path, tmp_path: Path, data: st.DataObject) -> None:
        path = tmp_path / "checkpoint"
        shutil.copytree(whole, path, dirs_exist_ok=True)
        file = path / data.draw(st.sampled_from(sorted(f.name for f in whole.iterdir())))
        content = file.read_bytes()
        at = data.draw(st.integers(0, len(content) - 1))
        bit = bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))])
        new = data.draw(
            st.sampled_from([content[:at], content[:at] + bit + content[at + 1 :], b"", content + b"\0", None])
        )
        file.unlink() if new is None else file.write_bytes(new)
        reason = damage(path)
        if file.name != "manifest.json":  # whose own white space may change without harm
            assert reason and file.name in reason
        if reason:
            assert "\n" not in reason and newest_checkpoint(tmp_path) is None
            with pytest.raises(UserError, match="no whole checkpoint"):
                load_state(path)

    @many
    @given(st.data())
    def test_any_json_in_place_of_what_describes_it_is_found(
        self, whole: Path, tmp_path: Path, data: st.DataObject
    ) -> None:
        path = tmp_path / "checkpoint"
        shutil.copytree(whole, path, dirs_exist_ok=True)
        leaf = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9))
        value = st.recursive(
            leaf, lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(st.text(max_size=9), v, max_size=3))
        )
        (path / data.draw(st.sampled_from(["manifest.json", "trainer.json"]))).write_text(json.dumps(data.draw(value)))
        assert damage(path) and list(find_checkpoints(tmp_path)) == [path] and newest_checkpoint(tmp_path) is None


def _row(text: str) -> None:
    with suppress(ValueError):
        parse_row("q", f"{text}#### 1")


UNITS = [piece for piece in PIECES if piece.isprintable()] + [
    " ",
    ". ",
    "Mr. ",
    "3+4=7 ",
    "x" * 64,
    "</answer><answer>7",
]
WORK = {
    "rewards": lambda text: [
        f(f"<reasoning>{text}</reasoning> <output>{text}</output> <answer>7</answer>", "7") for f in REWARD_FUNCTIONS
    ],
    "an answer": lambda text: [f(f"<answer>{text}</answer>", text) for f in REWARD_FUNCTIONS],
    "a row": _row,
    "printable": printable,
}


@pytest.mark.parametrize("what", WORK)
def test_a_long_text_takes_linear_time(what: str) -> None:
    for unit in UNITS if "INPUTS" in os.environ else random.Random(0).sample(UNITS, 8):
        with no_hang():
            WORK[what](unit * (LONG // len(unit)))


def test_prompts_of_any_length_are_encoded_in_linear_time() -> None:
    tokenizer = word_tokenizer()
    for unit in ("7 ", "<answer>", "x", "\u0301"):
        with no_hang():
            encode_prompts(tokenizer, [unit * (LONG // len(unit))])


def test_sampled_tokens_that_make_no_text_are_decoded_all_the_same() -> None:
    _, tokenizer = make_tiny(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        ids = torch.randint(len(tokenizer), (50,), generator=generator).tolist()
        [rewards] = score([tokenizer.decode(ids)], ["7"])
        assert all(0 <= r <= 1 for r in rewards)
