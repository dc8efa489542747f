"""Several processes that torchrun started, at work on the same steps: what is shared out, gathered and agreed.

Every process has the whole model and takes every optimizer step; what is shared out is the problems of a step. What
they sampled and scored is gathered, so that all know the whole step, and their gradients are added up: the step is the
one that a single process takes, up to rounding. A single process has no group, and gets back what it gave.

Nothing hangs where all were started alike, because collectives stand only on paths that every process takes, whatever
its own data: never inside a retry, never behind a condition that is not the same everywhere. CUDA tensors go through
NCCL, all else through gloo.
"""

import io
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from itertools import accumulate, groupby
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from src.errors import Agreed, UserError, one_line

T = TypeVar("T")

LAST_WORD = 5.0  # seconds to find out who says why the run ends
BUCKET = 2**24  # numbers of the gradient that travel at a time, about
PATIENCE = "PROCESS_TIMEOUT"  # the variable with the seconds that one process waits for another; 600 without it


def connect() -> "Processes":
    """This process among those that torchrun started with it, or alone.

    Raises:
        UserError: the others do not come.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return Processes()
    try:
        timeout = timedelta(seconds=float(os.environ.get(PATIENCE, 600)))
    except ValueError:
        raise UserError(f"{PATIENCE} is '{os.environ[PATIENCE]}': give a number of seconds.") from None
    with _explained():
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        except ValueError as error:  # it lacks a variable
            what = f"WORLD_SIZE is set, but not as torchrun does it ({one_line(error)})"
            raise UserError(f"{what}: unset it, or start with torchrun.") from error
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    return Processes(rank, world, store)


class Processes:
    """Process `rank` of `world`, and the device it works on."""

    def __init__(self, rank: int = 0, world: int = 1, store: dist.Store | None = None):
        self.rank, self.world, self.store, self.device = rank, world, store, torch.device("cpu")
        self.launcher, self.waited = os.getppid(), 0.0  # seconds that went by until the others came, in all

    def choose_device(self, name: str | None = None) -> torch.device:
        """The device named, or CUDA when there is a card, or the CPU; of several processes, each has its own card.

        Raises:
            UserError: there is no such device.
        """
        # Prompts and completions have new lengths in each step. Under WSL the driver can fail with it (pytorch#192330).
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and "microsoft" not in platform.release().lower():
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        # With a mask, cuDNN's attention gives NaN gradients at some lengths on Hopper (pytorch#196678), ignores it in
        # rows that are masked whole (#177842), and takes 0.4 s and more for every new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
        name, several = name or ("cuda" if torch.cuda.is_available() else "cpu"), self.world > 1
        try:
            device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if several and name.startswith("cuda") else name)
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            advice = "leave --device out, or give cpu or cuda" + several * ", and start no more processes than cards"
            raise UserError(f"There is no device '{name}' ({str(error).splitlines()[0]}): {advice}.") from error
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"Device '{name}' is not supported: give cpu or cuda.")
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # a graph is captured on the current card, wherever its tensors are (#87894)
        self.device = device
        return device

    def meet(self) -> None:
        """Connect the cards now, once each process has one: in the first step their memory may be full."""
        self.gather(lambda: None)
        self.sum(torch.zeros(1, device=self.device))[0].item()

    def problems(self, count: int) -> list[int]:
        """Which of `count` problems are this process's. A process left without one does the first again, for nobody."""
        return list(range(count)[self.rank :: self.world] or range(1))

    def owners(self, count: int) -> list[tuple[int, int]]:
        """For each of `count` problems, its rank and its index there in the result of `gather`."""
        return [(problem % self.world, problem // self.world) for problem in range(count)]

    def rows(self, rows: Tensor, group_size: int) -> Tensor:
        """Those of `rows` (n,) that this process learns from: whole groups, which share a prompt, in turns."""
        if self.world == 1:
            return rows
        groups = torch.unique(rows // group_size, return_inverse=True)[1]
        return rows[groups % self.world == self.rank]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on every process, by rank; tensors come to this one's device.

        Raises:
            Agreed: what `work` raised, on whichever process it did.
        """
        if self.world == 1:
            return [work()]
        try:
            mine: T | Agreed = work()
        except Agreed as error:
            mine = error
        packed, parcels = io.BytesIO(), [b""] * self.world
        torch.save(mine, packed)
        torch.get_device_module(self.device).synchronize()
        start = time.perf_counter()
        with _explained():
            dist.all_gather_object(parcels, packed.getvalue())
        self.waited += time.perf_counter() - start
        results = [torch.load(io.BytesIO(parcel), self.device, weights_only=False) for parcel in parcels]
        if errors := [result for result in results if isinstance(result, Agreed)]:
            raise errors[0]
        return results

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Each of these tensors, of one type, added up over processes."""
        if self.world == 1:
            return list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _explained():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The means over processes."""
        (total,) = self.sum(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, (total / self.world).tolist(), strict=True))

    @torch.no_grad()
    def add_gradients(self, params: Collection[Tensor]) -> None:
        """Add up each parameter's gradient over processes, with zeros for one that has none.

        A parameter that has none anywhere stays without, as it would in one process.
        """
        (holders,) = self.sum(torch.tensor([float(param.grad is not None) for param in params]))
        params = [param for param, count in zip(params, holders.tolist(), strict=True) if count]
        ends = accumulate(param.numel() for param in params)
        for _, part in groupby(zip(params, ends, strict=True), lambda pair: pair[1] // BUCKET):
            bucket = [param for param, _ in part]
            gradients = self.sum(*(torch.zeros_like(p) if p.grad is None else p.grad for p in bucket))
            for param, gradient in zip(bucket, gradients, strict=True):
                param.grad = gradient

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns on process 0, which alone does it while the others wait."""
        return self.gather(lambda: None if self.rank else work())[0]

    def tensors_of_first(self, load: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `load` returns on process 0, tensors on the CPU, too large to be gathered."""
        tensors: dict[str, Tensor] = {}
        like = self.first(lambda: tensors.update(load()) or {n: (t.shape, t.dtype) for n, t in tensors.items()})
        if self.rank:
            tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in like.items()}
        for tensor in tensors.values() if self.world > 1 else ():
            with _explained():
                dist.broadcast(tensor, 0)
        return tensors

    def asked_to_stop(self, signum: int | None) -> int | None:
        """The signal that any process was sent, if one was; SIGTERM where the launcher has gone without one."""
        orphan = self.world > 1 and os.getppid() != self.launcher
        return max(self.gather(lambda: signum or (signal.SIGTERM if orphan else 0))) or None

    def first_to_tell(self) -> bool:
        """Whether no other process has said yet why the run ends, as far as can be found out."""
        count: list[int] = []

        def ask() -> None:
            with suppress(RuntimeError):  # the launcher, which keeps the store, is gone
                count.append(self.store.add("told", 1) if self.store else 1)

        asking = threading.Thread(target=ask, daemon=True)  # the store of a machine that is cut off never answers
        asking.start()
        asking.join(LAST_WORD)
        return count in ([], [1])

    @contextmanager
    def one_speaks(self) -> Iterator[None]:
        """Within, process 0 alone prints; an error is still raised in each process."""
        with open(os.devnull, "w") as nowhere:
            out, err = (nowhere, nowhere) if self.rank else (sys.stdout, sys.stderr)
            with redirect_stdout(out), redirect_stderr(err):
                yield

    def close(self) -> None:
        """Leave the others; they have come as far as this one."""
        if self.world > 1:
            dist.destroy_process_group()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's: a connection has closed, or nothing came in time
        said, nccl, cause = str(error).partition("Last error:")
        # Without the place in their source.
        reason = one_line(cause.strip() or said).rpartition("] ")[2].partition(". ")[0]
        what = "Another process of this run has ended, or does not answer"
        what = "NCCL failed between the cards of this run" if nccl and "ncclRemoteError" not in said else what
        raise UserError(
            f"{what} ({reason}): look above for what it said. "
            f"{PATIENCE} sets how long to wait; --resume goes on from the last checkpoint."
        ) from error
