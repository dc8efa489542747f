"""Prompts -> a group of completions each: the decode loop, for training rollouts and for evaluation.

A prompt runs through the model once, what all that enter together begin with once for all; its keys and values are
copied to every row of its group. All rows share one cursor into the key-value buffers: row b holds its tokens at
columns starts[b] .. cursor, so a new prompt can enter a running batch by ending where the others end. The last prompt
token is not part of the prefix but the first token fed to the loop, which makes every step the same: one token in, one
token sampled.

On the CPU, finished rows leave the batch. On CUDA the batch keeps its shape, a multiple of `GRAPH_ROWS`, and each step
is the replay of one captured CUDA graph, one for every width of the attention window (a multiple of `GRAPH_WIDTH`).
Buffers keep the largest size seen, so that graphs stay; a smaller call leaves a part of them idle.

Randomness comes in from outside, one uniform number a token. Which rows share a batch, and how often a step is
repeated, therefore cannot change what is sampled.

Shapes: B completions, C completion tokens, S slots (rows that run at a time), P prompt tokens, V vocabulary.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from src.engine.kv_cache import SlotCache, encode_prefix, last_hidden, left_pad
from src.engine.models import turn_tokens

log = logging.getLogger(__name__)

GRAPH_WIDTH = 128  # columns; a wider step costs a little attention, a narrower one costs more graphs to capture
GRAPH_ROWS = 64  # rows, in the same way
LEAST_ROWS = {"cpu": 64, "cuda": 256}  # that may run at a time, unless a step has more
ROOM = 16  # the part of a card's memory that their keys and values may fill, since learning has to do without it
CUDA_CHECK_EVERY = 8  # steps between two looks at "who has finished", each of which waits for the GPU


@dataclass(frozen=True)
class Completions:
    """What was sampled, in the order of the prompts, a group's members side by side; padded on the right."""

    ids: Tensor  # (B, C) int64
    mask: Tensor  # (B, C) bool, true up to and including the first end token
    logps: Tensor  # (B, C) float32, log-probability of each token at the sampling temperature; 0 where padded
    truncated: Tensor  # (B,) bool, no end token within C


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
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
    """The running rows. Slot s works on output row `row[s]`; the last row of all, `nobody`, is that of idle slots.

    token: the next input; starts: its first column in the cache; count: completion tokens so far; each (S,).
    """

    def __init__(self, rows: int, total: int, max_new: int, device: torch.device):
        self.nobody = total
        self.token, self.starts, self.count, self.row = torch.zeros(4, rows, dtype=torch.long, device=device)
        self.all_ids = torch.zeros(total + 1, max_new, dtype=torch.long, device=device)
        self.all_logps, self.uniforms = torch.zeros(2, total + 1, max_new, device=device)
        self.last = torch.zeros((), dtype=torch.long, device=device)  # the place of a completion's last token

    def restart(self, rows: int, active: int, uniforms: Tensor) -> None:
        """All idle; `rows` slots are to work, `active` of them from the start, on completions as `uniforms` (B, C)."""
        self.total, length = uniforms.shape
        self.active, self.working = active, rows
        self.ids, self.logps = (values[: self.total, :length] for values in (self.all_ids, self.all_logps))
        self.uniforms[: self.total, :length] = uniforms
        self.last.fill_(length - 1)
        self.all_ids.fill_(-1)  # not sampled
        self.row.fill_(self.nobody)
        self.starts.zero_()

    def enter(self, slots: list[int], rows: Sequence[int], tokens: Tensor, starts: Tensor) -> Tensor:
        """Set slots to work on rows; returns the slots' numbers, on the device."""
        places, row = torch.tensor([slots, list(rows)], device=self.row.device)
        self.row[places], self.token[places], self.starts[places], self.count[places] = row, tokens, starts, 0
        self.active = max(self.active, slots[-1] + 1)
        return places

    def look(self) -> list[int]:
        """The slots that are busy, which the host learns from the device."""
        return [slot for slot, row in enumerate(self.row[: self.working].tolist()) if row != self.nobody]

    def longest(self, end: int) -> int:
        """Columns that the longest running row takes before column `end`."""
        return int(((end - self.starts) * (self.row != self.nobody)).max())

    def keep(self, slots: Tensor) -> None:
        """Move these slots to the front and empty the others."""
        for values in (self.token, self.starts, self.count, self.row):
            values[: len(slots)] = values[slots]
        self.row[len(slots) :] = self.nobody
        self.active = len(slots)

    def write(self, token: Tensor, logp: Tensor, end_ids: Tensor) -> None:
        """Note one sampled token a slot; a slot whose row has ended works for nobody from then on."""
        row, count = self.row[: self.active], self.count[: self.active]
        self.all_ids.index_put_((row, count), token)
        self.all_logps.index_put_((row, count), logp)
        ended = (token[:, None] == end_ids).any(-1) | (count == self.last)
        row.masked_fill_(ended, self.nobody)
        count.add_(1).clamp_(max=self.last)
        self.token[: self.active] = token


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _can_be_captured(config: PretrainedConfig) -> bool:
    """Not where rotary frequencies depend on the positions: the host would have to look at them in every step."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if moving := kinds & {"dynamic", "longrope"}:
        log.warning("rotary embedding '%s': decoding without CUDA graphs, which takes several times as long", *moving)
    return not moving


class Sampler:
    """Samples completions from `model`, whose weights may change in place between calls, in buffers that stay.

    rows: how many completions may run at a time; the others wait and take the place of those that finish.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, end_ids: Sequence[int], pad_id: int, rows: int | None = None):
        self.model, self.pad_id, self.device = model, pad_id, model.device
        self.on_cuda, self.rows = self.device.type == "cuda", rows or LEAST_ROWS[self.device.type]
        self.end_ids = torch.tensor(list(end_ids), device=self.device)
        self.check_every = CUDA_CHECK_EVERY if self.on_cuda else 1
        self.captures = self.on_cuda and _can_be_captured(model.config.get_text_config())
        self.graphs: dict[tuple[float, int, int], torch.cuda.CUDAGraph] = {}
        self.sizes = (0, 0, 0, 0)  # of the buffers: rows that run, columns, rows in all, tokens of each
        self.like = encode_prefix(model, *left_pad([[pad_id] * 2], pad_id, self.device))  # one column
        memory = torch.cuda.get_device_properties(self.device).total_memory if self.on_cuda else sys.maxsize
        self.room = memory // ROOM // sum(tensor.nbytes for tensor in self.like)  # columns of all rows

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
        if uniforms is None:
            if temperature:
                raise ValueError("sampling at a temperature above 0 needs `uniforms`")
            uniforms = torch.zeros(len(prompts) * group_size, max_new_tokens)
        self._prepare(max(map(len, prompts)), uniforms)
        slots, waiting, busy = self.slots, range(self.slots.total), []
        while waiting or busy:
            free = sorted(set(range(slots.working)).difference(busy))
            if waiting and len(free) * 4 >= slots.working:
                rows, waiting = waiting[: len(free)], waiting[len(free) :]
                self._admit(free[: len(rows)], rows, prompts, group_size)
            for _ in range(self.check_every):
                self._advance(temperature)
            busy = self._look()
            if on_progress:
                on_progress(slots.total - len(waiting) - len(busy), slots.ids)
        mask, truncated = slots.ids >= 0, ~torch.isin(slots.ids, self.end_ids).any(-1)
        return Completions(slots.ids.where(mask, self.pad_id), mask, slots.logps.where(mask, 0.0), truncated)

    def _prepare(self, longest: int, uniforms: Tensor) -> None:
        """Reuse the buffers if this call fits, else make larger ones that fit all earlier calls, too."""
        (total, max_new), (held, *others) = uniforms.shape, self.sizes
        # What this call takes is its own, so that what it rounds does not depend on earlier ones.
        self.columns = _rounded_up(longest + max_new + self.check_every, GRAPH_WIDTH)
        capacity, step = max(others[0], self.columns), GRAPH_ROWS if self.on_cuda else 1
        most = min(self.rows, max(1, self.room // capacity // step) * step)
        rows = min(most, _rounded_up(total, step))
        wanted = (rows, capacity, total, max_new)
        if any(new > old for new, old in zip(wanted, self.sizes, strict=True)):
            self.sizes = (max(rows, min(held, most)), *map(max, wanted[1:], others))
            self.cache = self.slots = None  # lets go of the old buffers before new ones are made
            self.graphs.clear()
            self.cache = SlotCache(self.like, *self.sizes[:2])
            self.slots = _Slots(self.sizes[0], *self.sizes[2:], self.device)
        self.cache.move(0, 0)
        self.slots.restart(rows, rows if self.on_cuda else 0, uniforms)

    def _admit(self, into: list[int], rows: Sequence[int], prompts: Sequence[Sequence[int]], group_size: int) -> None:
        """Prefill the prompts of these rows, each once, and put the rows into free slots."""
        slots, cache = self.slots, self.cache
        wanted = sorted({row // group_size for row in rows})
        ids, mask = left_pad([prompts[q] for q in wanted], self.pad_id, self.device)  # (Q, P)
        prefix = encode_prefix(self.model, ids, mask)
        content = slots.longest(cache.end)
        slots.starts += cache.move(content, max(content, ids.shape[1] - 1))
        source = torch.tensor([wanted.index(row // group_size) for row in rows], device=self.device)
        starts = cache.end - (mask.sum(-1)[source] - 1)
        cache.insert(slots.enter(into, rows, ids[source, -1], starts), prefix, source)

    def _look(self) -> list[int]:
        """The slots that are still busy. On the CPU, finished rows leave once they are an eighth of the batch."""
        slots, busy = self.slots, self.slots.look()
        if not self.on_cuda and busy and (slots.active - len(busy)) * 8 >= slots.active:
            places = torch.tensor(busy)
            self.cache.keep(places)
            slots.keep(places)
            busy = list(range(len(busy)))
        return busy

    def _advance(self, temperature: float) -> None:
        """One token for every slot: eagerly on the CPU, by the replay of a captured graph on CUDA."""
        cache = self.cache
        if cache.end == self.columns:  # idle columns on the left, left behind by rows that have gone
            content = self.slots.longest(cache.end)
            self.slots.starts += cache.move(content, content)
        cache.width = min(_rounded_up(cache.end + 1, GRAPH_WIDTH if self.on_cuda else 1), self.columns)
        if self.captures:
            graph = self.graphs.get((temperature, cache.width, self.slots.active))
            graph.replay() if graph else self._capture(temperature)
        else:
            self._step(temperature)
        cache.end += 1

    def _step(self, temperature: float) -> None:
        slots, cache = self.slots, self.cache
        n = slots.active
        hidden = last_hidden(self.model, cache, slots.token[:n, None], slots.starts[:n], cache.cursor)  # (S, 1, H)
        logits = self.model.get_output_embeddings()(hidden[:, -1])  # (S, V)
        uniforms = slots.uniforms[slots.row[:n], slots.count[:n]]
        slots.write(*pick_tokens(logits, uniforms, temperature), self.end_ids)
        cache.cursor.add_(1)

    def _capture(self, temperature: float) -> None:
        """Take this step eagerly, which is the warm-up that a capture needs, and record the graph of the next ones."""
        self._step(temperature)
        graph, other = torch.cuda.CUDAGraph(), next(iter(self.graphs.values()), None)
        # What a graph leaves behind lies in buffers of the run, so that all may use the same memory for the rest.
        with torch.cuda.graph(graph, pool=other.pool() if other else None):
            self._step(temperature)
        self.graphs[temperature, self.cache.width, self.slots.active] = graph
