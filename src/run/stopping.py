"""Ending a run from outside: SIGTERM, Ctrl-C or a lost terminal finish the step at hand, a Ctrl-C then ends at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from src.errors import Agreed


class Stopped(Agreed):
    """The run was asked to stop, and has come to a place where it can. Its argument is the signal."""


class StopRequest:
    """Which signal asked the run to stop, if one did."""

    signum: int | None = None

    def raise_if_asked(self, agree: Callable[[int | None], int | None] = lambda own: own) -> None:
        """Raise Stopped. agree: what the processes of the run agree on, from what each was asked."""
        self.signum = agree(self.signum)
        if self.signum is not None:
            raise Stopped(self.signum)

    def _handle(self, signum: int, frame: object) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum  # a lost terminal hangs up twice: by its shell, and by the kernel


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turn the first SIGTERM, SIGINT or SIGHUP into a request; the handlers are put back afterwards."""
    request = StopRequest()
    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []  # nohup wants it to go on
    signals = [signal.SIGTERM, signal.SIGINT, *hangup]
    before = [signal.signal(signum, request._handle) for signum in signals]
    try:
        yield request
    finally:
        for signum, handler in zip(signals, before, strict=True):
            signal.signal(signum, handler)
