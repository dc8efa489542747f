"""Checkpoints: whole or not there, whatever dies while they are written, and loaded without running pickled code.

A checkpoint is an ordinary Hugging Face model folder with its model card and three more files: `trainer.safetensors`
(fp32 masters and the optimizer's moments), `trainer.json` (everything else that the next step depends on) and
`manifest.json` (size and SHA-256 of every file but the card, which people edit). It is written under a temporary name,
flushed to disk, and renamed. Nothing is removed or replaced but folders that hold one of the first two.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from src.errors import UserError, one_line
from src.run.state import Progress, State

log = logging.getLogger(__name__)

TENSORS, STATE, MANIFEST, CARD = "trainer.safetensors", "trainer.json", "manifest.json", "README.md"
TEMPORARY, REPLACED = ".unfinished-", ".replaced-"
STEPS = re.compile(r"(step|cold_start)_\d{6,}|epoch_\d+")  # what --keep_last may remove
PLACES = re.compile(rf"({re.escape(TEMPORARY)}|{re.escape(REPLACED)})?({STEPS.pattern}|best|final|cold_start)")
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what a bad JSON file causes


def save_checkpoint(
    path: Path, write_model: Callable[[Path], None], tensors: dict[str, Tensor], state: State, rehearsal: bool = False
) -> None:
    """Write a checkpoint to `path`, replacing what is there only once the new one is whole.

    rehearsal: only try all that it takes, and leave nothing behind.

    Raises:
        UserError: the disk is full, the folder cannot be written, or something else is there; nothing is left behind.
    """
    with _published(path, json.dumps(asdict(state), indent=1).encode(), rehearsal) as temporary:
        write_model(temporary)
        if rehearsal:
            masters = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("master/"))
            needed, free = 12 * masters, shutil.disk_usage(temporary).free  # with two moments, 4 bytes each
            if free < needed:
                raise UserError(f"{free / 1e9:.3f} GB are free beside the model, {needed / 1e9:.3f} needed")
            return
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
        files = sorted(file for file in temporary.rglob("*") if file.is_file() and file.name != CARD)
        with ThreadPoolExecutor() as pool:  # which hashes while the disk writes
            digests = pool.map(_fingerprint, files)
            for file in files:
                _flush(file)
        proof = {str(file.relative_to(temporary)): digest for file, digest in zip(files, digests, strict=True)}
        (temporary / MANIFEST).write_text(json.dumps(proof, indent=1), encoding="utf-8")


def copy_checkpoint(source: Path, path: Path) -> None:
    """The same checkpoint under a second name: tensors by hard links, so no space, where the file system has them.

    Raises:
        UserError: as `save_checkpoint`.
    """
    with _published(path, (source / STATE).read_bytes()) as temporary:
        proof = json.loads((source / MANIFEST).read_text("utf-8"))
        for name in {MANIFEST, *proof, *(CARD,) * (source / CARD).exists()} - {STATE}:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            try:  # what people edit is each name's own
                (os.link if name.endswith(".safetensors") else shutil.copyfile)(source / name, temporary / name)
            except OSError:  # no hard links here, or another file system
                shutil.copyfile(source / name, temporary / name)


@contextmanager
def _published(path: Path, mark: bytes, rehearsal: bool = False) -> Iterator[Path]:
    """A folder with the mark, flushed to disk and renamed to `path` at the end, or else nothing is left behind."""
    temporary, replaced = path.with_name(TEMPORARY + path.name), path.with_name(REPLACED + path.name)
    try:
        temporary.mkdir(parents=True)
        (temporary / STATE).write_bytes(mark)
        _flush(temporary / STATE)  # so that what a dead machine leaves is known as ours
        yield temporary
        if not rehearsal:
            for file in (*temporary.rglob("*"), temporary):
                _flush(file)
            if os.path.lexists(path):
                if not _ours(path):
                    raise UserError("what is there was not written by this program")
                path.rename(replaced)
            temporary.rename(path)
            _flush(path.parent)
    except Exception as error:  # a full disk is an OSError or, from the tokenizer, just an Exception
        clear_up(path.parent, refuse=False)
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(
            f"Cannot save the checkpoint {path} ({reason}): free some disk space, check access, or choose another "
            "--checkpoint_dir."
        ) from error
    _remove(temporary if rehearsal else replaced)


def _fingerprint(path: Path) -> list[int | str]:
    """Size and SHA-256."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def marked(path: Path) -> bool:
    """Whether a folder has this program's mark; of a damaged one, one of the two files is enough."""
    return any(os.path.exists(path / name) for name in (STATE, TENSORS))


def _ours(path: Path) -> bool:
    """Whether a place may be cleared: a folder, no link, with the mark, or just begun or nearly removed."""
    empty = path.name[0] == "." and path.is_dir() and not any(path.iterdir())
    return not path.is_symlink() and (empty or marked(path))


def _remove(path: Path) -> None:
    """Remove a folder of ours as far as possible, its marks last, so that what a kill leaves has one."""
    with suppress(OSError):
        for entry in sorted(path.iterdir(), key=lambda entry: entry.name in (STATE, TENSORS)):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        path.rmdir()


def clear_up(folder: Path, refuse: bool = True) -> None:
    """Clear up after a save that did not come to its end; only for the process that holds the folder.

    Raises:
        UserError: where this program would write stands something that it did not, unless that is not to be refused.
    """
    places = [path for path in sorted(folder.glob("*")) if PLACES.fullmatch(path.name)]
    if refuse and (strange := [path for path in places if not _ours(path)]):
        raise UserError(
            f"'{strange[0]}' was not written by this program, which would replace it: move it elsewhere, or choose "
            "another --checkpoint_dir."
        )
    for path in filter(_ours, places):
        original = path.with_name(path.name.removeprefix(REPLACED))
        if not os.path.lexists(original):  # it ended between the two renames
            path.rename(original)
        elif path.name[0] == ".":
            _remove(path)


def damage(path: Path) -> str | None:
    """Why the checkpoint at `path` cannot be trusted, or None when it is whole."""
    try:
        for name, expected in {TENSORS: None, STATE: None, **json.loads((path / MANIFEST).read_text("utf-8"))}.items():
            if _fingerprint(path / name) != expected:
                return f"{name} is damaged"
        read_state(path)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except UNREADABLE as error:
        return f"{type(error).__name__}: {one_line(error)}"
    return None


def read_state(path: Path) -> State:
    """The state of a checkpoint, its files unchecked.

    Raises:
        OSError, ValueError: it is not there, or not what this program writes.
    """
    try:
        return State.read(json.loads((path / STATE).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its {STATE} does not fit this program: {one_line(error)}") from error


def find_checkpoints(folder: Path) -> dict[Path, State | None]:
    """The checkpoints in a folder, unreadable ones (None) first, then the last saved first.

    Runs are ordered by the clock, the saves of one run by its own count.
    """
    found: dict[Path, State | None] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name[0] != "." and marked(path):
            found[path] = None
            with suppress(*UNREADABLE):
                found[path] = read_state(path)

    def order(path: Path) -> tuple:
        if (state := found[path]) is None:
            return math.inf, path.name
        latest = max(other.saved_at for other in found.values() if other and other.run == state.run)
        return latest, *state.save, path.name == "final", path.name

    return {path: found[path] for path in sorted(found, key=order, reverse=True)}


def newest_checkpoint(folder: Path) -> Path | None:
    """The last saved whole checkpoint; damaged ones are named in the log and passed over."""
    for path in find_checkpoints(folder):
        if (reason := damage(path)) is None:
            return path
        log.warning("passing over the checkpoint %s: %s", path, reason)
    return None


def remove_checkpoints(paths: Iterable[Path], why: str) -> None:
    """Remove these, and say so."""
    for path in paths:
        temporary = path.with_name(TEMPORARY + path.name)
        with suppress(OSError):
            path.rename(temporary)  # so that a half removed checkpoint is debris
            _remove(temporary)
            log.info("removed %s, %s", path, why)


def old_checkpoints(folder: Path, keep: int, run: str, progress: Progress, kept: Path | None) -> list[Path]:
    """Steps and epochs of this run, not ahead of where it is, that are not among its last `keep` saves.

    Names of one save, such as a step that ends an epoch, count once. kept: never among them.
    """
    saves: dict[tuple, list[Path]] = {}
    for path, state in find_checkpoints(folder).items():
        if STEPS.fullmatch(path.name) and state and state.run == run and state.progress.place <= progress.place:
            saves.setdefault(state.save, []).append(path)
    old = [path for paths in list(saves.values())[keep:] for path in paths]
    return [path for path in old if not (kept and kept.exists() and path.samefile(kept))]


def other_checkpoints(folder: Path, run: str | None) -> list[Path]:
    """Those in this program's places that are not of `run`; one whose run cannot be read is of no other."""
    found = {path: state for path, state in find_checkpoints(folder).items() if PLACES.fullmatch(path.name)}
    return [path for path, state in found.items() if run is None or (state and state.run != run)]


def load_state(path: Path) -> State:
    """The state of a checkpoint that is whole, which takes seconds to see.

    Raises:
        UserError: it is damaged or no checkpoint at all.
    """
    if reason := damage(path):
        raise UserError(f"'{path}' is no whole checkpoint ({reason}): name another one, or none for the newest.")
    return read_state(path)


def tensors_digest(path: Path) -> str:
    """What tells the tensors of one checkpoint from those of any other."""
    return json.loads((path / MANIFEST).read_text("utf-8"))[TENSORS][1]
