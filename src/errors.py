"""What a user can mend, in one line; and text that a terminal can be shown."""

from collections.abc import Iterator
from contextlib import contextmanager


class Agreed(Exception):
    """What ends a run: of several processes, all raise it where one does."""


class UserError(Agreed):
    """Something the user can mend: shown as one line, without a traceback."""


def one_line(error: BaseException | str) -> str:
    """What an error of a library says, or a text from a file, for the middle of a UserError."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def printable(text: str) -> str:
    """The text without what a terminal would obey: control characters are shown as their escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


@contextmanager
def writing(place: str, remedy: str) -> Iterator[None]:
    """Turn what the system says to a write into a UserError. place: "'FILE'", or "to 'FOLDER'"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"Cannot write {place} ({error.strerror}): {remedy}.") from error


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn what torch says of a full memory into a UserError.

    Raises:
        UserError: the memory, of the machine or of the GPU, is full.
    """
    try:
        yield
    except RuntimeError as error:
        if "allocate" not in str(error):  # "can't allocate memory", or "Tried to allocate" of a GPU
            raise
        raise UserError(
            f"The memory is full ({' '.join(str(error).split())[:200]}): lower --group_size, --prompts_per_step or "
            "--max_completion_tokens. --resume goes on from the last checkpoint."
        ) from error
