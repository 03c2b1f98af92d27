# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The decoding state of fusion layers, inside whatever cache the caller uses.

`prepare_cache` gives each layer of a Transformers `Cache` the fusion state; what the layer holds stays. Everything
that `generate` does to a cache (reorder beams, crop rejected candidates, repeat or select rows, reset) reaches the
layers one by one and so reaches this state too. One of them, the `home_layer`, also owns the `WindowState`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    EncoderDecoderCache,
    LinearAttentionLayer,
    StaticLayer,
)

from .cache_layers import CasaDynamicLayer, CasaLayerMixin, CasaStaticLayer, CasaWrappedLayer, FixedFusion, KeysValues
from .cache_recurrent import CasaLinearLayer, CasaStaticLinearLayer
from .transfers import moved
from .window_state import WindowState, in_doublings
from .windows import WindowRules

# What a block's own attention keeps in a cache: keys/values of the text, the recurrent state of linear attention, or
# nothing where self-attention is replaced.
Kept = Literal["text", "recurrent", "nothing"]


def require_decoder_cache(cache: Any) -> None:
    """Refuse what CASA models can't keep their state in.

    Raises:
        TypeError: if `cache` isn't a `Cache`, or is one of an encoder-decoder model.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            f"The cache is a {type(cache).__name__}, which CASA models don't support; pass a decoder's cache "
            "such as DynamicCache or StaticCache. Caches of continuous batching (paged) and of "
            "encoder-decoder models can't be used."
        )


def prepare_cache(cache: Cache, kept: Sequence[Kept]) -> None:
    """Give every layer of `cache` the fusion state; a cache that has it is left alone.

    Args:
        cache: a cache of full-attention layers, and of linear-attention layers where the blocks are such, empty or
            filled with text by the source language model. Empty layers become what their blocks need.
        kept: what the attention of each decoder block keeps.

    Raises:
        TypeError: if `cache` isn't a `Cache`, or a layer isn't what its block needs.
        ValueError: if it has too few layers.
    """
    require_decoder_cache(cache)
    if home_layer(cache) is not None and len(cache.layers) >= len(kept):
        for layer in cache.layers:
            if isinstance(layer, CasaLinearLayer):
                layer.make_writable()
        return
    num_layers = len(kept)
    while len(cache.layers) < num_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) < num_layers:
        raise ValueError(
            f"The cache has {len(cache.layers)} layers, but the model has {num_layers}. Make the cache with "
            "this model's configuration: DynamicCache(config=model.config)."
        )
    room = next((layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)), None)
    further: list[Kept] = ["text"] * (len(cache.layers) - num_layers)
    prepared = [
        _linear_layer(layer, room) if of_block == "recurrent" else _attention_layer(layer)
        for layer, of_block in zip(cache.layers, [*kept, *further], strict=True)
    ]
    grows = all(layer.grows for layer in prepared)
    for layer, of_block in zip(prepared, [*kept, *further], strict=True):
        layer.grows = grows  # so that none does what another one refuses
        layer.fusion, layer.memory, layer.window_state = {}, {}, None
        layer.block_has_text = of_block == "text"
        layer.beside_recurrent = "recurrent" in kept
    cache.layers = prepared


def home_layer(cache: Cache) -> Any:
    """The layer of a prepared cache that owns the window state: the first of full attention, which Transformers asks
    for the length of the text; None before."""
    of_attention = (layer for layer in cache.layers if isinstance(layer, CacheLayerMixin))
    return next((layer for layer in of_attention if isinstance(layer, CasaLayerMixin)), None)


def _attention_layer(layer: Any) -> Any:
    """A layer for a block of full attention, that has taken over what `layer` holds."""
    if type(layer) in (DynamicLayer, StaticLayer):
        return _taken_over(layer, CasaDynamicLayer if type(layer) is DynamicLayer else CasaStaticLayer)
    if isinstance(layer, DynamicLayer) and not layer.is_sliding:
        return CasaWrappedLayer(layer)
    raise TypeError(
        f"The cache has a {type(layer).__name__}; CASA needs full-attention layers. Make the cache with "
        "DynamicCache(config=model.config) or StaticCache(config=model.config, max_cache_len=...)."
    )


def _linear_layer(layer: Any, room: int | None) -> Any:
    """The same for a block of linear attention. A layer for keys and values is replaced as long as it is empty.

    Args:
        layer: layer of Transformers.
        room: number of tokens that a static cache has room for; None for a growing one.
    """
    prepared: Any
    kind: Any = CasaLinearLayer if room is None else CasaStaticLinearLayer
    if type(layer) is LinearAttentionLayer:
        prepared = _taken_over(layer, kind)
    elif isinstance(layer, CacheLayerMixin) and not layer.is_initialized:
        prepared = kind()
    else:
        raise TypeError(
            f"The cache has a filled {type(layer).__name__} where the model has linear attention: another model, or a "
            "learned prefix, has filled it. Make the cache with DynamicCache(config=model.config) or "
            "StaticCache(config=model.config, max_cache_len=...)."
        )
    prepared.max_cache_len = room
    return prepared


def _taken_over(layer: Any, kind: type) -> Any:
    prepared: Any = object.__new__(kind)
    # What it holds by index isn't shared with it: a snapshot may have it still.
    prepared.__dict__.update({k: dict(v) if isinstance(v, dict) else v for k, v in vars(layer).items()})
    return prepared


def stored_state(cache: Cache | None) -> WindowState | None:
    """The window state that a prepared cache holds; None before the first text."""
    return None if cache is None else home_layer(cache).window_state


def window_state(
    cache: Cache | None,
    batch_size: int,
    device: torch.device,
    attention_mask: Any = None,
    reserved_columns: int = 0,
    held: WindowState | None = None,
) -> WindowState:
    """The window state that `cache` holds, or the one before the first image.

    Args:
        cache: prepared by `prepare_cache`, or None.
        batch_size: rows of the call.
        device: device for the state's tensors.
        attention_mask: mask of the call; if it covers the cached text of another model, (batch, all tokens), it says
            which of that is padding.
        reserved_columns: image columns that a static cache keeps at least.
        held: the state that `cache` holds, read from its device; None to take it as it is.

    Raises:
        ValueError: if the cache was filled with another batch size, or by another model in between.
    """
    if cache is None:
        return WindowState.empty(batch_size, device)
    home, length = home_layer(cache), cache.get_seq_length()
    state = home.window_state if held is None else held
    if state is None:
        state = WindowState.empty(batch_size, device, length=int(length))
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and state.length:
            valid = attention_mask[:, : state.length].bool().to(device)
            positions = (valid.cumsum(-1) - 1).clamp(min=0)
            state = replace(state, valid=valid, positions=positions, next_position=valid.sum(-1), padded=True)
        if isinstance(home, CasaStaticLayer):
            state = replace(state, text_start=0, reserved_columns=reserved_columns)
        return state
    if state.batch_size != batch_size:
        raise ValueError(
            f"The input has {batch_size} rows but the cache holds {state.batch_size}. Pass the same rows, or "
            "use cache.batch_repeat_interleave / batch_select_indices first."
        )
    # A static cache counts on its device; it isn't asked, so as not to wait for it.
    if isinstance(length, int) and length != state.length:
        raise ValueError(
            f"The cache holds {length} tokens, but CASA has seen {state.length} of them: another model has "
            "extended the cache. Give each model a cache of its own."
        )
    return state if state.valid.device == device else moved(state.settled(), device)


def check_room(cache: Cache | None, length: int | torch.Tensor, num_tokens: int) -> None:
    """Refuse text that a static cache has no room for, where that is known without waiting for the device.

    Args:
        cache: prepared by `prepare_cache`, or None.
        length: cache positions in use, as in `WindowState`.
        num_tokens: number of new tokens.

    Raises:
        ValueError: if there is too little room.
    """
    layer = None if cache is None else home_layer(cache)
    if not isinstance(layer, CasaStaticLayer) or not isinstance(length, int):
        return
    if length + num_tokens > layer.max_cache_len:
        raise ValueError(
            f"The static cache has room for {layer.max_cache_len} tokens, but the text has {length + num_tokens} "
            "now. Make it with a larger max_cache_len."
        )


def _fixed_windows(cache: Cache) -> WindowState | None:
    """The windows of a static cache that is in use; None for a growing or an empty one."""
    home = home_layer(cache)
    state = None if home is None else home.window_state
    return None if state is None or state.capacity is None else state


def reserve_images(
    cache: Cache, kept: Sequence[Kept], like: Sequence[dict[str, torch.Tensor]], num_columns: int, pins: bool
) -> None:
    """Let an empty static cache have room for images before the first one comes, so that compiled steps are the same
    before and after it, and for images of any size up to that room.

    Args:
        cache: static cache, empty.
        kept: what the attention of each decoder block keeps.
        like: for each block (batch, kv_heads, 1, head_dim) image keys, by the name that they are stored under.
        num_columns: number of image tokens that there is to be room for in each row.
        pins: whether some images stay visible to all later text.
    """
    prepare_cache(cache, kept)
    found = next(keys for of_block in like for keys in of_block.values())
    state = WindowState.empty(len(found), found.device)
    pinned = state.valid.new_zeros(len(found), num_columns) if pins else None
    state = replace(state, image_columns=num_columns, reserved_columns=num_columns, pinned=pinned)
    for layer, of_block in zip(cache.layers, like, strict=True):
        for name, keys in of_block.items():
            layer.allocate_images(name, keys, num_columns)
    home = home_layer(cache)
    home.window_state = state.fixed(home.max_cache_len)


def select_rows(cache: Cache, rows: Sequence[int | None]) -> None:
    """Let a cache hold these of its rows, in this order; a row may be taken several times.

    A static cache of as many rows is written in place, and only where rows change, so that compiled steps and CUDA
    graphs stay: `[0, 1, None, 1]` empties the third of four rows and copies the second to the fourth. With another
    number of rows it gets new memory.

    Args:
        cache: cache prepared by `prepare_cache`, growing or static.
        rows: numbers of the rows; None for one without text and images, in which all so far is padding.

    Raises:
        NotImplementedError: for quantized layers.
        ValueError: if there is no such row.
    """
    home = home_layer(cache)
    state = None if home is None else home.window_state
    number = 0 if state is None else state.batch_size
    for layer in cache.layers if home is not None else ():
        layer.require_replaceable("select_rows")
    wrong = [row for row in rows if row is not None and not 0 <= row < number]
    if wrong or not rows:
        raise ValueError(f"rows={list(rows)} must be numbers of the {number} rows that the cache holds, or None.")
    for layer in cache.layers:
        layer.select_rows(rows)


class CacheMoment:
    """What a cache holds now, to come back to after a forward that has failed, or was interrupted.

    A growing cache's memory is shared, and a static cache's text isn't copied: a forward adds behind it. Of a static
    cache, what a forward writes over is copied: windows, recurrent states, and images if it may bring any. So this is
    no way back from `evict_text`, `select_rows` or `crop`. The device isn't waited for.

    Args:
        cache: cache of any kind.
        images: whether the forward may bring images.
    """

    def __init__(self, cache: Cache, images: bool = True):
        self._cache = cache
        self._windows = _fixed_windows(cache)
        fixed = self._windows is not None
        self._layers = [] if fixed else cache_snapshot(cache).layers
        self._moments = [layer.moment(images) for layer in cache.layers] if fixed else []

    def restore(self) -> None:
        """Let the cache hold what it held."""
        if self._windows is None:
            self._cache.layers = self._layers
            self._layers = cache_snapshot(self._cache).layers
            return
        for layer, moment in zip(self._cache.layers, self._moments, strict=True):
            layer.return_to(moment)


def cache_snapshot(cache: Cache) -> Cache:
    """A cache that holds what this one holds now, whatever becomes of that one.

    Growing ones share the memory of what both hold, which is never written again; only what the original frees stays
    for as long as the snapshot lives. A static one is copied.
    """
    snapshot = copy.copy(cache)
    snapshot.layers = [_copied(layer) for layer in cache.layers]
    return snapshot


def _copied(layer: Any) -> Any:
    if isinstance(layer, CasaLayerMixin):
        return layer.copied()
    return copy.deepcopy(layer) if isinstance(layer, StaticLayer) else copy.copy(layer)


def cache_state(cache: Cache, rules: WindowRules | None = None) -> dict[str, Any]:
    """Everything that a cache holds, as tensors of their own and numbers; `restore_cache` takes it back, into a cache
    that grows or a static one.

    Args:
        cache: cache prepared by `prepare_cache`, growing or static.
        rules: rules of who sees which image; a growing cache doesn't need them.

    Raises:
        NotImplementedError: for quantized layers.
        ValueError: for a static cache without the rules.
    """
    for layer in cache.layers:
        layer.require_replaceable("cache_state")
    state: WindowState = home_layer(cache).window_state.settled()
    if state.capacity is not None:
        if rules is None:
            raise ValueError("cache_state needs the model's rules of windows (window_rules) for a static cache.")
        state = state.compact(rules.keys == "context", rules.text_windows)
    layers = []
    for layer in cache.layers:
        content = {name: [tensor.clone() for tensor in stored] for name, stored in layer.content(state).items()}
        of_layer = {
            "text": content.pop("text", []),
            "fusion": content,
            "joined": "window" in layer.memory or (isinstance(layer, FixedFusion) and "window" in content),
        }
        if isinstance(layer, CasaLinearLayer | CasaStaticLinearLayer):
            of_layer["recurrent"] = [state.clone() for state in layer.states]
        layers.append(of_layer)
    windows = {field.name: getattr(state, field.name) for field in fields(state)}
    copied = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in windows.items()}
    return {"layers": layers, "windows": copied}


def restore_cache(cache: Cache, state: dict[str, Any], devices: Sequence[torch.device], kept: Sequence[Kept]) -> None:
    """Fill an empty cache with what `cache_state` gave.

    Args:
        cache: empty cache of as many layers as the state has, growing or static.
        state: result of `cache_state`; it isn't changed and shares nothing with the cache.
        devices: devices of the decoder blocks.
        kept: what the attention of each decoder block keeps.

    Raises:
        ValueError: if what it holds has lengths that don't fit together, or isn't what the blocks keep, or if a static
            cache has too little room.
    """
    prepare_cache(cache, kept)
    home = home_layer(cache)
    named: dict[str, Any] = {
        name: value.to(devices[0], copy=True) if isinstance(value, torch.Tensor) else value
        for name, value in state["windows"].items()
    }
    windows = WindowState(**named)
    contents: list[dict[str, KeysValues]] = []
    recurrent: list[list[torch.Tensor]] = []
    for number, (stored, device) in enumerate(zip(state["layers"], devices, strict=True)):
        states = stored.get("recurrent", ())
        if (kept[number] == "text") != bool(stored["text"]) or len(states) != 2 * (kept[number] == "recurrent"):
            raise ValueError(
                f"The saved state is damaged: layer {number} has a part too few or too many. Load the whole state, as "
                "it was saved."
            )
        named_tensors = {**stored["fusion"], **({"text": stored["text"]} if stored["text"] else {})}
        contents.append(
            {name: KeysValues(*(t.to(device, copy=True) for t in tensors)) for name, tensors in named_tensors.items()}
        )
        recurrent.append([tensor.to(device, copy=True) for tensor in states])
    _check_lengths(windows, contents, recurrent)
    if isinstance(home, CasaStaticLayer):
        check_room(cache, 0, windows.valid.shape[1])
        windows = _with_reserved_columns(windows, home.window_state)
    for layer, content, states, stored in zip(cache.layers, contents, recurrent, state["layers"], strict=True):
        if states:
            layer.load_states(*states)
        layer.load(content, windows, stored["joined"])
    home.store_state(windows)


def _with_reserved_columns(state: WindowState, reserved: WindowState | None) -> WindowState:
    """The windows with as many image columns as a static cache is to have that has reserved some."""
    if reserved is None:
        return state
    columns = max(in_doublings(state.image_columns, max(reserved.reserved_columns, 1)), reserved.image_columns)
    added, pinned = columns - state.image_columns, state.pinned
    if pinned is None and reserved.pinned is not None:
        pinned = reserved.pinned.new_zeros(state.batch_size, state.image_columns)
    pinned = None if pinned is None else nn.functional.pad(pinned, (added, 0))
    return replace(state, image_columns=columns, pinned=pinned, reserved_columns=reserved.reserved_columns)


def _check_lengths(
    state: WindowState, contents: list[dict[str, KeysValues]], recurrent: list[list[torch.Tensor]]
) -> None:
    state.check()
    lengths = {"text": state.length, "window": state.length - state.text_start}
    lengths |= dict.fromkeys(("image", "update"), state.image_columns)
    like: torch.Tensor | None = None
    like_states: list[torch.Tensor] = []
    for number, (content, states) in enumerate(zip(contents, recurrent, strict=True)):
        for name, stored in content.items():
            for tensor in stored:
                like = tensor if like is None else like
                batch_size, heads, length, head_dim = tensor.shape
                fits = (batch_size, heads, head_dim) == (state.batch_size, like.shape[1], like.shape[3])
                fits &= length == lengths[name] and tensor.dtype == like.dtype
                _check_tensor(f"{name} of layer {number}", tensor, fits)
        like_states = like_states or states
        for tensor, other in zip(states, like_states, strict=False):
            fits = tensor.shape == other.shape and tensor.dtype == other.dtype
            fits &= tensor.shape[0] == state.batch_size
            _check_tensor(f"the recurrent state of layer {number}", tensor, fits)


def _check_tensor(name: str, tensor: torch.Tensor, fits: bool) -> None:
    if not fits:
        raise ValueError(
            f"The saved state is damaged: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, which doesn't "
            "match the rest of it. Load the whole state, as it was saved."
        )
    if not bool(tensor.isfinite().all()):
        raise ValueError(
            f"The saved state is damaged: {name} has numbers that aren't finite. Resume from an earlier state, or "
            "start a new stream."
        )


def cache_nbytes(cache: Cache, allocated: bool = False) -> dict[str, int]:
    """Bytes that a cache holds, by part; quantized text counts only as far as it isn't quantized yet.

    That is the content. A growing cache has room for more behind it: at most a quarter, at least 64 tokens. A static
    one has room for `max_cache_len` tokens, and for as many image tokens as are reserved.

    Args:
        cache: cache that a CASA model has filled, or another one.
        allocated: whether to count all that a static cache has allocated; of a growing one, it is the content too.

    Returns:
        "text": keys/values of self-attention and of the current windows' text in fusion layers.
        "image": keys/values of the visible images.
        "recurrent": states of linear attention, which don't grow; only where the model has any.
    """
    state = _fixed_windows(cache)
    if state is not None:
        first_text = int(state.window_start.min())
        state = replace(state.growing(), image_columns=state.num_seen_columns(), text_start=first_text)
    held = {"text": 0, "image": 0}
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            states = (*layer.conv_states.values(), *layer.recurrent_states.values())
            held["recurrent"] = held.get("recurrent", 0) + sum(s.nbytes for s in states if s is not None)
        if allocated or state is None or not isinstance(layer, CasaLayerMixin):
            content = {"text": _text_of(layer), **getattr(layer, "fusion", {})}
        else:
            content = layer.content(state)
        for name, stored in content.items():
            part = "text" if name in ("text", "window") else "image"
            held[part] += sum(tensor.nbytes for tensor in stored if tensor is not None)
    return held


def _text_of(layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Keys and values of self-attention, which layers of linear attention don't have."""
    return getattr(layer, "keys", None), getattr(layer, "values", None)
