"""What train.py and test.py share: streams, processes, what a repetition needs, and an end that is one line at most."""

import hashlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from src.engine.processes import Processes, connect
from src.errors import UserError, memory_is_full, one_line, open_streams, warn


def run_script(name: str, work: Callable[[Processes], int | None], stopped: str = "") -> int:
    """Do the work of a script, as one process of several or alone; returns the exit status.

    work: may return one, and raises UserError for what a user can mend. stopped: what there is to say after Ctrl-C.
    """
    processes, status, why = Processes(), 0, ""
    try:
        open_streams()
        processes = connect()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as it was for the imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with processes.one_speaks():
            status = work(processes) or 0
        processes.close()
    except UserError as error:
        status, why = 1, str(error)
    except KeyboardInterrupt:
        status, why = 130, stopped
    except (MemoryError, RuntimeError) as error:
        if not memory_is_full(error):
            raise
        status, why = 1, f"The memory is full ({one_line(error)}): lower --max_completion_tokens, or in training "
        why += "--group_size or --prompts_per_step; --resume goes on from the last checkpoint."
    except OSError as error:
        if error.filename:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or what is left is tried again at the exit
        if not isinstance(error, BrokenPipeError):  # what reads the output has gone
            status, why = 1, f"Cannot write to standard output ({error.strerror}): give it room."
    if why and processes.first_to_tell():
        warn(f"{name}: {why}")
    return status


def describe_run(device: torch.device) -> dict[str, str]:
    """Versions, commit and device: what a repetition of the run needs besides its settings."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = "unknown"
    with suppress(OSError, subprocess.CalledProcessError):  # there is no git here, or it knows no commit
        commit = subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "commit": commit,
        "device": f"{device} ({name}, {torch.get_num_threads()} CPU threads)",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "datasets")},
    }


def fingerprint_code(*files: str) -> str:
    """A short hash of these files, which stand beside this one."""
    sources = [Path(__file__).with_name(name).read_bytes() for name in files]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]
