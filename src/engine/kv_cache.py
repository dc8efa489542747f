"""Keys and values of prompts and of running rows; what both the sampler and the learner build on.

Prompts are padded on the left, so that a completion follows its prompt directly, whatever the prompts' lengths.

Shapes: Q prompts, P prompt tokens, S slots (rows that run at a time).
"""

import inspect
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from src.engine.models import max_positions

ALIGNED = 8  # a mask's row stride is a multiple of this, or a GPU's kernel copies it
WORTH_SHARING = {"cpu": 256, "cuda": 1024}  # tokens that are not run again, for one more call of the model


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token lists -> `prompt_ids`, `prompt_mask` (Q, P). The mask comes from the lengths, never from `pad_id`."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def unpad(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The token lists of rows that were padded, on whichever side: (B, T), (B, T) bool."""
    return [row[kept].tolist() for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all of these begin with."""
    return len(list(takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))))


def encode_prefix(model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor) -> list[Tensor]:
    """Run all but the last token of left-padded prompts (Q, P); what all begin with, as a system prompt, only once.

    Returns keys and values of every layer, in turns: (Q, KV heads, P - 1, head size).
    """
    starts, rows, cache = (~prompt_mask).sum(-1), unpad(prompt_ids, prompt_mask), DynamicCache()
    shared = min(common_length(rows), prompt_ids.shape[1] - 2)
    if shared * (len(rows) - 1) >= WORTH_SHARING[starts.device.type]:
        once, shifts = DynamicCache(), [prompt_ids.shape[1] - len(row) for row in rows]
        last_hidden(model, once, torch.tensor([rows[0][:shared]], device=starts.device), torch.zeros_like(starts[:1]))
        for index, layer in enumerate(once.layers):
            cache.update(*(_behind_padding(tensor, shifts) for tensor in (layer.keys, layer.values)), index)
    last_hidden(model, cache, prompt_ids[:, cache.get_seq_length() : -1], starts)
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _behind_padding(tensor: Tensor, shifts: Sequence[int]) -> Tensor:
    """The L columns of (1, N, L, D) moved right by each of `shifts`, without what no longer fits in: (Q, N, L, D)."""
    # In fp32, in which the gradients of the copies are then added up.
    wide, length = nn.functional.pad(tensor.float(), (0, 0, tensor.shape[2], 0)), tensor.shape[2]
    return torch.cat([wide[:, :, length - min(shift, length) :][:, :, :length] for shift in shifts]).to(tensor.dtype)


def last_hidden(
    model: PreTrainedModel, cache: Cache, ids: Tensor, starts: Tensor, columns: Tensor | None = None
) -> Tensor:
    """The last layer's output (B, T, H) for tokens `ids` (B, T) of rows that begin at columns `starts` (B,).

    columns: of these tokens, (T,); those behind what the cache holds when left out. The cache is extended.
    """
    width = cache.get_seq_length() + ids.shape[1]
    if columns is None:
        columns = torch.arange(width - ids.shape[1], width, device=ids.device)
    first = torch.minimum(starts[:, None], columns)  # (B, T): padding sees itself: a softmax over nothing is NaN
    masks = attention_masks(model.config.get_text_config(), first, columns, width, model.dtype)
    name = _cache_argument(type(model.base_model))
    positions = (columns - first).clamp(max=max_positions(model) - 1)  # finished rows go on, and nobody reads them
    return model.base_model(
        input_ids=ids, attention_mask=masks, position_ids=positions, use_cache=True, **{name: cache}
    ).last_hidden_state


@lru_cache
def _cache_argument(model: type) -> str:
    """transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def attention_masks(
    config: PretrainedConfig, first: Tensor, columns: Tensor, width: int, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """What queries at `columns` (T,) see, each from column `first` (B, T) to its own: (B, 1, T, width).

    It is added to the scores: 0 where a column may be seen. A boolean mask would be turned into this in every layer,
    and be padded to `ALIGNED` columns and kept there for the backward pass.
    Models with a mix of layers take one mask a kind of layer (`config.layer_types`); others one mask in all.
    """
    all_columns = torch.arange(-(-width // ALIGNED) * ALIGNED, device=first.device)
    window, kinds = getattr(config, "sliding_window", None) or width, getattr(config, "layer_types", None)
    seen_from = {"full_attention": first, "sliding_attention": first.maximum(columns - window + 1)}
    masks = {}
    for kind in set(kinds or ["sliding_attention"]):
        hidden = (all_columns < seen_from[kind][..., None]) | (all_columns > columns[:, None])  # (B, T, width or more)
        mask = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        masks[kind] = mask[:, None, :, :width]
    return masks if kinds else masks["sliding_attention"]


class SlotCache(Cache):
    """Key-value buffers of fixed size for S rows that all end at one cursor, where each step writes in place.

    buffers: keys and values of every layer, in turns, (S, KV heads, capacity, head size), as the prefix `like`;
    end: the cursor as the host knows it; cursor: the same on the device, (1,); width: the columns a step attends to.
    """

    def __init__(self, like: Sequence[Tensor], rows: int, capacity: int):
        super().__init__(layers=[])
        self.capacity, self.width, self.end = capacity, 0, 0
        self.cursor = torch.zeros(1, dtype=torch.long, device=like[0].device)
        self.buffers = [tensor.new_zeros(rows, tensor.shape[1], capacity, tensor.shape[3]) for tensor in like]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[: len(key_states)] for buffer in self.buffers[2 * layer_idx : 2 * layer_idx + 2])
        keys.index_copy_(2, self.cursor, key_states)
        values.index_copy_(2, self.cursor, value_states)
        return keys[:, :, : self.width], values[:, :, : self.width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width - 1

    def insert(self, slots: Tensor, prefix: Sequence[Tensor], source: Tensor) -> None:
        """Copy row source[i] of `prefix` into slots[i], ending at the cursor."""
        start = self.end - prefix[0].shape[2]
        for buffer, new in zip(self.buffers, prefix, strict=True):
            buffer[slots, :, start : self.end] = new[source]

    def move(self, content: int, end: int) -> int:
        """Shift the `content` columns before the cursor and the cursor to end at `end`; returns by how far."""
        if content and end != self.end:
            for buffer in self.buffers:
                buffer[:, :, end - content : end] = buffer[:, :, self.end - content : self.end].clone()
        shift, self.end = end - self.end, end
        self.cursor.fill_(end)
        return shift

    def keep(self, slots: Tensor) -> None:
        """Move these rows to the front, in this order."""
        for buffer in self.buffers:
            buffer[: len(slots)] = buffer[slots]
