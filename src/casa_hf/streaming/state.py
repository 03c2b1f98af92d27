# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Saved streams: whether a stream can resume from what `CasaStream.state_dict` of another one returned."""

from __future__ import annotations

import math
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from ..cache_casa import restore_cache
from ..checks import is_number
from ..design_space import DESIGN_FIELDS

if TYPE_CHECKING:
    from ..modeling_casa import CasaForConditionalGeneration

# What a frame is to the model.
IMAGES = ("pixel_values", "image_grid_thw")

# Another one for every change of what is in a state.
STATE_VERSION = 4

# Fields of the text configuration that decide whether a cache fits a model.
_GEOMETRY = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "head_dim",
    "vocab_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
_WAY_OUT = "give what state_dict() of a CasaStream returned."


def model_design(model: CasaForConditionalGeneration) -> dict[str, Any]:
    """What a cache must have been made with to fit the model."""
    config, text = model.config, model.config.get_text_config()
    fields = {name: getattr(config, name) for name in DESIGN_FIELDS}
    fields |= {"casa_layers": list(config.fusion_layers), "model_type": text.model_type}
    fields |= {name: getattr(text, name, None) for name in _GEOMETRY}
    return fields | {"dtype": str(model.dtype)}


def check_state(state: Any, own: dict[str, Any], model: CasaForConditionalGeneration, tokenizer: Any) -> None:
    """Refuse a state that a stream can't resume from.

    Args:
        state: state that the stream was given.
        own: state of that stream itself, its cache left out.
        model: model of that stream.
        tokenizer: tokenizer of that stream.

    Raises:
        ValueError: with what is wrong.
        Exception: of other kinds, where something in a damaged state has no such form.
    """
    if not isinstance(state, dict) or "design" not in state:
        raise ValueError(f"The state is not a stream's; {_WAY_OUT}")
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"The state has version {state.get('version')!r}; this release of casa_hf reads version {STATE_VERSION}. "
            "Resume with the release that saved it, or begin a new stream."
        )
    missing = [name for name in (*own, "cache") if name not in state]
    if missing:
        raise ValueError(f"The state has no {', '.join(missing)}; {_WAY_OUT.replace('give', 'give all of')}")
    _check_design(state["design"], own["design"])
    held, blocks = state["cache"], len(model.get_decoder().layers)
    if held is not None and len(held["layers"]) != blocks:
        raise ValueError(
            f"The state has a cache of {len(held['layers'])} layers; the model has {blocks}. It isn't whole; "
            f"{_WAY_OUT.replace('give', 'give all of')}"
        )
    _check_settings(state["settings"], own["settings"], tokenizer)
    _check_text(state, model.config.get_text_config().vocab_size)
    _check_waiting(state)
    _check_random(state["random"], own["random"])


def check_cache(held: dict[str, Any], model: CasaForConditionalGeneration) -> None:
    """Refuse the cache of a state if it isn't one of a single stream of this model.

    Args:
        held: cache of a state.
        model: model that the cache is for.

    Raises:
        ValueError: if a part of a layer is missing, or doesn't belong to it.
    """
    windows = held["windows"]
    # Blocks of one kind hold the same.
    parts: dict[tuple[bool, bool], set[str]] = {}
    for number, (layer, block) in enumerate(zip(held["layers"], model.get_decoder().layers, strict=True)):
        kind = (block.self_attn is not None, block.casa_attn is not None)
        own = parts.setdefault(kind, set(layer["fusion"]))
        images = "image" in own or not kind[1] or not windows["image_columns"]
        if own != layer["fusion"].keys() or not images or len(windows["valid"]) != 1:
            raise ValueError(f"The state is damaged: layer {number} has a part too few or too many; {_WAY_OUT}")


def filled_cache(cache: Any, held: dict[str, Any], model: CasaForConditionalGeneration) -> Any:
    """An empty cache of the model, growing or static, that now holds what a state has of one.

    Raises:
        ValueError: if what is held doesn't fit together.
    """
    decoder = model.get_decoder()
    devices = [next(block.parameters()).device for block in decoder.layers]
    restore_cache(cache, held, devices, decoder.kept_by_blocks)
    return cache


def _check_design(given: dict[str, Any], own: dict[str, Any]) -> None:
    differing = [name for name in own if given.get(name) != own[name]]
    if differing:
        name, *others = differing
        raise ValueError(
            f"The state is of a model with {name}={given.get(name)!r}; this one has {name}={own[name]!r}"
            f"{' and differs in ' + ', '.join(others) if others else ''}. Load it into a stream of the model that it "
            "was saved with."
        )


def _check_settings(given: dict[str, Any], own: dict[str, Any], tokenizer: Any) -> None:
    if given.get("opening") != own["opening"]:
        opened, other = (tokenizer.decode(ids or []) for ids in (own["opening"], given.get("opening")))
        raise ValueError(
            f"The state is of a stream that begins with {other!r}; this one begins with {opened!r}. Make it with the "
            "system message and the prompt of the other one."
        )
    for name in own:
        if given.get(name) != own[name]:
            raise ValueError(
                f"The state is of a stream with {name}={given.get(name)!r}; this one has {name}={own[name]!r}. Make "
                f"it with {name}={given.get(name)!r}."
            )


def _check_text(state: dict[str, Any], vocabulary: int) -> None:
    """Refuse what no stream has, of all but the cache."""
    history, last, pieces = state["history"], state["last_timestamp"], state["pieces"]

    def are_ids(values: Any) -> bool:
        return isinstance(values, list) and all(is_number(i, Integral) and 0 <= i < vocabulary for i in values)

    fits = {
        "pending": are_ids(state["pending"]) and state["pending"],
        "history": history.dtype == torch.long and history.shape[:-1] == (1,) and are_ids(history[0].tolist()),
        "num_frames": is_number(state["num_frames"], Integral) and state["num_frames"] >= 0,
        "last_timestamp": last is None or (is_number(last) and math.isfinite(last)),
        "begun": isinstance(state["begun"], bool),
        "answered": isinstance(state["answered"], bool),
        "pieces": are_ids(pieces["before"]) and are_ids(pieces["waiting"]),
        "cache": state["cache"] is not None or not (state["begun"] or state["answered"]),
    }
    for name, fit in fits.items():
        if not fit:
            raise ValueError(f"The state is damaged: its {name} can't be {state[name]!r:.100}; {_WAY_OUT}")


def _check_waiting(state: dict[str, Any]) -> None:
    """Refuse frames that wait for others as no stream has them."""
    waiting, frames_per_image = state["waiting"], state["settings"]["frames_per_image"]
    fits = len(waiting) < frames_per_image
    for frame in waiting:
        index, timestamp, pixels, grid = (frame[name] for name in ("index", "timestamp", *IMAGES))
        fits &= is_number(index, Integral) and 0 <= index < state["num_frames"] and math.isfinite(timestamp)
        fits &= grid.shape == (1, 3) and pixels.ndim == 2 and len(pixels) == int(grid.prod())
    if not fits:
        raise ValueError(f"The state is damaged: its waiting can't be {waiting!r:.100}; {_WAY_OUT}")


def _check_random(given: Any, own: Any) -> None:
    if own is not None and (given is None or given.shape != own.shape):
        raise ValueError(
            "The state has no random numbers, but this stream draws tokens at random. Make both streams with the same "
            "do_sample."
            if given is None
            else f"The state is damaged: its random can't be {given!r:.100}; {_WAY_OUT}"
        )
