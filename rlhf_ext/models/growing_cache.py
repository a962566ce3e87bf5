"""A key-value cache with room ahead, so that a step of decoding writes one column and copies nothing.

Transformers' own layer concatenates: each step copies all keys and values of before into new memory.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer


ROOM = 64
"""Columns made ahead: every so many steps the layer is copied once."""


class GrowingLayer(DynamicLayer):
    """
    [`~transformers.DynamicLayer`] whose `keys` and `values` `(B, heads, T, d)` are views of buffers with free columns.

    Whatever else changes `keys` and `values` (rows selected, repeated, columns cropped) puts new tensors in their
    place and lets the buffers go; the next `update` makes new ones.
    """

    longest: int | None = None
    """Columns that there will be at the end: no more are made."""

    _seen: torch.Tensor | None = None
    _all_keys: torch.Tensor | None = None
    _all_values: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._all_keys is None or self.keys is not self._seen or end > self._all_keys.shape[-2]:
            columns = end + ROOM if self.longest is None else max(end, min(end + ROOM, self.longest))
            self._all_keys = _with_room(self.keys, key_states, start, columns)
            self._all_values = _with_room(self.values, value_states, start, columns)
        assert self._all_values is not None
        self._all_keys[:, :, start:end] = key_states
        self._all_values[:, :, start:end] = value_states
        self.keys, self.values = self._all_keys[:, :, :end], self._all_values[:, :, :end]
        self._seen = self.keys
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._let_go()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._let_go()

    def reset(self) -> None:
        super().reset()
        self._let_go()

    def _let_go(self) -> None:
        # Else rows that were cut would stay in memory until the next update of this layer.
        self._all_keys = self._all_values = self._seen = None


def _with_room(before: torch.Tensor | None, new: torch.Tensor, start: int, columns: int) -> torch.Tensor:
    room = new.new_empty(*new.shape[:2], columns, new.shape[-1])
    if before is not None and start:
        room[:, :, :start] = before
    return room


def cache_argument(model: nn.Module) -> str:
    """Name of the cache among the arguments of a model's forward; transformers renamed it within version 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output: Any, given: Any = None) -> Any:
    """The cache in a model's output, under either name; `given` where it has none and changed that in place."""
    fields = getattr(output, "__dict__", {})  # a tuple has none
    found = fields.get("cache", fields.get("past_key_values"))
    return given if found is None else found


def grow_ahead(cache: Cache | None, longest: int | None = None) -> None:
    """Put [`GrowingLayer`] into an empty cache, in place of each layer that would concatenate.

    Others stay, and so do those of a cache that is offloaded: buffers would remain on the device. `longest` is the
    number of tokens that a row will have at most.
    """
    if cache is None or getattr(cache, "offloading", False):
        return

    def growing() -> GrowingLayer:
        layer = GrowingLayer()
        layer.longest = longest
        return layer

    layers = getattr(cache, "layers", [])
    for place, layer in enumerate(layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            layers[place] = growing()
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = growing
