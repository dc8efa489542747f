"""Flags: a field carries its default, help and bounds, and what changing it means; the settings of a run.

Those of the algorithm are in `src.grpo.GRPOConfig`, those of an evaluation in test.py.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml
from transformers import HfArgumentParser

from src.data import SYSTEM_PROMPT, check_answer_pattern, read_system_prompt
from src.errors import UserError
from src.tiny import TINY_SYSTEM_PROMPT


def flag(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    alters: bool = True,
    tells: bool | None = None,
    unsaid: Any = None,
    **argparse_options: Any,
) -> Any:
    """A dataclass field that is also a flag.

    least, above, below: bounds of a number, which is finite then. alters: changing it alters a run that is resumed.
    tells: it tells two runs apart; as `alters` when left out. What does neither is of the machine only: where files go,
    what is kept and shown. unsaid: what older checkpoints did, which do not say it.
    argparse_options: for `add_argument`.
    """
    metadata = {"argparse": {"help": text, **argparse_options}, "least": least, "above": above, "below": below}
    metadata |= {"alters": alters, "tells": alters if tells is None else tells, "unsaid": unsaid}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def machine(default: Any, text: str, **options: Any) -> Any:
    """A flag of the machine only."""
    return flag(default, text, alters=False, **options)


def check_fields(settings: Any) -> None:
    """Raise UserError when a number is outside the bounds of its field, or a word is none of its choices."""
    for f in fields(settings):
        value = getattr(settings, f.name, None)
        if get_origin(f.type) is Literal and value not in get_args(f.type):
            raise UserError(f"--{f.name} is {value}: choose one of {', '.join(get_args(f.type))}.")
        bounds = [f.metadata.get(name) for name in ("least", "above", "below")]
        if value is not None and (wanted := _instead(value, *bounds)):
            raise UserError(f"--{f.name} is {value}: give {wanted}.")


def _instead(value: Any, least: float | None, above: float | None, below: float | None) -> str | None:
    """What to give instead of a number out of these bounds, or not finite; None when it is within."""
    if least is above is None:
        return None
    if (value >= least if above is None else value > above) and value < (math.inf if below is None else below):
        return None
    if below is not None:
        return f"a number between {least if above is None else above} and {below}"
    if above is not None:
        return f"a number above {above}"
    return f"a number of {least} or more" if isinstance(value, float) else f"{least} or more"


INT64 = {"least": -(2**63), "below": 2**63}  # what torch takes as a seed
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "tiny": {
        "model": "tiny",
        "dataset": "synthetic",
        "cold_start_steps": 500,
        "cold_start_batch_size": 32,
        "cold_start_learning_rate": 2e-3,
        "max_steps": 200,
        "prompts_per_step": 16,
        "group_size": 8,
        "max_completion_tokens": 64,
        "learning_rate": 2e-4,
        "kl_coef": 0.0,
        "eval_every": 40,
        "eval_samples": 0,
        "save_every": 100,
        "sample_every": 10,
    },
}


@dataclass
class TrainConfig:
    """Settings of a run."""

    preset: Literal["default", "tiny"] = machine("default", "default: Qwen2.5-0.5B on GSM8K; tiny: no download, no GPU")
    config: str | None = machine(None, "a YAML file with settings by flag name")
    model: str = flag("Qwen/Qwen2.5-0.5B-Instruct", "Hub id or folder of a chat model, or tiny")
    dataset: str = flag("openai/gsm8k", "Hub id, folder with train.* and test.*, one file, or synthetic")
    question_column: list[str] = flag(["question"], "the column with the question, or several to be joined")  # noqa: RUF009
    answer_column: str = flag("answer", "the column with the final answer, and what leads to it")
    answer_pattern: str = flag("gsm8k", "where in it the final answer is: gsm8k (after ####), boxed, whole, or a regex")
    system_prompt_file: str | None = flag(
        None, "a text file with the system prompt, instead of the built-in one", alters=False, tells=True
    )
    template_arguments: list[str] | None = flag(None, "NAME=VALUE for the chat template: enable_thinking=false")  # noqa: RUF009
    system_prompt: str = field(init=False, metadata={"alters": True, "tells": False})  # its text
    checkpoint_dir: str = machine("checkpoints", "where checkpoints go")
    log_dir: str = machine("logs", "where logs go")
    resume: str | None = machine(
        None, "go on from the newest checkpoint, or from the one named", nargs="?", const="newest"
    )
    seed: int = flag(
        0, "of data order, sampling, synthetic problems and the tiny model's weights", tells=False, **INT64
    )
    device: str | None = machine(None, "cpu or cuda; CUDA when there is one")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "the model works in; auto: bf16 where the hardware has it")
    lora_rank: int | None = flag(None, "train adapters of this rank (needs peft) instead of all weights", least=1)
    epochs: int = flag(1, "passes over the training problems", least=1, alters=False, tells=True)
    max_steps: int | None = flag(None, "GRPO steps, whatever --epochs says", least=0, alters=False, tells=True)
    cold_start_steps: int = flag(0, "supervised steps on the XML targets before GRPO", least=0)
    cold_start_batch_size: int = flag(16, "targets a cold-start step", least=1)
    cold_start_learning_rate: float = flag(1e-5, "constant learning rate of the cold start", above=0)
    save_every: int = machine(100, "steps between checkpoints; 0: only at the end of epochs and of the run", least=0)
    keep_last: int = machine(0, "checkpoints of steps and epochs to keep, the older ones are removed; 0: all", least=0)
    keep_best: bool = machine(True, "also keep the checkpoint of the best validation so far, as best")
    eval_every: int = machine(
        100, "steps between validations; 0: only at the start, at the end of epochs and of the run", least=0
    )
    eval_samples: int = flag(200, "test problems in a validation; 0: all", least=0)
    final_eval_samples: int | None = machine(None, "test problems in one more evaluation at the end; 0: all", least=0)
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

    def shown(value: object) -> str:
        text = " ".join(str(value).split())
        return text if len(text) <= 80 else f"{text[:77]}..."

    pairs = [
        (f.name, before.get(f.name, f.metadata.get("unsaid")), getattr(each, f.name))
        for each in now
        for f in fields(each)
        if f.metadata["alters"]
    ]
    return [f"{name} was {shown(was)}, is {shown(value)}" for name, was, value in pairs if was != value]


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help).")


def parse_flags(
    types: Sequence[type], argv: Sequence[str] | None = None, presets: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Any, ...]:
    """One instance of each dataclass. A flag beats `--config FILE.yaml`, the file beats `--preset NAME`.

    Raises:
        UserError: an unknown flag, key or preset, or a value that does not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if presets is None:
        return _parse(types, argv)
    first = _Parser(dataclass_types=[], add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config")
    chosen, _ = first.parse_known_args(argv)
    values = _read_yaml(chosen.config) if chosen.config else {}
    preset = chosen.preset or values.get("preset")
    if preset is not None and preset not in presets:
        raise UserError(f"There is no preset '{preset}': choose one of {', '.join(presets)}.")
    known = {f.name for kind in types for f in fields(kind) if f.init} - {"config"}
    if unknown := sorted(values.keys() - known):
        raise UserError(f"'{chosen.config}' sets {', '.join(unknown)}, which is no flag: see --help for the names.")
    return _parse(types, _as_flags(presets.get(preset, {})) + _as_flags(values) + argv)


def _parse(types: Sequence[type], argv: Sequence[str]) -> tuple[Any, ...]:
    plain = [_for_argparse(kind) for kind in types]
    parser = _Parser(plain, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        raise UserError(f"Unknown arguments: {' '.join(unknown)} (see --help).")
    return tuple(kind(**vars(values)) for kind, values in zip(types, parsed, strict=True))


def _for_argparse(kind: type) -> type:
    """The flags alone, with what argparse takes of their metadata, and nothing that checks."""
    flags = [
        (f.name, f.type, field(default=f.default, default_factory=f.default_factory, metadata=options))
        for f in fields(kind)
        if (options := f.metadata.get("argparse"))
    ]
    return make_dataclass(kind.__name__, flags)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Cannot read the settings in '{path}' ({reason}): give a YAML file.") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds no settings: write one `name: value` a line, with the flags' names.")
    return values


def _as_flags(values: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return flags
