"""The rewards a run uses: the built-in four, or those that `--rewards FILE.py:NAME=WEIGHT,...` names.

A function of the user's takes one completion, or a batch of them as TRL's do; its parameters tell which, and its first
call whether it reads them as text or as messages. It is given copies of the data. Whatever goes wrong in it becomes one
line that names it and the sample.
"""

import hashlib
import inspect
import logging
import reprlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

from src.data import Example, format_target
from src.errors import UserError, one_line
from src.rewards import DEFAULT_WEIGHTS, REWARD_FUNCTIONS

log = logging.getLogger(__name__)

Tokens = Sequence[Sequence[int]]  # of each completion

LARGEST_SCORE = 1e9  # anything larger is a mistake, and drowns the other rewards in fp32
SINGLE_PARAMETERS = {"completion", "answer", "question", "example"}
BATCH_PARAMETERS = {"prompts", "completions", "completion_ids"}
BUILT_IN = {function.__name__: function for function in REWARD_FUNCTIONS}
ALIASES = {"accuracy": "answer_accuracy"}


class RewardError(UserError):
    """A reward function failed, or returned what is no reward."""


class Reward:
    """One reward: its name in the metrics, its weight in the sum, and the function.

    The function takes any of `SINGLE_PARAMETERS`, by name, and returns a number; or it is TRL's, takes any of
    `BATCH_PARAMETERS` and of the data's columns, or `**kwargs` alone, and returns a list, where None counts as 0.
    """

    def __init__(self, name: str, weight: float, function: Callable[..., Any]):
        self.name, self.weight, self.function = name, weight, function
        self.signature = inspect.signature(function)
        parameters = self.signature.parameters.values()
        self.asks = {"**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters}
        self.of_batch = bool(self.asks & BATCH_PARAMETERS) or ("**" in self.asks and not self.asks & SINGLE_PARAMETERS)
        self.messages: bool | None = None  # what a function of a batch is given, no text; None before its first

    def values(self, completions: Sequence[str], examples: Sequence[Example], ids: Tokens) -> list[float]:
        """The score of each completion.

        Raises:
            RewardError: the function raised, or returned anything but one finite number for each.
        """
        samples = list(zip(completions, examples, strict=True))
        places = [f"for the completion {t[:80]!r} of the problem {e.question[:80]!r}" for t, e in samples]
        given = ({"completion": t, "answer": e.answer, "question": e.question, "example": e} for t, e in samples)
        returned = self._of_batch(completions, examples, ids) if self.of_batch else map(self._call, given, places)
        return list(map(self._number, returned, places))

    def _of_batch(self, completions: Sequence[str], *given: Any) -> list[Any]:
        """Call with plain text, or with messages, as TRL's functions want for chats, if text fails at first."""
        failures = []
        place = f"for {len(completions)} completions"
        for messages in (False, True) if self.messages is None else (self.messages,):
            try:
                returned = self._call(batch_columns(completions, *given, messages), place)
            except RewardError as error:
                failures.append(error)
                continue
            if len(returned) != len(completions):
                raise RewardError(f"The reward '{self.name}' returned {len(returned)} numbers {place}.")
            if completions and self.messages is None:
                self.messages = messages
                log.info("the reward '%s' is given %s", self.name, "messages: text fails" if messages else "plain text")
            return [0.0 if value is None else value for value in returned]
        raise failures[0]

    def _call(self, given: Mapping[str, Any], place: str) -> Any:
        """What the function returns for copies of what it asks for, of each entry of a batch its own."""
        asked = {name: value for name, value in given.items() if self.asks & {name, "**"}}
        try:
            self.signature.bind(**asked)
        except TypeError as error:
            names = f"{', '.join(given)}; TRL's log_metric and verl's parameters are not supported"
            raise RewardError(f"The reward '{self.name}' cannot be called ({error}): it may take {names}.") from error
        try:
            if self.of_batch:
                return list(self.function(**{name: list(map(deepcopy, column)) for name, column in asked.items()}))
            return self.function(**deepcopy(asked))
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            log.debug("the reward '%s' raised", self.name, exc_info=error)
            raise RewardError(f"The reward '{self.name}' raised {_describe(error)} {place}.") from error

    def _number(self, value: object, place: str) -> float:
        number = None if isinstance(value, str | bytes) else _finite(value)
        if number is None:
            raise RewardError(f"The reward '{self.name}' returned {reprlib.repr(value)}, no finite number, {place}.")
        return number


class RewardSet:
    """R rewards in the order of their columns. fingerprint: of the user's file, None where there is none.

    columns: what the functions may ask of the data's columns; None: of any, since one takes `example` or `**`.
    """

    def __init__(self, rewards: Sequence[Reward], fingerprint: str | None = None):
        self.rewards, self.fingerprint = rewards, fingerprint
        self.names = [reward.name for reward in rewards]
        self.weights = [reward.weight for reward in rewards]
        asked = set().union(*(reward.asks for reward in rewards))
        self.columns = None if asked & {"example", "**"} else asked

    def score(self, completions: Sequence[str], examples: Sequence[Example], ids: Tokens = ()) -> list[list[float]]:
        """The scores (B, R): what every function gives every completion, unweighted.

        examples: the problem of each completion; ids: its tokens, for TRL-style functions.

        Raises:
            RewardError: a function failed, or returned anything but one finite number for each.
        """
        columns = [reward.values(completions, examples, ids) for reward in self.rewards]
        return [list(row) for row in zip(*columns, strict=True)]

    def try_out(self, examples: Sequence[Example]) -> None:
        """Score the targets of two problems: what is wrong with a function shows before anything is computed."""
        self.score(list(map(format_target, examples[:2])), examples[:2], [[0], [0]][: len(examples)])


def built_in(weights: Sequence[float] = DEFAULT_WEIGHTS) -> RewardSet:
    """The four rewards of `src.rewards`."""
    return RewardSet([Reward(f.__name__, w, f) for f, w in zip(REWARD_FUNCTIONS, weights, strict=True)])


def choose_rewards(spec: str | None, weights: Sequence[float] = DEFAULT_WEIGHTS) -> RewardSet:
    """The rewards of `[FILE.py:]NAME[=WEIGHT],...`, where a weight is 1 unless given; without it, the built-in four.

    The file is run, and a name looked up in it before it is among the built-in ones.

    Raises:
        UserError: the file cannot be read or run, or a name or a weight does not fit.
    """
    if spec is None:
        return built_in(weights)
    path, _, items = spec.rpartition(":")
    found, fingerprint = _run_file(path) if path else ({}, None)
    rewards: dict[str, Reward] = {}
    for item in items.split(","):
        name, _, text = (part.strip() for part in item.partition("="))
        function = found.get(name) or BUILT_IN.get(name := ALIASES.get(name, name))
        weight = _finite(text or 1)
        try:
            reward = Reward(name, weight, function)
        except (TypeError, ValueError):
            where = f"no function in '{path}' and none of {', '.join(BUILT_IN)}" if path else "not built in"
            raise UserError(f"--rewards names '{name}', which is {where}: write FILE.py:NAME=WEIGHT,...") from None
        if any(map(inspect.iscoroutinefunction, (function, function.__call__))):
            raise UserError(f"--rewards names '{name}', which is asynchronous: make it a plain function.")
        if name in rewards:
            raise UserError(f"--rewards names '{name}' twice: name each reward once.")
        if weight is None:
            raise UserError(f"--rewards gives '{name}' the weight '{text}': give a finite number.")
        rewards[name] = reward
    return RewardSet(list(rewards.values()), fingerprint)


def _run_file(path: str) -> tuple[dict[str, Any], str]:
    """The names that a file defines, and its fingerprint. Not imported, so that what runs is what was fingerprinted."""
    module = sys.modules["user_rewards"] = ModuleType("user_rewards")  # where dataclasses and pickle will look
    module.__file__ = path
    try:
        source = Path(path).expanduser().read_bytes()
        sys.path.append(str(Path(path).expanduser().resolve().parent))  # for what it imports from beside it
        exec(compile(source, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UserError(f"The rewards file '{path}' cannot be run: {_describe(error)}.") from error
    return vars(module), hashlib.sha256(source).hexdigest()[:16]


def batch_columns(
    completions: Sequence[str], examples: Sequence[Example], ids: Tokens, messages: bool
) -> dict[str, list[Any]]:
    """What a TRL-style function is given, by name: lists with an entry for each completion."""
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    columns |= {"question": [e.question for e in examples], "answer": [e.answer for e in examples]}
    texts = {"prompts": ("user", columns["question"]), "completions": ("assistant", completions)}
    for name, (role, contents) in texts.items():
        columns[name] = [[{"role": role, "content": content}] if messages else content for content in contents]
    return columns | {"completion_ids": ids}


def _finite(value: Any) -> float | None:
    """The number that a value stands for, None where it is none, or none that can be meant."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's, for several numbers
        return None
    return number if abs(number) <= LARGEST_SCORE else None


def _describe(error: BaseException) -> str:
    """The error, and the line outside this file that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    line = f", {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__} ({one_line(error)[:200]}{line})"
