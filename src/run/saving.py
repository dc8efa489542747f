"""What a run saves and when, and how it goes on from there."""

import copy
import logging
import shlex
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from src.errors import UserError, one_line
from src.run import checkpoint
from src.run.state import Progress, State

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """When a run validates and saves; every 0 steps: at the end of epochs and of the run only, as it does anyway."""

    steps_per_epoch: int
    total_steps: int  # of GRPO, in the whole run
    save_every: int
    eval_every: int
    keep_best: bool

    def validates(self, p: Progress) -> bool:
        """Whether a validation is due that is not done yet."""
        regular = self.eval_every > 0 and p.step % self.eval_every == 0
        return not p.evaluated and (regular or p.step % self.steps_per_epoch == 0 or p.step == self.total_steps)

    def names(self, p: Progress) -> list[str]:
        """The names under which the run has to be saved at this point; none at most points."""
        grpo, epoch = p.phase == "grpo", f"epoch_{p.step // self.steps_per_epoch}"
        names = {  # the best first: what is saved later says that it is there
            "best": grpo and self.keep_best and p.step and p.evaluated and p.step == p.best_step,
            p.name: self.save_every and p.step and p.step % self.save_every == 0,
            epoch: grpo and p.step and p.step % self.steps_per_epoch == 0,
            "final": grpo and p.step == self.total_steps,
        }
        return [name for name, due in names.items() if due]


class Saved(NamedTuple):
    """A checkpoint to go on from."""

    path: Path
    state: State
    named: bool  # by --resume: then it stays, whatever --keep_last says


def open_resume(resume: str | None, folder: Path, replace: bool = False) -> Saved | None:
    """The checkpoint that --resume means, if given: `newest` is the last one saved in `folder`, which is cleared up.

    Raises:
        UserError: there is none, or the one named is not whole; or this run would write over what is not its own,
            other runs' checkpoints without `replace`.
    """
    checkpoint.clear_up(folder)
    saved = None
    if resume is not None:
        named = resume != "newest"
        path = Path(resume) if named else checkpoint.newest_checkpoint(folder)
        if path is None:
            raise UserError(f"There is no whole checkpoint in '{folder}' to resume: leave --resume out to start anew.")
        saved = Saved(path, checkpoint.load_state(path) if named else checkpoint.read_state(path), named)
    if not replace and (theirs := checkpoint.other_checkpoints(folder, saved and saved.state.run)):
        newest = next((path for path in theirs if checkpoint.damage(path) is None), None)
        advice = f"pass --resume {shlex.quote(str(newest))} to go on with it, " if newest else ""
        raise UserError(
            f"'{folder}' holds checkpoints of another run: {advice}another --checkpoint_dir to keep both, or --replace "
            "to have them removed once this run has saved."
        )
    return saved


@dataclass
class Saver:
    """How far a run is, its learner, and its checkpoints in `folder`: a state is written once, under all its names."""

    folder: Path
    keep_last: int  # saves of steps and epochs that stay; 0: all
    schedule: Schedule
    settings: Mapping[str, Any]
    identity: Mapping[str, str | None]  # what tells the content of model and data
    learner: Any  # has the counts and the budget of a `State`, and an optimizer with its tensors
    write_model: Callable[[Path, Progress], None]  # writes a model folder
    lines: Callable[[], dict[str, int]]  # how long the log files are
    processes: Any  # of which the first alone reads and writes, and all know what came of it
    replace: bool = False  # whether other runs' checkpoints go once this one has saved
    progress: Progress = field(default_factory=Progress)
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    reference: str | None = None  # which cold start GRPO began from, if one
    source: Path | None = None  # where that is, if not in `folder`
    saved: Progress | None = None  # the last state saved, or resumed from, and where it is
    path: Path = Path()
    kept: Path | None = None  # a checkpoint that stays
    saves: int = 0

    def save(self, names: Sequence[str], must: bool = False) -> None:
        """Save under these names. When that fails the run says so and goes on, unless it must not fail.

        Raises:
            UserError: the disk is full or the folder cannot be written; what was there is there still.
        """
        for name in names:
            path, last = self.folder / name, name == names[-1]
            try:
                self.processes.first(partial(self._save, path, last))
                self.saved, self.path = copy.copy(self.progress), path
            except UserError as error:
                if must and last:
                    raise
                log.warning("%s The run goes on and tries again at the next save.", error)

    def _save(self, path: Path, last: bool) -> None:
        if self.progress != self.saved or not (self.path / checkpoint.STATE).is_file():
            self._write(path)
            self.saves += 1
        elif path != self.path:
            checkpoint.copy_checkpoint(self.path, path)
        else:
            return
        log.info("step %d: saved %s", self.progress.step, path)
        if last and self.keep_last:
            old = checkpoint.old_checkpoints(self.folder, self.keep_last, self.run, self.progress, self.kept)
            checkpoint.remove_checkpoints(old, f"since --keep_last is {self.keep_last}")
        if last and self.replace:
            others = checkpoint.other_checkpoints(self.folder, self.run)
            checkpoint.remove_checkpoints(others, "which is another run's, since --replace is given")

    def _write(self, path: Path, rehearsal: bool = False) -> None:
        own = {name: getattr(self, name) for name in ("run", "progress", "settings", "identity", "reference")}
        learned = {name: getattr(self.learner, name) for name in ("skipped_steps", "skips_in_a_row", "token_budget")}
        counts = {"saves": self.saves + 1, "processes": self.processes.world, "log_lines": self.lines()}
        state = State(**own, **learned, **counts, saved_at=time.time())
        write_model, tensors = partial(self.write_model, progress=self.progress), self.learner.optimizer.state_tensors()
        checkpoint.save_checkpoint(path, write_model, tensors, state, rehearsal)

    def rehearse(self) -> None:
        """Raise UserError when this run could not be saved. What GRPO began from comes into its folder."""
        self.processes.first(lambda: self._write(self.folder / self.progress.name, rehearsal=True))
        source, path = self.source, self.folder / "cold_start"
        self.processes.first(lambda: source and checkpoint.copy_checkpoint(source, path))

    def save_if_due(self) -> None:
        """Save what the schedule says, but nothing that came after a loss or gradient that was not finite."""
        names = self.schedule.names(self.progress)
        if names and self.learner.skips_in_a_row and "final" not in names:
            log.warning("step %d: not saved, since the last loss or gradient was not finite", self.progress.step)
        else:
            self.save(names, must="final" in names)

    def save_reference(self, must: bool) -> None:
        """Save what GRPO begins from."""
        self.save(["cold_start"], must)
        if self.saved == self.progress:
            self.reference = self.processes.first(partial(checkpoint.tensors_digest, self.path))

    def save_here(self) -> str:
        """Save what there is, when the run has to stop; says and returns where that is."""
        if self.progress != self.saved:
            self.save([self.progress.name], must=True)
        place = f"{self.progress.phase} step {self.progress.step}"
        log.info("stopped at %s; go on with the same command and --resume", place)
        return place

    def check(self, saved: Saved, settings: Sequence[str], allow_changes: bool) -> None:
        """Compare the run that was saved with this one. settings: those that have changed.

        Raises:
            UserError: they or the content have, and it is not allowed; or this run would be over by then.
        """
        contents = [name for name, was in saved.state.identity.items() if was != self.identity.get(name)]
        changed = [*settings, *(f"{name} (its content)" for name in contents)]
        if changed and not allow_changes:
            raise UserError(
                f"The run in '{saved.path}' had other settings: {'; '.join(changed)}. Resume it with the same ones, or "
                "pass --allow_changes true to go on with the new ones."
            )
        if changed:
            log.info("changed settings: %s", "; ".join(changed))
        if saved.state.progress.place > (True, self.schedule.total_steps):
            raise UserError(
                f"'{saved.path}' is at step {saved.state.progress.step}, but this run ends at step "
                f"{self.schedule.total_steps}: raise --max_steps."
            )

    def _tensors(self, path: Path) -> dict[str, Tensor]:
        """Masters and moments of a checkpoint, on the CPU; checked against the learner's."""
        try:
            tensors = load_file(path / checkpoint.TENSORS)
            for name, own in self.learner.optimizer.state_tensors().items():  # masters; there are no moments yet
                moments = (name.replace("master/", f"adam/{moment}/") for moment in ("exp_avg", "exp_avg_sq"))
                found = [tensors[key] for key in (name, *moments) if key in tensors]
                if name not in tensors or any((t.shape, t.dtype) != (own.shape, own.dtype) for t in found):
                    raise ValueError(f"{name} is missing, or of another shape or type")
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise ValueError("it has numbers that are not finite")
        except (ValueError, OSError, SafetensorError) as error:
            raise UserError(
                f"'{path}' does not fit this program and model ({one_line(error)}): resume it with the version, the "
                "--model and the --lora_rank that wrote it."
            ) from error
        return tensors

    def load_reference(self, saved: Saved, cold_start: bool, needed: bool) -> None:
        """Give the learner the weights that GRPO began from, those of the cold start if there was one.

        `rehearse` puts them into this run's folder if they are not there.

        Raises:
            UserError: they are not there, damaged, or of another run.
        """
        own = self.processes.first(partial(checkpoint.tensors_digest, saved.path))
        begins = cold_start and saved.state.progress.step == 0  # it is the reference itself
        self.reference = saved.state.reference or (own if begins else None)
        if needed and (cold_start or self.reference):
            source = saved.path if own == self.reference else saved.path.parent / "cold_start"
            tensors = self.processes.tensors_of_first(partial(self._reference, saved.path, source))
            self.learner.optimizer.load_state_tensors(tensors)

    def _reference(self, path: Path, source: Path) -> dict[str, Tensor]:
        checkpoint.load_state(source)  # raises UserError unless it is whole
        if checkpoint.tensors_digest(source) != self.reference:
            raise UserError(
                f"'{source}' is not what '{path}' says it began from, which its KL term needs: put that one back, or "
                "resume another checkpoint."
            )
        tensors = self._tensors(source)
        self.source = None if source.resolve() == (self.folder / "cold_start").resolve() else source
        return tensors

    def take_over(self, saved: Saved) -> None:
        """Go on from there: with its progress, its learner's state, and under its name."""
        state = saved.state
        self.learner.skipped_steps, self.learner.skips_in_a_row = state.skipped_steps, state.skips_in_a_row
        if state.settings.get("token_budget") == self.settings.get("token_budget"):
            self.learner.token_budget = state.token_budget  # what a full memory left; named anew, it is what is named
        tensors = self.processes.tensors_of_first(partial(self._tensors, saved.path))
        self.learner.optimizer.load_state_tensors(tensors)
        self.run, self.progress = state.run, copy.copy(state.progress)
        self.saved, self.path, self.kept = copy.copy(state.progress), saved.path, saved.path if saved.named else None
        known = [state, *filter(None, checkpoint.find_checkpoints(self.folder).values())]
        self.saves = max(each.saves for each in known if each.run == self.run)  # what is saved now is the newest
        before, now = state.processes, self.processes.world
        note = f" in {now} processes after {before}, the same up to rounding" if before != now else ""
        log.info("resuming from %s: %s step %d%s", saved.path, self.progress.phase, self.progress.step, note)
