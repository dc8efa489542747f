"""What a run saves and when, and how it goes on from there."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from src.errors import UserError
from src.run.checkpoint import (
    copy_checkpoint,
    find_checkpoints,
    load_state,
    newest_checkpoint,
    remove_old_checkpoints,
    tensors_digest,
)

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is; with the weights and the optimizer, everything that what comes next depends on."""

    phase: str = "cold_start"
    step: int = 0  # steps done in this phase
    evaluated: bool = False  # whether the validation due at this step is done
    before: float | None = None  # validation accuracy when GRPO started
    after: float | None = None  # at the last validation
    best: float = -1.0
    best_step: int = 0


def due_names(p: Progress, save_every: int, steps_per_epoch: int, total_steps: int, keep_best: bool) -> list[str]:
    """The names under which a run has to be saved at this point; none at most points."""
    names = {step_name(p): save_every and p.step and p.step % save_every == 0}
    if p.phase == "grpo":
        names[f"epoch_{p.step // steps_per_epoch}"] = p.step and p.step % steps_per_epoch == 0
        names["best"] = keep_best and p.step and p.evaluated and p.step == p.best_step
        names["final"] = p.step == total_steps
    return [name for name, due in names.items() if due]


def step_name(p: Progress) -> str:
    """The name of a checkpoint at this step."""
    return f"step_{p.step:06d}" if p.phase == "grpo" else f"cold_start_{p.step:06d}"


class Saver:
    """The checkpoints of one run in `folder`: each state is written once, under all its names.

    keep_last: how many saves of steps and epochs stay; 0: all. `final`, `best` and `cold_start` always stay.
    """

    SPARE = ("final", "best", "cold_start")

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last
        self.saved: Progress | None = None  # the last state saved, or resumed from, and where it is
        self.path = folder

    def save(self, names: Sequence[str], progress: Progress, write: Callable[[Path], None]) -> None:
        """Have `write` write the state to the first name, and link the others to it.

        Raises:
            UserError: the disk is full or the folder cannot be written; what was there is there still.
        """
        for path in (self.folder / name for name in names):
            if progress != self.saved or not self.path.is_dir():
                write(path)
                self.took(path, progress)
                if self.keep_last:
                    remove_old_checkpoints(self.folder, self.keep_last, path, self.SPARE)
            elif path != self.path:
                copy_checkpoint(self.path, path)
            else:
                continue
            log.info("step %d: saved %s", progress.step, path)

    def took(self, path: Path, progress: Progress) -> None:
        """Note that this state is saved at `path`."""
        self.saved, self.path = copy.copy(progress), path

    def warn_of_others(self) -> None:
        """Say so when a new run will replace the checkpoints of an earlier one."""
        if find_checkpoints(self.folder):
            log.warning(
                "'%s' holds checkpoints of an earlier run: those of the same name will be replaced. To go on with "
                "that run, stop this one and pass --resume; to keep both, pass another --checkpoint_dir.",
                self.folder,
            )


def open_resume(resume: str | None, folder: Path) -> tuple[Path | None, dict[str, Tensor], dict[str, Any]]:
    """The checkpoint that --resume means, if given, and what it holds: `newest` is the last one saved in `folder`.

    Raises:
        UserError: there is none, or the one named is not whole.
    """
    if resume is None:
        return None, {}, {}
    path = newest_checkpoint(folder) if resume == "newest" else Path(resume)
    if path is None:
        raise UserError(f"There is no whole checkpoint in '{folder}' to resume: leave --resume out to start anew.")
    return path, *load_state(path)


def load_reference(path: Path, digest: str, folder: Path) -> dict[str, Tensor]:
    """The tensors of the cold start that the run saved at `path` began from; also put into `folder` if not there.

    Raises:
        UserError: it is not there, damaged, or of another run.
    """
    source = path if tensors_digest(path) == digest else path.parent / "cold_start"
    tensors, _ = load_state(source)
    if tensors_digest(source) != digest:
        raise UserError(
            f"'{source}' belongs to another run than '{path}', whose KL term needs its own: put that one back, or "
            "resume another checkpoint."
        )
    if source.resolve() != (folder / "cold_start").resolve():
        copy_checkpoint(source, folder / "cold_start")
    return tensors


def check_same_run(
    path: Path, settings: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any], allow_changes: bool
) -> list[str]:
    """What differs between the run saved at `path` and this one: `settings`, and the content of model and data.

    Raises:
        UserError: something does, and it is not allowed.
    """
    changed = [*settings, *(f"{k} (its content)" for k, v in before.items() if v != now[k])]
    if changed and not allow_changes:
        raise UserError(
            f"The run in '{path}' had other settings: {'; '.join(changed)}. Resume it with the same ones, or pass "
            "--allow_changes true to go on with the new ones."
        )
    return changed
