"""Checkpoints: whole or not there, whatever dies while they are written, and loaded without running pickled code.

A checkpoint is an ordinary Hugging Face model folder with its model card and three more files: `trainer.safetensors`
(fp32 masters and the optimizer's moments), `trainer.json` (everything else that the next step depends on) and
`manifest.json` (size and SHA-256 of every file). It is written under a temporary name, flushed to disk, and renamed.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from src.errors import UserError, writing
from src.untrusted import plain_file, read_json

log = logging.getLogger(__name__)

TENSORS, STATE, MANIFEST = "trainer.safetensors", "trainer.json", "manifest.json"
TEMPORARY, REPLACED = ".unfinished-", ".replaced-"
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what a bad JSON file causes


def save_checkpoint(
    path: Path, write_model: Callable[[Path], None], tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Write a checkpoint to `path`, replacing what is there only once the new one is whole.

    write_model: writes the model folder.

    Raises:
        UserError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    with _published(path) as temporary:
        write_model(temporary)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
        (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = {str(file.relative_to(temporary)): _fingerprint(file) for file in _files(temporary)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def copy_checkpoint(source: Path, path: Path) -> None:
    """The same checkpoint under a second name: hard links, so no space, where the file system has them.

    Raises:
        UserError: as `save_checkpoint`.
    """
    with _published(path) as temporary:
        for file in _files(source):
            target = temporary / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            try:
                os.link(file, target)
            except OSError:  # no hard links here, or another file system
                shutil.copyfile(file, target)


@contextmanager
def _published(path: Path) -> Iterator[Path]:
    """A temporary folder that is flushed to disk and renamed to `path` at the end, or leaves nothing behind."""
    temporary, replaced = path.with_name(TEMPORARY + path.name), path.with_name(REPLACED + path.name)
    try:
        remove_debris(path.parent)
        temporary.mkdir(parents=True)
        yield temporary
        for file in (*temporary.rglob("*"), temporary):
            _flush(file)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        _flush(path.parent)
    except Exception as error:  # a full disk is an OSError, a SafetensorError or, from the tokenizer, just an Exception
        remove_debris(path.parent)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"Cannot save the checkpoint {path} ({reason}): free some disk space or check access."
        ) from error
    shutil.rmtree(replaced, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fingerprint(path: Path) -> list[int | str]:
    digest = hashlib.sha256()
    with open(path, "rb", opener=plain_file) as file:
        while block := file.read(2**20):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]


def damage(path: Path) -> str | None:
    """Why the checkpoint at `path` cannot be trusted, or None when it is whole."""
    try:
        manifest = read_json(path / MANIFEST)
        for name, expected in {TENSORS: None, STATE: None, **manifest}.items():
            if _fingerprint(path / name) != expected:
                return f"{name} is damaged"
        _saved_at(path)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except UNREADABLE as error:
        return f"{type(error).__name__}: {error}"
    return None


def _saved_at(path: Path) -> float:
    return float(read_state(path)["saved_at"])


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, unchecked."""
    return read_json(path / STATE)


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that look like one, unreadable ones first, then last saved first."""

    def order(path: Path) -> tuple[float, bool, str]:
        saved_at = math.inf
        with suppress(*UNREADABLE):
            saved_at = _saved_at(path)
        return saved_at, path.name == "final", path.name

    if not folder.is_dir():
        return []
    parts = (STATE, TENSORS, MANIFEST)
    found = [p for p in folder.iterdir() if p.name[0] != "." and any(os.path.exists(p / part) for part in parts)]
    return sorted(found, key=order, reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The last saved whole checkpoint; damaged ones are named in the log and passed over."""
    for path in find_checkpoints(folder):
        if (reason := damage(path)) is None:
            return path
        log.warning("passing over the checkpoint %s: %s", path, reason)
    return None


def remove_old_checkpoints(folder: Path, keep: int, newest: Path, spare: Collection[str]) -> None:
    """Remove all but the last `keep` saves of the run that saved `newest`; never that one, never the names to spare.

    Names of one save, such as a step that ends an epoch, count once.
    """
    state, saves = read_state(newest), {}
    for path in find_checkpoints(folder):
        with suppress(*UNREADABLE):
            other = read_state(path)
            if other["run"] == state["run"] and other["saved_at"] != state["saved_at"] and path.name not in spare:
                saves.setdefault(other["saved_at"], []).append(path)
    for paths in list(saves.values())[keep - 1 :]:
        for path in paths:
            temporary = path.with_name(TEMPORARY + path.name)
            with suppress(OSError):
                path.rename(temporary)  # so that a half removed checkpoint is debris
            shutil.rmtree(temporary, ignore_errors=True)


def load_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint that is whole.

    Raises:
        UserError: it is damaged or no checkpoint at all.
    """
    if (reason := damage(path)) is not None:
        raise UserError(f"'{path}' is no whole checkpoint ({reason}): name another one, or resume without a name.")
    return read_state(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Masters and moments, on the CPU, of a checkpoint that is whole."""
    return load_file(path / TENSORS)


def tensors_digest(path: Path) -> str:
    """What tells the tensors of one checkpoint from those of any other."""
    return read_json(path / MANIFEST)[TENSORS][1]


@contextmanager
def exclusive(*folders: Path) -> Iterator[None]:
    """Hold these folders, made if need be, for this process alone; a dead process holds nothing.

    Raises:
        UserError: another process holds one of them, or it cannot be made or written.
    """
    with ExitStack() as held:
        for folder in dict.fromkeys(folders):
            with writing(f"to '{folder}'", "choose another folder"):
                folder.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(open(folder / ".lock", "a", opener=plain_file))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise UserError(
                        f"Another run is writing to '{folder}': wait for it, or give this one its own --checkpoint_dir "
                        "and --log_dir."
                    ) from error
        yield


def remove_debris(folder: Path) -> None:
    """Clear up after a process that died while saving; only for the process that holds the folder."""
    for path in folder.glob(f"{REPLACED}*"):
        original = path.with_name(path.name.removeprefix(REPLACED))
        if not original.exists():  # it died between the two renames
            path.rename(original)
    for pattern in (TEMPORARY, REPLACED):
        for path in folder.glob(f"{pattern}*"):
            shutil.rmtree(path, ignore_errors=True)
