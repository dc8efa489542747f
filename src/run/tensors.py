"""Masters and moments of a checkpoint, checked against the model before anything is taken over."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from src.errors import UserError, one_line
from src.run.checkpoint import TENSORS, check_unchanged
from src.run.state import State


def load_tensors(path: Path, state: State, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masters and moments, on the CPU, of a checkpoint with this state. like: those of the model.

    Raises:
        UserError: one is missing, of another shape or type than the model's, or not finite.
    """
    try:
        tensors = load_file(path / TENSORS)
        for master in like:
            if master.startswith("master/"):
                _check_tensors(tensors, master.removeprefix("master/"), like[master].shape)
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(
            f"'{path}' does not fit this program and model ({one_line(error)}): resume it with the version, the "
            "--model and the --lora_rank that wrote it."
        ) from error
    check_unchanged(path, state)
    return tensors


def _check_tensors(tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> None:
    """Raise ValueError when the master or the moments of a weight cannot be taken over; it may have no moments."""
    moments = {f"adam/step/{name}": torch.Size(), f"adam/exp_avg/{name}": shape, f"adam/exp_avg_sq/{name}": shape}
    for key, wanted in {f"master/{name}": shape, **(moments if tensors.keys() & moments.keys() else {})}.items():
        if key not in tensors:
            raise ValueError(f"{key} is missing")
        found = tensors[key]
        if (found.shape, found.dtype) != (wanted, torch.float32):
            raise ValueError(f"{key} is {found.dtype} {tuple(found.shape)}, not torch.float32 {tuple(wanted)}")
        if not found.isfinite().all() or (key.startswith(("adam/step/", "adam/exp_avg_sq/")) and (found < 0).any()):
            raise ValueError(f"{key} has numbers that it cannot have")
