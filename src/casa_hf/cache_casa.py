# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The decoding state of fusion layers, inside whatever cache the caller uses.

`prepare_cache` gives each layer of a Transformers `Cache` the fusion state, keeping the layer's own class and content.
Everything that `generate` does to a cache (reorder beams, crop rejected candidates, repeat or select rows, reset)
reaches the layers one by one and so reaches this state too. Layer 0 also owns the `WindowState`.
"""

from __future__ import annotations

from functools import cache as memoize
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache, StaticLayer

from .windows import WindowPlan, WindowState


class CasaLayerMixin:
    """A cache layer that also holds one decoder block's image keys/values and window text.

    Attributes:
        image_keys, image_values: (batch, kv_heads, image columns, head_dim) of the visible images, right-aligned.
        window_keys, window_values: (batch, kv_heads, slots, head_dim) of the text from `WindowState.text_start` on;
            None where the fusion layer has no text keys or shares those of self-attention.
        window_state: in layer 0 only, the state of the windows.
    """

    image_keys: torch.Tensor | None = None
    image_values: torch.Tensor | None = None
    window_keys: torch.Tensor | None = None
    window_values: torch.Tensor | None = None
    window_state: WindowState | None = None

    _FUSION_TENSORS = ("image_keys", "image_values", "window_keys", "window_values")

    def update_images(
        self, keys: torch.Tensor | None, values: torch.Tensor | None, plan: WindowPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new image keys/values and return all that this call can see; only what stays visible is stored."""
        if keys is None or values is None:
            assert self.image_keys is not None and self.image_values is not None
            return self.image_keys, self.image_values
        if self.image_keys is not None and self.image_values is not None:
            keys = torch.cat([self.image_keys, keys], dim=2)
            values = torch.cat([self.image_values, values], dim=2)
        self.image_keys, self.image_values = plan.keep(keys), plan.keep(values)
        return keys, values

    def update_window(
        self, keys: torch.Tensor, values: torch.Tensor, plan: WindowPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new text keys/values and return those of all current windows; closed windows are dropped."""
        if self.window_keys is not None and self.window_values is not None:
            keys = torch.cat([self.window_keys, keys], dim=2)
            values = torch.cat([self.window_values, values], dim=2)
        dropped = plan.num_dropped_slots
        # A copy of the rest, so that the dropped part's memory is freed.
        self.window_keys = keys[:, :, dropped:].clone() if dropped else keys
        self.window_values = values[:, :, dropped:].clone() if dropped else values
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        length = self.get_seq_length()  # type: ignore[attr-defined]
        removed = abs(tokens_to_remove) if tokens_to_remove < 0 else max(0, int(length) - tokens_to_remove)
        if tokens_to_remove == 0:
            removed = 0
        if self.window_state is not None:
            self.window_state = self.window_state.crop(removed)
        if removed and self.window_keys is not None and self.window_values is not None:
            self.window_keys = self.window_keys[:, :, :-removed]
            self.window_values = self.window_values[:, :, :-removed]
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reset(self) -> None:
        for name in self._FUSION_TENSORS:
            setattr(self, name, None)
        self.window_state = None
        if isinstance(self, DynamicLayer):
            # Transformers 5.17 zeroes a dynamic layer without shortening it.
            self.keys = self.values = None
            self.is_initialized = False
        super().reset()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select_fusion_rows(beam_idx)
        super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select_fusion_rows(indices)
        super().batch_select_indices(indices)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        for name in self._FUSION_TENSORS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.repeat_interleave(repeats, dim=0))
        if self.window_state is not None:
            self.window_state = self.window_state.repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def _select_fusion_rows(self, rows: torch.Tensor) -> None:
        for name in self._FUSION_TENSORS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor[rows.to(tensor.device)])
        if self.window_state is not None:
            self.window_state = self.window_state.select(rows)


class CasaDynamicLayer(CasaLayerMixin, DynamicLayer):
    """A growing cache layer with fusion state."""


class CasaStaticLayer(CasaLayerMixin, StaticLayer):
    """A preallocated cache layer with fusion state, which itself grows with the current window."""


@memoize
def _casa_class(layer_class: type) -> Any:
    known: dict[type, type] = {DynamicLayer: CasaDynamicLayer, StaticLayer: CasaStaticLayer}
    if layer_class in known:
        return known[layer_class]
    return type(f"Casa{layer_class.__name__}", (CasaLayerMixin, layer_class), {})


def prepare_cache(cache: Cache, num_layers: int) -> None:
    """Give every layer of `cache` the fusion state; a cache that has it is left alone.

    Args:
        cache: a cache of full-attention layers, empty or filled with text by the source language model.
        num_layers: number of decoder blocks.

    Raises:
        TypeError: if `cache` isn't a `Cache`, or a layer isn't a full-attention layer.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}; pass a decoder cache such as DynamicCache or StaticCache."
        )
    if cache.layers and isinstance(cache.layers[0], CasaLayerMixin):
        return
    while len(cache.layers) < num_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    cache.layers = [_with_fusion_state(layer) for layer in cache.layers]


def _with_fusion_state(layer: Any) -> Any:
    if not isinstance(layer, CacheLayerMixin) or getattr(layer, "is_sliding", False):
        raise TypeError(
            f"past_key_values has a {type(layer).__name__}; CASA needs full-attention layers. Make the cache with "
            "DynamicCache(config=model.config) or StaticCache(config=model.config, max_cache_len=...)."
        )
    casa_class = _casa_class(type(layer))  # type: ignore[arg-type]
    adopted = casa_class.__new__(casa_class)
    adopted.__dict__.update(layer.__dict__)
    return adopted


def window_state(cache: Cache | None, batch_size: int, device: torch.device) -> WindowState:
    """The window state that `cache` holds, or an empty one.

    Raises:
        ValueError: if the cache was filled with another batch size.
    """
    if cache is None:
        return WindowState.empty(batch_size, device)
    state = cache.layers[0].window_state
    if state is None:
        return WindowState.empty(batch_size, device, length=int(cache.get_seq_length()))
    if state.batch_size != batch_size:
        raise ValueError(
            f"The input has {batch_size} rows but past_key_values holds {state.batch_size}. Pass the same rows, or "
            "use past_key_values.batch_repeat_interleave / batch_select_indices first."
        )
    return state.to(device)


def cache_nbytes(cache: Cache) -> dict[str, int]:
    """Bytes that a cache holds, by part.

    Returns:
        "text": keys/values of self-attention and of the current windows' text in fusion layers.
        "image": keys/values of the visible images.
    """
    text = image = 0
    for layer in cache.layers:
        text += _nbytes(layer.keys, layer.values)
        if isinstance(layer, CasaLayerMixin):
            text += _nbytes(layer.window_keys, layer.window_values)
            image += _nbytes(layer.image_keys, layer.image_values)
    return {"text": text, "image": image}


def _nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
