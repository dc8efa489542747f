"""What a run saves and when, and how it goes on from there."""

from dataclasses import dataclass
from pathlib import Path

from src.checkpoint import newest_checkpoint
from src.errors import UserError


@dataclass
class Progress:
    """How far a run is; with the weights and the optimizer, everything that what comes next depends on."""

    phase: str = "cold_start"
    step: int = 0  # steps done in this phase
    evaluated: bool = False  # whether the validation due at this step is done
    before: float | None = None  # accuracy when GRPO started
    after: float | None = None  # accuracy of the last validation
    best: float = -1.0
    best_step: int = 0


def step_name(p: Progress) -> str:
    """The name of a checkpoint at this step."""
    return f"step_{p.step:06d}" if p.phase == "grpo" else f"cold_start_{p.step:06d}"


def find_resume(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint that --resume means, if it was given: `newest` is the last one saved in `folder`."""
    if resume is None:
        return None
    if resume != "newest":
        return Path(resume)
    path = newest_checkpoint(folder)
    if path is None:
        raise UserError(f"There is no whole checkpoint in '{folder}' to resume: leave --resume out.")
    return path
