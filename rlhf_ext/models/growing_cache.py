"""A key-value cache with room ahead, so that a step of decoding writes one column and copies nothing.

Transformers' own layer concatenates: each step copies all keys and values of before into new memory.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


ROOM = 64
"""Columns made ahead: every so many steps the layer is copied once."""


class GrowingLayer(DynamicLayer):
    """
    [`~transformers.DynamicLayer`] whose `keys` and `values` `(B, heads, T, d)` are views of buffers with free columns.

    Whatever else changes `keys` and `values` (rows selected, repeated, columns cropped) puts new tensors in their
    place; the next `update` sees that, and makes its buffers of them.
    """

    _seen: torch.Tensor | None = None
    _all_keys: torch.Tensor
    _all_values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.keys is not self._seen or end > self._all_keys.shape[-2]:
            self._all_keys, self._all_values = (
                _with_room(before, new, start, end)
                for before, new in ((self.keys, key_states), (self.values, value_states))
            )
        self._all_keys[:, :, start:end] = key_states
        self._all_values[:, :, start:end] = value_states
        self.keys, self.values = self._all_keys[:, :, :end], self._all_values[:, :, :end]
        self._seen = self.keys
        return self.keys, self.values


def _with_room(before: torch.Tensor | None, new: torch.Tensor, start: int, end: int) -> torch.Tensor:
    room = new.new_empty(*new.shape[:2], end + ROOM, new.shape[-1])
    if before is not None and start:
        room[:, :, :start] = before
    return room


def grow_ahead(cache: Cache | None) -> None:
    """Put [`GrowingLayer`] into an empty cache, in place of each layer that would concatenate. Others stay."""
    if cache is None:
        return
    layers = getattr(cache, "layers", [])
    for place, layer in enumerate(layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            layers[place] = GrowingLayer()
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
