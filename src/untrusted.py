"""Reading what somebody else may have written: no link is followed, no device read, nothing without an end."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

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
