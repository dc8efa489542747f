"""train.py in several processes under torchrun: the same run, and what becomes of it when one of them fails."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers import assert_same, write_sums
from tests.processes import Process
from tests.test_reliability import SHORT, metrics, names, result, run, whole_run
from tests.torchrun import start_torchrun


def torchrun(*flags: str, cwd: Path, faults: str = "", **options: Any) -> Process:
    """train.py on a few problems in two processes, or as many as `processes` says, until all of them have ended."""
    process = begin(*flags, cwd=cwd, faults=faults, **options)
    process.wait()
    return process


def begin(*flags: str, cwd: Path, faults: str = "", **options: Any) -> Process:
    if not (cwd / "data").exists():
        write_sums(cwd / "data")
    faults = f"import os, signal, sys, time\n{faults}"
    return start_torchrun("train.py", "--dataset", "data", *flags, cwd=cwd, faults=faults, **options)


def in_step(number: int, what: str) -> str:
    """Code with which the process RANK does something before learning in GRPO step `number`."""
    return f"""
import src.grpo as g
g.steps, learning, step = 0, g.GRPOTrainer.update, g.GRPOTrainer.step
def update(self, *given):
    if g.steps == {number}:
        {what}
    return learning(self, *given)
def counted(self, number, *given):
    g.steps = number + 1
    return step(self, number, *given)
g.GRPOTrainer.update, g.GRPOTrainer.step = update, counted
"""


def until_asked(number: int) -> str:
    """Code that holds GRPO step `number` until the process has been asked to stop."""
    heard = """
import src.run.stopping as s
handle, heard = s.StopRequest._handle, []
def hear(self, *given):
    heard.append(True)
    handle(self, *given)
s.StopRequest._handle = hear
"""
    return heard + in_step(number, "while not heard: time.sleep(0.005)")


def the_line(process: Process) -> str:
    """The one line that train.py says at its end."""
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("train.py: ")]
    assert process.returncode != 0 and "Traceback" not in process.stderr.partition(line)[0], process.stderr
    return line.removeprefix("train.py: ")


def masters(cwd: Path) -> dict:
    return load_file(cwd / "checkpoints" / "final" / "trainer.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole short run in one process."""
    return whole_run(tmp_path_factory.mktemp("alone"), *SHORT)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in two."""
    folder = tmp_path_factory.mktemp("both")
    done = torchrun(*SHORT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def goes_on_like(cwd: Path, whole: Path) -> None:
    """Resume it, and compare its end with that of the undisturbed run, to the bit."""
    done = torchrun(*SHORT, "--resume", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert result(cwd) == result(whole)


class TestTheSameRun:
    def check(self, cwd: Path, alone: Path) -> None:
        assert names(cwd) == names(alone)
        for actual, expected in zip(metrics(cwd), metrics(alone), strict=True):
            assert actual.pop("phase") == expected.pop("phase")
            assert actual == pytest.approx(expected, rel=1e-3, abs=1e-4)
        weights = [{n: t for n, t in masters(folder).items() if n.startswith("master/")} for folder in (cwd, alone)]
        assert_same(*weights, tolerance=1e-3)

    def test_two_processes_end_where_one_does(self, both: Path, alone: Path) -> None:
        self.check(both, alone)
        assert (both / "logs" / "samples.jsonl").read_text() == (alone / "logs" / "samples.jsonl").read_text()
        assert "1 CPU threads), processes: 2\n" in (both / "logs" / "train.log").read_text()

    def test_more_processes_than_problems_in_a_step_end_there_too(self, alone: Path, tmp_path: Path) -> None:
        assert torchrun(*SHORT, cwd=tmp_path, processes=3).returncode == 0
        self.check(tmp_path, alone)

    def test_two_launchers_that_meet_are_one_run(self, both: Path, tmp_path: Path) -> None:
        launcher = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=tests", "--local_addr=127.0.0.1"]
        launcher += [f"--rdzv_endpoint=127.0.0.1:{20000 + os.getpid() % 20000}"]
        (tmp_path / "second").mkdir()
        write_sums(tmp_path / "second" / "data")
        second = begin(*SHORT, cwd=tmp_path / "second", processes=1, launcher=launcher)
        first = begin(*SHORT, cwd=tmp_path, processes=1, launcher=launcher)
        assert (first.wait(), second.wait()) == (0, 0), first.stderr + second.stderr
        folders = [folder for folder in (tmp_path, tmp_path / "second") if (folder / "checkpoints").exists()]
        assert [result(folder) for folder in folders] == [result(both)]

    def test_another_number_of_processes_goes_on_and_says_so(self, both: Path, alone: Path, tmp_path: Path) -> None:
        where = both / "checkpoints" / "step_000002"
        done = run(*SHORT, "--resume", str(where), cwd=tmp_path)
        assert "grpo step 2 in 1 processes after 2, the same up to rounding" in done.stderr
        assert_same(masters(tmp_path), masters(alone), 1e-2)

    def test_ranks_above_the_first_leave_nothing_and_say_nothing(self, both: Path, tmp_path: Path) -> None:
        done = torchrun("--help", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.count("usage:") == 1


class TestKills:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_process_that_is_killed_ends_all(self, rank: int, both: Path, tmp_path: Path) -> None:
        kill = f"if RANK == {rank}: os.kill(os.getpid(), signal.SIGKILL)"
        line = the_line(torchrun(*SHORT, cwd=tmp_path, faults=in_step(3, kill)))
        assert line.startswith("Another process of this run has ended")
        assert "step_000002" in names(tmp_path) and "final" not in names(tmp_path)
        goes_on_like(tmp_path, both)

    def test_a_launcher_that_ends_a_process_as_it_says_why_cuts_nothing_short(self, tmp_path: Path) -> None:
        faults = "from src.engine.processes import Processes as P\ntell = P.first_to_tell\n"
        faults += "P.first_to_tell = lambda self: os.kill(os.getpid(), signal.SIGTERM) or tell(self)\n"
        assert the_line(torchrun(*SHORT, "--model", "missing", cwd=tmp_path, faults=faults)).startswith("Cannot load")

    def test_processes_whose_launcher_is_killed_stop_and_save(self, both: Path, tmp_path: Path) -> None:
        hold = "open(f'busy{RANK}', 'w').write('yes')\n"
        hold += "        while os.getppid() == launcher: time.sleep(0.005)"
        process = begin(*SHORT, cwd=tmp_path, faults="launcher = os.getppid()\n" + in_step(3, hold))
        for rank in range(2):
            process.wait_for("yes", tmp_path / f"busy{rank}")
        process.send_signal(signal.SIGKILL)
        while "stopped at grpo step 3; go on with the same command and --resume" not in process.stderr:
            time.sleep(0.01)
        goes_on_like(tmp_path, both)

    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_a_launcher_that_is_asked_to_stop_leaves_a_checkpoint(self, signum: int, both: Path, tmp_path) -> None:
        faults = until_asked(3).replace("while not", "open(f'busy{RANK}', 'w').write('yes')\n        while not")
        process = begin(*SHORT, cwd=tmp_path, faults=faults)
        for rank in range(2):
            process.wait_for("yes", tmp_path / f"busy{rank}")
        process.send_signal(signum)
        assert process.wait() != 0
        assert process.stderr.count("stopped at grpo step 3; go on with the same command and --resume") == 1
        assert "step_000003" in names(tmp_path)
        goes_on_like(tmp_path, both)

    def test_a_signal_to_one_process_stops_all(self, both: Path, tmp_path: Path) -> None:
        stop = "if RANK == 1: os.kill(os.getpid(), signal.SIGTERM)"
        process = torchrun(*SHORT, cwd=tmp_path, faults=in_step(2, stop))
        assert process.returncode != 0 and "stopped at grpo step 2; go on with" in process.stderr
        goes_on_like(tmp_path, both)

    def test_a_stop_during_a_validation_stops_all(self, both: Path, tmp_path: Path) -> None:
        faults = "import src.evaluation as e\ngenerate = e.Sampler.generate\n"
        faults += "def stopped(*a, on_progress=None, **k):\n"
        faults += "    if on_progress and RANK == 1: os.kill(os.getpid(), 15)\n"
        faults += "    return generate(*a, on_progress=on_progress, **k)\ne.Sampler.generate = stopped"
        process = torchrun(*SHORT, cwd=tmp_path, faults=faults)
        assert process.returncode != 0 and "stopped at grpo step 0; go on with" in process.stderr
        goes_on_like(tmp_path, both)

    @pytest.mark.parametrize("moment", ["before it comes", "in a step"])
    def test_a_process_that_hangs_is_waited_for_no_longer_than_said(self, moment: str, tmp_path: Path) -> None:
        hang = "if RANK == 1: signal.pause()"
        faults = hang if moment == "before it comes" else in_step(2, hang)
        patience = {"PROCESS_TIMEOUT": "1" if moment == "before it comes" else "4"}
        line = the_line(torchrun(*SHORT, cwd=tmp_path, faults=faults, environment=patience))
        assert line.startswith("Another process of this run has ended, or does not answer (") and "000ms" in line


class TestErrors:
    """What one process alone runs into."""

    def test_a_reward_that_raises_leaves_a_checkpoint_and_says_where(self, tmp_path: Path) -> None:
        text = "import os\ncalls = []\ndef moody(completion):\n    calls.append(1)\n"
        text += (
            "    if os.environ.get('RANK') == '1' and len(calls) > 20: raise ValueError('not today')\n    return 1.0\n"
        )
        (tmp_path / "mine.py").write_text(text, encoding="utf-8")
        line = the_line(torchrun(*SHORT, "--rewards", "mine.py:moody", cwd=tmp_path))
        assert (
            line.startswith("After grpo step ") and "The reward 'moody' raised ValueError (not today, mine.py" in line
        )
        assert f"step_{int(line.split()[3].rstrip(':')):06d}" in names(tmp_path)

    def test_data_that_one_process_cannot_read(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        line = the_line(torchrun(*SHORT, cwd=tmp_path, faults="if RANK == 1: os.chdir('elsewhere')"))
        assert "'data'" in line and "Another process" not in line

    @pytest.mark.parametrize("kind", ["OutOfMemoryError", "RuntimeError"])
    def test_a_memory_that_is_full_on_one_process(self, kind: str, tmp_path: Path) -> None:
        spoilt = "accumulate_gradients" if kind == "OutOfMemoryError" else "decode"
        faults = f"""
import torch, src.grpo as g
def full(*given, **named):
    raise torch.{kind}("Tried to allocate 2 GiB") if "{kind}" in dir(torch) else {kind}("can't allocate memory")
if RANK == 1: g.{spoilt} = full
"""
        line = the_line(torchrun(*SHORT, cwd=tmp_path, faults=faults))
        assert "emory is full" in line and "--group_size" in line

    def test_a_gradient_of_one_process_that_is_not_finite_skips_the_step(self, tmp_path: Path) -> None:
        faults = in_step(2, "if RANK == 1: next(iter(self.optimizer.params.values())).register_hook(lambda g: g * nan)")
        done = torchrun(*SHORT, cwd=tmp_path, faults=faults.replace("import src", "nan = float('nan')\nimport src"))
        assert done.returncode == 0, done.stderr
        assert [row["skipped_steps"] for row in metrics(tmp_path) if row["phase"] == "grpo"][:2] == [0, 1]

    def test_a_full_disk_is_tried_again_and_ends_all_at_the_last_save(self, tmp_path: Path) -> None:
        faults = "import src.run.checkpoint as c\ndef full(*given): raise OSError(28, 'No space left on device')\n"
        process = torchrun(*SHORT, "--kl_coef", "0", cwd=tmp_path, faults=faults + "c.save_file = full")
        assert "No space left on device" in the_line(process)
        assert process.stderr.count("The run goes on and tries again at the next save.") >= 2
        assert names(tmp_path) == set()

    def test_a_bug_shows_its_traceback_and_ends_all(self, tmp_path: Path) -> None:
        process = torchrun(*SHORT, cwd=tmp_path, faults=in_step(2, "if RANK == 1: 1 / 0"))
        assert process.returncode != 0 and "ZeroDivisionError: division by zero" in process.stderr
        assert process.stderr.count("train.py: Another process of this run has ended") == 1


def test_an_evaluation_in_three_processes_is_that_of_one(tmp_path: Path) -> None:
    write_sums(tmp_path / "data")
    flags = ["--model", "tiny", "--dataset", "data", "--num_samples", "7", "--k", "2", "--interactive", "false"]
    files = [tmp_path / name for name in ("one.json", "three.json")]
    for path, processes in zip(files, (1, 3), strict=True):
        done = start_torchrun("test.py", *flags, "--output", str(path), cwd=tmp_path, processes=processes)
        assert done.wait() == 0, done.stderr
        assert done.stdout.count("on 7 problems, with 95% intervals:") == 1
    assert files[0].read_bytes() == files[1].read_bytes()
