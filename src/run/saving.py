"""What a run saves and when, and how it goes on from there."""

import copy
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from src.errors import UserError
from src.run.checkpoint import (
    copy_checkpoint,
    find_checkpoints,
    load_state,
    load_tensors,
    newest_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
    tensors_digest,
)

log = logging.getLogger(__name__)

SPARE = ("final", "best", "cold_start")  # never removed to make room
LEARNER_STATE = ("skipped_steps", "skips_in_a_row", "token_budget")


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


@dataclass(frozen=True)
class Schedule:
    """When a run validates and saves; every 0 steps: at the end of epochs and of the run only, as it does anyway."""

    steps_per_epoch: int
    epochs: int
    max_steps: int | None  # in all, whatever the epochs say
    save_every: int
    eval_every: int
    keep_best: bool

    @property
    def total_steps(self) -> int:
        """GRPO steps of the whole run."""
        return self.epochs * self.steps_per_epoch if self.max_steps is None else self.max_steps

    def validates(self, p: Progress) -> bool:
        """Whether a validation is due that is not done yet."""
        regular = self.eval_every and p.step % self.eval_every == 0
        return not p.evaluated and bool(
            p.step in (0, self.total_steps) or p.step % self.steps_per_epoch == 0 or regular
        )

    def names(self, p: Progress) -> list[str]:
        """The names under which the run has to be saved at this point; none at most points."""
        names = {p.name: self.save_every and p.step and p.step % self.save_every == 0}
        if p.phase == "grpo":
            names[f"epoch_{p.step // self.steps_per_epoch}"] = p.step and p.step % self.steps_per_epoch == 0
            names["best"] = self.keep_best and p.step and p.evaluated and p.step == p.best_step
            names["final"] = p.step == self.total_steps
        return [name for name, due in names.items() if due]


@dataclass(frozen=True)
class Saved:
    """A checkpoint to go on from."""

    path: Path
    state: Mapping[str, Any]

    @property
    def progress(self) -> Progress:
        """Where it was saved, anew each time."""
        return Progress(**self.state["progress"])

    @contextmanager
    def fits(self) -> Iterator[None]:
        """Raise UserError when what is done with it within finds an entry or a weight missing, or of another shape."""
        try:
            yield
        except (KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"'{self.path}' does not fit this program and model ({' '.join(str(error).split())}): resume it with "
                "the version, the --model and the --lora_rank that wrote it."
            ) from error


def open_resume(resume: str | None, folder: Path) -> Saved | None:
    """The checkpoint that --resume means, if given: `newest` is the last one saved in `folder`.

    Raises:
        UserError: there is none, or the one named is not whole.
    """
    if resume is None:
        return None
    path = newest_checkpoint(folder) if resume == "newest" else Path(resume)
    if path is None:
        raise UserError(f"There is no whole checkpoint in '{folder}' to resume: leave --resume out to start anew.")
    return Saved(path, load_state(path))


@dataclass
class Saver:
    """How far a run is, its learner, and its checkpoints in `folder`: a state is written once, under all its names."""

    folder: Path
    keep_last: int  # saves of steps and epochs that stay; 0: all
    schedule: Schedule
    settings: Mapping[str, Any]
    identity: Mapping[str, str | None]  # what tells the content of model and data
    learner: Any  # has LEARNER_STATE, and an optimizer with its tensors
    write_model: Callable[[Path, Progress], None]  # writes a model folder
    positions: Callable[[], Mapping[str, int]]  # of the log files
    processes: Any  # of which the first alone reads and writes, and all know what came of it
    progress: Progress = field(default_factory=Progress)
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    reference: str | None = None  # which cold start GRPO began from, if one
    saved: Progress | None = None  # the last state saved, or resumed from, and where it is
    path: Path = Path()

    def begin(self, phase: str, learner: Any) -> None:
        """The next phase, with a learner of its own."""
        self.progress, self.learner = Progress(phase), learner

    def save(self, names: Sequence[str], must: bool = False) -> None:
        """Save under these names. When that fails the run says so and goes on, unless it must not fail.

        Raises:
            UserError: the disk is full or the folder cannot be written; what was there is there still.
        """
        try:
            for name in names:
                self.processes.first(partial(self._save, self.folder / name))
                self.saved, self.path = copy.copy(self.progress), self.folder / name
        except UserError as error:
            if must:
                raise
            log.warning("%s The run goes on and tries again at the next save.", error)

    def _save(self, path: Path) -> None:
        if self.progress != self.saved or not self.path.is_dir():
            write = partial(self.write_model, progress=self.progress)
            save_checkpoint(path, write, self.learner.optimizer.state_tensors(), self._state())
            if self.keep_last:
                remove_old_checkpoints(self.folder, self.keep_last, path, SPARE)
        elif path != self.path:
            copy_checkpoint(self.path, path)
        else:
            return
        log.info("step %d: saved %s", self.progress.step, path)

    def _state(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "progress": asdict(self.progress),
            "settings": self.settings,
            "identity": self.identity,
            "reference": self.reference,
            **{name: getattr(self.learner, name) for name in LEARNER_STATE},
            "processes": self.processes.world,
            "log_positions": self.positions(),
            "saved_at": time.time(),
        }

    def save_if_due(self) -> None:
        """Save what the schedule says, but nothing that came after a loss or gradient that was not finite."""
        names = self.schedule.names(self.progress)
        if names and self.learner.skips_in_a_row and "final" not in names:
            log.warning("step %d: not saved, since the last loss or gradient was not finite", self.progress.step)
        elif names:
            self.save(names, must="final" in names)

    def save_reference(self, must: bool) -> None:
        """Save what GRPO begins from."""
        self.save(["cold_start"], must)
        if self.saved == self.progress:
            self.reference = self.processes.first(partial(tensors_digest, self.path))

    def save_here(self) -> None:
        """Save what there is, when the run has to stop."""
        if self.progress != self.saved:
            self.save([self.progress.name], must=True)

    def warn_of_others(self) -> None:
        """Say so when a new run will replace the checkpoints of an earlier one."""
        if find_checkpoints(self.folder):
            log.warning(
                "'%s' holds checkpoints of an earlier run: those of the same name will be replaced. To go on with "
                "that run, stop this one and pass --resume; to keep both, pass another --checkpoint_dir.",
                self.folder,
            )

    def check(self, saved: Saved, settings: Sequence[str], allow_changes: bool) -> list[str]:
        """What differs between the run that was saved and this one: `settings`, and the content of model and data.

        Raises:
            UserError: something does, and it is not allowed; or this run would be over by then.
        """
        before, progress = saved.state["identity"], saved.progress
        changed = [*settings, *(f"{k} (its content)" for k, v in before.items() if v != self.identity[k])]
        if changed and not allow_changes:
            raise UserError(
                f"The run in '{saved.path}' had other settings: {'; '.join(changed)}. Resume it with the same ones, or "
                "pass --allow_changes true to go on with the new ones."
            )
        if progress.phase == "grpo" and progress.step > self.schedule.total_steps:
            raise UserError(
                f"'{saved.path}' is at step {progress.step}, but this run ends at step {self.schedule.total_steps}: "
                "raise --max_steps."
            )
        return changed

    def load_reference(self, saved: Saved, cold_start: bool, needed: bool) -> None:
        """Give the learner the weights that GRPO began from, those of the cold start if there was one.

        They are also put into this run's folder if they are not there.

        Raises:
            UserError: they are not there, damaged, or of another run.
        """
        self.reference = saved.state["reference"]
        own = self.processes.first(partial(tensors_digest, saved.path))
        if saved.progress.step == 0 and cold_start and not self.reference:
            self.reference = own
        if not (self.reference and needed):
            return
        source = saved.path if own == self.reference else saved.path.parent / "cold_start"
        self.learner.optimizer.load_state_tensors(
            self.processes.tensors_of_first(partial(self._reference, saved.path, source))
        )

    def _reference(self, path: Path, source: Path) -> dict[str, Tensor]:
        load_state(source)
        if tensors_digest(source) != self.reference:
            raise UserError(
                f"'{source}' belongs to another run than '{path}', whose KL term needs its own: put that one "
                "back, or resume another checkpoint."
            )
        if source.resolve() != (self.folder / "cold_start").resolve():
            copy_checkpoint(source, self.folder / "cold_start")
        return load_tensors(source)

    def take_over(self, saved: Saved, changed: Sequence[str]) -> None:
        """Go on from there: with its progress, its learner's state, and under its name. changed: for the log."""
        budgets = [settings["token_budget"] for settings in (saved.state["settings"], self.settings)]
        for name in LEARNER_STATE:
            if name != "token_budget" or budgets[0] == budgets[1]:  # named anew, it is not what a full memory left
                setattr(self.learner, name, saved.state[name])
        self.learner.optimizer.load_state_tensors(self.processes.tensors_of_first(partial(load_tensors, saved.path)))
        self.run, self.progress = saved.state["run"], saved.progress
        self.saved, self.path = saved.progress, saved.path
        note = f" with changed settings: {'; '.join(changed)}" if changed else ""
        before, now = saved.state.get("processes", 1), self.processes.world
        note += f" in {now} processes after {before}, the same up to rounding" if before != now else ""
        log.info("resuming from %s: %s step %d%s", saved.path, self.progress.phase, self.progress.step, note)
