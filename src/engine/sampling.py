"""Prompts -> a group of completions each: the decode loop, for training rollouts and for evaluation.

A prompt runs through the model once; its keys and values are copied to every row of its group. All rows share one
cursor into the key-value buffers: row b holds its tokens at columns starts[b] .. cursor, so a new prompt can enter
a running batch by ending where the others end. The last prompt token is not part of the prefix but the first token
fed to the loop, which makes every step the same: one token in, one token sampled.

On the CPU, finished rows leave the batch. On CUDA the batch keeps its shape and each step is the replay of one
captured CUDA graph, one for every width of the attention window (a multiple of `GRAPH_WIDTH`).

Randomness comes in from outside, one uniform number a token. Which rows share a batch, and how often a step is
repeated, therefore cannot change what is sampled.

Shapes: B completions, C completion tokens, S slots (rows that run at a time), P prompt tokens, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from src.engine.kv_cache import SlotCache, decode_masks, encode_prefix, last_hidden, left_pad
from src.engine.models import max_positions, turn_tokens

log = logging.getLogger(__name__)

GRAPH_WIDTH = 128  # columns; a wider step costs a little attention, a narrower one costs more graphs to capture
LEAST_ROWS = 64  # that run at a time, unless a step has more
CUDA_CHECK_EVERY = 8  # steps between two looks at "who has finished", each of which waits for the GPU


@dataclass(frozen=True)
class Completions:
    """What was sampled, in the order of the prompts, a group's members side by side; padded on the right."""

    ids: Tensor  # (B, C) int64
    mask: Tensor  # (B, C) bool, true up to and including the first end token
    logps: Tensor  # (B, C) float32, log-probability of each token at the sampling temperature; 0 where padded
    truncated: Tensor  # (B,) bool, no end token within C


def decode(tokenizer: PreTrainedTokenizerBase, completions: Completions) -> list[str]:
    """The completions as text, as `decode_rows`."""
    rows = zip(completions.ids.cpu(), completions.mask.cpu(), strict=True)
    return decode_rows(tokenizer, [row[mask].tolist() for row, mask in rows])


def decode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Token ids as texts, without those that begin, end or fill a turn.

    Other special tokens stay: the tags of the format may be such.
    """
    named = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.special_tokens_map.values()}
    silent = named.union(*turn_tokens(tokenizer))
    return tokenizer.batch_decode([[token for token in row if token not in silent] for row in rows])


def pick_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution; the most likely one at temperature 0.

    logits (S, V), uniforms (S,) in [0, 1) -> token ids (S,) and their log-probabilities (S,) at that temperature.
    """
    logits = logits.float() if temperature in (0, 1) else logits.float() / temperature
    log_probs = logits.log_softmax(-1)
    if temperature == 0:
        ids = log_probs.argmax(-1, keepdim=True)
    else:
        cdf = log_probs.exp().cumsum(-1)
        total = cdf[:, -1:]
        # Below the last value even when rounding says otherwise: the first entry above it has a positive probability.
        target = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
        ids = torch.searchsorted(cdf, target, right=True).clamp(max=logits.shape[-1] - 1)  # (S, 1); clamped for NaN
    return ids[:, 0], log_probs.gather(-1, ids)[:, 0]


class _Slots:
    """The running rows. Slot s works on output row `row[s]`; B, one past the last, stands for nobody.

    token: the next input; starts: its first column in the cache; count: completion tokens so far; each (S,).
    """

    def __init__(self, rows: int, total: int, max_new: int, device: torch.device):
        self.total, self.active = total, 0
        self.token, self.starts, self.count = torch.zeros(3, rows, dtype=torch.long, device=device)
        self.row = torch.full((rows,), total, device=device)
        self.ids = torch.full((total + 1, max_new), -1, device=device)  # (B + 1, C), -1: not sampled
        self.logps = torch.zeros(total + 1, max_new, device=device)
        self.uniforms = torch.zeros(total + 1, max_new, device=device)
        self.host_rows: list[int] = [total] * rows

    def restart(self, uniforms: Tensor) -> None:
        self.uniforms[:-1] = uniforms
        self.ids.fill_(-1)
        self.logps.zero_()
        self.row.fill_(self.total)
        self.starts.zero_()  # an idle slot must see a column, too: a softmax of nothing is NaN, and stays in the cache
        self.host_rows = [self.total] * len(self.row)

    def enter(self, slots: Tensor, rows: Tensor, tokens: Tensor, starts: Tensor) -> None:
        self.row[slots], self.token[slots], self.starts[slots], self.count[slots] = rows, tokens, starts, 0
        self.host_rows = self.row.tolist()

    def free(self) -> list[int]:
        return [slot for slot, row in enumerate(self.host_rows) if row == self.total]

    def longest(self, end: int) -> int:
        """Columns that the longest running row takes before column `end`."""
        lengths = (end - self.starts)[self.row != self.total]
        return int(lengths.max()) if len(lengths) else 0

    def keep(self, slots: Tensor) -> None:
        """Move these slots to the front and empty the others."""
        for name in ("token", "starts", "count", "row"):
            values = getattr(self, name)
            values[: len(slots)] = values[slots]
        self.row[len(slots) :] = self.total
        self.active = len(slots)
        self.host_rows = self.row.tolist()

    def write(self, token: Tensor, logp: Tensor, end_ids: Tensor) -> None:
        """Note one sampled token a slot; a slot whose row has ended works for nobody from then on."""
        n, last = self.active, self.ids.shape[1] - 1
        row, count = self.row[:n], self.count[:n]
        self.ids.index_put_((row, count), token)
        self.logps.index_put_((row, count), logp)
        ended = (token[:, None] == end_ids).any(-1) | (count == last)
        row.masked_fill_(ended, self.total)
        count.add_(1).clamp_(max=last)
        self.token[:n] = token


def _can_be_captured(config: PretrainedConfig) -> bool:
    """Not where rotary frequencies depend on the positions: the host would have to look at them in every step."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if moving := kinds & {"dynamic", "longrope"}:
        log.warning("rotary embedding '%s': decoding without CUDA graphs, which takes several times as long", *moving)
    return not moving


class Sampler:
    """Samples completions from `model`, whose weights may change in place between calls, in buffers that stay.

    rows: how many completions run at a time; the others wait and take the place of those that finish.
    """

    def __init__(self, model: PreTrainedModel, end_ids: Sequence[int], pad_id: int, rows: int = LEAST_ROWS):
        self.model, self.pad_id, self.rows = model, pad_id, rows
        self.device, self.on_cuda = model.device, model.device.type == "cuda"
        self.end_ids = torch.tensor(list(end_ids), device=self.device)
        self.last = max_positions(model) - 1  # a table of learned positions has no row after it
        self.check_every = CUDA_CHECK_EVERY if self.on_cuda else 1
        self.cache: SlotCache | None = None
        self.slots: _Slots | None = None
        self.captures = self.on_cuda and _can_be_captured(model.config.get_text_config())
        self.graphs: dict[tuple[float, int], torch.cuda.CUDAGraph] = {}
        self.side = torch.cuda.Stream() if self.on_cuda else None  # of the steps before a capture

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int = 1,
        max_new_tokens: int,
        temperature: float = 0.0,
        uniforms: Tensor | None = None,
        on_progress: Callable[[int, Tensor], None] | None = None,
    ) -> Completions:
        """`group_size` completions for each prompt (at least two token ids each).

        temperature: 0 takes the most likely token; above it `uniforms` (B, C) in [0, 1) decides, one a token.
        on_progress: called at each look at the batch with the number of completions done so far and `ids` (B, C),
        -1 where nothing is sampled yet.
        """
        total = len(prompts) * group_size
        if uniforms is None:
            if temperature:
                raise ValueError("sampling at a temperature above 0 needs `uniforms`")
            uniforms = torch.zeros(total, max_new_tokens)
        self._prepare(max(map(len, prompts)), total, max_new_tokens, uniforms)
        self._run(prompts, group_size, temperature, on_progress)
        slots = self.slots
        ids, mask = slots.ids[:-1], slots.ids[:-1] >= 0
        truncated = ~torch.isin(ids, self.end_ids).any(-1)
        return Completions(ids.where(mask, self.pad_id), mask, slots.logps[:-1].where(mask, 0.0), truncated)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        temperature: float,
        on_progress: Callable[[int, Tensor], None] | None,
    ) -> None:
        """Fill the slots with waiting rows and step until no row is left."""
        slots, waiting, busy = self.slots, range(self.slots.total), 0
        while waiting or busy:
            free = slots.free()
            if waiting and (not busy or len(free) * 4 >= len(slots.host_rows)):
                rows, waiting = waiting[: len(free)], waiting[len(free) :]
                self._admit(free[: len(rows)], rows, prompts, group_size)
            for _ in range(self.check_every):
                self._advance(temperature)
            busy = self._look()
            if on_progress:
                on_progress(slots.total - len(waiting) - busy, slots.ids[:-1])

    def _prepare(self, longest: int, total: int, max_new: int, uniforms: Tensor) -> None:
        """Buffers that hold this call: those of the last call if they do, else new ones."""
        rows = self.rows if self.on_cuda else min(self.rows, total)
        capacity = -(-(longest + max_new + self.check_every) // GRAPH_WIDTH) * GRAPH_WIDTH
        if self.cache is None or self.cache.rows < rows or self.cache.capacity < capacity:
            self.cache = None  # lets go of the old buffers before new ones are made
            like = encode_prefix(self.model, *left_pad([[self.pad_id] * 2], self.pad_id, self.device))
            self.cache = SlotCache(like, rows, capacity)
            self.graphs.clear()
        self.cache.move(0, 0)
        if self.slots is None or len(self.slots.row) != rows or self.slots.ids.shape != (total + 1, max_new):
            self.slots = _Slots(rows, total, max_new, self.device)
            self.graphs.clear()
        self.slots.restart(uniforms)
        self.slots.active = rows if self.on_cuda else 0

    def _admit(self, into: list[int], rows: Sequence[int], prompts: Sequence[Sequence[int]], group_size: int) -> None:
        """Prefill the prompts of these rows, each once, and put the rows into free slots."""
        slots, cache = self.slots, self.cache
        wanted = sorted({row // group_size for row in rows})
        ids, mask = left_pad([prompts[q] for q in wanted], self.pad_id, self.device)  # (Q, P)
        prefix = encode_prefix(self.model, ids, mask)
        content = slots.longest(cache.end)
        slots.starts += cache.move(content, max(content, ids.shape[1] - 1))
        source = torch.tensor([wanted.index(row // group_size) for row in rows], device=self.device)
        places = torch.tensor(into, device=self.device)
        cache.insert(places, prefix, source)
        starts = cache.end - (mask.sum(-1)[source] - 1)
        slots.enter(places, torch.tensor(rows, device=self.device), ids[source, -1], starts)
        slots.active = max(slots.active, into[-1] + 1)

    def _look(self) -> int:
        """How many slots are still busy. On the CPU, finished rows leave once they are an eighth of the batch."""
        slots = self.slots
        slots.host_rows = slots.row.tolist()
        busy = [slot for slot, row in enumerate(slots.host_rows) if row != slots.total]
        if not self.on_cuda and busy and (slots.active - len(busy)) * 8 >= slots.active:
            places = torch.tensor(busy)
            self.cache.keep(places)
            slots.keep(places)
        return len(busy)

    def _advance(self, temperature: float) -> None:
        """One token for every slot: eagerly on the CPU, by the replay of a captured graph on CUDA."""
        cache = self.cache
        if cache.end == cache.capacity:  # idle columns on the left, left behind by rows that have gone
            content = self.slots.longest(cache.end)
            self.slots.starts += cache.move(content, content)
        cache.width = cache.end + 1
        if self.on_cuda:
            cache.width = min(-(-cache.width // GRAPH_WIDTH) * GRAPH_WIDTH, cache.capacity)
        if self.captures:
            graph = self.graphs.get((temperature, cache.width))
            graph.replay() if graph else self._capture(temperature)
        else:
            self._step(temperature)
        cache.end += 1

    def _step(self, temperature: float) -> None:
        slots, cache = self.slots, self.cache
        n = slots.active
        starts, config = slots.starts[:n], self.model.config.get_text_config()
        masks = decode_masks(config, starts, cache.cursor, cache.width, self.model.dtype)
        positions = (cache.cursor - starts).clamp(max=self.last)[:, None]  # a row that has ended goes on, unread
        hidden = last_hidden(self.model, cache, slots.token[:n, None], masks, positions)  # (S, 1, H)
        logits = self.model.get_output_embeddings()(hidden[:, -1])  # (S, V)
        uniforms = slots.uniforms[slots.row[:n], slots.count[:n]]
        slots.write(*pick_tokens(logits, uniforms, temperature), self.end_ids)
        cache.cursor.add_(1)

    def _capture(self, temperature: float) -> None:
        """Take this step eagerly, which is the warm-up that a capture needs, and record the graph of the next ones."""
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self._step(temperature)
        torch.cuda.current_stream().wait_stream(self.side)
        graph, other = torch.cuda.CUDAGraph(), next(iter(self.graphs.values()), None)
        # What a graph leaves behind lies in buffers of the run, so that all may use the same memory for the rest.
        with torch.cuda.graph(graph, pool=other.pool() if other else None):
            self._step(temperature)
        self.graphs[temperature, self.cache.width] = graph
