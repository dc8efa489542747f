"""Two GPUs that are not there: CPU tensors that say they are on "cuda", held to a GPU's rules.

It cannot tell how fast or how exact a GPU is, but runs the code's CUDA branches and fails where a GPU would:

- an operation on tensors of different devices, but for single numbers and indices from the CPU;
- while a CUDA graph is captured, what waits for the GPU or copies from the CPU.

A capture sees the current card alone: work on the other one is done at once, and is not in the graph.
Nothing that is captured takes effect; what it makes is garbage until the graph is replayed, and again after another
graph of the same memory pool has been. A replay does what was recorded with the storages of then: numbers that the host
knew are baked in, and a tensor that has been replaced since is not noticed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
INDEXES = ("aten::index.Tensor", "aten::index_put", "aten::_index_put_impl")  # the second argument may be on the CPU
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_", "repeat_interleave")
WAITS = tuple(f"aten::{name}" for name in WAITS)  # operations whose result has to reach the host
READS = ("tolist", "allclose")  # that are no operations
REFUSED = ("numpy", "__array__")


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def spoil(tensors: Iterable[Tensor]) -> None:
    """Garbage that no test can take for a result."""
    for tensor in tensors:
        tensor.fill_(torch.nan if tensor.is_floating_point() else tensor.dtype == torch.bool or -(2**30))


class Graph:
    """Stands for `torch.cuda.CUDAGraph`: operations with their arguments and results."""

    def __init__(self, gpu: "PretendGPU") -> None:
        self.gpu, self.card = gpu, gpu.current
        self.calls: list[tuple[Callable, tuple, dict, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what the capture has overwritten, to be put back
        self.own: set[int] = set()
        self.sharing: list[Graph] = []  # the graphs of one pool

    def pool(self) -> list["Graph"]:
        return self.sharing

    def record(self, func: Any, args: tuple, kwargs: dict) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            for t in tensors_in(given.get(argument.name)) if written else ():
                if storage(t) not in self.own | self.before.keys():
                    whole = t.detach().as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
                    self.before[storage(t)] = (whole, whole.clone())
        out = func(*args, **kwargs)
        old = {storage(t) for t in tensors_in((args, kwargs))}
        made = [t.detach() for t in tensors_in(out) if storage(t) not in old]
        self.own |= set(map(storage, made))
        if made or func._schema.is_mutable:  # a view needs no work
            args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
            self.calls.append((func, args, kwargs, made))
        return out

    @torch.no_grad()
    def end(self) -> None:
        for whole, before in self.before.values():
            whole.copy_(before)
        self.spoil()

    def spoil(self) -> None:
        for *_, made in self.calls:
            spoil(made)

    @torch.no_grad()
    def replay(self) -> None:
        assert self.calls, "the graph is empty"
        for func, args, kwargs, made in self.calls:
            with self.gpu.making(self.card), torch._C.DisableTorchFunction():
                again = func(*args, **kwargs)
            for old, new in zip(made, tensors_in(again) if made else (), strict=True):
                old.copy_(new)
        for other in self.sharing:
            if other is not self:
                other.spoil()


class PretendGPU(TorchDispatchMode):
    """Inside, `device="cuda"` and `.cuda()` work. waits: how often the host has waited for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        # A storage that is referred to leaves its address to no other.
        self.on_gpu: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self.current = torch.device("cuda", 0)
        self.graph: Graph | None = None
        self.waits = 0
        self.default = CPU  # of what is made from nothing
        self.names = _Names(self)

    def device_of(self, tensor: Tensor) -> torch.device:
        return self.on_gpu[storage(tensor)][1] if storage(tensor) in self.on_gpu else CPU

    def named(self, device: torch.device | str | int) -> torch.device:
        """The device of this name, the current card when it gives no number."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return self.current if device.type == "cuda" and device.index is None else device

    def choose(self, device: torch.device | str | int) -> None:
        self.current = self.named(device)

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.on_gpu.pop(storage(tensor), None)
        if device.type == "cuda":
            self.on_gpu[storage(tensor)] = (StorageWeakRef(tensor.untyped_storage()), device)
        return tensor

    @contextmanager
    def making(self, device: torch.device) -> Iterator[None]:
        """Inside, what is made from nothing is on this device."""
        before, self.default = self.default, device
        try:
            yield
        finally:
            self.default = before

    def wait(self, what: str) -> None:
        self.waits += 1
        assert self.graph is None, f"{what} while a graph is captured"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func.name()
        given = tensors_in((args, kwargs))
        together = tensors_in((args[0], args[2:], kwargs)) if name.startswith(INDEXES) else given
        devices = {self.device_of(t) for t in together if t.dim() or self.device_of(t) != CPU}
        devices = devices or {CPU if given else self.default}
        if name.startswith(INDEXES):
            indices, where = tensors_in(args[1]), self.device_of(args[0])
            assert {where, CPU} >= set(map(self.device_of, indices)), f"{name} by indices on another device"
            if where != CPU and any(self.device_of(i) == CPU or i.dtype == torch.bool for i in indices):
                self.wait(name)
        if name.startswith(WAITS) and devices != {CPU}:
            self.wait(name)
        if name.startswith("aten::copy_") and len(devices) > 1:
            self.wait("a copy between devices")
            devices = {self.device_of(args[0])}
        assert len(devices) < 2, f"{name} of tensors on both devices: {[(self.device_of(t), t.shape) for t in given]}"
        captured = self.graph is not None and devices == {self.graph.card}
        made = self.graph.record(func, args, kwargs) if captured else func(*args, **kwargs)
        old = {storage(t) for t in given}
        for out in tensors_in(made):
            if storage(out) not in old:
                self.put(out, *devices)
        return made


class _Names(TorchFunctionMode):
    """Answers to "which device?" and makes what is asked for on one."""

    def __init__(self, gpu: PretendGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return self.gpu.device_of(args[0])
        if func == Tensor.is_cuda.__get__:
            return self.gpu.device_of(args[0]) != CPU
        on_gpu = bool(args) and isinstance(args[0], Tensor) and self.gpu.device_of(args[0]) != CPU
        assert not (on_gpu and name in REFUSED), f"{name} of a tensor on the GPU"
        if on_gpu and name in READS:
            self.gpu.wait(name)
        if name in ("to", "cuda", "cpu"):
            return self.move(func, name, args, kwargs)
        stays = on_gpu and name in ("new_tensor", "__deepcopy__")
        wanted = kwargs.pop("device", None) or (self.gpu.device_of(args[0]) if stays else None)
        given = {self.gpu.device_of(t) for t in tensors_in((args, kwargs))} - {CPU}
        device = self.gpu.named(wanted or next(iter(given), CPU))
        with self.gpu.making(device):
            made = func(*args, **kwargs)
        if wanted is not None and isinstance(made, Tensor):  # torch.tensor's passes through no operation that makes it
            assert device.type == "cpu" or kwargs.get("generator") is None, f"{name} on the GPU by the CPU's generator"
            self.gpu.put(made, device)
            if name in ("tensor", "new_tensor") and device.type == "cuda" and made.numel():
                self.gpu.wait("a copy of numbers")
        return made

    def move(self, func: Any, name: str, args: tuple, kwargs: dict) -> Tensor:
        tensor, rest, wanted = args[0], list(args[1:]), self.gpu.device_of(args[0])
        if name != "to":
            wanted, rest = (self.gpu.current if name == "cuda" else CPU), []
        elif "device" in kwargs:
            wanted = self.gpu.named(kwargs.pop("device") or wanted)
        elif rest and isinstance(rest[0], str | torch.device):
            wanted = self.gpu.named(rest.pop(0))
        elif rest and isinstance(rest[0], Tensor):
            wanted, rest[0] = self.gpu.device_of(rest[0]), rest[0].dtype
        rest = [r for r in rest if isinstance(r, torch.dtype)]
        kwargs = {k: v for k, v in kwargs.items() if k in ("dtype", "copy") and v is not None}
        here = wanted == self.gpu.device_of(tensor)
        moved = Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        if here:
            return moved
        self.gpu.wait("a copy between devices")
        return self.gpu.put(moved.clone() if storage(moved) == storage(tensor) else moved, wanted)


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPU]:
    """A machine with a GPU for everything inside."""
    gpu = PretendGPU()

    @contextmanager
    def capture(graph: Graph, pool: list[Graph] | None = None) -> Iterator[None]:
        gpu.graph, graph.sharing = graph, [] if pool is None else pool
        graph.sharing.append(graph)
        try:
            yield
        finally:
            gpu.graph = None
            graph.end()

    names = {
        "is_available": lambda: True,
        "set_device": gpu.choose,
        "is_bf16_supported": lambda including_emulation: True,
        "get_device_name": lambda _: "pretend",
        "get_device_properties": lambda _: SimpleNamespace(total_memory=24 * 10**9),
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda _: 10**9,
        "reset_peak_memory_stats": lambda _: None,
        "synchronize": lambda *_: gpu.wait("synchronize"),
        "CUDAGraph": lambda: Graph(gpu),
        "graph": capture,
        "is_current_stream_capturing": lambda: gpu.graph is not None,
    }
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)  # else AdamW asks the driver
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with gpu, gpu.names:
        yield gpu
