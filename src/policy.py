"""Log-probabilities of given completions, and their gradient, in the least memory and work that keeps them exact.

Every prompt runs once; its keys and values are shared by its group. In training the shared keys and values are
leaves of the completions' graphs: micro-batches of completions add up gradients in them, and one backward pass
through the prompts then finishes the job. Only completion tokens pass through the head, a chunk at a time, and the
chunk's logits are computed again in the backward pass, so no (B, C, V) tensor ever exists.

Shapes: Q prompts, G completions each, B = Q * G rows, P prompt tokens, C completion tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from src.kv_cache import encode_prefix

HEAD_CHUNK = 2**24  # logits that live at a time


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, completions padded on the right; row b completes prompt b // group_size."""

    prompt_ids: Tensor  # (Q, P) int64
    prompt_mask: Tensor  # (Q, P) bool
    completion_ids: Tensor  # (B, C) int64
    completion_mask: Tensor  # (B, C) bool

    @property
    def group_size(self) -> int:
        return len(self.completion_ids) // len(self.prompt_ids)


def token_logps(head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(head(hidden) / temperature)[targets]: hidden (N, H), targets (N,) -> (N,) float32."""

    def logps(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float() / temperature  # (n, V)
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    size = max(1, HEAD_CHUNK // head.weight.shape[0])
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(logps, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in chunks])
    return torch.cat([logps(h, t) for h, t in chunks])


def completion_logps(
    model: PreTrainedModel, prefix: DynamicCache, batch: Batch, rows: Tensor, temperature: float
) -> Tensor:
    """Log-probabilities (b, c) of the completion tokens of `rows` (b,), c their longest; 0 where padded.

    prefix: keys and values of these rows' prompts without their last token, row for row; it is extended.
    """
    mask = batch.completion_mask[rows]  # (b, C)
    width = int(mask.sum(-1).max())
    mask, targets = mask[:, :width], batch.completion_ids[rows, :width]  # (b, c)
    prompts = rows // batch.group_size
    prefix_mask = batch.prompt_mask[prompts, :-1]  # (b, P - 1)
    inputs = torch.cat([batch.prompt_ids[prompts, -1:], targets[:, :-1]], 1)  # (b, c)
    hidden = model.base_model(
        input_ids=inputs,
        # Causality hides the padding on the right; only that on the left, inside the prefix, needs a mask.
        attention_mask=torch.cat([prefix_mask, torch.ones_like(mask)], 1).long(),
        position_ids=prefix_mask.sum(-1, keepdim=True) + torch.arange(width, device=rows.device),
        past_key_values=prefix,
        use_cache=True,
    ).last_hidden_state  # (b, c, H)
    logps = token_logps(model.get_output_embeddings(), hidden[mask], targets[mask], temperature)
    return torch.zeros(mask.shape, device=rows.device).masked_scatter(mask, logps)


def batch_logps(model: PreTrainedModel, batch: Batch, rows: Tensor, temperature: float, token_budget: int) -> Tensor:
    """Log-probabilities (B, C) of the completion tokens of `rows`, without gradient; 0 elsewhere."""
    out = torch.zeros(batch.completion_ids.shape, device=rows.device)
    with torch.no_grad():
        for chunk, prefix in _prefixes(model, batch, rows, token_budget):
            pairs = [(layer.keys, layer.values) for layer in prefix.layers]
            for part, source in _micro_batches(batch, chunk, rows, token_budget):
                logps = completion_logps(model, _select(pairs, source), batch, part, temperature)
                out[part, : logps.shape[1]] = logps
    return out


def accumulate_gradients(
    model: PreTrainedModel,
    batch: Batch,
    rows: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    temperature: float,
    token_budget: int,
) -> Tensor:
    """Add the gradient of the sum of `loss` over micro-batches to the parameters; returns log-probs (B, C) as used.

    loss: (rows (b,), logps (b, c)) -> scalar, which has to be a sum over rows whose terms do not depend on the
    split; then any `token_budget`, the completion tokens (padding included) of one micro-batch, gives the same result.
    """
    out = torch.zeros(batch.completion_ids.shape, device=rows.device)
    for chunk, prefix in _prefixes(model, batch, rows, token_budget):
        pairs = [(layer.keys, layer.values) for layer in prefix.layers]
        leaves = [(k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in pairs]
        for part, source in _micro_batches(batch, chunk, rows, token_budget):
            logps = completion_logps(model, _select(leaves, source), batch, part, temperature)
            loss(part, logps).backward()
            out[part, : logps.shape[1]] = logps.detach()
        shared = [tensor for pair in pairs for tensor in pair]
        gradients = [leaf.grad for pair in leaves for leaf in pair]
        torch.autograd.backward(shared, gradients)
    return out


def _select(pairs: list[tuple[Tensor, Tensor]], source: Tensor) -> DynamicCache:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(pairs):
        cache.update(keys[source], values[source], layer)
    return cache


def _prefixes(
    model: PreTrainedModel, batch: Batch, rows: Tensor, token_budget: int
) -> Iterator[tuple[Tensor, DynamicCache]]:
    """Prompts that `rows` need, (q,) at a time, with their keys and values."""
    if not len(rows):
        return
    prompts = torch.unique(rows // batch.group_size)
    for chunk in prompts.split(max(1, token_budget // batch.prompt_ids.shape[1])):
        yield chunk, encode_prefix(model, batch.prompt_ids[chunk], batch.prompt_mask[chunk])


def _micro_batches(batch: Batch, chunk: Tensor, rows: Tensor, token_budget: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of `rows` that belong to the prompts in `chunk`, longest first, and each one's place in `chunk`."""
    rows = rows[torch.isin(rows // batch.group_size, chunk)]
    lengths, order = batch.completion_mask[rows].sum(-1).sort(descending=True, stable=True)
    rows, start = rows[order], 0
    while start < len(rows):
        part = rows[start : start + max(1, token_budget // int(lengths[start]))]
        yield part, torch.searchsorted(chunk, part // batch.group_size)
        start += len(part)
