"""Keys and values of prompts and of running rows; what both the sampler and the learner build on.

Prompts are padded on the left, so that a completion follows its prompt directly, whatever the prompts' lengths.

Shapes: Q prompts, P prompt tokens, S slots (rows that run at a time).
"""

import inspect
import weakref
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from src.engine.models import max_positions

ALIGNED = 8  # columns between two rows of a mask, a multiple, without which a GPU's kernel copies the mask


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token lists -> `prompt_ids`, `prompt_mask` (Q, P). The mask comes from the lengths, never from `pad_id`."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def unpad(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The token lists of rows that were padded, on whichever side: (B, T), (B, T) bool."""
    return [row[kept].tolist() for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]


def encode_prefix(model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor) -> DynamicCache:
    """Run all but the last token of left-padded prompts (Q, P); returns their keys and values, P - 1 columns wide."""
    cache = DynamicCache()
    last_hidden(model, cache, prompt_ids[:, :-1], (~prompt_mask).sum(-1))
    return cache


def tensors_of(cache: Cache) -> list[Tensor]:
    """Keys and values of every layer, in turns."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def last_hidden(
    model: PreTrainedModel, cache: Cache, ids: Tensor, starts: Tensor, columns: Tensor | None = None
) -> Tensor:
    """The last layer's output (B, T, H) for tokens `ids` (B, T) of rows that begin at columns `starts` (B,).

    columns: of these tokens, (T,); those behind what the cache holds when left out. The cache is extended.
    """
    width = cache.get_seq_length() + ids.shape[1]
    if columns is None:
        columns = torch.arange(width - ids.shape[1], width, device=ids.device)
    first = torch.minimum(starts[:, None], columns)  # (B, T): padding sees itself, since a softmax of nothing is NaN
    masks = attention_masks(model.config.get_text_config(), first, columns, width, model.dtype)
    name = _cache_argument(type(model.base_model))
    positions = (columns - first).clamp(max=max_positions(model) - 1)  # a row that has ended goes on, unread
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
    full = (all_columns >= first[..., None]) & (all_columns <= columns[:, None])  # (B, T, width or a little more)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    masks = {"full_attention": full, "sliding_attention": full}
    if window:
        masks["sliding_attention"] = full & (all_columns > columns[:, None] - window)
    hidden = torch.finfo(dtype).min
    additive = {
        kind: torch.zeros_like(masks[kind], dtype=dtype).masked_fill_(~masks[kind], hidden)[:, None, :, :width]
        for kind in set(kinds or ["sliding_attention"])
    }
    return additive if kinds else additive["sliding_attention"]


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values (S, heads, capacity, head size), written in place at the shared cursor."""

    def __init__(self, slots: "SlotCache", like: Tensor):
        super().__init__()
        shape = (slots.rows, like.shape[1], slots.capacity, like.shape[3])
        self.slots, self.is_initialized = weakref.proxy(slots), True  # no circle, which would keep the buffers
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers exist from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        active, width = len(key_states), self.slots.width
        self.keys[:active].index_copy_(2, self.slots.cursor, key_states)
        self.values[:active].index_copy_(2, self.slots.cursor, value_states)
        return self.keys[:active, :, :width], self.values[:active, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.width, 0

    def get_seq_length(self) -> int:
        return self.slots.width - 1

    def get_max_length(self) -> int:
        return self.slots.capacity


class SlotCache(Cache):
    """Key-value buffers of fixed size for S rows that all end at one cursor.

    end: the cursor as the host knows it; cursor: the same on the device, (1,); width: the columns a step attends to.
    """

    def __init__(self, like: DynamicCache, rows: int, capacity: int):
        self.rows, self.capacity, self.width, self.end = rows, capacity, 0, 0
        self.cursor = torch.zeros(1, dtype=torch.long, device=like.layers[0].keys.device)
        super().__init__(layers=[_SlotLayer(self, layer.keys) for layer in like.layers])

    def insert(self, slots: Tensor, prefix: DynamicCache, source: Tensor) -> None:
        """Copy row source[i] of `prefix` into slots[i], ending at the cursor."""
        start = self.end - prefix.layers[0].keys.shape[2]
        for buffer, new in zip(tensors_of(self), tensors_of(prefix), strict=True):
            buffer[slots, :, start : self.end] = new[source]

    def move(self, content: int, end: int) -> int:
        """Shift the `content` columns before the cursor and the cursor to end at `end`; returns by how far."""
        if content and end != self.end:
            for buffer in tensors_of(self):
                buffer[:, :, end - content : end] = buffer[:, :, self.end - content : self.end].clone()
        shift, self.end = end - self.end, end
        self.cursor.fill_(end)
        return shift

    def keep(self, slots: Tensor) -> None:
        """Move these rows to the front, in this order."""
        for buffer in tensors_of(self):
            buffer[: len(slots)] = buffer[slots]
