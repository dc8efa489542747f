"""What a run will need of the GPU's memory, counted before training starts. GB are 10^9 bytes.

Activations are not guessed from a formula: the learner's own passes over one and over two texts of full length show
how much a text leaves behind for the backward pass.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.grpo import GRPOConfig
from src.kv_cache import encode_prefix
from src.policy import HEAD_CHUNK, Batch, completion_logps
from src.sampling import GRAPH_WIDTH, Sampler

log = logging.getLogger(__name__)

LOGIT_BYTES = 16  # of the head at work: logits in the model's precision and in fp32, divided, and their gradient
FULL = 0.9  # share of the card above which a run is likely to fail: fragments and CUDA itself take the rest


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weights_and_optimizer(model: PreTrainedModel, reference: bool) -> dict[str, int]:
    """Bytes of what stands in memory through the whole run, by part; `reference`: whether there is a KL term."""
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    return {
        "weights": _size(model.parameters()) + _size(model.buffers()),
        "fp32 masters": 4 * sum(p.numel() for p in trained if p.dtype != torch.float32),
        "Adam": 8 * numbers + 4 * len(trained),  # two moments, and one step count a tensor
        "gradients": 4 * numbers,
        "reference": _size(trained) if reference else 0,
    }


def cache_bytes(model: PreTrainedModel, rows: int, columns: int) -> int:
    """Bytes of the sampler's keys and values: `rows` running completions, rounded up to whole blocks of columns."""
    with torch.no_grad():
        prefix = encode_prefix(model, *_texts(1, 2, model.device))
    capacity = -(-columns // GRAPH_WIDTH) * GRAPH_WIDTH
    return rows * capacity * sum(_size((layer.keys, layer.values)) for layer in prefix.layers)


def activation_bytes(model: PreTrainedModel, prompt_tokens: int, completion_tokens: int) -> tuple[int, int]:
    """Bytes that one prompt, and one completion, keep for the backward pass."""

    def prompts(count: int) -> Any:
        return encode_prefix(model, *_texts(count, prompt_tokens, model.device))

    def completions(count: int) -> Any:
        batch = Batch(*_texts(count, prompt_tokens, model.device), *_texts(count, completion_tokens, model.device))
        return completion_logps(model, prompts(count), batch, torch.arange(count, device=model.device), 1.0)

    prompt = _saved(lambda: prompts(2)) - _saved(lambda: prompts(1))
    both = _saved(lambda: completions(2)) - _saved(lambda: completions(1))
    return prompt, both - prompt


def _texts(count: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(count, tokens, dtype=torch.long, device=device)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def _saved(work: Callable[[], Any]) -> int:
    """Bytes that autograd holds on to after `work`, each storage once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = work()  # alive while counted, so that no storage takes the place of another
    del kept
    return sum(storages.values())


def estimate_memory(model: PreTrainedModel, sampler: Sampler, config: GRPOConfig) -> dict[str, int]:
    """Bytes by part, at the longest prompts and completions that the settings allow."""
    c = config
    parts = weights_and_optimizer(model, c.kl_coef > 0)
    columns = c.max_prompt_tokens + c.max_completion_tokens + sampler.check_every
    parts["KV cache"] = cache_bytes(model, sampler.rows, columns)
    prompt, completion = activation_bytes(model, c.max_prompt_tokens, c.max_completion_tokens)
    prompts = min(c.prompts_per_step, max(1, c.token_budget // c.max_prompt_tokens))
    rows = min(c.prompts_per_step * c.group_size, max(1, c.token_budget // c.max_completion_tokens))
    parts["activations"] = prompts * prompt + rows * completion
    vocabulary = model.get_output_embeddings().weight.shape[0]
    parts["logits"] = LOGIT_BYTES * max(HEAD_CHUNK, sampler.rows * vocabulary)
    return parts


def report_memory(model: PreTrainedModel, sampler: Sampler, config: GRPOConfig) -> None:
    """Log the estimate, and on CUDA what to change when it does not fit."""
    parts = estimate_memory(model, sampler, config)
    total = sum(parts.values())
    line = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    log.info("memory: about %.1f GB: %s", total / 1e9, line)
    if model.device.type == "cuda":
        card = torch.cuda.get_device_properties(model.device).total_memory
        if total > FULL * card:
            log.warning("memory: the card has %.1f GB, which may be too little: %s", card / 1e9, advice(parts, config))


def advice(parts: dict[str, int], config: GRPOConfig) -> str:
    """What to change, and what it saves, the largest saving first."""
    trained = parts["Adam"] + parts["gradients"] + parts["fp32 masters"] + parts["reference"]
    smaller = max(64, config.token_budget // 4)
    savings = {
        f"--token_budget {smaller}": parts["activations"] * 3 // 4,
        "--kl_coef 0": parts["reference"],
        "a lower --group_size or --prompts_per_step": parts["KV cache"] // 2,
    }
    if trained > parts["weights"]:  # more than an adapter is trained
        savings["--lora_rank 32"] = trained
    ordered = sorted(savings.items(), key=lambda item: -item[1])
    return "; ".join(f"{what} saves about {size / 1e9:.1f} GB" for what, size in ordered if size > 5e7)
