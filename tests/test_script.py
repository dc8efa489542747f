"""How a script ends: a status, and at most one line."""

import pytest

from src.engine.processes import Processes
from src.errors import UserError
from src.script import run_script


def end(error: BaseException) -> int:
    def work(processes: Processes) -> None:
        raise error

    return run_script("some.py", work, stopped="stopped, as asked")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("This is wrong: do that."), 1, "some.py: This is wrong: do that."),
        (KeyboardInterrupt(), 130, "some.py: stopped, as asked"),
        (MemoryError(), 1, "some.py: The memory is full (MemoryError): lower --max_completion_tokens"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "some.py: The memory is full (DefaultCPU"),
        (RuntimeError("CUDA error: out of memory"), 1, "some.py: The memory is full (CUDA error"),
    ],
)
def test_what_a_user_can_mend_is_a_status_and_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(error) == status
    said = capsys.readouterr()
    assert said.err.startswith(line) and said.err.count("\n") == 1 and said.out == ""


@pytest.mark.parametrize("error", [RuntimeError("something else"), FileNotFoundError(2, "No such file", "a.txt")])
def test_a_mistake_of_the_program_is_not_hidden(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        end(error)
    assert caught.value is error


def test_work_that_comes_to_its_end_gives_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("some.py", lambda processes: None) == 0
    assert run_script("some.py", lambda processes: 143) == 143
    assert capsys.readouterr() == ("", "")
