"""Keys and values of a growing batch, written in place: a concatenation for each token would copy all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

CHUNK = 128  # positions that are added at a time


class GrownLayer(DynamicLayer):
    """A `DynamicLayer` with room for more positions than it has; `keys` and `values` are views of the used ones."""

    keys: Any
    values: Any

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append positions `[R, heads, X, size]`; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room: list[Tensor] = [key_states[..., :0, :], value_states[..., :0, :]]
        used = self.get_seq_length()
        length = used + key_states.shape[-2]
        if length > self._room[0].shape[-2]:
            self._grow([key_states, value_states], used, length)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., used:length, :] = new
        self.keys, self.values = (room[..., :length, :] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, without spare room."""
        super().batch_select_indices(indices)
        self._room = [self.keys, self.values]

    def _grow(self, new: list[Tensor], used: int, length: int) -> None:
        """Make room for `length` positions and some more, for as many rows as the new ones have."""
        positions = -(-length // CHUNK) * CHUNK
        bigger = [torch.empty(*x.shape[:-2], positions, x.shape[-1], dtype=x.dtype, device=x.device) for x in new]
        if used:
            for room, old in zip(bigger, (self.keys, self.values), strict=True):
                room[..., :used, :] = old
        self._room = bigger


def grown_cache(config: PreTrainedConfig) -> DynamicCache:
    """The cache of transformers for a model, with `GrownLayer` wherever a layer keeps all positions."""
    cache = DynamicCache(config=config)
    cache.layers = [GrownLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]  # type: ignore
    return cache
