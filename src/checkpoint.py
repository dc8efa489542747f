"""Checkpoints: whole or not there, whatever dies while they are written, and loaded without running pickled code.

A checkpoint is an ordinary Hugging Face model folder with three more files: `trainer.safetensors` (fp32 masters and
the optimizer's moments), `trainer.json` (everything else that the next step depends on) and `manifest.json` (size and
SHA-256 of every file). It is written under a temporary name, flushed to disk, and renamed.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.errors import UserError

log = logging.getLogger(__name__)

TENSORS, STATE, MANIFEST = "trainer.safetensors", "trainer.json", "manifest.json"
TEMPORARY, REPLACED = ".unfinished-", ".replaced-"


def save_checkpoint(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Write a checkpoint to `path`, replacing what is there only once the new one is whole.

    Raises:
        UserError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
        (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _publish(temporary, path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"Cannot save the checkpoint {path} ({reason}): free some disk space or check access."
        ) from error


def _publish(temporary: Path, path: Path) -> None:
    """Flush everything to disk, then give the folder its name."""
    for file in (*temporary.iterdir(), temporary):
        _flush(file)
    replaced = path.with_name(REPLACED + path.name)
    if path.exists():
        path.rename(replaced)
    temporary.rename(path)
    _flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fingerprint(path: Path) -> list[int | str]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]


def damage(path: Path) -> str | None:
    """Why the checkpoint at `path` cannot be trusted, or None when it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if _fingerprint(path / name) != expected:
                return f"{name} is damaged"
        json.loads((path / STATE).read_text(encoding="utf-8"))["saved_at"]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that look like one, last saved first; other folders do not count."""

    def saved_at(path: Path) -> float:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads((path / STATE).read_text(encoding="utf-8"))["saved_at"])
        return 0.0

    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if (path / MANIFEST).exists() and path.name[0] != "."]
    return sorted(found, key=lambda path: (saved_at(path), path.name), reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The last saved whole checkpoint; damaged ones are named in the log and passed over."""
    for path in find_checkpoints(folder):
        if (reason := damage(path)) is None:
            return path
        log.warning("passing over the checkpoint %s: %s", path, reason)
    return None


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the state of a checkpoint.

    Raises:
        UserError: it is damaged or no checkpoint at all.
    """
    if (reason := damage(path)) is not None:
        raise UserError(f"'{path}' is no whole checkpoint ({reason}): name another one, or resume without a name.")
    return load_file(path / TENSORS), json.loads((path / STATE).read_text(encoding="utf-8"))


@contextmanager
def exclusive(*folders: Path) -> Iterator[None]:
    """Hold these folders, made if need be, for this process alone; a dead process holds nothing.

    Raises:
        UserError: another process holds one of them, or it cannot be made or written.
    """
    handles = []
    try:
        for folder in dict.fromkeys(folders):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                handles.append(open(folder / ".lock", "w"))  # noqa: SIM115
                fcntl.flock(handles[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"Another run is writing to '{folder}': wait for it, or give this one its own --checkpoint_dir "
                    "and --log_dir."
                ) from error
            except OSError as error:
                raise UserError(f"Cannot write to '{folder}' ({error.strerror}): choose another folder.") from error
        yield
    finally:
        for handle in handles:
            handle.close()


def remove_debris(folder: Path) -> None:
    """Clear up after a process that died while saving; only for the process that holds the folder."""
    for path in folder.glob(f"{REPLACED}*"):
        original = path.with_name(path.name.removeprefix(REPLACED))
        if not original.exists():  # it died between the two renames
            path.rename(original)
    for pattern in (TEMPORARY, REPLACED):
        for path in folder.glob(f"{pattern}*"):
            shutil.rmtree(path, ignore_errors=True)
