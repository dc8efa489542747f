"""Files of somebody else: no code of theirs is run, each odd one is one clear line."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from src.data import encode_prompts
from src.engine.models import end_token_ids, load_model, save_model
from src.errors import UserError
from src.hub import local_path
from src.rows import read_rows
from src.run.checkpoint import damage, find_checkpoints
from tests.helpers import change, load_script, state, tiny_model, word_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    tokenizer = word_tokenizer()
    folder = tmp_path_factory.mktemp("saved")
    save_model(tiny_model(vocab_size=len(tokenizer)), tokenizer, folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


class TestHub:
    @pytest.mark.parametrize("name", ["./mine", "../mine", "/mine", "~/mine", "a/b/c", "mine/", "here/mine", "here"])
    def test_what_looks_like_a_path_is_not_asked_of_the_hub(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here").mkdir()
        monkeypatch.setattr("src.engine.models.hub_problem", lambda: pytest.fail("asked"))
        monkeypatch.setattr("src.rows.hub_problem", lambda: pytest.fail("asked"))
        with pytest.raises(UserError, match="Cannot load the folder"):
            load_model(name, CPU)
        with pytest.raises(UserError):
            read_rows(name, "train", 0, ["question"])
        assert local_path("openai/gsm8k") is None and local_path("gpt2") is None


def checksum(path: Path) -> list[int | str]:
    return [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]


STATES = [
    "",
    "{",
    "null",
    "[]",
    "5",
    "{}",
    '{"settings": null}',
    '{"settings": []}',
    '{"settings": {"seed": ' + "1" * 5000 + "}}",
]
SETTINGS: list[dict[str, Any]] = [
    {"seed": 1.5},
    {"seed": None},
    {"seed": 2**64},
    {"seed": [1]},
    {"max_completion_tokens": 0},
    {"max_completion_tokens": "many"},
    {"max_completion_tokens": 1e99},
    {"max_completion_tokens": True},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": "hot"},
    {"temperature": {}},
    {"dataset": None},
    {"dataset": 5},
    {"dataset": ["synthetic"]},
    {"question_column": []},
    {"question_column": [["question"]]},
    {"question_column": {"a": 1}},
    {"answer_column": 3},
    {"answer_pattern": None},
    {"system_prompt": 7},
    {"system_prompt": ["Solve it."]},
    {"rewards": 5},
    {"rewards": ["a.py:f"]},
    {"reward_weights": [1]},
    {"reward_weights": "abcd"},
    {"reward_weights": [1, 1, 1, float("nan")]},
    {"loss_type": "other"},
    {"keep_best": "perhaps"},
]


class TestCheckpoints:
    @pytest.mark.parametrize(
        "text", [*STATES, *(json.dumps(asdict(state(settings=each))) for each in SETTINGS)], ids=lambda t: t[-80:]
    )
    def test_odd_settings_of_a_checkpoint_are_one_line(
        self, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "trainer.safetensors").write_bytes(b"")
        (tmp_path / "trainer.json").write_text(text, encoding="utf-8")
        sums = {name: checksum(tmp_path / name) for name in ("trainer.safetensors", "trainer.json")}
        (tmp_path / "manifest.json").write_text(json.dumps(sums), encoding="utf-8")
        assert load_script("test").main(["--checkpoint", str(tmp_path), "--ask", "1 + 1?", "--device", "cpu"]) == 1
        lines = capsys.readouterr().err.splitlines()
        said = "is no whole checkpoint (" if text in STATES else "Cannot use the checkpoint"
        assert len(lines) == 2 and said in lines[1] and f"'{tmp_path}'" in lines[1]
        assert lines[1].startswith("test.py: ") and lines[1].isprintable()

    @pytest.mark.parametrize(
        "manifest",
        [
            {"missing": [0, ""]},
            {"folder": [0, ""]},
            {"../trainer.json/x": [0, ""]},
            {"trainer.json": [0, ""], "\0": [1, ""]},
            {"": [0, ""]},
            {"x" * 5000: [0, ""]},
            {"\ud800": [0, ""]},
            [["trainer.json", [1, ""]]],
            "text",
            7,
            None,
        ],
        ids=lambda m: str(m)[:20],
    )
    def test_an_odd_manifest_is_refused(self, tmp_path: Path, manifest: object) -> None:
        place = tmp_path / "step_000001"
        place.mkdir()
        (place / "folder").mkdir()
        (place / "trainer.json").write_text('{"saved_at": 1.0}')
        (place / "trainer.safetensors").write_bytes(b"")
        if isinstance(manifest, dict):  # after what is checked first
            known = ("trainer.safetensors", "trainer.json")
            manifest = {name: checksum(place / name) for name in known} | manifest
        (place / "manifest.json").write_text(json.dumps(manifest))
        assert damage(place) and list(find_checkpoints(tmp_path)) == [place]


class TestModels:
    @pytest.mark.parametrize(
        "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
    )
    @pytest.mark.parametrize(
        "text",
        ["", "null", "[]", "5", '"text"', "{", "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\0", '{"\x1b[2J": 1}'],
    )
    def test_odd_json_in_a_model_folder_is_one_line_or_harmless(self, model: Path, name: str, text: str) -> None:
        (model / name).write_text(text, encoding="utf-8")
        try:
            loaded, tokenizer = load_model(str(model), CPU)
            assert end_token_ids(loaded, tokenizer) == [tokenizer.eos_token_id]
        except UserError as error:
            assert str(error).isprintable()

    @pytest.mark.parametrize(
        "eos",
        ["text", [["x"]], [1.5], {}, {"a": 1}, -1, 10**30, 10**6, True, [None], [[2]], "", [], [2, "2"], 2.0, None],
    )
    def test_end_tokens_that_are_none_are_passed_over(self, model: Path, eos: object) -> None:
        change(model / "generation_config.json", eos_token_id=eos)
        try:
            loaded, tokenizer = load_model(str(model), CPU)
            assert end_token_ids(loaded, tokenizer) == [2]
        except UserError as error:
            assert str(error).isprintable()

    @pytest.mark.parametrize(
        "entries",
        [
            {"num_hidden_layers": "many"},
            {"num_hidden_layers": None},
            {"num_hidden_layers": 1e9},
            {"hidden_size": 0},
            {"hidden_size": 10**15},
            {"vocab_size": 10**18},
            {"vocab_size": []},
            {"num_attention_heads": 0},
            {"num_attention_heads": 7},
            {"model_type": "\x1b[31m"},
            {"model_type": None},
            {"model_type": ["llama"]},
            {"architectures": 5},
            {"dtype": "float7"},
            {"dtype": 3},
            {"rope_parameters": "x"},
            {"hidden_act": "none"},
            {"quantization_config": {"quant_method": "x"}},
            {"quantization_config": 4},
            {"torch_dtype": "os.system"},
        ],
        ids=str,
    )
    def test_an_odd_config_is_one_line_or_harmless(self, model: Path, entries: dict) -> None:
        change(model / "config.json", **entries)
        try:
            load_model(str(model), CPU)
            assert not {"num_hidden_layers", "hidden_size", "vocab_size", "model_type"} & entries.keys()
        except UserError as error:
            assert str(error).isprintable()

    @pytest.mark.parametrize(
        "template",
        [
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ 'x' * 10 ** 13 }}",
            "{% for i in range(10 ** 9) %}{% endfor %}",
            "{{ raise_exception('\x1b[2J') }}",
            "{{ messages[99].content }}",
            "{% for",
            "{{ ''.__class__.__mro__ }}",
            "{{ cycler.__init__.__globals__ }}",
            "{% include '/etc/passwd' %}",
            "{% set messages = [] %}",
            "{{ 1 / 0 }}",
            "{{ messages | nothing }}",
            "{{ messages.append(1) }}",
            "{" * 100_000,
            "(" * 100_000,
            "{{ " + "(" * 50_000 + " }}",
            "{{ " + "1+" * 50_000 + "1 }}",
            "",
            "text",
            "\0",
            5,
            ["a"],
            {"default": 5},
            {"a": "b"},
            [{"name": "default"}],
        ],
        ids=lambda t: str(t)[:30],
    )
    def test_an_odd_chat_template_is_one_line(self, model: Path, template: object) -> None:
        (model / "chat_template.jinja").unlink(missing_ok=True)
        change(model / "tokenizer_config.json", chat_template=template)
        with pytest.raises(UserError) as caught:
            _, tokenizer = load_model(str(model), CPU)
            encode_prompts(tokenizer, ["1 + 1?"])
        assert str(caught.value).isprintable()
