import socket
import time

from huggingface_hub import close_session, constants

from src.hub import hub_problem


def test_a_hub_that_does_not_answer_is_a_problem_within_the_timeout(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    close_session()  # the next one reads the environment again
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.perf_counter()
        assert hub_problem(timeout=0.2)
        assert time.perf_counter() - start < 2
    assert hub_problem()  # now nobody listens there
