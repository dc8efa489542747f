"""Folders that one run at a time writes to."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from src.errors import UserError, writing

log = logging.getLogger(__name__)


@contextmanager
def exclusive(*folders: Path) -> Iterator[None]:
    """Hold these folders, made if need be, for this process alone; a dead process holds nothing.

    The locks are POSIX's: a process that is forked from this one does not hold them.

    Raises:
        UserError: another process holds one of them, or it cannot be made or written.
    """
    with ExitStack() as held:
        for folder in {folder.resolve(): folder for folder in folders}.values():  # one under two names is held once
            with writing(f"to '{folder}'", "choose another folder"):
                folder.mkdir(parents=True, exist_ok=True)
                lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
                held.callback(os.close, lock)
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError) as error:
                    holder = os.pread(lock, 20, 0).decode("utf-8", "replace")
                    raise UserError(
                        f"Another run is writing to '{folder}' (process {holder}): wait for it, or give this one its "
                        "own --checkpoint_dir and --log_dir."
                    ) from error
                except OSError as error:  # a file system without locks
                    log.warning("'%s' knows no locks (%s): let no other run write there", folder, error.strerror)
                os.ftruncate(lock, 0)
                os.write(lock, str(os.getpid()).encode())
        yield
