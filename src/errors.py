"""What a user can mend, in one line; and the one way in which text reaches a terminal."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Agreed(Exception):
    """What ends a run: of several processes, all raise it where one does."""


class UserError(Agreed):
    """Something the user can mend: shown as one line, without a traceback."""

    def __str__(self) -> str:
        text = printable(super().__str__()).replace("\n", "\\n")
        return text if len(text) <= 1500 else f"{text[:1000]} ... {text[-400:]}"  # what to do comes last


def one_line(error: BaseException | str) -> str:
    """What an error of a library says, or a text from a file, for the middle of a UserError."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def memory_is_full(error: BaseException) -> bool:
    """Whether it says that there is no memory left: Python's, torch's of either device, or the CUDA libraries'."""
    said = ("allocate memory", "tried to allocate", "out of memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in said)


def printable(text: str) -> str:
    """The text without what a terminal would obey: control characters are shown as their escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def say(text: str = "", end: str = "\n") -> None:
    """Print to standard output, at once."""
    print(printable(text), end=end, flush=True)


def warn(text: object) -> None:
    """Print to standard error."""
    print(printable(str(text)), file=sys.stderr)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


def open_streams() -> None:
    """Once, as a script begins: a closed stream does no harm, nor what is no text; no log obeys what is in a file."""
    for name, errors in {"stdin": "replace", "stdout": "backslashreplace", "stderr": "backslashreplace"}.items():
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    logging.setLogRecordFactory(_Record)


@contextmanager
def writing(place: str, remedy: str) -> Iterator[None]:
    """Turn what the system says to a write into a UserError. place: "'FILE'", or "to 'FOLDER'"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"Cannot write {place} ({error.strerror}): {remedy}.") from error
