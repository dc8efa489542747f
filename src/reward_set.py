"""The rewards a run uses: the built-in four, or those that `--rewards FILE.py:NAME=WEIGHT,...` names.

A function of the user's takes one completion, or a batch of them as TRL's do; its parameters tell which. Whatever goes
wrong in it becomes one line that names it and the sample.
"""

import hashlib
import inspect
import logging
import math
import reprlib
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor

from src.data import Example, format_target
from src.errors import UserError, printable
from src.rewards import DEFAULT_WEIGHTS, REWARD_FUNCTIONS

log = logging.getLogger(__name__)

SLOW = 1.0  # seconds for one batch; beyond that the log names the function
LARGEST = 1e9  # anything larger is a mistake, and drowns the other rewards in fp32
BATCH_PARAMETERS = {"prompts", "completions", "completion_ids"}
BUILT_IN = {function.__name__: function for function in REWARD_FUNCTIONS}
ALIASES = {"accuracy": "answer_accuracy"}


class RewardError(UserError):
    """A reward function failed, or returned what is no reward."""


@dataclass(frozen=True)
class Reward:
    """One reward: its name in the metrics, its weight in the sum, and the function.

    The function takes any of `completion`, `answer`, `question` and `example`, by name, and returns a number; or it is
    TRL's, takes any of `BATCH_PARAMETERS` and of the data's columns, and returns a list, where None counts as 0.
    """

    name: str
    weight: float
    function: Callable[..., Any]

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    def values(
        self, completions: Sequence[str], examples: Sequence[Example], completion_ids: Sequence[Sequence[int]]
    ) -> list[float]:
        """The reward of each completion.

        Raises:
            RewardError: the function raised, or returned anything but one finite number for each.
        """
        samples = list(zip(completions, examples, strict=True))
        if self.parameters.keys() & BATCH_PARAMETERS:
            columns = batch_columns(completions, examples, completion_ids, reads_messages(self.function))
            place = f"for {len(samples)} completions"
            returned = [0.0 if value is None else value for value in self._call(columns, place, list)]
            if len(returned) != len(samples):
                raise RewardError(f"The reward '{self.name}' returned {len(returned)} numbers {place}.")
        else:
            names = ("completion", "answer", "question", "example")
            given = [dict(zip(names, (text, e.answer, e.question, e), strict=True)) for text, e in samples]
            returned = [self._call(one, _sample(*sample)) for one, sample in zip(given, samples, strict=True)]
        return [self._number(value, _sample(*sample)) for value, sample in zip(returned, samples, strict=True)]

    def _call(self, given: Mapping[str, Any], place: str, convert: Callable[[Any], Any] | None = None) -> Any:
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in self.parameters.values()):
            given = {name: value for name, value in given.items() if name in self.parameters}
        try:
            returned = self.function(**given)
            return convert(returned) if convert else returned
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            log.debug("the reward '%s' raised", self.name, exc_info=error)
            raise RewardError(f"The reward '{self.name}' raised {_describe(error)} {place}.") from error

    def _number(self, value: object, place: str) -> float:
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's, for several numbers
            number = math.nan
        if not abs(number) <= LARGEST:
            shown = printable(" ".join(reprlib.repr(value).split()))
            raise RewardError(f"The reward '{self.name}' returned {shown}, no finite number, {place}.")
        return number


@dataclass(frozen=True)
class RewardSet:
    """R rewards in the order of their columns. fingerprint: of the user's file, None where there is none."""

    rewards: tuple[Reward, ...]
    fingerprint: str | None = None
    _slowest: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    @property
    def names(self) -> list[str]:
        return [reward.name for reward in self.rewards]

    @property
    def weights(self) -> list[float]:
        return [reward.weight for reward in self.rewards]

    @property
    def columns(self) -> set[str] | None:
        """What the functions may ask of the data's columns; None: of any, since one takes `example` or `**`."""
        taken = [parameter for reward in self.rewards for parameter in reward.parameters.values()]
        every = any(parameter.name == "example" or parameter.kind is parameter.VAR_KEYWORD for parameter in taken)
        return None if every else {parameter.name for parameter in taken}

    def score(
        self, completions: Sequence[str], examples: Sequence[Example], completion_ids: Sequence[Sequence[int]] = ()
    ) -> list[list[float]]:
        """Every reward of every completion, unweighted, (B, R).

        examples: the problem of each completion; completion_ids: its tokens, for TRL-style functions.

        Raises:
            RewardError: a function failed, or returned anything but one finite number for each.
        """
        columns = [self._timed(reward, completions, examples, completion_ids) for reward in self.rewards]
        return [list(row) for row in zip(*columns, strict=True)]

    def _timed(self, reward: Reward, completions: Sequence[str], *given: Any) -> list[float]:
        """A slow function is named in the log once, and again only when it takes twice as long as ever before."""
        start = time.perf_counter()
        values = reward.values(completions, *given)
        seconds = time.perf_counter() - start
        if seconds > max(SLOW, 2 * self._slowest.get(reward.name, 0.0)):
            self._slowest[reward.name] = seconds
            log.warning("the reward '%s' took %.1f s for %d completions", reward.name, seconds, len(completions))
        return values

    def try_out(self, examples: Sequence[Example]) -> None:
        """Score the targets of two problems: what is wrong with a function shows before anything is computed."""
        self.score(list(map(format_target, examples[:2])), examples[:2], [[0], [0]][: len(examples)])


def built_in(weights: Sequence[float] = DEFAULT_WEIGHTS) -> RewardSet:
    """The four rewards of `src.rewards`."""
    return RewardSet(tuple(Reward(f.__name__, w, f) for f, w in zip(REWARD_FUNCTIONS, weights, strict=True)))


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
        try:
            inspect.signature(function)
        except (TypeError, ValueError):
            where = f"no function in '{path}' and none of {', '.join(BUILT_IN)}" if path else "not built in"
            raise UserError(f"--rewards names '{name}', which is {where}: write FILE.py:NAME=WEIGHT,...") from None
        if name in rewards:
            raise UserError(f"--rewards names '{name}' twice: name each reward once.")
        try:
            weight = float(text or 1)
        except ValueError:
            weight = math.nan
        if not abs(weight) <= LARGEST:
            raise UserError(f"--rewards gives '{name}' the weight '{text}': give a finite number.")
        rewards[name] = Reward(name, weight, function)
    return RewardSet(tuple(rewards.values()), fingerprint)


def _run_file(path: str) -> tuple[dict[str, Any], str]:
    """The names that a file defines, and its fingerprint. Not imported, so that what runs is what was fingerprinted."""
    module = sys.modules["user_rewards"] = ModuleType("user_rewards")  # where dataclasses and pickle will look
    module.__file__ = path
    try:
        source = Path(path).expanduser().read_bytes()
        exec(compile(source, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UserError(f"The rewards file '{path}' cannot be run: {_describe(error)}.") from error
    return vars(module), hashlib.sha256(source).hexdigest()[:16]


def token_ids(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Completions (B, C) as lists of their tokens, the end token included."""
    return [row[kept].tolist() for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]


def batch_columns(
    completions: Sequence[str], examples: Sequence[Example], completion_ids: Sequence[Sequence[int]], messages: bool
) -> dict[str, list[Any]]:
    """What a TRL-style function is given, by name: lists with an entry for each completion."""
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    columns |= {"question": [e.question for e in examples], "answer": [e.answer for e in examples]}
    prompts, texts = columns["question"], list(completions)
    if messages:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    return columns | {"prompts": prompts, "completions": texts, "completion_ids": list(completion_ids)}


def reads_messages(function: Callable[..., Any]) -> bool:
    """Whether a function or a helper of its looks up "content", as TRL's do for chats: `completion[0]["content"]`."""
    function = inspect.unwrap(function)
    codes = [function.__code__] if isinstance(function, FunctionType) else []
    for code in codes:  # grows
        helpers = (function.__globals__.get(name) for name in code.co_names)
        parts = [c for c in code.co_consts if isinstance(c, CodeType)]
        parts += [helper.__code__ for helper in helpers if isinstance(helper, FunctionType)]
        codes += [part for part in parts if part not in codes]
    return any("content" in code.co_consts for code in codes)


def _sample(completion: str, example: Example) -> str:
    return f"for the completion {completion[:80]!r} of the problem {example.question[:80]!r}"


def _describe(error: BaseException) -> str:
    """The error, and the line outside this file that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    line = f", {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__} ({' '.join(printable(str(error)).split())[:200]}{line})"
