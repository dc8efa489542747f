"""Products with a model's weights on a CPU, by oneDNN instead of PyTorch's default (MKL on x86).

MKL is slow for few rows, which is what decoding asks for, and for wide outputs, which the head has. oneDNN takes
half to a third of the time with weights laid out for it in advance, and half for the head's as they lie (measured on
an AMD EPYC with AVX-512: benchmarks/README.md). The operators are those that `torch.compile` emits on a CPU
(torch/_inductor/mkldnn_lowerings.py); PyTorch has no public name for them, so where they are missing, and on
machines where nothing was measured, everything stays with PyTorch's default.

Shapes: n rows, I inputs, O outputs.
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SMALLEST = 2**18  # entries of a weight; below, the cost of a call outweighs the gain
AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and platform.machine() in ("x86_64", "AMD64")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
)


def _suits(weight: Tensor) -> bool:
    return AVAILABLE and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= SMALLEST


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, without gradient on any path: (n, I), (O, I), (O,) or None -> (n, O)."""
    with torch.no_grad():
        return _product(x, weight, bias) if _suits(weight) else nn.functional.linear(x, weight, bias)


def packable(model: nn.Module) -> list[nn.Linear]:
    """The layers that `packed_weights` works on: large, plain ones."""
    plain = (layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer))
    return [layer for layer in plain if _suits(layer.weight)]


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, large linear layers of `model` work on copies of their weights laid out for oneDNN, without gradient.

    The weights must not change inside. The copies take as much memory as the weights and go when the block ends.
    """
    layers = packable(model)
    try:
        with torch.no_grad():
            for layer in layers:
                layer.forward = _packed_forward(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _packed_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight), layer.bias
    return lambda x: _product(x, weight, bias)
