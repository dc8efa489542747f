"""What train.py and test.py share: streams, processes, and that every end is a status and at most one line."""

import os
import signal
import sys
from collections.abc import Callable

from src.engine.processes import Processes, connect
from src.errors import UserError, one_line, open_streams, warn


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
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # "can't allocate memory", "Tried to ..."
            raise
        status, why = 1, f"The memory is full ({one_line(error)}): lower --group_size, --prompts_per_step or "
        why += "--max_completion_tokens. --resume goes on from the last checkpoint."
    except OSError as error:
        if error.filename:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or what is left is tried again at the exit
        if not isinstance(error, BrokenPipeError):  # what reads the output has gone
            status, why = 1, f"Cannot write to standard output ({error.strerror}): give it room."
    if why and processes.first_to_tell():
        warn(f"{name}: {why}")
    return status
