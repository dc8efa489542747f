"""One thread for every test and every process that a test starts: small tensors gain nothing from more."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import signal
from collections.abc import Iterator

import pytest
import torch

from src.engine.processes import Processes
from tests.pretend_gpu import PretendGPU, pretend_gpu

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the processes that a test hangs up on would not hear it

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPUS = ["pretend", pytest.param("real", marks=[pytest.mark.cuda, needs_cuda])]


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPU | None]:
    """A machine with a GPU: a real one (None), or the stand-in, which is there everywhere."""
    if request.param == "real":
        Processes().choose_device("cuda")  # without cuDNN's attention, as the scripts are
        yield None
    else:
        with pretend_gpu(monkeypatch) as pretend:
            yield pretend


@pytest.fixture(params=["cpu", *GPUS])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device to put tensors on."""
    if request.param == "pretend":
        with pretend_gpu(monkeypatch):
            yield "cuda"
    else:
        yield "cpu" if request.param == "cpu" else str(Processes().choose_device("cuda"))
