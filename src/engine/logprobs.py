"""Log-probabilities of given completions, and their gradient, in the least memory and work that keeps them exact.

Every prompt runs once, what all begin with once for all; its keys and values are shared by its group. In training these
are leaves of the completions' graphs: micro-batches of completions add up gradients in them, and one backward pass
through the prompts then finishes the job. Only completion tokens pass through the head, a chunk at a time, and the
chunk's gradient is taken while its logits are there, so no (B, C, V) tensor ever exists and none is computed twice.

Shapes: Q prompts, G completions each, B = Q * G rows, P prompt tokens, C completion tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from src.engine.kv_cache import encode_prefix, last_hidden
from src.engine.optim import pieces

# Logits in memory at a time. Each chunk's part is added to the weight's gradient in fp32, so small chunks are slow: 512
# tokens of Qwen2.5-0.5B's head in bf16 take 4.0 CPU seconds at 2^23 and 3.6 at 2^25, in pieces; 8.3 at 2^23 at one go.
HEAD_CHUNK = {"cpu": 2**25, "cuda": 2**27}
BATCH_COST = {"cpu": 256, "cuda": 4096}  # the fixed cost of one more micro-batch, in tokens of work

# (rows (n,), columns (n,), logps (n,)) -> scalar: the loss of these tokens, places in (B, C)
TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
# (slice of the tokens, logps (n,)) -> scalar: the loss of these tokens
Loss = Callable[[slice, Tensor], Tensor]


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


def _log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """log softmax(head(hidden) / temperature): (n, H) -> (n, V) float32."""
    logits = nn.functional.linear(hidden, weight, bias).float()  # (n, V)
    return (logits if temperature == 1 else logits.div_(temperature)).log_softmax(-1)


def _chunk_size(weight: Tensor) -> int:
    return max(1, HEAD_CHUNK[weight.device.type] // len(weight))


@torch.no_grad()
def token_logps(head: nn.Linear, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(head(hidden) / temperature)[targets], without gradient: (N, H), (N,) -> (N,) float32."""
    size, logps = _chunk_size(head.weight), []
    for h, t in zip(hidden.split(size), targets.split(size), strict=True):
        logps.append(_log_probs(h, head.weight, head.bias, temperature).gather(-1, t[:, None])[:, 0])
    return torch.cat(logps)


class HeadLoss(torch.autograd.Function):
    """A loss on token log-probabilities whose gradient through the head is taken on the way forward.

    Like the fused linear cross entropy of Liger (arXiv:2410.10989), for any loss that is a sum over tokens.
    forward: hidden (N, H), weight (V, H), bias (V,) or None, targets (N,), `loss(slice, logps (n,))` -> the loss, and
    the log-probabilities (N,), which carry no gradient. The weight's gradient is added up in float32
    within a call; autograd then rounds it to the weight's type.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, loss: Loss
    ) -> tuple[Tensor, Tensor]:
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        out, total = torch.zeros(len(targets), device=hidden.device), torch.zeros((), device=hidden.device)
        for start in range(0, len(targets), _chunk_size(weight)):
            part = slice(start, start + _chunk_size(weight))
            log_probs, places = _log_probs(hidden[part], weight, bias, temperature), targets[part, None]
            with torch.enable_grad():
                logps = log_probs.gather(-1, places)[:, 0].requires_grad_()
                value = loss(part, logps)
                (slope,) = torch.autograd.grad(value, logps)  # (n,)
            out[part], total = logps.detach(), total + value.detach()
            slope = slope[:, None] / temperature
            d_logits = log_probs.exp_().mul_(-slope).scatter_add_(-1, places, slope)  # slope * (one-hot - softmax)
            d_logits = d_logits.to(weight.dtype)
            d_hidden[part] = d_logits @ weight
            if d_weight is not None and d_weight.dtype == d_logits.dtype:
                d_weight.addmm_(d_logits.T, hidden[part])
            elif d_weight is not None:
                for words, slopes in pieces(d_weight, d_logits.T):
                    words += slopes @ hidden[part]
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            del log_probs, d_logits  # before the next chunk's are made
        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.mark_non_differentiable(out)
        return total, out

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if gradient is None else gradient.mul_(d_total) for gradient in gradients), None, None, None)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a batch that run together, b of them with N tokens, no wider than the longest."""

    rows: Tensor  # (b,)
    source: Tensor  # (b,), index of each row's prompt in the prefix
    width: int
    places: Tensor  # (N,), of the tokens in the flattened (b, width)
    tokens: tuple[Tensor, Tensor]  # (N,), (N,), their places in (B, C)


def completion_hidden(model: PreTrainedModel, prefix: Cache, batch: Batch, part: MicroBatch) -> tuple[Tensor, Tensor]:
    """The last layer's output (N, H) for a micro-batch's completion tokens, and these tokens (N,).

    prefix: keys and values of its rows' prompts without their last token, row for row; it is extended.
    """
    prompts = part.rows // batch.group_size  # (b,)
    inputs = torch.cat([batch.prompt_ids[prompts, -1:], batch.completion_ids[part.rows, : part.width - 1]], 1)  # (b, c)
    # Causality hides the padding on the right; only that on the left, inside the prefix, needs a mask.
    hidden = last_hidden(model, prefix, inputs, (~batch.prompt_mask[prompts]).sum(-1))  # (b, c, H)
    return hidden.flatten(0, 1).index_select(0, part.places), batch.completion_ids[part.tokens]


@torch.no_grad()
def batch_logps(model: PreTrainedModel, batch: Batch, rows: Tensor, temperature: float, token_budget: int) -> Tensor:
    """Log-probabilities (B, C) of the completion tokens of `rows`, without gradient; 0 elsewhere."""
    out = torch.zeros(batch.completion_ids.shape, device=rows.device)
    for shared, parts in _prefixes(model, batch, rows, token_budget):
        for part in parts:
            hidden, targets = completion_hidden(model, _select(shared, part.source), batch, part)
            out[part.tokens] = token_logps(model.get_output_embeddings(), hidden, targets, temperature)
    return out


def accumulate_gradients(
    model: PreTrainedModel, batch: Batch, rows: Tensor, loss: TokenLoss, *, temperature: float, token_budget: int
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the sum of `loss` over micro-batches to the parameters.

    Returns the log-probs (B, C) as used, and the loss. The loss has to be a sum over tokens whose terms do not depend
    on the split; then any `token_budget`, the completion tokens (padding included) of one micro-batch, gives the same
    result, up to rounding.
    """
    head, total = model.get_output_embeddings(), torch.zeros((), device=rows.device)
    out = torch.zeros(batch.completion_ids.shape, device=rows.device)
    for shared, parts in _prefixes(model, batch, rows, token_budget):
        leaves = [tensor.detach().requires_grad_() for tensor in shared]
        for part in parts:
            hidden, targets = completion_hidden(model, _select(leaves, part.source), batch, part)
            given, (row, column) = (hidden, head.weight, head.bias, targets, temperature), part.tokens
            value, logps = HeadLoss.apply(*given, lambda s, lp, row=row, column=column: loss(row[s], column[s], lp))
            value.backward()
            out[row, column], total = logps, total + value.detach()
        torch.autograd.backward(shared, [leaf.grad for leaf in leaves])
    return out, total


class _Rows(torch.autograd.Function):
    """`shared[source]`, (q, ...), (b,) -> (b, ...); members (b, q), the same in 0s and 1s, carries the gradient.

    Indexing would add up the rows' gradients one at a time, rounding each sum to the tensor's type, and with several
    threads in whatever order they arrive, which ends differently every time. Here it is a matrix product.
    """

    @staticmethod
    def forward(ctx: Any, shared: Tensor, source: Tensor, members: Tensor) -> Tensor:
        ctx.save_for_backward(members)
        return shared.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (members,) = ctx.saved_tensors
        return (members.T @ gradient.flatten(1)).unflatten(1, gradient.shape[1:]), None, None


def _select(shared: Sequence[Tensor], source: Tensor) -> DynamicCache:
    """A cache with row source[i] of `shared`, keys and values in turns, as its row i."""
    members = (source[:, None] == torch.arange(len(shared[0]), device=source.device)).to(shared[0].dtype)
    chosen = [_Rows.apply(tensor, source, members) for tensor in shared]
    return DynamicCache(zip(chosen[::2], chosen[1::2], strict=True))


def _prefixes(
    model: PreTrainedModel, batch: Batch, rows: Tensor, token_budget: int
) -> Iterator[tuple[list[Tensor], list[MicroBatch]]]:
    """Prompts that `rows` need, some at a time: their keys and values in turns, and their rows' micro-batches.

    The host waits for the lengths once, for prompts and tokens' places once a chunk of prompts, never a micro-batch.
    """
    lengths, wanted, size = batch.completion_mask.sum(-1).tolist(), rows.tolist(), batch.group_size
    prompts = sorted({row // size for row in wanted})
    step = max(1, token_budget // batch.prompt_ids.shape[1])
    for chunk in (prompts[start : start + step] for start in range(0, len(prompts), step)):
        longest_first = sorted((row for row in wanted if row // size in chunk), key=lambda row: -lengths[row])
        on_device, order = (torch.tensor(ids, device=rows.device) for ids in (chunk, longest_first))
        prefix = encode_prefix(model, batch.prompt_ids[on_device], batch.prompt_mask[on_device])
        source, (place, column) = torch.searchsorted(on_device, order // size), batch.completion_mask[order].nonzero().T
        parts, lengths_here, done = [], [lengths[row] for row in longest_first], 0
        for start, end in _cuts(lengths_here, token_budget, BATCH_COST[rows.device.type]):
            here, width = slice(done, done := done + sum(lengths_here[start:end])), lengths_here[start]
            places = (place[here] - start) * width + column[here]
            tokens = (order[place[here]], column[here])
            parts.append(MicroBatch(order[start:end], source[start:end], width, places, tokens))
        yield prefix, parts


def _cuts(lengths: Sequence[int], token_budget: int, cost: int) -> Iterator[tuple[int, int]]:
    """Where micro-batches of rows of these lengths, longest first, start and end.

    One ends where the budget is used up, or earlier where that saves more padding than one more costs.
    """
    start = 0
    while start < len(lengths):
        end = min(len(lengths), start + max(1, token_budget // lengths[start]))
        saved = [(lengths[start] - lengths[i]) * (end - i) for i in range(start, end)]
        if max(saved) > cost:
            end = start + saved.index(max(saved))
        yield start, end
        start = end
