"""How far a run is, and the rest of what a checkpoint's trainer.json holds."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class Progress:
    """How far a run is; with the weights and the optimizer, everything that what comes next depends on."""

    phase: Literal["cold_start", "grpo"] = "cold_start"
    step: int = 0  # steps done in this phase
    evaluated: bool = False  # whether the validation due at this step is done
    before: float | None = None  # validation accuracy when GRPO started
    after: float | None = None  # at the last validation
    best: float = -1.0
    best_step: int = 0

    def validated(self, accuracy: float) -> None:
        """Note a validation at this step."""
        self.evaluated, self.after = True, accuracy
        self.before = accuracy if self.before is None else self.before
        if accuracy > self.best:
            self.best, self.best_step = accuracy, self.step

    @property
    def name(self) -> str:
        """The name of a checkpoint at this step."""
        return f"step_{self.step:06d}" if self.phase == "grpo" else f"cold_start_{self.step:06d}"

    @property
    def place(self) -> tuple[bool, int]:
        """What orders the steps of a run."""
        return self.phase == "grpo", self.step


@dataclass(frozen=True)
class State:
    """What a checkpoint holds beside tensors."""

    run: str
    progress: Progress
    settings: dict[str, Any]
    identity: dict[str, str | None]  # what tells the content of model, data and rewards
    reference: str | None  # which cold start GRPO began from, if one
    skipped_steps: int
    skips_in_a_row: int
    token_budget: int
    saved_at: float  # seconds since 1970, by a clock that may be wrong
    saves: int  # the run's own count: what was saved when, whatever the clock says
    processes: int
    log_lines: dict[str, int]  # of each log file

    @classmethod
    def read(cls, values: dict[str, Any]) -> "State":
        """The state that was written as these values.

        Raises:
            TypeError, KeyError, ValueError: an entry is missing or unknown; or a main one of another type.
        """
        state = cls(**{**values, "progress": Progress(**values["progress"])})
        main = {**values, **values["progress"]}
        kinds = {"run": str, "settings": dict, "identity": dict, "log_lines": dict, "saves": int, "saved_at": float}
        for name, kind in (kinds | {"phase": str, "step": int}).items():
            if not isinstance(main[name], kind):
                raise ValueError(f"{name} is {main[name]!r}")
        return state

    @property
    def save(self) -> tuple[str, int, float]:
        """What tells this save from every other."""
        return self.run, self.saves, self.saved_at
