"""When a run validates and is saved, under which names, and what of a failed save remains."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from src.engine.processes import Processes
from src.errors import UserError
from src.run.checkpoint import damage, read_state, tensors_digest
from src.run.saving import Saved, Saver, Schedule, open_resume
from src.run.state import Progress

SCHEDULE = Schedule(steps_per_epoch=6, total_steps=13, save_every=4, eval_every=5, keep_best=True)


def at(phase: str = "grpo", step: int = 0, evaluated: bool = True, best_step: int = 0) -> Progress:
    return Progress(phase, step, evaluated, best_step=best_step)


@pytest.mark.parametrize(
    ("names", "case", "rules"),
    [
        ([], {"step": 0}, {}),
        ([], {"step": 3}, {}),
        (["step_000004"], {"step": 4}, {}),
        ([], {"step": 4}, {"save_every": 0}),
        (["epoch_1"], {"step": 6}, {}),
        (["best", "step_000012", "epoch_2"], {"step": 12, "best_step": 12}, {}),
        (["step_000012", "epoch_2"], {"step": 12, "best_step": 12}, {"keep_best": False}),
        (["step_000012", "epoch_2"], {"step": 12, "best_step": 12, "evaluated": False}, {}),
        (["final"], {"step": 13}, {}),
        (["final"], {"step": 0}, {"total_steps": 0}),
        (["cold_start_000004"], {"phase": "cold_start", "step": 4}, {}),
        ([], {"phase": "cold_start", "step": 6}, {}),
        ([], {"phase": "cold_start", "step": 13}, {}),
    ],
)
def test_steps_epochs_the_best_and_the_last_have_names(names: list[str], case: dict, rules: dict) -> None:
    assert replace(SCHEDULE, **rules).names(at(**case)) == names


def test_validations_come_before_the_first_step_on_schedule_at_the_end_of_epochs_and_last_each_once() -> None:
    assert [step for step in range(14) if SCHEDULE.validates(at(step=step, evaluated=False))] == [0, 5, 6, 10, 12, 13]
    rare = replace(SCHEDULE, eval_every=0)
    assert [step for step in range(14) if rare.validates(at(step=step, evaluated=False))] == [0, 6, 12, 13]
    assert not any(SCHEDULE.validates(at(step=step)) for step in range(14))


def test_the_first_validation_the_last_and_the_earliest_of_the_best_are_remembered() -> None:
    progress = Progress("grpo")
    for progress.step, accuracy in enumerate([0.2, 0.5, 0.5, 0.3]):
        progress.validated(accuracy)
    assert progress == Progress("grpo", 3, True, before=0.2, after=0.3, best=0.5, best_step=1)


class TestSaver:
    """A saver whose model folder is one file that counts how often it was written."""

    @pytest.fixture
    def saver(self, tmp_path: Path) -> Saver:
        self.written: list[Path] = []

        def write(folder: Path, progress: Progress) -> None:
            (folder / "model.safetensors").write_text(str(len(self.written)), encoding="utf-8")
            self.written.append(folder)

        optimizer = SimpleNamespace(state_tensors=lambda: {"master/weight": torch.zeros(1)})
        learner = SimpleNamespace(skipped_steps=0, skips_in_a_row=0, token_budget=1, optimizer=optimizer)
        saver = Saver(tmp_path, 0, SCHEDULE, {"token_budget": 128}, {}, learner, write, dict, Processes())
        saver.progress = Progress("grpo", 4)
        return saver

    def test_a_state_is_written_once_whatever_its_names_and_however_often(self, saver: Saver, tmp_path: Path) -> None:
        for names in (["step_000004", "final"], ["step_000004", "final"], ["best"]):
            saver.save(names)
        assert len(self.written) == 1
        assert {path.name for path in tmp_path.iterdir()} == {"step_000004", "final", "best"}
        assert (tmp_path / "best" / "model.safetensors").samefile(tmp_path / "final" / "model.safetensors")
        saver.progress.step = 5
        saver.save(["step_000005"])
        assert len(self.written) == 2 and damage(tmp_path / "step_000005") is None

    def test_what_could_not_be_saved_is_not_taken_for_saved(self, saver, tmp_path, monkeypatch, caplog) -> None:
        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("src.run.checkpoint.save_file", full)
            with pytest.raises(UserError, match="No space left on device"):
                saver.save(["step_000004", "final"], must=True)
            saver.save(["step_000004"])
        assert "The run goes on and tries again at the next save" in caplog.text
        assert saver.saved is None and list(tmp_path.iterdir()) == []
        saver.save(["final"])
        assert [path.name for path in tmp_path.iterdir()] == ["final"]

    def test_a_reference_from_elsewhere_comes_into_the_folder_once_this_run_can_be_saved(
        self, saver: Saver, tmp_path: Path
    ) -> None:
        """What stands in its place may be another run's, which a run that is refused must not cost."""
        theirs, mine = tmp_path / "theirs", tmp_path / "mine"
        saver.folder = theirs
        saver.save(["cold_start"])
        optimizer = saver.learner.optimizer
        optimizer.state_tensors, optimizer.load_state_tensors = lambda: {"master/weight": torch.ones(1)}, list
        begun = replace(saver, folder=mine, saved=None, run="mine")
        begun.save_reference(must=True)
        begun.progress = Progress("grpo", 5)
        begun.save(["step_000005"])
        saved = Saved(mine / "step_000005", read_state(mine / "step_000005"), named=True)
        resumed, before = (
            replace(begun, folder=theirs, saved=None, reference=None),
            tensors_digest(theirs / "cold_start"),
        )
        resumed.load_reference(saved, cold_start=True, needed=True)
        assert tensors_digest(theirs / "cold_start") == before != resumed.reference
        resumed.rehearse()
        assert tensors_digest(theirs / "cold_start") == resumed.reference == tensors_digest(mine / "cold_start")

    def test_a_checkpoint_that_somebody_removed_is_written_anew(self, saver: Saver, tmp_path: Path) -> None:
        saver.save(["step_000004"])
        (tmp_path / "step_000004").rename(tmp_path / "elsewhere")
        saver.save(["final"])
        assert len(self.written) == 2 and damage(tmp_path / "final") is None
        (tmp_path / "final" / "trainer.json").unlink()
        saver.save(["best"])
        assert len(self.written) == 3 and damage(tmp_path / "best") is None

    def test_what_somebody_put_into_a_checkpoint_is_not_in_the_way(self, saver: Saver, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "thesis.txt").write_text("theirs", encoding="utf-8")
        saver.save(["final"])
        (tmp_path / "final" / ".cache" / "huggingface").mkdir(parents=True)
        (tmp_path / "final" / ".cache" / "huggingface" / ".gitignore").write_text("*", encoding="utf-8")
        saver.save(["best"])
        assert not (tmp_path / "best" / ".cache").exists()
        (tmp_path / "final" / "link").symlink_to(tmp_path / "theirs")
        saver.progress.step = 5
        saver.save(["final"])
        assert len(self.written) == 2 and damage(tmp_path / "final") is None and damage(tmp_path / "best") is None
        assert {path.name for path in tmp_path.iterdir()} == {"final", "best", "theirs"}
        assert (tmp_path / "theirs" / "thesis.txt").read_text(encoding="utf-8") == "theirs"

    def test_a_folder_with_a_manifest_of_something_else_is_refused(self, saver: Saver, tmp_path: Path) -> None:
        (tmp_path / "final").mkdir()
        (tmp_path / "final" / "manifest.json").write_text('{"name": "my web app"}', encoding="utf-8")
        with pytest.raises(UserError, match=r"'.*final' was not written by this program"):
            open_resume(None, tmp_path)
        with pytest.raises(UserError, match="what is there was not written by this program"):
            saver.save(["final"], must=True)
        assert [path.name for path in (tmp_path / "final").iterdir()] == ["manifest.json"]

    def test_after_a_step_without_a_finite_gradient_only_the_last_state_is_saved(self, saver, tmp_path, caplog) -> None:
        saver.learner.skips_in_a_row = 1
        saver.save_if_due()
        assert list(tmp_path.iterdir()) == [] and "step 4: not saved" in caplog.text
        saver.progress.step = 13
        saver.save_if_due()
        assert [path.name for path in tmp_path.iterdir()] == ["final"]

    def test_a_stop_saves_what_is_not_saved_yet(self, saver: Saver, tmp_path: Path) -> None:
        saver.progress.step = 3
        saver.save_here()
        saver.save_here()
        assert [path.name for path in tmp_path.iterdir()] == ["step_000003"] and len(self.written) == 1

    def test_what_was_saved_is_what_a_resumed_run_takes_over(self, saver: Saver, tmp_path: Path, caplog) -> None:
        caplog.set_level("INFO")
        saver.learner.skipped_steps, saver.learner.token_budget = 2, 64
        saver.save(["step_000004"])
        saved, taken = open_resume("newest", tmp_path), []
        optimizer = SimpleNamespace(load_state_tensors=taken.append, state_tensors=dict)
        learner = SimpleNamespace(optimizer=optimizer)
        other = Saver(tmp_path, 0, SCHEDULE, saver.settings, {}, learner, None, dict, Processes())
        other.take_over(saved)
        assert (other.progress, other.run) == (saver.progress, saver.run) and list(taken[0]) == ["master/weight"]
        assert (other.learner.skipped_steps, other.learner.token_budget) == (2, 64)
        assert caplog.messages[-1].endswith("step_000004: grpo step 4")
        saver.check(saved, ["seed was 0, is 1"], allow_changes=True)
        assert caplog.messages[-1] == "changed settings: seed was 0, is 1"
        with pytest.raises(UserError, match="had other settings: seed was 0, is 1"):
            saver.check(saved, ["seed was 0, is 1"], allow_changes=False)

    def test_another_number_of_processes_is_told(self, saver: Saver, tmp_path: Path, caplog) -> None:
        caplog.set_level("INFO")
        saver.processes = SimpleNamespace(world=3, first=lambda work: work())
        saver.save(["step_000004"])
        saver.processes, saver.learner.optimizer.load_state_tensors = Processes(), lambda tensors: None
        saver.take_over(open_resume("newest", tmp_path))
        assert caplog.messages[-1].endswith("step_000004: grpo step 4 in 1 processes after 3, the same up to rounding")

    def test_an_entry_of_the_state_that_is_missing_or_unknown_is_one_line(self, saver: Saver, tmp_path: Path) -> None:
        saver.save(["final"])
        path = tmp_path / "final" / "trainer.json"
        whole = json.loads(path.read_text(encoding="utf-8"))
        for entry, reason in (
            ({"progress": {"flavour": 1}}, "'flavour'"),
            ({"progress": {**whole["progress"], "step": "3"}}, "step is '3'"),
            ({"progress": {**whole["progress"], "phase": ["grpo"]}}, r"phase is \['grpo'\]"),
            ({"progress": 5}, "mapping"),
            ({"flavour": 1}, "'flavour'"),
            ({"settings": []}, r"settings is \[\]"),
            ({"log_lines": None}, "log_lines is None"),
            ({"saves": "many"}, "saves is 'many'"),
            ({"saved_at": "noon"}, "saved_at is 'noon'"),
            ({"run": None}, "run is None"),
        ):
            path.write_text(json.dumps({**whole, **entry}), encoding="utf-8")
            with pytest.raises(ValueError, match=f"does not fit this program: .*{reason}"):
                read_state(tmp_path / "final")
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != "run"}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"does not fit this program: .*missing .*'run'"):
            read_state(tmp_path / "final")

    def test_the_state_holds_what_the_next_step_depends_on(self, saver: Saver, tmp_path: Path) -> None:
        saver.save(["final"])
        state = json.loads((tmp_path / "final" / "trainer.json").read_text(encoding="utf-8"))
        learner = {"skipped_steps", "skips_in_a_row", "token_budget"}
        run = {"run", "progress", "settings", "identity", "reference", "processes", "saves", "saved_at"}
        assert state.keys() == learner | run | {"log_lines"}
