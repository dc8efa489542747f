"""Folders that one run at a time writes to."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from src.errors import UserError, printable, writing
from src.run.checkpoint import PLACES, marked
from src.untrusted import plain_file

log = logging.getLogger(__name__)


@contextmanager
def exclusive(*folders: Path) -> Iterator[None]:
    """Hold these folders, made if need be, for this process alone; a dead process holds nothing.

    The locks are POSIX's: a process that is forked from this one does not hold them.

    Raises:
        UserError: another process holds one of them, it cannot be made or written, or it is inside a checkpoint.
    """
    with ExitStack() as held:
        for folder in {folder.resolve(): folder for folder in folders}.values():  # one under two names is held once
            _check_outside(folder, folders[0])
            with writing(f"to '{folder}'", "choose another folder"):
                folder.mkdir(parents=True, exist_ok=True)
                lock = plain_file(folder / ".lock", os.O_RDWR | os.O_CREAT)
                held.callback(os.close, lock)
                _hold(lock, folder)
                held.callback(os.ftruncate, lock, 0)
        yield


def _check_outside(folder: Path, checkpoints: Path) -> None:
    """Raise UserError when a folder is, or would be, inside a checkpoint."""
    whole = folder.resolve()
    for path in (whole, *whole.parents):
        if marked(path) or (PLACES.fullmatch(path.name) and path.parent == checkpoints.resolve()):
            raise UserError(
                f"'{folder}' is inside the checkpoint '{path}', and would go with it: choose another --checkpoint_dir "
                "and --log_dir."
            )


def _hold(lock: int, folder: Path) -> None:
    """Lock it, and write down who does; where locks do not work, what is written there has to do."""
    here = socket.gethostname()
    host, _, process = printable(os.pread(lock, 300, 0).decode("utf-8", "replace")).partition(" ")
    holder = f"process {process} on {host}" if host else "a process"
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        works = isinstance(error, BlockingIOError | PermissionError)  # locks do on this file system
        if works or host:
            ended = "" if works else f", or remove '{folder / '.lock'}' if it has ended"
            raise UserError(
                f"Another run is writing to '{folder}' ({holder}): wait for it{ended}, or give this one its own "
                "--checkpoint_dir and --log_dir."
            ) from error
        log.warning("'%s' knows no locks (%s): see to it that no other run writes there", folder, error.strerror)
    if host not in ("", here):
        log.warning("'%s' was last written to by %s: if that run still goes on, stop one of the two", folder, holder)
    os.ftruncate(lock, 0)
    os.write(lock, f"{here} {os.getpid()}".encode())
