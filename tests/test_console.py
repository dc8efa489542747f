"""The prompt: streaming, JSON lines from a pipe, and a conversation at a real pseudo-terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from src.console import Answerer, read_temperature
from src.data import encode_prompts
from src.engine.kv_cache import unpad
from src.engine.sampling import Sampler, decode
from src.errors import UserError
from src.seeding import generator
from tests.helpers import tiny_model, word_tokenizer

ROOT = Path(__file__).parent.parent
SCRIPT = [sys.executable, str(ROOT / "test.py"), "--model", "tiny", "--dataset", "synthetic", "--device", "cpu"]
READY = "\x1b[?2004h> "  # a line is asked for, and what is pasted should come in brackets


def make_answerer(seed: int = 0, tokens: int = 20) -> Answerer:
    tokenizer = word_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    return Answerer(Sampler(model, [tokenizer.eos_token_id], tokenizer.pad_token_id), tokenizer, tokens, seed=seed)


class TestAnswerer:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_the_pieces_streamed_make_the_answer_that_the_sampler_gives(self, temperature):
        pieces: list[str] = []
        answerer = make_answerer(seed=3)
        answer = answerer.answer("Tom has 3 apples", temperature, pieces.append)
        expected = make_answerer().sampler.generate(
            encode_prompts(answerer.tokenizer, ["Tom has 3 apples"]),
            max_new_tokens=20,
            temperature=temperature,
            uniforms=torch.rand(1, 20, generator=generator(3, "prompt", 1)),
        )
        [text] = decode(answerer.tokenizer, unpad(expected.ids, expected.mask))
        assert "".join(pieces) == answer.completion == text != ""
        assert len(pieces) == answer.tokens == int(expected.mask.sum())
        assert answer.truncated == bool(expected.truncated)

    def test_asking_again_samples_anew_and_the_seed_repeats_the_conversation(self):
        first, second = (
            [a.answer("Tom", 1.0).completion for _ in range(2)] for a in (make_answerer(), make_answerer())
        )
        assert first == second and first[0] != first[1]

    def test_a_character_whose_bytes_come_one_by_one_is_shown_whole(self):
        from src.tiny import build_tiny_tokenizer

        tokenizer = build_tiny_tokenizer()
        tokens = tokenizer("4 € é", add_special_tokens=False)["input_ids"]
        assert len(tokens) > 5

        class Recorded:
            """Plays tokens back, one a look."""

            model = tiny_model(vocab_size=len(tokenizer))
            end_ids = torch.tensor([tokenizer.eos_token_id])

            def generate(self, prompts, on_progress, max_new_tokens, **_):
                ids = torch.full((1, max_new_tokens), -1)
                for i, token in enumerate(tokens):
                    ids[0, i] = token
                    on_progress(int(i == len(tokens) - 1), ids)

        pieces: list[str] = []
        answer = Answerer(Recorded(), tokenizer, 20, "short").answer("q", on_text=pieces.append)
        assert "".join(pieces) == answer.completion == "4 € é"
        assert "€" in pieces and answer.truncated

    def test_what_cannot_be_answered_is_said_in_one_line(self):
        answerer = make_answerer()
        with pytest.raises(UserError, match=r"^The question is empty\.$"):
            answerer.answer(" \n")
        with pytest.raises(UserError, match=r"^A question takes \d+ tokens and .* is 20, but the model takes 256 "):
            answerer.answer("Tom " * 300)

    def test_bytes_that_are_no_text_are_answered_as_question_marks(self):
        assert make_answerer().answer("Tom \udce9 3").question == "Tom ? 3"


@pytest.mark.parametrize("value", [-1.0, 1e-9, float("nan"), float("inf")])
def test_a_temperature_that_cannot_be_sampled_at_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="--temperature is"):
        read_temperature(value, "--temperature")


def test_one_question_a_line_in_is_one_json_object_a_line_out(tmp_path: Path) -> None:
    lines = [b"Tom has 3 apples.", b"", b":quit", b"\xe9\x9b2J", "½ of 8?".encode(), b"Tom " * 600]
    done = subprocess.run(
        [*SCRIPT, "--json", "--max_completion_tokens", "8"],
        cwd=tmp_path,
        input=b"\n".join(lines),
        capture_output=True,
        timeout=120,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.isascii()
    rows = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [row["question"] for row in rows[:3]] == ["Tom has 3 apples.", "", ":quit"]
    assert len(rows) == len(lines) and rows[4]["question"] == "½ of 8?"
    assert [sorted(row) for row in rows if "error" in row] == [["error", "question"]] * 2
    assert "but the model takes 512 tokens in all" in rows[5]["error"]
    assert sorted(rows[0]) == ["answer", "completion", "question", "tokens", "truncated"]
    assert rows[0]["tokens"] == 8 and rows[0]["truncated"] is True


class Terminal:
    """A process at a pseudo-terminal: what a person would see, and the keys that a person would press."""

    def __init__(self, command: list[str], cwd: Path, variables: dict[str, str]):
        self.pid, self.master = pty.fork()
        if not self.pid:
            os.chdir(cwd)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets what it runs in the background ignore it
            os.execve(command[0], command, {**os.environ, **variables})
        self.seen = ""

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def expect(self, words: str, seconds: float = 90) -> str:
        """Read until the words are there; what was read up to them."""
        deadline = time.monotonic() + seconds
        while words not in self.seen:
            self.read(deadline - time.monotonic())
        before, _, self.seen = self.seen.partition(words)
        return before

    def read(self, seconds: float = 90) -> None:
        """Wait for more to be seen."""
        assert select.select([self.master], [], [], max(0, seconds))[0], f"nothing came after {self.seen!r}"
        try:
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        except OSError:  # the other end is closed
            raise AssertionError(f"ended after {self.seen!r}") from None

    def rest(self, seconds: float) -> None:
        """See what comes in this time, if anything does."""
        while select.select([self.master], [], [], seconds)[0]:
            self.read()

    def status(self) -> int:
        """The exit status, once the process has ended."""
        while True:
            try:
                if not os.read(self.master, 4096):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    pytest.importorskip("readline")
    flags = ["--num_samples", "1", "--max_completion_tokens", "400"]
    session = Terminal([*SCRIPT, *flags], tmp_path, {"TERM": "xterm"})
    session.expect("Type a problem and press Enter; :help")
    session.expect(READY)
    yield session
    os.close(session.master)


def start_an_answer(terminal: Terminal) -> None:
    terminal.press("Tom has 3 apples.\r")
    terminal.expect("\x1b[?2004l\r")  # the line is taken
    while not terminal.seen:
        terminal.read()


def test_a_conversation_at_a_terminal(terminal: Terminal) -> None:
    def ask(keys: str, words: str) -> str:
        terminal.press(keys)
        shown = terminal.expect(words)
        terminal.expect(READY)
        return shown

    ask(":help\r", ":temperature 0.7  sample")
    ask("\r", "\n")
    ask(":nonsense\r", "There is no command :nonsense")
    ask(":temperature warm\r", ":temperature is warm: give 0")
    ask("Tom " * 600 + "\r", "but the model takes 512 tokens in all")

    start_an_answer(terminal)
    terminal.press("\x03")  # Ctrl-C stops the answer
    terminal.expect("(stopped)")
    terminal.expect(READY)
    terminal.press("half a line")
    terminal.expect("half a line")
    for _ in range(30):  # and throws a line away
        terminal.press("\x03")
        terminal.rest(1)  # Python loses the key if it comes just before the line editor waits for one
        if "(:quit or Ctrl-D ends)" in terminal.seen:
            break
    terminal.expect("(:quit or Ctrl-D ends)")
    terminal.expect(READY)

    ask(":temperature 0.7\r", "temperature 0.7")
    ask(":sample\r", "truth:  ")
    ask("\x1b[A\r", "truth:  ")  # the last line, from the history
    ask("\x1b[200~Tom has 3.\nHow many\x1b[201~ now?\r", "\nanswer: ")  # pasted: one problem of two lines
    terminal.press("\x04")  # Ctrl-D
    assert terminal.status() == 0


def test_a_request_to_terminate_ends_the_program_and_not_just_the_answer(terminal: Terminal) -> None:
    start_an_answer(terminal)
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.status() == 128 + signal.SIGTERM
