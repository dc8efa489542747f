"""A GPU that is not there: CPU tensors that say they are on "cuda", held to a GPU's rules.

It cannot tell how fast or how exact a GPU is, but runs the code's CUDA branches and fails where a GPU would:

- an operation on tensors of both devices (single numbers and the indices that PyTorch moves by itself excepted);
- while a CUDA graph is captured, whatever waits for the GPU or copies from the CPU.

Nothing that is captured takes effect. A replay does what was recorded with the storages of then: numbers that the
host knew are baked in, and a tensor that has been replaced since is not noticed, as on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CROSSES = ("aten::copy_", "aten::_to_copy", "aten::set_.source_Tensor")  # operations that may see both devices
INDEXES = ("aten::index.Tensor", "aten::index_put", "aten::_index_put_impl")  # take indices from the CPU, and wait
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
READS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Graph:
    """Stands for `torch.cuda.CUDAGraph`: operations with their arguments and results."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what the capture has overwritten, to be put back
        self.own: set[int] = set()

    def record(self, func: Any, args: tuple, kwargs: dict) -> Any:
        for argument, tensor in zip(func._schema.arguments, [*args, *kwargs.values()], strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            for t in tensors_in(tensor) if written else ():
                if storage(t) not in self.own | self.before.keys():
                    whole = t.detach().as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
                    self.before[storage(t)] = (whole, whole.clone())
        out = func(*args, **kwargs)
        given = {storage(t) for t in tensors_in((args, kwargs))}
        made = [t.detach() for t in tensors_in(out) if storage(t) not in given]
        self.own |= set(map(storage, made))
        if made or func._schema.is_mutable:  # a view needs no work
            args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
            self.calls.append((func, args, kwargs, made))
        return out

    def pool(self) -> "Graph":
        return self

    def undo(self) -> None:
        for whole, before in self.before.values():
            whole.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        assert self.calls, "the graph is empty"
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(made, tensors_in(again) if made else (), strict=True):
                old.copy_(new)


class Stream:
    """Stands for `torch.cuda.Stream`: everything happens at once anyway."""

    def wait_stream(self, other: "Stream") -> None:
        pass


class PretendGPU(TorchDispatchMode):
    """Inside, `device="cuda"` and `.cuda()` work. waits: how often the host has waited for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.on_gpu: dict[int, StorageWeakRef] = {}  # a storage that is referred to leaves its address to no other
        self.graph: Graph | None = None
        self.waits = 0
        self.default = CPU  # of what is made from nothing
        self.names = _Names(self)

    def device_of(self, tensor: Tensor) -> torch.device:
        return GPU if storage(tensor) in self.on_gpu else CPU

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.on_gpu.pop(storage(tensor), None)
        if device.type == "cuda":
            self.on_gpu[storage(tensor)] = StorageWeakRef(tensor.untyped_storage())
        return tensor

    def wait(self, what: str) -> None:
        self.waits += 1
        assert self.graph is None, f"{what} while a graph is captured"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func.name()
        given = tensors_in((args, kwargs))
        devices = {self.device_of(t) for t in given if t.dim()} or {self.device_of(t) for t in given}
        if name.startswith(INDEXES) and GPU in devices:
            if len(devices) > 1:
                self.wait(f"{name} with indices on the CPU")
            devices = {self.device_of(args[0])}
        if name.startswith(WAITS) and GPU in devices:
            self.wait(name)
        if name.startswith(CROSSES) and len(devices) > 1:
            self.wait(f"{name} between devices")
            devices = {self.device_of(args[0])}
        assert len(devices) < 2, f"{name} of tensors on both devices: {[(self.device_of(t), t.shape) for t in given]}"
        made = self.graph.record(func, args, kwargs) if self.graph and GPU in devices else func(*args, **kwargs)
        old = {storage(t) for t in given}
        for out in tensors_in(made):
            if storage(out) not in old:
                self.put(out, *devices or {self.default})
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
            return self.gpu.device_of(args[0]) == GPU
        if name in READS and args and isinstance(args[0], Tensor) and self.gpu.device_of(args[0]) == GPU:
            self.gpu.wait(name)
        if name in ("to", "cuda", "cpu"):
            return self.move(func, name, args, kwargs)
        wanted = kwargs.pop("device", None) or (self.gpu.device_of(args[0]) if func is Tensor.new_tensor else None)
        given = {self.gpu.device_of(t) for t in tensors_in((args, kwargs))}
        before, self.gpu.default = self.gpu.default, torch.device(wanted or (GPU if GPU in given else CPU))
        try:
            made = func(*args, **kwargs)
        finally:
            self.gpu.default, default = before, self.gpu.default
        if wanted is not None and isinstance(made, Tensor):  # torch.tensor's passes through no operation that makes it
            self.gpu.put(made, default)
            if name in ("tensor", "new_tensor") and default.type == "cuda":
                self.gpu.wait("a copy of numbers")
        return made

    def move(self, func: Any, name: str, args: tuple, kwargs: dict) -> Tensor:
        tensor, rest, wanted = args[0], list(args[1:]), self.gpu.device_of(args[0])
        if name != "to":
            wanted, rest = (GPU if name == "cuda" else CPU), []
        elif "device" in kwargs:
            wanted = torch.device(kwargs.pop("device") or wanted)
        elif rest and isinstance(rest[0], str | torch.device):
            wanted = torch.device(rest.pop(0))
        elif rest and isinstance(rest[0], Tensor):
            wanted, rest[0] = self.gpu.device_of(rest[0]), rest[0].dtype
        rest = [r for r in rest if isinstance(r, torch.dtype)]
        kwargs = {k: v for k, v in kwargs.items() if k in ("dtype", "copy") and v is not None}
        here = wanted.type == self.gpu.device_of(tensor).type
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
    def capture(graph: Graph, pool: Graph | None = None) -> Iterator[None]:
        gpu.graph = graph
        try:
            yield
        finally:
            gpu.graph = None
            graph.undo()

    names = {"CUDAGraph": Graph, "graph": capture, "stream": nullcontext, "Stream": Stream, "current_stream": Stream}
    names |= {"empty_cache": lambda: None, "synchronize": lambda *_: None}
    names |= {"is_available": lambda: True, "is_bf16_supported": lambda: True, "get_device_name": lambda _: "pretend"}
    names |= {"get_device_properties": lambda _: SimpleNamespace(total_memory=24 * 10**9)}
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with gpu, gpu.names:
        yield gpu
