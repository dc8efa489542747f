"""When a run is saved, and under which names."""

from pathlib import Path

import pytest

from src.errors import UserError
from src.run.saving import Progress, Saver, due_names


def due(phase: str = "grpo", step: int = 0, evaluated: bool = True, best_step: int = 0, **changes) -> list[str]:
    rules = {"save_every": 4, "steps_per_epoch": 6, "total_steps": 13, "keep_best": True, **changes}
    return due_names(Progress(phase, step, evaluated, best_step=best_step), **rules)


@pytest.mark.parametrize(
    ("names", "case"),
    [
        ([], {"step": 0}),
        ([], {"step": 3}),
        (["step_000004"], {"step": 4}),
        ([], {"step": 4, "save_every": 0}),
        (["epoch_1"], {"step": 6}),
        (["step_000012", "epoch_2", "best"], {"step": 12, "best_step": 12}),
        (["step_000012", "epoch_2"], {"step": 12, "best_step": 12, "keep_best": False}),
        (["step_000012", "epoch_2"], {"step": 12, "best_step": 12, "evaluated": False}),
        (["final"], {"step": 13}),
        (["final"], {"step": 0, "total_steps": 0}),
        (["cold_start_000004"], {"phase": "cold_start", "step": 4}),
        ([], {"phase": "cold_start", "step": 6}),
        ([], {"phase": "cold_start", "step": 13}),
    ],
)
def test_steps_epochs_the_best_and_the_last_have_names(names: list[str], case: dict) -> None:
    assert due(**case) == names


class TestSaver:
    @pytest.fixture
    def written(self) -> list[Path]:
        return []

    @pytest.fixture
    def write(self, written: list[Path]):
        def write(path: Path) -> None:
            path.mkdir(parents=True)
            (path / "file").write_text(str(len(written)), encoding="utf-8")
            written.append(path)

        return write

    def test_a_state_is_written_once_whatever_its_names_and_however_often(self, tmp_path, write, written) -> None:
        saver, progress = Saver(tmp_path, 0), Progress("grpo", 4)
        for names in (["step_000004", "final"], ["step_000004", "final"], ["best"]):
            saver.save(names, progress, write)
        assert written == [tmp_path / "step_000004"]
        assert {path.name for path in tmp_path.iterdir()} == {"step_000004", "final", "best"}
        assert (tmp_path / "best" / "file").samefile(tmp_path / "final" / "file")
        progress.step = 5  # the saver keeps a copy of its own
        saver.save(["step_000005"], progress, write)
        assert written[1:] == [tmp_path / "step_000005"]

    def test_what_could_not_be_saved_is_not_taken_for_saved(self, tmp_path, write, written) -> None:
        saver, progress = Saver(tmp_path, 0), Progress("grpo", 4)

        def fail(path: Path) -> None:
            raise UserError("the disk is full")

        with pytest.raises(UserError, match="full"):
            saver.save(["step_000004", "final"], progress, fail)
        assert saver.saved is None and list(tmp_path.iterdir()) == []
        saver.save(["final"], progress, write)
        assert written == [tmp_path / "final"]

    def test_a_checkpoint_that_somebody_removed_is_written_anew(self, tmp_path, write, written) -> None:
        saver, progress = Saver(tmp_path, 0), Progress("grpo", 4)
        saver.save(["step_000004"], progress, write)
        (tmp_path / "step_000004" / "file").unlink()
        (tmp_path / "step_000004").rmdir()
        saver.save(["final"], progress, write)
        assert written == [tmp_path / "step_000004", tmp_path / "final"]
