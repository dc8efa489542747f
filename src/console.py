"""Answering what people type and what programs pipe in."""

import contextlib
import json
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.data import SYSTEM_PROMPT, Example, encode_prompts
from src.engine.models import check_room
from src.engine.sampling import Sampler, decode
from src.errors import UserError, say, warn
from src.rewards import answer_accuracy, parse_completion
from src.run.stopping import Stopped, stop_request
from src.seeding import generator

HELP = """\
Type a problem and press Enter. Or:
  :sample           a random test problem, and its true answer
  :temperature 0.7  sample from here on; 0: the most likely answer
  :help             this
  :quit             leave, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass(frozen=True)
class Answer:
    """One answer of the model; `answer` is its answer field, None where there is not exactly one."""

    question: str
    completion: str
    answer: str | None
    tokens: int
    truncated: bool


def read_temperature(value: float | str, name: str) -> float:
    """A temperature that can be sampled at, far below 0.01 the logits overflow. Raises UserError for any other."""
    with contextlib.suppress(ValueError):
        if (temperature := float(value)) == 0 or 0.01 <= temperature < math.inf:
            return temperature
    raise UserError(f"{name} is {value}: give 0 for the most likely answer, or 0.01 or more.")


@dataclass
class Answerer:
    """A model to ask one question at a time; sampled answers depend on the seed and their number."""

    sampler: Sampler
    tokenizer: PreTrainedTokenizerBase
    max_completion_tokens: int
    system_prompt: str = SYSTEM_PROMPT
    seed: int = 0
    asked: int = 0

    def answer(self, question: str, temperature: float = 0.0, on_text: Callable[[str], None] | None = None) -> Answer:
        """Answer a question. on_text: called with each piece of the completion, as it comes.

        Raises:
            UserError: there is no question, or it is too long for the model.
        """
        question = question.encode(errors="replace").decode()  # bytes that were no UTF-8 reach us as lone surrogates
        if not question.strip():
            raise UserError("The question is empty.")
        [prompt] = encode_prompts(self.tokenizer, [question], self.system_prompt)
        room = self.max_completion_tokens
        check_room(self.sampler.model, [prompt], room)
        self.asked += 1
        drawn = torch.rand(1, room, generator=generator(self.seed, "prompt", self.asked))
        tokens: list[int] = []
        text = ""

        def look(done: int, ids: Tensor) -> None:
            nonlocal tokens, text
            tokens = [token for token in ids[0].tolist() if token >= 0]
            [whole] = decode(self.tokenizer, [tokens])
            if not done:
                whole = whole.rstrip("\ufffd")  # a character whose bytes are not all there yet
            if on_text:
                on_text(whole.removeprefix(text))
            text = whole

        self.sampler.generate([prompt], max_new_tokens=room, temperature=temperature, uniforms=drawn, on_progress=look)
        field = parse_completion(text).answer
        return Answer(question, text, field and field.strip(), len(tokens), tokens[-1] not in self.sampler.end_ids)


class Prompt:
    """A prompt at a terminal, or the same commands from a pipe."""

    def __init__(self, answerer: Answerer, draw: Callable[[], Example], temperature: float = 0.0):
        self.answerer, self.draw, self.temperature = answerer, draw, temperature
        self.at_terminal = sys.stdin.isatty()

    def run(self) -> None:
        """Answer one problem a line until `:quit` or end of input."""
        if self.at_terminal:
            with contextlib.suppress(ImportError):
                import readline  # line editing and history for input()

                readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one problem
            say("Type a problem and press Enter; :help lists what else there is, :quit ends.")
        while True:
            try:
                line = input("> " if self.at_terminal else "").strip()
                if line in (":quit", ":q", "quit", "exit"):
                    return
                self._do(line)
            except EOFError:
                say()
                return
            except UserError as error:
                warn(error)
            except KeyboardInterrupt:
                if not self.at_terminal:
                    raise
                say("\n(:quit or Ctrl-D ends)")

    def _do(self, line: str) -> None:
        command, _, value = line.partition(" ")
        if command == ":help":
            say(HELP)
        elif command == ":sample":
            self._ask(self.draw())
        elif command == ":temperature":
            self.temperature = read_temperature(value or self.temperature, command)
            say(f"temperature {self.temperature:g}")
        elif line.startswith(":"):
            raise UserError(f"There is no command {command}: :help lists those there are.")
        elif line:
            self._ask(Example(line, "", "", ""))

    def _ask(self, problem: Example) -> None:
        """Answer a typed question, or a sample, which has an answer to show."""
        answer = None
        if problem.answer:
            say(f"{problem.question}\n")
        with contextlib.suppress(Stopped), stop_request() as stop:  # the sampler is left between two steps, not in one

            def on_text(text: str) -> None:
                say(text, end="")
                stop.raise_if_asked()

            answer = self.answerer.answer(problem.question, self.temperature, on_text)
        if stop.signum and not (self.at_terminal and stop.signum == signal.SIGINT):
            raise SystemExit(128 + stop.signum)
        if answer is None:
            say("\n(stopped)\n")
            return
        said = "none, there is no one answer field" if answer.answer is None else " ".join(answer.answer.split())
        say(f"\nanswer: {said}{' (cut off)' * answer.truncated}")
        if problem.answer:
            right = answer_accuracy(answer.completion, problem.answer) == 1
            say(f"truth:  {problem.answer} ({'right' if right else 'wrong'})")
        say()


def answer_lines(answerer: Answerer, temperature: float = 0.0) -> None:
    """One question a line in, one JSON object a line out; a question that cannot be answered gives an `error`."""
    for line in sys.stdin:
        question = line.strip()
        try:
            row = asdict(answerer.answer(question, temperature))
        except UserError as error:
            row = {"question": question, "error": str(error)}
        print(json.dumps(row), flush=True)  # in ASCII: no control character, whatever the terminal
