"""Reading what somebody else may have written: no link is followed, no device read, nothing without an end."""

import errno
import json
import math
import os
import stat
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

LARGEST_JSON = 2**26  # bytes; what this program writes has some thousand
MOST_HOLES = 2**36  # bytes of a file that no disk holds, as zeros need not be; a sparse terabyte takes an hour to read


def plain_file(path: str | Path, flags: int) -> int:
    """An `opener`: of an ordinary file alone, without waiting; one that is written is never reached through a link.

    Raises:
        OSError: it is something else, or cannot be opened.
    """
    if flags & (os.O_WRONLY | os.O_RDWR):
        flags |= os.O_NOFOLLOW
        if os.path.islink(path):
            raise OSError(errno.ELOOP, "it is a link, which is not followed", str(path))
    handle = os.open(path, flags | os.O_NONBLOCK, 0o666)
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode) or about.st_size - 512 * about.st_blocks > MOST_HOLES:
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no ordinary file", str(path))
    return handle


def read_json(path: Path) -> Any:
    """What stands in a JSON file.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read, is too large, no JSON, or nested too deep.
    """
    with open(path, "rb", opener=plain_file) as file:
        text = file.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ValueError(f"{path.name} is larger than {LARGEST_JSON} bytes")
    return json.loads(text.decode("utf-8"))


def typed(hint: Any, value: object, name: str = "") -> Any:
    """The value, a dataclass in the place of an object; numbers are finite, and whole ones not negative.

    Raises:
        ValueError: an entry is missing, unknown or of another type.
    """
    if is_dataclass(hint) and isinstance(value, dict):
        hints = get_type_hints(hint)
        required = {f.name for f in fields(hint) if f.default is f.default_factory}  # both are MISSING
        for entry in sorted(value.keys() - hints.keys() | required - value.keys()):
            raise ValueError(f"{name}{entry} is {'missing' if entry in required else 'unknown'}")
        return hint(**{entry: typed(hints[entry], each, f"{name}{entry}.") for entry, each in value.items()})
    if not _fits(value, hint):
        raise ValueError(f"{name.removesuffix('.') or 'it'} is {repr(value)[:80]}")
    return value


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return type(value) is str and value in get_args(hint)
    if get_origin(hint) is dict:
        return type(value) is dict and all(_fits(each, get_args(hint)[1]) for each in value.values())
    if hint is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return hint is Any or (type(value) is hint and (hint is not int or 0 <= value < 2**63))
