"""Log files: the settings of a run; TensorBoard's event files, read back with TensorBoard's own reader."""

import importlib.util
import json
from contextlib import closing
from pathlib import Path

import pytest

from src.errors import UserError
from src.run.state import Progress, State
from src.run.tracking import RunLog
from src.settings import TrainConfig
from tests.helpers import state


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of one metric."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def begun(folder: Path, saved: State | None = None, run: str = "a") -> closing:
    """The logs of a run with TensorBoard's files too."""
    run_log = RunLog(folder, tensorboard=True)
    run_log.begin(run, {}, (), saved)
    return closing(run_log)


def steps(run_log: RunLog, phase: str, numbers: range, value: float) -> None:
    for step in numbers:
        run_log.metrics(phase, step, {"loss": value, "reward/my_own": value / 2})


def test_the_file_of_settings_says_which_do_not_tell_two_runs_apart(tmp_path: Path) -> None:
    with closing(RunLog(tmp_path)) as run_log:
        run_log.begin("a", {"seed": 3, "kl_coef": 0.1, "log_dir": "logs"}, {"kl_coef"})
    settings = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
    silent = ["log_dir", "run", "seed"]
    assert settings == {"seed": 3, "kl_coef": 0.1, "log_dir": "logs", "run": "a", "not_compared": silent}
    assert '"kl_coef": 0.1' in (tmp_path / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", ["5", "null", "[", '{"zero_signal_groups": "x"}'])
def test_an_edited_line_of_metrics_does_not_spoil_the_end_of_a_run(tmp_path: Path, line: str) -> None:
    with closing(RunLog(tmp_path)) as run_log:
        run_log.begin("a", {}, ())
        run_log.metrics("grpo", 1, {"zero_signal_groups": 0.5})
        with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        run_log.summary(Progress("grpo", 20, before=0.25, after=0.5, best=0.625, best_step=10), Path("final"))
    assert "checkpoint: final" in (tmp_path / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ([1.0] * 20, True),
        ([0.0] * 16 + [1.0] * 4, True),
        ([0.0] * 17 + [1.0] * 3, False),
        ([1.0] * 19 + [0.75], False),
        ([0.0] * 2 + [1.0] * 3, True),
        ([0.0] * 3 + [1.0] * 2, False),
        ([], False),
    ],
)
def test_a_run_ends_with_its_accuracies_and_says_when_its_last_fifth_had_no_signal(
    tmp_path: Path, shares: list[float], told: bool
) -> None:
    with closing(RunLog(tmp_path)) as run_log:
        run_log.begin("a", {}, ())
        for step, share in enumerate(shares, 1):
            run_log.metrics("grpo", step, {"zero_signal_groups": share})
        run_log.metrics("eval", len(shares), {"eval/accuracy": 0.5})
        run_log.summary(Progress("grpo", 20, before=0.25, after=0.5, best=0.625, best_step=10), Path("my final"))
    end = (tmp_path / "train.log").read_text(encoding="utf-8").split(" done\n")[1].splitlines()
    assert end[:3] == [
        "accuracy: 25.0% before, 62.5% at best (step 10), 50.0% at the end",
        "checkpoint: my final",
        "next: python test.py --checkpoint 'my final'",
    ]
    assert any("no signal in the last fifth of the run" in line for line in end) is told


@pytest.fixture(autouse=True)
def tensorboard() -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def test_every_metric_of_every_phase_is_there_at_its_step(tmp_path: Path) -> None:
    with begun(tmp_path) as run_log:
        steps(run_log, "cold_start", range(1, 4), 1.0)
        steps(run_log, "grpo", range(1, 3), 0.5)
        run_log.metrics("eval", 0, {"eval/accuracy": 0.25})
    assert scalars(tmp_path, "cold_start/loss") == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert scalars(tmp_path, "grpo/reward/my_own") == [(1, 0.25), (2, 0.25)]
    assert scalars(tmp_path, "eval/accuracy") == [(0, 0.25)]


def test_a_resumed_run_goes_on_beside_what_it_does_again(tmp_path: Path) -> None:
    with begun(tmp_path) as run_log:
        steps(run_log, "cold_start", range(1, 10), 1.0)
        steps(run_log, "grpo", range(1, 3), 2.0)
        lines = run_log.lines()
        steps(run_log, "grpo", range(3, 4), 3.0)
    with begun(tmp_path, state(log_lines=lines)) as run_log:
        steps(run_log, "grpo", range(3, 5), 4.0)
    assert scalars(tmp_path, "cold_start/loss") == [(step, 1.0) for step in range(1, 10)]
    assert sorted(scalars(tmp_path, "grpo/loss")) == [(1, 2.0), (2, 2.0), (3, 3.0), (3, 4.0), (4, 4.0)]


def test_a_new_run_sets_the_event_files_of_an_earlier_one_aside(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with begun(tmp_path) as run_log:
            steps(run_log, "grpo", range(1, 2), value)
    assert scalars(tmp_path, "grpo/loss") == [(1, 2.0)]
    assert (tmp_path / "tensorboard.1").is_dir()


def test_a_checkpoint_holds_on_to_the_points_before_it_whatever_dies(tmp_path: Path) -> None:
    with begun(tmp_path) as run_log:
        steps(run_log, "grpo", range(1, 4), 1.0)
        run_log.lines()
        assert len(scalars(tmp_path, "grpo/loss")) == 3  # read before the files are closed


def test_without_the_package_the_flag_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    TrainConfig()
    with pytest.raises(UserError, match="pip install tensorboard"):
        TrainConfig(tensorboard=True)


def test_event_files_that_fail_do_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with begun(tmp_path) as run_log:
        steps(run_log, "grpo", range(1, 4), 1.0)
        run_log.lines()
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith("No more TensorBoard files in") and "No space left on device" in message
    assert len((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3
