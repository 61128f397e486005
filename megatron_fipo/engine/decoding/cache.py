"""A KV cache with a fixed place for every token, and attention of one new token per row over it.

Row `r` has its token at position `p` in column `p`: no padding on the left, so the position alone tells what a row sees.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from megatron_fipo.engine.decoding.versions import cache_argument

ATTENTION = "megatron_fipo_decoding"
"""The name of `attend` in transformers."""


@dataclass(frozen=True)
class Layout:
    """What a model keeps of each token."""

    layers: tuple[tuple[int, int, int], ...]
    """Of each layer: key-value heads, size of a key, size of a value."""
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Any) -> "Layout":
        """As the model itself fills a growing cache. ValueError for layers that keep anything but all keys and values."""
        cache: Any = DynamicCache(config=model.config)
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(input_ids=token, use_cache=True, **{cache_argument(model): cache})
        if any(cache.is_sliding) or not all(layer.keys.ndim == 4 for layer in cache.layers):
            raise ValueError("its layers do not keep all keys and values")
        layers = tuple(
            (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers
        )
        return cls(layers, cache.layers[0].keys.dtype)

    @property
    def bytes_per_token(self) -> int:
        return self.dtype.itemsize * sum(groups * (key + value) for groups, key, value in self.layers)


class KeyValues:
    """Keys [rows, groups, length, size] and values of each layer."""

    def __init__(self, layout: Layout, rows: int, length: int, device: torch.device) -> None:
        def zeros(groups: int, size: int) -> Tensor:
            return torch.zeros(rows, groups, length, size, dtype=layout.dtype, device=device)

        self.rows, self.length = rows, length
        self.keys = [zeros(groups, key) for groups, key, _ in layout.layers]
        self.values = [zeros(groups, value) for groups, _, value in layout.layers]

    def clear(self) -> None:
        """Unseen columns count with weight 0, so they must be finite."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()

    def fill(self, rows: Tensor, filled: Any, sources: Tensor) -> None:
        """Copy row `sources[i]` of a `DynamicCache` that the model filled from column 0 on into row `rows[i]`."""
        for layer, keys, values in zip(filled.layers, self.keys, self.values, strict=True):
            keys[rows, :, : layer.keys.shape[2]] = layer.keys[sources]
            values[rows, :, : layer.values.shape[2]] = layer.values[sources]

    def select(self, rows: Tensor, length: int) -> None:
        """Move these rows to the first places, with their first `length` columns."""
        for tensor in (*self.keys, *self.values):
            tensor[: len(rows), :, :length] = tensor[rows, :, :length]


class StepCache(Cache):
    """transformers' view of `KeyValues` in one step: a new token for each of the first rows, at a position of its own.

    Returns the first `length` columns of these rows, always the same memory.
    """

    def __init__(self, stored: KeyValues, positions: Tensor, length: int) -> None:
        super().__init__(layers=[])
        self._stored = stored
        self._positions = positions
        self._length = length
        self._places: dict[int, Tensor] = {}
        """By number of groups: where the new tokens are among all [rows · groups · length] of a layer."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys [B, groups, 1, size] and values; return those of all columns."""
        return self._put(self._stored.keys[layer_idx], key_states), self._put(
            self._stored.values[layer_idx], value_states
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions and mask are given to the model, so nothing may depend on it."""
        return 0

    def _put(self, stored: Tensor, new: Tensor) -> Tensor:
        size = stored.shape[-1]
        stored.view(-1, size).index_copy_(0, self._place(stored.shape[1]), new.reshape(-1, size))
        return stored[: len(self._positions), :, : self._length]

    def _place(self, groups: int) -> Tensor:
        if groups not in self._places:
            heads = torch.arange(len(self._positions) * groups, device=self._positions.device)
            place = heads.view(-1, groups) * self._stored.length + self._positions[:, None]
            self._places[groups] = place.view(-1)
        return self._places[groups]


def visible(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The additive mask [B, 1, 1, length]: row `b` sees the columns up to `positions[b]`."""
    columns = torch.arange(length, device=positions.device)
    mask = torch.zeros(len(positions), length, dtype=dtype, device=positions.device)
    return mask.masked_fill_(columns > positions[:, None], -torch.inf)[:, None, None]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """As transformers' `sdpa`, but one query per row reads each key and value once for all of its heads.

    With a mask, `sdpa` of older versions of transformers copies them for every head.
    """
    if query.shape[2] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, heads, _, size = query.shape
    packed = query.reshape(rows, key.shape[1], -1, size)
    output = torch.nn.functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(rows, 1, heads, -1), None


def use_attention(model: Any) -> None:
    """Let the model compute attention by `attend`."""
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
