"""What happens to a running train.py: killed, stopped, out of disk, refused, fed with damage; and what is left then."""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from src.engine.learner import MAX_SKIPS
from tests import processes
from tests.helpers import write_sums
from tests.processes import ROOT, Process

TINY = "--preset tiny --cold_start_batch_size 8 --prompts_per_step 2 --group_size 4 --max_completion_tokens 12 "
TINY += "--eval_samples 6 --sample_every 1 --device cpu --learning_rate 1e-4 --warmup_steps 2"
SHORT = f"{TINY} --cold_start_steps 3 --max_steps 4 --eval_every 2 --save_every 2 --keep_last 0 --kl_coef 0.1".split()
CLOCK = ("seconds", "tokens_per_second", "peak_memory")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to mount a small disk or to become another user")
needs_reading_by_others = pytest.mark.skipif(
    not all(path.stat().st_mode & 5 == 5 for path in (ROOT / "src", ROOT, *ROOT.parents)),
    reason="others may not read this checkout",
)


def start(*flags: str, cwd: Path, faults: str = "", user: str | None = None) -> Process:
    """train.py on a few problems, since making thousands takes long; `faults` is code that it runs first."""
    if not (cwd / "data").exists():
        write_sums(cwd / "data")
    flags = ("--dataset", "data", *flags)
    return processes.start("train.py", *flags, cwd=cwd, faults=faults, user=user)


def run(*flags: str, **options: Any) -> Process:
    process = start(*flags, **options)
    process.wait()
    return process


def metrics(cwd: Path) -> list[dict]:
    """The lines of metrics.jsonl, each of which has to be JSON, without what a clock measured."""

    def no_number(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    lines = (cwd / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line, parse_constant=no_number) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]


def result(cwd: Path) -> tuple:
    """What a run ends with: weights, masters, moments, metrics and samples, to the bit."""
    final = cwd / "checkpoints" / "final"
    files = [(final / name).read_bytes() for name in ("model.safetensors", "trainer.safetensors")]
    return *files, metrics(cwd), (cwd / "logs" / "samples.jsonl").read_bytes()


def names(cwd: Path) -> set[str]:
    """What is in the checkpoint folder, debris included."""
    return {path.name for path in (cwd / "checkpoints").iterdir()} - {".lock"}


def last_line(process: Process) -> str:
    assert "Traceback" not in process.stderr, process.stderr
    return process.stderr.splitlines()[-1]


def whole_run(cwd: Path, *flags: str, faults: str = "") -> Path:
    cwd.mkdir(parents=True, exist_ok=True)
    done = run(*flags, cwd=cwd, faults=faults)
    assert done.returncode == 0, done.stderr
    return cwd


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole short run, to be read or copied."""
    return whole_run(tmp_path_factory.mktemp("a run with späces"), *SHORT)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be spoilt."""
    for folder in ("checkpoints", "logs"):
        shutil.copytree(finished / folder, tmp_path / folder)
    return tmp_path


def counted(part: str, last: int = 0) -> str:
    """Code that counts calls of our functions in this part of src, readable from outside even after a kill; the
    process is killed at the last."""
    return f"""
import mmap, os, sys
file = open("calls", "w+b")
file.write(bytes(8)), file.flush()
shared, calls = mmap.mmap(file.fileno(), 8), 0
def count(frame, event, arg):
    global calls
    if event == "call" and frame.f_code.co_filename.startswith("{processes.ROOT}/src/{part}"):
        calls += 1
        shared[:] = calls.to_bytes(8, "little")
        if calls == {last}:
            os.kill(os.getpid(), 9)
sys.setprofile(count)
"""


def calls_of(cwd: Path) -> int:
    return int.from_bytes((cwd / "calls").read_bytes(), "little")


def resume_flags(cwd: Path) -> list[str]:
    return ["--resume"] if any((cwd / "checkpoints").glob("[!.]*/manifest.json")) else []


class TestKills:
    """kill -9 at any moment costs what was not saved, nothing else."""

    FLAGS = f"{TINY} --cold_start_steps 3 --save_every 1 --keep_last 3 --kl_coef 0.1 --updates_per_rollout 2".split()

    def survive(self, flags: list[str], cwd: Path, kills: int, seed: int, part: str = "") -> int:
        """Kill a run that often, at random calls of ours, and resume it; it ends like an undisturbed one.

        The calls, in this part of src, are drawn so that the kills spread over the whole run, loading and saving
        included. Returns how many of them hit a save.
        """
        whole, killed, moments, hits = cwd / "whole", cwd / "killed", random.Random(seed), 0
        calls = calls_of(whole_run(whole, *flags, faults=counted(part)))
        loading = calls_of(whole_run(whole, *flags, "--resume", faults=counted(part)))  # nothing was left to do
        killed.mkdir()
        for _ in range(kills):
            moment = moments.randrange(loading // 2, loading + (calls - loading) // (kills + 1))
            done = run(*flags, *resume_flags(killed), cwd=killed, faults=counted(part, moment))
            assert done.returncode == -signal.SIGKILL, f"it ended before call {moment}: {done.stderr}"
            hits += any(name.startswith(".") for name in names(killed))
        whole_run(killed, *flags, *resume_flags(killed))
        assert result(killed) == result(whole)
        assert not any(name.startswith(".") for name in names(killed))
        return hits

    def test_a_run_killed_at_random_moments_ends_like_an_undisturbed_one(self, tmp_path: Path) -> None:
        self.survive([*self.FLAGS, "--max_steps", "12", "--eval_every", "4"], tmp_path, kills=6, seed=0)

    @pytest.mark.parametrize(
        ("place", "when"),
        [
            (
                "src.run.saving.Saver.save",
                "'step_000002' in a[1] and a[0].progress.phase == 'grpo'",
            ),  # validated, not yet saved
            (
                "src.run.checkpoint.save_file",
                "os.path.exists('checkpoints/.unfinished-step_000004')",
            ),  # half a checkpoint
            ("src.run.checkpoint._flush", "'final' in str(a[0])"),  # all of it, under another name
            ("src.run.checkpoint.copy_checkpoint", "a[1].name == 'final'"),  # saved under the first of its names
        ],
    )
    def test_a_kill_at_the_worst_moments_is_survived_too(self, finished, tmp_path: Path, place: str, when: str) -> None:
        target, name = place.rsplit(".", 1)
        faults = f"""
import os, src.run.saving, src.run.checkpoint
real = {place}
def kill(*a, **k):
    if {when}:
        os.kill(os.getpid(), 9)
    return real(*a, **k)
{target}.{name} = kill
"""
        assert run(*SHORT, cwd=tmp_path, faults=faults).returncode == -signal.SIGKILL
        whole_run(tmp_path, *SHORT, "--resume")
        assert result(tmp_path) == result(finished) and names(tmp_path) == names(finished)

    @pytest.mark.slow
    def test_two_hundred_kills(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        flags = [*self.FLAGS, "--max_steps", "150", "--eval_every", "25"]
        anywhere = self.survive(flags, tmp_path / "anywhere", kills=100, seed=1)
        saving = self.survive(flags, tmp_path / "saving", kills=100, seed=1, part="run/checkpoint.py")
        with capsys.disabled():
            print(f"\n200 kills, {anywhere + saving} of them during a save")
        assert saving >= 10


class TestStops:
    """Requests to stop end within a step, with a checkpoint to go on from."""

    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    @pytest.mark.parametrize("moment", [("cold_start", 2), ("grpo", 2)])
    def test_it_saves_says_how_to_go_on_and_goes_on_to_the_same_end(self, finished, tmp_path, signum, moment) -> None:
        flags, (phase, step) = [*SHORT, "--save_every", "0"], moment
        times = 1 if signum == signal.SIGINT else 2  # a lost terminal hangs up twice: by its shell, and by the kernel
        faults = "import os, src.run.tracking as t\nreal = t.RunLog.metrics\ndef metrics(log, phase, step, values):\n"
        faults += "    real(log, phase, step, values)\n"
        faults += f"    if (phase, step) == {moment}: [os.kill(os.getpid(), {signum:d}) for _ in range({times})]\n"
        process = run(*flags, cwd=tmp_path, faults=f"{faults}t.RunLog.metrics = metrics")
        assert process.returncode == 128 + signum
        assert "go on with the same command and --resume" in last_line(process)
        assert [row["step"] for row in metrics(tmp_path) if row["phase"] == phase] == [*range(1, step + 1)]  # no more
        whole_run(tmp_path, *flags, "--resume")
        assert result(tmp_path) == result(finished)

    def test_a_stop_during_the_first_validation_can_be_resumed(self, finished, tmp_path: Path) -> None:
        faults = "import os, src.evaluation as e; generate = e.Sampler.generate\n"
        faults += "def stopped(*a, on_progress=None, **k):\n    if on_progress: os.kill(os.getpid(), 15)\n"
        faults += "    return generate(*a, on_progress=on_progress, **k)\ne.Sampler.generate = stopped"
        process = run(*SHORT, cwd=tmp_path, faults=faults)
        assert process.returncode == 128 + signal.SIGTERM and "stopped at grpo step 0" in last_line(process)
        whole_run(tmp_path, *SHORT, "--resume")
        assert result(tmp_path) == result(finished)

    def test_a_second_one_ends_it_at_once(self, tmp_path: Path) -> None:
        how = "import os; [os.kill(os.getpid(), 2) for _ in range(2)]"
        process = run(*SHORT, cwd=tmp_path, faults=spoil("cold_start", "supervised_gradients", "[1]", how))
        assert process.returncode == 130
        assert "stopped at once" in last_line(process)
        assert names(tmp_path) == set()

    def test_nohup_holds(self, tmp_path: Path) -> None:
        faults = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
        process = start(*SHORT, cwd=tmp_path, faults=faults)
        process.wait_for("cold_start", tmp_path / "logs" / "metrics.jsonl")
        process.send_signal(signal.SIGHUP)
        assert process.wait() == 0


class TestResume:
    """Wherever a run goes on from, its end is the same."""

    @pytest.mark.parametrize("name", ["cold_start_000002", "cold_start", "step_000002", "final"])
    def test_every_checkpoint_leads_to_the_same_end(self, finished, copied: Path, name: str) -> None:
        whole_run(copied, *SHORT, "--resume", f"checkpoints/{name}")
        assert result(copied) == result(finished)

    @pytest.mark.skipif(os.cpu_count() == 1, reason="threads that share one core do not race")
    def test_with_two_threads_and_large_batches_the_end_is_the_same_too(self, tmp_path: Path) -> None:
        flags = [*SHORT, "--prompts_per_step", "8", "--group_size", "8", "--max_completion_tokens", "48"]
        threads = "import torch; torch.set_num_threads(2)\n"
        whole = whole_run(tmp_path / "whole", *flags, faults=threads)
        shutil.copytree(whole, tmp_path / "again")
        whole_run(tmp_path / "again", *flags, "--resume", "checkpoints/cold_start_000002", faults=threads)
        assert result(tmp_path / "again") == result(whole)

    def test_it_may_go_on_in_other_folders_again_and_again(self, finished, copied: Path) -> None:
        others = ["--checkpoint_dir", "other"]
        whole_run(copied, *SHORT, *others, "--max_steps", "3", "--resume", "checkpoints/step_000002")
        whole_run(copied, *SHORT, *others, "--resume")  # needs the cold start as its reference
        shutil.rmtree(copied / "checkpoints")
        (copied / "other").rename(copied / "checkpoints")
        assert result(copied)[:2] == result(finished)[:2]

    def test_epochs_end_and_begin_as_in_one_go(self, tmp_path: Path) -> None:
        flags = f"{TINY} --epochs 2 --max_steps 8 --eval_every 0 --save_every 0 --cold_start_steps 0".split()
        whole = whole_run(tmp_path / "whole", *flags)
        assert names(whole) == {"epoch_1", "epoch_2", "final"}  # 9 problems are 4 steps of 2
        shutil.copytree(whole, tmp_path / "again")
        whole_run(tmp_path / "again", *flags, "--resume", "checkpoints/epoch_1")
        assert result(tmp_path / "again") == result(whole)

    def test_more_steps_than_planned_are_as_if_planned(self, finished, tmp_path: Path) -> None:
        whole_run(tmp_path, *SHORT, "--max_steps", "2")
        whole_run(tmp_path, *SHORT, "--resume")
        assert result(tmp_path) == result(finished)

    def test_as_many_steps_as_done_make_the_last_checkpoint(self, copied: Path) -> None:
        shutil.rmtree(copied / "checkpoints" / "final")
        whole_run(copied, *SHORT, "--max_steps", "2", "--resume", "checkpoints/step_000002")
        final, step = (copied / "checkpoints" / name / "model.safetensors" for name in ("final", "step_000002"))
        assert final.samefile(step)

    def test_fewer_steps_than_done_are_refused(self, finished) -> None:
        done = run(*SHORT, "--max_steps", "1", "--resume", cwd=finished)
        assert done.returncode == 1 and "is at step 4, but this run ends at step 1" in last_line(done)

    def test_nothing_to_resume_is_said(self, tmp_path: Path) -> None:
        done = run(*SHORT, "--resume", cwd=tmp_path)
        assert done.returncode == 1 and "no whole checkpoint in 'checkpoints'" in last_line(done)

    def test_the_cold_start_of_another_run_is_no_reference(self, copied: Path, tmp_path_factory) -> None:
        other = whole_run(tmp_path_factory.mktemp("other"), *SHORT, "--max_steps", "0", "--seed", "1")
        shutil.rmtree(copied / "checkpoints" / "cold_start")
        shutil.copytree(other / "checkpoints" / "cold_start", copied / "checkpoints" / "cold_start")
        done = run(*SHORT, "--resume", "checkpoints/step_000002", cwd=copied)
        assert done.returncode == 1 and "'checkpoints' holds checkpoints of another run" in last_line(done)
        done = run(*SHORT, "--replace", "--resume", "checkpoints/step_000002", cwd=copied)
        assert (
            done.returncode == 1
            and "cold_start' is not what 'checkpoints/step_000002' says it began from" in last_line(done)
        )

    def test_logs_that_lost_lines_or_end_in_half_a_line_stay_readable(self, copied: Path) -> None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = copied / "logs" / name
            path.write_bytes(path.read_bytes()[:-700])
        done = run(*SHORT, "--resume", "--max_steps", "6", cwd=copied)
        assert done.returncode == 0 and "metrics.jsonl has lost lines" in done.stderr
        assert [row["step"] for row in metrics(copied) if row["phase"] == "grpo"][-2:] == [5, 6]


class TestKeeping:
    def test_the_last_saves_the_best_the_cold_start_and_the_end_stay(self, tmp_path: Path) -> None:
        flags = f"{TINY} --cold_start_steps 3 --max_steps 5 --eval_every 1 --save_every 1 --keep_last 2".split()
        faults = "import src.evaluation as e; metrics = e.Evaluation.metrics\n"
        faults += "marks = iter([0.2, 0.1, 0.5, 0.4, 0.3, 0.5])\n"
        faults += "e.Evaluation.metrics = lambda *given: metrics(*given) | {'eval/accuracy': next(marks)}"
        done = run(*flags, cwd=tmp_path, faults=faults)
        assert done.returncode == 0, done.stderr
        assert names(tmp_path) == {"cold_start", "best", "epoch_1", "step_000004", "step_000005", "final"}
        epoch, step = (tmp_path / "checkpoints" / name / "model.safetensors" for name in ("epoch_1", "step_000004"))
        assert epoch.samefile(step)  # two names of one save
        best = json.loads((tmp_path / "checkpoints" / "best" / "trainer.json").read_text(encoding="utf-8"))
        assert best["progress"]["step"] == 2 == best["progress"]["best_step"]
        assert done.stderr.count("removed checkpoints/") == 6 and "since --keep_last is 2" in done.stderr


class TestDisk:
    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
        """Mounts a disk of the size given; a second call changes its size."""
        folder = tmp_path / "disk"
        folder.mkdir()

        def size(size: str) -> Path:
            remount = ["-o", "remount"] if os.path.ismount(folder) else []
            subprocess.run(["mount", "-t", "tmpfs", *remount, "-o", f"size={size}", "tmpfs", str(folder)], check=True)
            return folder

        yield size
        subprocess.run(["umount", str(folder)], check=True)

    @needs_root
    @pytest.mark.parametrize("share", [0.02, 0.2, 0.3, 0.35, 0.6, 0.9, 0.99])  # of a second checkpoint that fits
    def test_a_full_disk_costs_the_save_at_hand_and_a_failed_last_one_is_a_failure(
        self, finished, disk, tmp_path, share
    ) -> None:
        size = sum(-file.stat().st_size // 4096 * -4096 for file in (finished / "checkpoints" / "final").iterdir())
        folder = disk(str(size + int(share * size)))
        flags = [*SHORT, "--checkpoint_dir", str(folder), "--cold_start_steps", "0", "--save_every", "1"]
        done = run(*flags, cwd=tmp_path)
        (tmp_path / "checkpoints").symlink_to(folder)
        assert done.returncode == 1
        assert "No space left on device" in last_line(done)
        assert "The run goes on and tries again at the next save." in done.stderr
        assert names(tmp_path) == {"step_000001"}
        disk("100m")
        whole_run(tmp_path, *flags, "--resume")
        assert [row["step"] for row in metrics(tmp_path) if row["phase"] == "grpo"] == [1, 2, 3, 4]

    @needs_root
    def test_logs_wait_for_room_on_the_disk(self, finished, disk, tmp_path: Path) -> None:
        folder = disk("16k")
        process = start(*SHORT, "--log_dir", str(folder), cwd=tmp_path)
        process.wait_for("saved checkpoints/step_000002", process.folder / "stderr")
        disk("10m")
        assert process.wait() == 0
        assert "Cannot write to" in process.stderr and "Traceback" not in process.stderr
        (tmp_path / "logs").symlink_to(folder)
        assert result(tmp_path) == result(finished)

    @needs_root
    def test_logs_that_never_find_room_do_not_end_the_run(self, disk, tmp_path: Path) -> None:
        done = run(*SHORT, "--log_dir", str(disk("16k")), cwd=tmp_path)
        assert done.returncode == 0 and "Traceback" not in done.stderr and "Cannot write to" in done.stderr
        whole_run(tmp_path, *SHORT, "--log_dir", str(disk("10m")), "--resume", "--max_steps", "5")

    @needs_root
    @pytest.mark.parametrize("flag", ["--checkpoint_dir", "--log_dir"])
    def test_a_read_only_disk_is_said_before_training(self, disk, tmp_path: Path, flag: str) -> None:
        folder = disk("1m")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        done = run(*SHORT, flag, str(folder), cwd=tmp_path)
        assert done.returncode == 1 and f"Cannot write to '{folder}'" in last_line(done)

    @needs_root
    @needs_reading_by_others
    def test_folders_of_somebody_else_are_said_before_training(self, copied: Path) -> None:
        for folder in (copied, *copied.parents):
            if folder.owner() == "root" and folder.stat().st_mode & 0o777 == 0o700:
                folder.chmod(0o755)
        done = run(*SHORT, "--resume", cwd=copied, user="nobody")
        assert done.returncode == 1 and "Cannot write to 'checkpoints' (Permission denied)" in last_line(done)
        for folder in ("checkpoints", "logs"):  # the folder may be written, what is in it may not
            (copied / folder).chmod(0o777)
            (copied / folder / ".lock").chmod(0o666)
        for name in names(copied):
            (copied / "checkpoints" / name / "trainer.json").chmod(0o600)
        done = run(*SHORT, "--resume", cwd=copied, user="nobody")
        assert done.returncode == 1 and "no whole checkpoint" in last_line(done)
        assert done.stderr.count("PermissionError") == len(names(copied))

    def test_links_are_copies_where_the_file_system_has_none(self, finished, tmp_path: Path) -> None:
        faults = "import os\ndef link(*a, **k): raise PermissionError(1, 'Operation not permitted')\nos.link = link"
        done = run(*SHORT, cwd=tmp_path, faults=faults)
        assert done.returncode == 0, done.stderr
        assert result(tmp_path) == result(finished)
        final, step = (tmp_path / "checkpoints" / name / "model.safetensors" for name in ("final", "step_000004"))
        assert not final.samefile(step)

    def test_names_of_one_state_share_their_files(self, finished) -> None:
        final, step = (finished / "checkpoints" / name / "model.safetensors" for name in ("final", "step_000004"))
        assert final.samefile(step)


class TestTwoRuns:
    def test_a_second_run_on_the_same_folders_is_refused_a_dead_ones_lock_is_not_in_the_way(self, tmp_path) -> None:
        waits = "import time\n        while True: time.sleep(0.01)"
        first = start(*SHORT, cwd=tmp_path, faults=spoil("cold_start", "supervised_gradients", "[2]", waits))
        first.wait_for("cold_start", tmp_path / "logs" / "metrics.jsonl")
        for flags in ([], ["--checkpoint_dir", "other"], ["--log_dir", "other", "--resume"]):
            second = run(*SHORT, *flags, cwd=tmp_path)
            assert second.returncode == 1 and "Another run is writing to" in last_line(second)
            assert f"(process {first.pid})" in last_line(second)
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert (tmp_path / "checkpoints" / ".lock").exists()
        whole_run(tmp_path, *SHORT)


def spoil(module: str, name: str, calls: str, how: str) -> str:
    """Code that spoils the results of some calls (from 1) of a function of ours; the result is `loss`."""
    return f"""
import src.{module} as m
real, count = m.{name}, 0
def spoilt(*a, **k):
    global count
    loss, count = real(*a, **k), count + 1
    if count in {calls}:
        {how}
    return loss
m.{name} = spoilt
"""


class TestNumbers:
    """A loss or gradient that is not finite."""

    @pytest.mark.parametrize(
        "how",
        ["loss = loss * float('nan')", "loss = loss + float('inf')", "loss.register_hook(lambda g: g * float('nan'))"],
    )
    def test_one_step_is_skipped_and_counted(self, tmp_path: Path, how: str) -> None:
        done = run(*SHORT, cwd=tmp_path, faults=spoil("grpo", "grpo_loss", "[4]", how))
        assert done.returncode == 0, done.stderr
        rows = [row for row in metrics(tmp_path) if row["phase"] == "grpo"]
        assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 1]
        assert "not saved" not in done.stderr and "final" in names(tmp_path)
        three = whole_run(tmp_path / "three", *SHORT, "--max_steps", "3")
        ends = [(cwd / "checkpoints" / "final" / "trainer.safetensors").read_bytes() for cwd in (tmp_path, three)]
        assert ends[0] == ends[1]  # neither the weights nor the moments have been touched

    def test_too_many_in_a_row_stop_the_run_and_leave_the_good_checkpoint(self, tmp_path: Path) -> None:
        flags = [*SHORT, "--max_steps", "8", "--save_every", "1", "--keep_last", "1"]
        done = run(
            *flags, cwd=tmp_path, faults=spoil("grpo", "grpo_loss", "range(3, 99)", "loss = loss * float('nan')")
        )
        assert done.returncode == 1
        assert f"not finite in {MAX_SKIPS} updates in a row" in last_line(done)
        assert names(tmp_path) == {"cold_start", "step_000002"}
        whole_run(tmp_path, *flags, "--resume")
        whole = whole_run(tmp_path / "whole", *flags)
        assert result(tmp_path) == result(whole)

    def test_the_cold_start_is_guarded_too(self, tmp_path: Path) -> None:
        faults = spoil("cold_start", "supervised_gradients", "range(99)", "loss = float('inf')")
        done = run(*SHORT, "--cold_start_steps", "9", cwd=tmp_path, faults=faults)
        assert done.returncode == 1
        assert f"not finite in {MAX_SKIPS} updates in a row" in last_line(done)
        assert [row["skipped_steps"] for row in metrics(tmp_path)] == list(range(1, MAX_SKIPS))


class TestDamage:
    """What stands in checkpoints/ is verified before it is believed."""

    def check(self, cwd: Path, spoilt: str, reason: str) -> None:
        """The newest is passed over, named, and the one before it gives the same end; named itself, it is refused."""
        refused = run(*SHORT, "--resume", f"checkpoints/{spoilt}", cwd=cwd)
        assert refused.returncode == 1
        assert f"'checkpoints/{spoilt}' is no whole checkpoint" in last_line(refused) and reason in last_line(refused)
        done = run(*SHORT, "--resume", cwd=cwd)
        assert done.returncode == 0, done.stderr
        assert f"passing over the checkpoint checkpoints/{spoilt}: " in done.stderr and reason in done.stderr

    @pytest.mark.parametrize(
        ("name", "spoil", "reason"),
        [
            ("model.safetensors", lambda data: data[: len(data) // 2], "model.safetensors is damaged"),
            ("trainer.safetensors", lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:], "is damaged"),
            ("trainer.json", lambda data: b"", "trainer.json is damaged"),
            ("manifest.json", lambda data: b"[1, 2]", "TypeError"),
            ("manifest.json", lambda data: b"{}", "trainer.safetensors is damaged"),
            ("manifest.json", lambda data: b"\xff\xfe" * 99, "UnicodeDecodeError"),
            ("tokenizer.json", None, "tokenizer.json is missing"),
            ("manifest.json", None, "manifest.json is missing"),
        ],
    )
    def test_damaged_files_are_named(self, finished, copied: Path, name: str, spoil, reason: str) -> None:
        shutil.rmtree(copied / "checkpoints" / "step_000004")
        path = copied / "checkpoints" / "final" / name
        data = path.read_bytes()
        path.unlink()
        if spoil:
            path.write_bytes(spoil(data))
        self.check(copied, "final", reason)
        assert result(copied) == result(finished)

    def test_what_is_no_checkpoint_is_not_in_the_way(self, finished, copied: Path) -> None:
        folder = copied / "checkpoints"
        (folder / "notes.txt").write_text("mine", encoding="utf-8")
        (folder / "empty").mkdir()
        (folder / "step_nine").write_bytes(b"\0" * 99)
        (folder / "zz").symlink_to("nowhere")
        (folder / ".unfinished-step_000005").mkdir()
        (folder / "final").rename(folder / ".replaced-final")  # died between two renames
        whole_run(copied, *SHORT, "--resume")
        assert {"notes.txt", "empty", "step_nine", "zz"} < names(copied)
        assert not any(name.startswith(".") for name in names(copied))
        assert result(copied) == result(finished)

    def test_a_checkpoint_of_another_program_is_refused(self, copied: Path) -> None:
        import hashlib

        folder = copied / "checkpoints" / "final"
        state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        state["progress"]["flavour"] = 1
        data = json.dumps(state).encode()
        (folder / "trainer.json").unlink()
        (folder / "trainer.json").write_bytes(data)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        manifest["trainer.json"] = [len(data), hashlib.sha256(data).hexdigest()]
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        done = run(*SHORT, "--resume", "checkpoints/final", cwd=copied)
        assert done.returncode == 1 and "does not fit this program" in last_line(done) and "flavour" in last_line(done)


class TestModels:
    """Model folders that people make."""

    def folder(self, finished: Path, cwd: Path, spoil: Callable[[Any, Any], None]) -> Path:
        """A model folder with a space and an accent in its name, spoilt."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        good, path = finished / "checkpoints" / "final", cwd / "my modèl"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(good), AutoTokenizer.from_pretrained(good)
        spoil(model, tokenizer)
        model.save_pretrained(path), tokenizer.save_pretrained(path)
        return path

    def no_end(model, tokenizer) -> None:
        tokenizer.eos_token = None

    def no_pad(model, tokenizer) -> None:
        tokenizer.pad_token = None

    def more_words(model, tokenizer) -> None:
        tokenizer.add_tokens([f"word{i}" for i in range(9)])

    def not_finite(model, tokenizer) -> None:
        next(model.parameters()).data[3, 3] = float("nan")

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (no_end, "has no end token"),
            (more_words, "they do not belong together"),
            (not_finite, "numbers that are not finite"),
        ],
    )
    def test_what_cannot_be_trained_is_said_before_training(self, finished, tmp_path, spoil, words) -> None:
        folder = self.folder(finished, tmp_path, spoil)
        done = run(*SHORT, "--model", str(folder), cwd=tmp_path)
        assert done.returncode == 1 and words in last_line(done) and "my modèl" in last_line(done)
        assert names(tmp_path) == set()

    def test_a_folder_without_a_tokenizer_is_said_before_training(self, finished, tmp_path: Path) -> None:
        folder = self.folder(finished, tmp_path, lambda *parts: None)
        for file in folder.glob("*token*"):
            file.unlink()
        done = run(*SHORT, "--model", str(folder), cwd=tmp_path)
        assert done.returncode == 1 and "has no tokenizer" in last_line(done)

    def test_without_a_padding_token_it_trains(self, finished, tmp_path: Path) -> None:
        folder = self.folder(finished, tmp_path, TestModels.no_pad)
        whole_run(tmp_path, *SHORT, "--model", str(folder))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seed 999999999999999999999999", "--seed is 999999999999999999999999"),
        ("--kl_coef inf", "--kl_coef is inf"),
        ("--temperature nan", "--temperature is nan"),
        ("--clip_eps_high inf", "--clip_eps_high is inf"),
        ("--prompts_per_step -3", "--prompts_per_step is -3"),
        ("--keep_last -1", "--keep_last is -1"),
        ("--max_steps -1", "--max_steps is -1"),
        ("--max_steps many", "'many'"),
        ("--group_size 2.5", "'2.5'"),
        ("--scale_advantages perhaps", "perhaps"),
        ("--reward_weights 1 2 3 nan", "--reward_weights is [1.0, 2.0, 3.0, nan]"),
        ("--max_completion_tokens 100000000", "the model takes 512 tokens"),
        ("--max_prompt_tokens 5", "No train problem fits into --max_prompt_tokens 5"),
        ("--group_size 1000000000", "The memory is full"),
        ("--checkpoint_dir data/train.jsonl", "Cannot write to 'data/train.jsonl'"),
    ],
)
def test_nonsense_in_flags_ends_in_one_line_with_the_numbers(tmp_path: Path, flags: str, words: str) -> None:
    done = run(*SHORT, *flags.split(), cwd=tmp_path)
    assert done.returncode == 1 and words in last_line(done)
