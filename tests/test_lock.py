"""Who may write to a folder: helpers of a dead run, file systems without locks, one folder under two names."""

import os
import signal
from pathlib import Path

from tests.test_reliability import SHORT, run, spoil, whole_run

NO_LOCKS = "import fcntl\ndef lockf(*a): raise OSError(38, 'Function not implemented')\nfcntl.lockf = lockf\n"


class TestLocks:
    def test_a_helper_that_outlives_a_killed_run_does_not_hold_its_folders(self, tmp_path: Path) -> None:
        fork = "import os, signal; pid = os.fork() or signal.pause(); open('pid', 'w').write(str(pid))\n"
        fork += "        os.kill(os.getpid(), 9)"
        killed = run(*SHORT, cwd=tmp_path, faults=spoil("cold_start", "supervised_gradients", "[1]", fork))
        assert killed.returncode == -signal.SIGKILL
        helper = int((tmp_path / "pid").read_text())
        try:
            whole_run(tmp_path, *SHORT, "--max_steps", "0")
        finally:
            os.kill(helper, signal.SIGKILL)

    def test_where_locks_do_not_work_a_run_warns(self, tmp_path: Path) -> None:
        done = run(*SHORT, "--max_steps", "0", "--cold_start_steps", "0", cwd=tmp_path, faults=NO_LOCKS)
        assert done.returncode == 0 and "'checkpoints' knows no locks (Function not implemented)" in done.stderr

    def test_one_folder_under_two_names_is_one_run_s(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "logs").symlink_to("checkpoints")
        for faults in ("", NO_LOCKS):
            whole_run(tmp_path, *SHORT, "--max_steps", "0", "--cold_start_steps", "0", "--replace", faults=faults)
