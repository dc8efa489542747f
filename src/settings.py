"""Flags: a field carries its default, help and bounds, and what changing it means; the settings of a run.

Those of the algorithm are in `src.grpo.GRPOConfig`, those of an evaluation in test.py.
"""

import argparse
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml

from src.data import SYSTEM_PROMPT, check_answer_pattern, read_system_prompt
from src.errors import UserError, one_line
from src.hub import MADE_HERE, local_name, local_path
from src.tiny import TINY_SYSTEM_PROMPT


def flag(default: Any, text: str, *, alters: bool = True, tells: bool | None = None, **more: Any) -> Any:
    """A dataclass field that is also a flag. text: its help.

    alters: changing it alters a run that is resumed. tells: it tells two runs apart; as `alters` when left out. What
    does neither is of the machine only: where files go, what is kept and shown.
    more: least, above, below: bounds of a number, which is finite then. path: makes what is typed a path. const: what
    the flag says without a value.
    """
    metadata = {"help": text, "alters": alters, "tells": alters if tells is None else tells, **more}
    return field(default_factory=lambda: copy(default), metadata=metadata)


def machine(default: Any, text: str, **options: Any) -> Any:
    """A flag of the machine only."""
    return flag(default, text, alters=False, **options)


def place(default: Any, text: str, path: Callable[[str], str] = local_name) -> Any:
    """A flag that names where something is, which a resumed run finds elsewhere, too."""
    return flag(default, text, alters=False, tells=True, path=path)


def check_fields(settings: Any) -> None:
    """Raise UserError when a number is outside the bounds of its field, or a word is none of its choices."""
    for f in fields(settings):
        check_value(f, getattr(settings, f.name, None))


def check_value(f: Field[Any], value: Any) -> None:
    """Raise UserError, as `check_fields`."""
    if get_origin(f.type) is Literal and value not in get_args(f.type):
        raise UserError(f"--{f.name} is {value}: choose one of {', '.join(get_args(f.type))}.")
    least, above, below = f.metadata.get("least"), f.metadata.get("above"), f.metadata.get("below", math.inf)
    lowest = above if least is None else least
    if value is not None and lowest is not None and not (value == least or lowest < value < below):
        wanted = f"{least} or more" if above is None else f"a number above {above}"
        wanted = f"a number between {lowest} and {below}" if below < math.inf else wanted
        raise UserError(f"--{f.name} is {value}: give {wanted}.")


HOME = os.path.expanduser
NULL = ("", "~", "null", "Null", "NULL")  # as YAML writes nothing
TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
INT64 = {"least": -(2**63), "below": 2**63}  # what torch takes as a seed
PRESETS = Path(__file__).with_name("presets")


@dataclass
class TrainConfig:
    """Settings of a run."""

    preset: str = machine("default", "default: Qwen2.5-0.5B on GSM8K; tiny: no download, no GPU")
    config: str | None = machine(None, "a YAML file with settings by flag name", path=HOME)
    # Where a model and data come from may change in a resumed run: what is in them may not (`Saver.check`).
    model: str = place("Qwen/Qwen2.5-0.5B-Instruct", "Hub id or folder of a chat model, or tiny")
    dataset: str = place("openai/gsm8k", "Hub id, folder with train.* and test.*, one file, or synthetic")
    question_column: list[str] = flag(["question"], "the column with the question, or several to be joined")  # noqa: RUF009
    answer_column: str = flag("answer", "the column with the final answer, and what leads to it")
    answer_pattern: str = flag("gsm8k", "where in it the final answer is: gsm8k (after ####), boxed, whole, or a regex")
    system_prompt_file: str | None = place(None, "a text file with the system prompt instead of the built-in one", HOME)
    template_arguments: list[str] | None = flag(None, "NAME=VALUE for the chat template: enable_thinking=false")  # noqa: RUF009
    system_prompt: str = field(init=False, metadata={"alters": True, "tells": False})  # its text
    checkpoint_dir: str = machine("checkpoints", "where checkpoints go", path=HOME)
    log_dir: str = machine("logs", "where logs go", path=HOME)
    resume: str | None = machine(None, "go on from the newest checkpoint, or the one named", path=HOME, const="newest")
    replace: bool = machine(False, "begin where another run's checkpoints are, and remove them once this one has saved")
    seed: int = flag(0, "of data order, sampling, synthetic problems, the tiny model's weights", tells=False, **INT64)
    device: str | None = machine(None, "cpu or cuda; CUDA when there is one")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "the model works in; auto: bf16 where the hardware has it")
    lora_rank: int | None = flag(None, "train adapters of this rank (needs peft) instead of all weights", least=1)
    epochs: int = flag(1, "passes over the training problems", least=1, alters=False, tells=True)
    max_steps: int | None = flag(None, "GRPO steps, whatever --epochs says", least=0, alters=False, tells=True)
    cold_start_steps: int = flag(0, "supervised steps on the XML targets before GRPO", least=0)
    cold_start_batch_size: int = flag(16, "targets a cold-start step", least=1)
    cold_start_learning_rate: float = flag(1e-5, "constant learning rate of the cold start", above=0)
    save_every: int = machine(100, "steps between checkpoints; 0: only at the end of epochs and of the run", least=0)
    keep_last: int = machine(2, "saves of steps and epochs to keep, the older ones are removed; 0: all", least=0)
    keep_best: bool = machine(True, "also keep the checkpoint of the best validation so far, as best")
    eval_every: int = machine(100, "steps between validations; 0: at the start, after epochs and at the end", least=0)
    eval_samples: int = flag(200, "test problems in a validation; 0: all", least=0)
    sample_every: int = machine(10, "steps between completions written to the logs; 0: none", least=0)
    tensorboard: bool = machine(False, "write event files for `tensorboard --logdir` too")
    allow_changes: bool = machine(False, "resume although settings that alter the run have changed")

    def __post_init__(self) -> None:
        check_fields(self)
        built_in = TINY_SYSTEM_PROMPT if self.model == "tiny" else SYSTEM_PROMPT
        self.system_prompt = read_system_prompt(self.system_prompt_file, built_in)
        check_answer_pattern(self.answer_pattern)
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs a package that is missing: pip install tensorboard, or leave it out.")


def names_of(fact: Literal["alters", "tells"], *settings: Any) -> set[str]:
    """The names of the settings that alter a resumed run, or that tell two runs apart."""
    return {f.name for each in settings for f in fields(each) if f.metadata[fact]}


def described(*settings: Any) -> dict[str, Any]:
    """The settings that are not of the machine only, by name."""
    told = names_of("alters", *settings) | names_of("tells", *settings)
    return {name: value for each in settings for name, value in asdict(each).items() if name in told}


def changed_settings(before: Mapping[str, Any], *now: Any) -> list[str]:
    """The settings that would alter a run's steps and differ: "name was X, is Y", long texts cut off."""

    def shown(value: Any) -> str:
        return " ".join(str(value).split())[:80]

    altering = {f.name: getattr(each, f.name) for each in now for f in fields(each) if f.metadata["alters"]}
    changed = {name: value for name, value in altering.items() if before.get(name) != value}
    return [f"{name} was {shown(before.get(name))}, is {shown(value)}" for name, value in changed.items()]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help).")


def parse_flags(types: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """One instance of each dataclass. A flag beats `--config FILE.yaml`, the file beats `--preset NAME`.

    Raises:
        UserError: an unknown flag, key or preset, or a value that does not fit.
    """
    known = {f.name: f for kind in types for f in fields(kind) if "help" in f.metadata}
    given = _read_flags(known, argv)
    values = (_read_yaml(given["config"], known) if "config" in given else {}) | given
    presets = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if (name := values.get("preset", "default")) not in presets:
        raise UserError(f"--preset is {name}: choose one of {', '.join(presets)}.")
    values = _read_yaml(presets[name], known) | values
    return tuple(kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values}) for kind in types)


def _read_flags(known: Mapping[str, Field[Any]], argv: Sequence[str] | None) -> dict[str, Any]:
    parser = _Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in known.values():
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
        kind, is_list, _ = _kind(f)
        form: dict[str, Any] = {"nargs": "+"} if is_list else {}
        if kind is bool or "const" in f.metadata:
            form = {"nargs": "?", "const": f.metadata.get("const", "true")}
        parser.add_argument(*names, dest=f.name, help=f"{f.metadata['help']} (default: {f.default_factory()})", **form)
        if kind is bool:
            off = {"action": "store_const", "const": "false", "help": argparse.SUPPRESS}
            parser.add_argument(f"--no_{f.name}", f"--no-{f.name.replace('_', '-')}", dest=f.name, **off)
    return {name: read_value(known[name], value) for name, value in vars(parser.parse_args(argv)).items()}


def _read_yaml(path: str | Path, known: Mapping[str, Field[Any]]) -> dict[str, Any]:
    """The settings in a file, of which all is text, lists and names, whatever YAML would take it for."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            values = yaml.load(file, yaml.BaseLoader) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"Cannot read the settings in '{path}' ({one_line(error)}): give a YAML file.") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds no settings: write one `name: value` a line, with the flags' names.")
    values = {name.replace("-", "_"): None if value in NULL else value for name, value in values.items()}
    if unknown := sorted(values.keys() - known.keys() | values.keys() & {"config"}):
        raise UserError(f"'{path}' sets {', '.join(unknown)}, which is no flag: see --help for the names.")
    return {name: read_value(known[name], value) for name, value in values.items()}


def _kind(f: Field[Any]) -> tuple[type, bool, bool]:
    """The type of a setting or of its entries, whether it is a list of them, and whether it may be None."""
    kind, *none = get_args(f.type) if isinstance(f.type, UnionType) else (f.type,)
    is_list = get_origin(kind) is list
    return get_args(kind)[0] if is_list else str if get_origin(kind) is Literal else kind, is_list, bool(none)


def read_value(f: Field[Any], value: Any) -> Any:
    """What a flag or a file says of a setting, in the type of its field.

    Raises:
        UserError: it does not fit there, or is out of bounds.
    """
    kind, is_list, optional = _kind(f)
    if value is None and optional:
        return None
    entries = value if is_list and isinstance(value, list) else [value]
    try:
        if not entries or not all(isinstance(entry, str if kind is str else str | int | float) for entry in entries):
            raise ValueError
        read = [TRUTH[str(entry).lower()] if kind is bool else kind(str(entry)) for entry in entries]
    except (ValueError, KeyError):
        what = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
        shown = "nothing" if value is None else f"'{one_line(str(value))}'"
        raise UserError(f"--{f.name} is {shown}: give {what}{', or a list of such' * is_list}.") from None
    if is_list:
        return read
    if f.name == "resume" and read[0].lower() in TRUTH:  # `resume: true` in a file
        return f.metadata["const"] if TRUTH[read[0].lower()] else None
    check_value(f, read[0])
    return f.metadata["path"](read[0]) if "path" in f.metadata else read[0]


def read_settings(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The settings of this kind in a checkpoint, those that are known here.

    Raises:
        UserError: one is not of its type, or out of its bounds.
    """
    return {f.name: read_value(f, values[f.name]) for f in fields(kind) if f.name in values}


def resume_settings(settings: TrainConfig, before: Mapping[str, Any]) -> None:
    """Let a resumed run work in the type that it worked in, whatever this machine would choose.

    Raises:
        UserError: the type is unknown, or it would ask the Hub for what was a path: a stranger may own the name.
    """
    for name in ("model", "dataset"):
        was, now = str(before.get(name)), getattr(settings, name)
        if local_path(was) and not local_path(now) and now not in MADE_HERE and not settings.allow_changes:
            raise UserError(f"--{name} was '{was}', and '{now}' is not here: put it back, or say where it is.")
    settings.dtype = before.get("dtype") if settings.dtype == "auto" else settings.dtype
    check_fields(settings)
