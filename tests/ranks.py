"""A function in several connected processes, without torchrun: each is forked from the one that runs the tests."""

import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from src.engine.processes import Processes, connect

T = TypeVar("T")


def on_each(world: int, work: Callable[[Processes], T]) -> list[T | str]:
    """What `work` returns on each of `world` processes, by rank; what it raised as text; "" of one that was killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(rank) for rank in range(world)]
        pids = [os.fork() or _be(rank, world, store.port, work, path) for rank, path in enumerate(paths)]
        for pid in pids:
            os.waitpid(pid, 0)
        return [torch.load(path, weights_only=False) if path.exists() else "" for path in paths]


def _be(rank: int, world: int, port: int, work: Callable[[Processes], T], path: Path) -> int:
    """As an agent of torchrun starts a process: it keeps the store that they meet at."""
    gc.freeze()  # a store of the parent's would be collected here, and wait for its thread, which only the parent has
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        processes = connect()
        try:
            result = work(processes)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        torch.save(result, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        processes.close()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
