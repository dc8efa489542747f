import signal
import socket

from huggingface_hub import close_session, constants

from src.hub import hub_problem
from tests.helpers import no_hang


def test_a_hub_that_does_not_answer_is_a_problem_within_the_timeout(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    close_session()  # the next one reads the environment again
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with no_hang(60, signal.ITIMER_REAL):  # it would wait for ever
            assert hub_problem(timeout=0.2)
    assert hub_problem()  # now nobody listens there
