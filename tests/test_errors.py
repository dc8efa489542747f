"""What reaches a terminal, whoever wrote it."""

import logging
import sys
from collections.abc import Iterator

import pytest

from src.errors import UserError, open_streams, say, warn

CONTROLS = "\x1b[2J\x9b1m\x07\r\u202e\ud800"
ESCAPED = r"\x1b[2J\x9b1m\x07\r\u202e\ud800"


@pytest.fixture(autouse=True)
def plain_records() -> Iterator[None]:
    """Log records are as they were afterwards."""
    yield
    logging.setLogRecordFactory(logging.LogRecord)


def test_what_is_said_and_logged_by_whatever_library_has_its_controls_escaped(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    open_streams()
    say(CONTROLS)
    warn(CONTROLS)
    logging.getLogger("some.library").warning("%s", CONTROLS)
    assert capsys.readouterr() == (f"{ESCAPED}\n", f"{ESCAPED}\n")
    assert caplog.messages == [ESCAPED]


def test_an_error_for_the_user_is_one_line_that_ends_in_what_to_do() -> None:
    assert str(UserError(f"a\n{CONTROLS}")) == rf"a\n{ESCAPED}"
    text = str(UserError("x" * 100_000 + ": do this."))
    assert len(text) < 1500 and text.endswith(": do this.")


def test_a_closed_stream_takes_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    open_streams()
    say("words")
    warn("words")
    sys.stdout.write("words")
