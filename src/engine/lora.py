"""LoRA through `peft` (Hu et al. 2021): a small trained addition to every linear layer of frozen blocks.

The adapters are put into the model in place. It keeps its class, its parameters' addresses and its ways in
(`base_model`, `get_output_embeddings`), so the sampler and the learner do not know that they are there.
"""

import logging
import warnings

import torch
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
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about names inside peft and transformers
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    model.eval()
    trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    log.info("LoRA: training %d of %d parameters; it wants about ten times the usual learning rate", trained, total)


@torch.no_grad()
def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of an ordinary model with the adapters added to the weights; `model` stays as it is.

    The sum is taken in fp32 and rounded once; merged weights lie on the CPU.
    """
    state = {n.replace(".base_layer.", "."): t for n, t in model.state_dict().items() if ".lora_" not in n}
    adapted = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, layer in adapted.items():
        weight = layer.get_base_layer().weight
        delta = layer.lora_B[ADAPTER].weight.float() @ layer.lora_A[ADAPTER].weight.float() * layer.scaling[ADAPTER]
        merged = weight.float() + (delta.T if layer.fan_in_fan_out else delta)
        state[f"{name}.weight"] = merged.to("cpu", weight.dtype)
    return state
