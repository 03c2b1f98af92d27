# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The decoding state of fusion layers, inside whatever cache the caller uses.

`prepare_cache` gives each layer of a Transformers `Cache` the fusion state, keeping the layer's own class and content.
Everything that `generate` does to a cache (reorder beams, crop rejected candidates, repeat or select rows, reset)
reaches the layers one by one and so reaches this state too. Layer 0 also owns the `WindowState`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache as memoize
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache, StaticLayer

from .windows import WindowPlan, WindowState


class KeysValues(NamedTuple):
    """Keys and values, each (batch, kv_heads, length, head_dim)."""

    keys: torch.Tensor
    values: torch.Tensor

    def append(self, other: KeysValues) -> KeysValues:
        """Both, one after the other."""
        return KeysValues(torch.cat([self.keys, other.keys], dim=2), torch.cat([self.values, other.values], dim=2))

    def slots(self, start: int, end: int) -> KeysValues:
        """Views of a range of slots."""
        return KeysValues(self.keys[:, :, start:end], self.values[:, :, start:end])


class CasaLayerMixin:
    """A cache layer that also holds one decoder block's image keys/values and window text.

    Attributes:
        fusion: keys/values by name.
            "image": image columns of the fusion layer, right-aligned.
            "update": image columns by self-attention's projections, where image states are updated by attention and
            the fusion layer's own don't serve.
            "window": text from `WindowState.text_start` on, where the fusion layer has text keys that aren't those of
            self-attention.
        window_state: in layer 0 only, the state of the windows.
    """

    keys: torch.Tensor | None
    fusion: dict[str, KeysValues]
    window_state: WindowState | None

    def update_images(self, name: str, new: KeysValues | None, plan: WindowPlan) -> KeysValues | None:
        """Add new image keys/values and return all that this call can see; only what stays visible is stored."""
        stored = self.fusion.get(name)
        if new is None:
            return stored
        everything = new if stored is None else stored.append(new)
        self.fusion[name] = KeysValues(*(plan.keep(tensor) for tensor in everything))
        return everything

    def update_window(self, new: KeysValues, plan: WindowPlan) -> KeysValues:
        """Add new text keys/values and return those of all current windows; closed windows are dropped."""
        stored = self.fusion.get("window")
        everything = new if stored is None else stored.append(new)
        dropped = plan.num_dropped_slots
        # A copy of the rest, so that the dropped part's memory is freed.
        self.fusion["window"] = KeysValues(*(t[:, :, dropped:].clone() for t in everything)) if dropped else everything
        return everything

    def get_seq_length(self) -> int:
        if self._without_text and self.window_state is not None:
            return self.window_state.length
        return super().get_seq_length()  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        self._require_dynamic("crop")
        removed = -int(tokens_to_remove)  # a tensor, from some versions of `generate`
        if removed < 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to take back as a negative number. A length to "
                "keep isn't taken, because blocks without self-attention don't know theirs."
            )
        # What may refuse comes first: a refused crop leaves the cache as it was.
        state = None if self.window_state is None else self.window_state.crop(removed)
        if not self._without_text:
            super().crop(tokens_to_remove)  # type: ignore[misc]
        self.window_state = state
        if removed and "window" in self.fusion:
            window = self.fusion["window"]
            self.fusion["window"] = window.slots(0, window.keys.shape[2] - removed)

    def reset(self) -> None:
        self.fusion = {}
        self.window_state = None
        if isinstance(self, DynamicLayer):
            # Transformers 5.17 zeroes a dynamic layer without shortening it.
            self.keys = self.values = None
            self.is_initialized = False
        super().reset()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map_fusion(lambda tensor: tensor[beam_idx.to(tensor.device)])
        if self.window_state is not None:
            self.window_state = self.window_state.select(beam_idx)
        if not self._without_text:
            super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._require_dynamic("batch_select_indices")
        self._map_fusion(lambda tensor: tensor[indices.to(tensor.device)])
        if self.window_state is not None:
            self.window_state = self.window_state.select(indices)
        if not self._without_text:
            super().batch_select_indices(indices)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._require_dynamic("batch_repeat_interleave")
        self._map_fusion(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        if self.window_state is not None:
            self.window_state = self.window_state.repeat_interleave(repeats)
        if not self._without_text:
            super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def _require_dynamic(self, operation: str) -> None:
        """Refuse what Transformers implements for growing, unquantised layers only, before anything has changed."""
        if not isinstance(self, DynamicLayer) or hasattr(self, "_quantized_keys"):
            raise NotImplementedError(
                f"{operation} isn't possible on a {type(self).__name__}, a static or quantized cache layer; use a "
                "DynamicCache."
            )

    @property
    def _without_text(self) -> bool:
        """Whether the layer holds no text, as in blocks whose self-attention is replaced."""
        return self.keys is None

    def _map_fusion(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.fusion = {name: KeysValues(*map(change, stored)) for name, stored in self.fusion.items()}


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
        ValueError: if it has too few layers.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}; pass a decoder cache such as DynamicCache or StaticCache."
        )
    if cache.layers and isinstance(cache.layers[0], CasaLayerMixin):
        return
    while len(cache.layers) < num_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) < num_layers:
        raise ValueError(
            f"past_key_values has {len(cache.layers)} layers, the model has {num_layers}. Make the cache with this "
            "model's config."
        )
    cache.layers = [_with_fusion_state(layer) for layer in cache.layers]


def _with_fusion_state(layer: Any) -> Any:
    if not isinstance(layer, CacheLayerMixin) or getattr(layer, "is_sliding", False):
        raise TypeError(
            f"past_key_values has a {type(layer).__name__}; CASA needs full-attention layers. Make the cache with "
            "DynamicCache(config=model.config) or StaticCache(config=model.config, max_cache_len=...)."
        )
    casa_class = _casa_class(type(layer))  # type: ignore[arg-type]
    adopted = casa_class.__new__(casa_class)
    adopted.__dict__.update(layer.__dict__, fusion={}, window_state=None)
    return adopted


def window_state(
    cache: Cache | None, batch_size: int, device: torch.device, attention_mask: Any = None
) -> WindowState:
    """The window state that `cache` holds, or the one before the first image.

    Args:
        cache: prepared by `prepare_cache`, or None.
        batch_size: rows of the call.
        device: where the state's tensors are wanted.
        attention_mask: of the call; if it covers the cached text of another model, (batch, all slots), it says which
            of that is padding.

    Raises:
        ValueError: if the cache was filled with another batch size, or by another model in between.
    """
    if cache is None:
        return WindowState.empty(batch_size, device)
    state, length = cache.layers[0].window_state, cache.get_seq_length()
    if state is None:
        state = WindowState.empty(batch_size, device, length=int(length))
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and state.length:
            valid = attention_mask[:, : state.length].bool().to(device)
            state = replace(state, valid=valid, next_position=valid.sum(-1), padded=True)
        return state
    if state.batch_size != batch_size:
        raise ValueError(
            f"The input has {batch_size} rows but past_key_values holds {state.batch_size}. Pass the same rows, or "
            "use past_key_values.batch_repeat_interleave / batch_select_indices first."
        )
    # A static cache counts on its device; it isn't asked, so as not to wait for it.
    if isinstance(length, int) and length != state.length:
        raise ValueError(
            f"past_key_values holds {length} tokens, but CASA has seen {state.length} of them: another model has "
            "extended the cache. Give each model a cache of its own."
        )
    return state.to(device)


def cache_nbytes(cache: Cache) -> dict[str, int]:
    """Bytes that a cache holds, by part; quantised text counts only as far as it isn't quantised yet.

    Returns:
        "text": keys/values of self-attention and of the current windows' text in fusion layers.
        "image": keys/values of the visible images.
    """
    held = {"text": 0, "image": 0}
    for layer in cache.layers:
        held["text"] += sum(tensor.nbytes for tensor in (layer.keys, layer.values) if tensor is not None)
        for name, stored in getattr(layer, "fusion", {}).items():
            held["text" if name == "window" else "image"] += sum(tensor.nbytes for tensor in stored)
    return held
