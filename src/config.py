"""The settings of a run, the presets, and which settings a resumed run may change."""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from src.data import SYSTEM_PROMPT, check_answer_pattern, read_system_prompt
from src.errors import UserError
from src.settings import flag
from src.tiny import TINY_SYSTEM_PROMPT

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
    """Settings of a run; those of the algorithm are in GRPOConfig."""

    preset: Literal["default", "tiny"] = flag("default", "default: Qwen2.5-0.5B on GSM8K; tiny: no download, no GPU")
    config: str | None = flag(None, "a YAML file with settings by flag name")
    model: str = flag("Qwen/Qwen2.5-0.5B-Instruct", "Hub id or folder of a chat model, or tiny")
    dataset: str = flag("openai/gsm8k", "Hub id, folder with train.* and test.*, one file, or synthetic")
    question_column: list[str] = flag(["question"], "the column with the question, or several to be joined")
    answer_column: str = flag("answer", "the column with the final answer, and what leads to it")
    answer_pattern: str = flag("gsm8k", "where in it the final answer is: gsm8k (after ####), boxed, whole, or a regex")
    system_prompt_file: str | None = flag(None, "a text file with the system prompt, instead of the built-in one")
    system_prompt: str = field(init=False)  # its text
    checkpoint_dir: str = flag("checkpoints", "where checkpoints go")
    log_dir: str = flag("logs", "where logs go")
    resume: str | None = flag(
        None, "go on from the newest checkpoint, or from the one named", nargs="?", const="newest"
    )
    seed: int = flag(0, "of data order, sampling, synthetic problems and the tiny model's weights")
    device: str | None = flag(None, "cpu or cuda; CUDA when there is one")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "the model works in; auto: bf16 where the hardware has it")
    lora_rank: int | None = flag(None, "train adapters of this rank (needs peft) instead of all weights")
    epochs: int = flag(1, "passes over the training problems")
    max_steps: int | None = flag(None, "GRPO steps, whatever --epochs says")
    cold_start_steps: int = flag(0, "supervised steps on the XML targets before GRPO")
    cold_start_batch_size: int = flag(16, "targets a cold-start step")
    cold_start_learning_rate: float = flag(1e-5, "constant learning rate of the cold start")
    save_every: int = flag(100, "steps between checkpoints; 0: only at the end of epochs and of the run")
    keep_last: int = flag(0, "checkpoints of steps and epochs to keep, the older ones are removed; 0: all")
    keep_best: bool = flag(True, "also keep the checkpoint of the best validation so far, as best")
    eval_every: int = flag(100, "steps between validations; 0: only at the start, at the end of epochs and of the run")
    eval_samples: int = flag(200, "test problems in a validation; 0: all")
    final_eval_samples: int | None = flag(None, "test problems in one more evaluation at the end; 0: all")
    sample_every: int = flag(10, "steps between completions written to the logs; 0: none")
    tensorboard: bool = flag(False, "write event files for `tensorboard --logdir` too")
    allow_changes: bool = flag(False, "resume although settings that alter the run have changed")

    def __post_init__(self) -> None:
        built_in = TINY_SYSTEM_PROMPT if self.model == "tiny" else SYSTEM_PROMPT
        self.system_prompt = read_system_prompt(self.system_prompt_file, built_in)
        check_answer_pattern(self.answer_pattern)
        least = {"epochs": 1, "cold_start_steps": 0, "cold_start_batch_size": 1, "save_every": 0, "eval_every": 0}
        for name, value in (least | {"keep_last": 0, "eval_samples": 0, "sample_every": 0}).items():
            if getattr(self, name) < value:
                raise UserError(f"--{name} is {getattr(self, name)}: give {value} or more.")
        for name in ("max_steps", "final_eval_samples"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name} is {getattr(self, name)}: give 0 or more.")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs a package that is missing: pip install tensorboard, or leave it out.")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}: give a number of 64 bits.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise UserError(f"--lora_rank is {self.lora_rank}: give 1 or more.")
        if not 0 < self.cold_start_learning_rate < math.inf:
            raise UserError(f"--cold_start_learning_rate is {self.cold_start_learning_rate}: give a number above 0.")


UNCHANGING = {"preset", "config", "checkpoint_dir", "log_dir", "resume", "device", "epochs", "max_steps", "save_every"}
UNCHANGING |= {"keep_last", "keep_best", "eval_every", "final_eval_samples", "sample_every"}
UNCHANGING |= {"token_budget", "tensorboard", "allow_changes", "system_prompt_file"}


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that would alter a run's steps and differ: "name was X, is Y"."""
    names = [name for name in now if name not in UNCHANGING and before.get(name) != now[name]]
    shown = {name: [_short(settings.get(name)) for settings in (before, now)] for name in names}
    return [f"{name} was {was}, is {now}" for name, (was, now) in shown.items()]


def _short(value: object) -> str:
    """On one line, and not whole where it is a text of sentences."""
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
