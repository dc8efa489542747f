"""torchrun as a process whose workers are forked from it, so that none of them imports torch anew.

The launcher is torchrun's own, signals, store and all; only the call that starts a worker is another: the worker has
its own session, arguments and environment, and no open file but the standard ones, as after a fresh start.
"""

import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from subprocess import Popen
from typing import Any, NoReturn

from tests.processes import ROOT, Process, start


def start_torchrun(
    script: str, *flags: str, cwd: Path, processes: int = 2, faults: str = "", **options: Any
) -> Process:
    """Start `torchrun --standalone --nproc_per_node PROCESSES script flags`, without waiting.

    faults: code that every worker runs first, which finds its number as RANK. options: `launcher`, other flags of
    torchrun; `environment`, variables.
    """
    launcher = options.get("launcher", ["--standalone"])
    command = [*launcher, f"--nproc_per_node={processes}", str(ROOT / script), *flags]
    given = (command, faults, options.get("environment", {}))
    return start(script, cwd=cwd, faults=f"from tests.torchrun import launch\nlaunch(*{given!r})")


def launch(command: list[str], faults: str, environment: Mapping[str, str]) -> NoReturn:
    """Be torchrun."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
    from torch.distributed.run import main

    os.environ |= environment
    SubprocessHandler._popen = lambda self, args, env: _fork(args, env, faults)
    main(command)
    sys.exit(0)


def _fork(args: tuple[str, ...], env: dict[str, str], faults: str) -> Popen:
    sys.stdout.flush(), sys.stderr.flush()
    process = Popen.__new__(Popen)
    process.__dict__ |= {"args": args, "stdin": None, "stdout": None, "stderr": None, "returncode": None}
    process.__dict__ |= {"_child_created": True, "_waitpid_lock": threading.Lock()}
    process.pid = os.fork() or _be_a_worker(args, env, faults)
    return process


def _be_a_worker(args: tuple[str, ...], env: dict[str, str], faults: str) -> NoReturn:
    status = 1
    try:
        os.setsid()
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.environ.clear()
        os.environ |= env
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        script = next(i for i, arg in enumerate(args) if arg.endswith(".py"))
        sys.argv = list(args[script:])
        exec(faults, {"RANK": int(env["RANK"])})
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as exit:
        status = exit.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
