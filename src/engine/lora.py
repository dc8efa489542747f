"""LoRA through `peft` (Hu et al. 2021): a small trained addition to every linear layer of frozen blocks.

The adapters are put into the model in place. It keeps its class, its parameters' addresses and its ways in
(`base_model`, `get_output_embeddings`), so the sampler and the learner do not know that they are there.
"""

import logging
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from src.errors import UserError

log = logging.getLogger(__name__)

ALPHA = 32  # the addition is scaled by ALPHA / rank, so that one learning rate suits every rank (Schulman et al. 2025)
ADAPTER = "default"  # peft's name of the only adapter


def add_lora(model: PreTrainedModel, rank: int, seed: int) -> None:
    """Freeze `model` and add an adapter to every linear layer but the output layer; it changes nothing yet.

    Raises:
        UserError: `peft` is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--lora_rank needs the package peft, which is not installed: pip install peft") from error
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.name_or_path}
    config = LoraConfig(r=rank, lora_alpha=ALPHA, **options)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about names inside peft and transformers
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    model.eval()
    trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    log.info("LoRA: training %d of %d parameters; it wants about ten times the usual learning rate", trained, total)


def adapted_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """By name; none where the model has no adapter."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


@torch.no_grad()
def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of an ordinary model with the adapters added to the weights; `model` stays as it is.

    The sum is taken in fp32 and rounded once; merged weights lie on the CPU.
    """
    state = {n.replace(".base_layer.", "."): t for n, t in model.state_dict().items() if ".lora_" not in n}
    for name, layer in adapted_layers(model).items():
        weight = layer.get_base_layer().weight
        delta = layer.lora_B[ADAPTER].weight.float() @ layer.lora_A[ADAPTER].weight.float() * layer.scaling[ADAPTER]
        merged = weight.float() + (delta.T if layer.fan_in_fan_out else delta)
        state[f"{name}.weight"] = merged.to("cpu", weight.dtype)
    return state


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """The adapter alone, as `peft.PeftModel.from_pretrained(base, folder)` loads it."""
    folder.mkdir()
    model.peft_config[ADAPTER].save_pretrained(folder)
    state = {n.replace(f".{ADAPTER}.", "."): t.contiguous() for n, t in model.state_dict().items() if ".lora_" in n}
    save_file({f"base_model.model.{n}": t for n, t in state.items()}, folder / "adapter_model.safetensors")
