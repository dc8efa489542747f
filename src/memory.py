"""What a run will need of the GPU's memory, counted before training starts. GB are 10^9 bytes.

Activations are not guessed from a formula: the learner's own passes over one and over two short texts show how much a
text leaves behind for the backward pass, which is in proportion to its length.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.engine.kv_cache import encode_prefix
from src.engine.logprobs import HEAD_CHUNK, Batch, completion_hidden
from src.engine.sampling import GRAPH_WIDTH, Sampler
from src.grpo import GRPOConfig

log = logging.getLogger(__name__)

LOGIT_BYTES = 12  # of the head at work: logits in the model's precision and in fp32, and their log-softmax
SAMPLED_BYTES = LOGIT_BYTES + 8  # in the sampler also the probabilities and their sums
Fits = Callable[[int], int | None]  # bytes of a card -> the largest token budget below the given one that fits it
LEAST_ROWS = 64  # that the sampler of train.py runs at a time
SHORT = 32  # tokens that are enough to measure with
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
    """Bytes that one prompt, and one completion, keep for the backward pass, in proportion to shorter ones."""
    shrink = max(1, max(prompt_tokens, completion_tokens) // SHORT)
    p, c = max(2, prompt_tokens // shrink), max(1, completion_tokens // shrink)

    def prompts(count: int) -> Any:
        return encode_prefix(model, *_texts(count, p, model.device))

    def completions(count: int) -> Any:
        batch = Batch(*_texts(count, p, model.device), *_texts(count, c, model.device))
        return completion_hidden(model, prompts(count), batch, torch.arange(count, device=model.device))

    prompt = _saved(lambda: prompts(2)) - _saved(lambda: prompts(1))
    both = _saved(lambda: completions(2)) - _saved(lambda: completions(1))
    return prompt * prompt_tokens // p, (both - prompt) * completion_tokens // c


def _texts(count: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(count, tokens, dtype=torch.long, device=device)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def _saved(work: Callable[[], Any]) -> int:
    """Bytes that the result of `work` keeps alive for its backward pass, each storage once."""
    saved: list[ReferenceType[Tensor]] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = work()  # what does not lead to it, a prompt's last hidden states, is gone by now
    alive = [tensor.untyped_storage() for each in saved if (tensor := each()) is not None]
    del result
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values())


def activations(per_prompt: int, per_completion: int, config: GRPOConfig, token_budget: int) -> int:
    """Bytes of one micro-batch of the longest completions, and of the prompts it shares its graph with."""
    c = config
    prompts = min(c.prompts_per_step, max(1, token_budget // c.max_prompt_tokens))
    rows = min(c.prompts_per_step * c.group_size, max(1, token_budget // c.max_completion_tokens))
    return prompts * per_prompt + rows * per_completion


def estimate_memory(model: PreTrainedModel, sampler: Sampler, config: GRPOConfig) -> tuple[dict[str, int], Fits]:
    """Bytes by part at the longest prompts and completions that the settings allow; and which budget fits a card."""
    parts = weights_and_optimizer(model, config.kl_coef > 0)
    columns = config.max_prompt_tokens + config.max_completion_tokens + sampler.check_every
    parts["KV cache"] = cache_bytes(model, sampler.rows, columns)
    head = model.get_output_embeddings().weight
    learner, rows = LOGIT_BYTES * HEAD_CHUNK[head.device.type], SAMPLED_BYTES * sampler.rows * len(head)
    parts["logits"] = learner + rows if sampler.on_cuda else max(learner, rows)  # what graphs work in stays theirs
    parts["head gradient"] = 4 * head.numel() if head.requires_grad else 0  # of the micro-batch, in fp32
    rest, texts = sum(parts.values()), activation_bytes(model, config.max_prompt_tokens, config.max_completion_tokens)
    parts["activations"] = activations(*texts, config, config.token_budget)

    def fits(card: int) -> int | None:
        budgets = [config.token_budget >> halvings for halvings in range(1, 9)]
        return next((b for b in budgets if rest + activations(*texts, config, b) <= FULL * card), None)

    return parts, fits


def report_memory(model: PreTrainedModel, sampler: Sampler, config: GRPOConfig) -> None:
    """Log the estimate, and on CUDA what to change when it does not fit."""
    parts, fits = estimate_memory(model, sampler, config)
    total = sum(parts.values())
    line = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    log.info("memory: at most about %.1f GB: %s", total / 1e9, line)
    if model.device.type == "cuda":
        card = torch.cuda.get_device_properties(model.device).total_memory
        if total > FULL * card:
            log.warning("memory: the card has %.1f GB. %s", card / 1e9, advice(parts, config, fits(card)))


def advice(parts: dict[str, int], config: GRPOConfig, budget: int | None) -> str:
    """What to change when `parts` do not fit, but would at this token budget; what else saves how much."""
    trained = parts["Adam"] + parts["gradients"] + parts["fp32 masters"]
    rows = config.prompts_per_step * config.group_size
    savings = {
        "--lora_rank 32": trained + parts["reference"] if trained > parts["weights"] else 0,
        "--kl_coef 0": parts["reference"],
        "half the --prompts_per_step or --group_size": parts["KV cache"] // 2 if rows >= 2 * LEAST_ROWS else 0,
    }
    others = [f"{what} saves about {size / 1e9:.1f} GB" for what, size in savings.items() if size > 5e7]
    if budget:
        return "; ".join([f"When texts get that long, --token_budget {budget} fits", *others])
    return "; ".join(["No --token_budget makes it fit", *others, "or choose a smaller --model"])
