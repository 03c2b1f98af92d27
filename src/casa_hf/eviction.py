# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A window over the text that a cache remembers: what is older than the window, except the first tokens, is evicted.

The first tokens stay because attention leans on them (attention sinks, arXiv 2309.17453). What stays is re-based:
positions run on from the sinks, as if the evicted text had never been there. Keys are stored rotated, so they are
turned back by the positions that went before them, and so are the keys of images. Among recent text, images and what
is still to come the relative geometry stays what it was; only the sinks come closer. Positions then are bounded,
however long the stream, by the window and, with insertion positions, by what the images of the retained text advance:
float32 rotary angles lose 8e-2 at position 2,000,000.

Rows of a batch have windows of their own. What was padding between their tokens is closed up on the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache_casa import CasaLayerMixin, KeysValues
from .windows import OPEN, WindowRules, WindowState

# Rope types whose frequencies depend on the length of the text: a stored key can't be turned from one to another.
_CHANGING_ROPE_TYPES = ("dynamic", "longrope")


class KeyRotation:
    """Turns keys that are stored rotated to other positions.

    Args:
        rotary: the backbone's rotary embedding.
        apply_rotary: its function `(q, k, cos, sin) -> (q, k)`.

    Raises:
        ValueError: if the frequencies depend on the length of the text.
    """

    def __init__(self, rotary: nn.Module, apply_rotary: Callable):
        rope_type = getattr(rotary, "rope_type", "default")
        if rope_type in _CHANGING_ROPE_TYPES:
            raise ValueError(
                f"Text can't be evicted with rope_type={rope_type!r}: its frequencies change with the length of the "
                "text, so stored keys can't be moved to other positions. Use a rope type with fixed frequencies "
                '("default", "linear", "yarn", "llama3"), or keep all text.'
            )
        self.inv_freq: Any = rotary.inv_freq
        self.apply_rotary = apply_rotary

    def tables(self, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float64 on the CPU, that turn keys back by `shift` (batch, length) positions.

        The angles are exact products: of whatever a key's own float32 angle has lost, nothing is added here. They
        carry no attention scaling, which stored keys have already. All axes of M-RoPE move by the same amount.
        """
        angles = -shift.cpu().double()[..., None] * self.inv_freq.cpu().double()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def rotate(self, keys: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Keys (batch, heads, length or 1, head_dim), turned in at least float32."""
        dtype = torch.promote_types(keys.dtype, torch.float32)
        cos, sin = (table.to(keys.device, dtype, non_blocking=True) for table in tables)
        wide = keys.to(dtype)
        return self.apply_rotary(wide, wide[:, :0], cos, sin)[0].to(keys.dtype)


@dataclass(frozen=True)
class TextEviction:
    """Which text slots stay in a cache, and by how much what stays is moved.

    Attributes:
        drops: whether any text goes, and not only padding.
        length: number of slots afterwards.
        slots: (batch, length) the slot that each of them was; rows with fewer tokens are padded on the left.
        valid: (batch, length) False for that padding.
        shift: (batch, length) positions that went before each token.
        image_shift: (batch,) and before each row's images.
        moved: (batch, old length + 1) for each old slot, the new slot of the first text that stays at or after it.
        text_start: first new slot whose text keys fusion layers still need.
        old_text_start: the same before, in old slots.
    """

    drops: bool
    length: int
    slots: torch.Tensor
    valid: torch.Tensor
    shift: torch.Tensor
    image_shift: torch.Tensor
    moved: torch.Tensor
    text_start: int
    old_text_start: int

    def text(self, stored: KeysValues) -> KeysValues:
        """What stays of self-attention's keys/values."""
        return _gather(stored, self.slots)

    def window(self, stored: KeysValues) -> KeysValues:
        """What stays of fusion layers' own text keys/values, which begin at `old_text_start`."""
        # Rows whose windows begin later have no keys there; nor will they look.
        return _gather(stored, (self.slots[:, self.text_start :] - self.old_text_start).clamp(min=0))

    def state(self, state: WindowState) -> WindowState:
        """The state of the windows afterwards."""

        def moved(slots: torch.Tensor) -> torch.Tensor:
            return self.moved.gather(1, slots.clamp(0, self.moved.shape[1] - 1)[:, None])[:, 0]

        closed = state.closed_at.clamp(max=self.moved.shape[1] - 1)
        # A window that evicted text has closed stays closed, wherever the cache is cropped to.
        stays = self.moved.gather(1, (closed + 1).clamp(max=self.moved.shape[1] - 1)[:, None])[:, 0] > moved(closed)
        closed_at = torch.where(stays, moved(closed), moved(closed) - 1)
        return replace(
            state,
            length=self.length,
            valid=self.valid,
            padded=not bool(self.valid.all()),
            positions=torch.where(self.valid, state.positions.gather(1, self.slots) - self.shift, 0),
            next_position=state.next_position - (self.shift[:, -1] if self.length else 0),
            last_image=torch.where(state.last_image < 0, state.last_image, moved(state.last_image)),
            window_start=moved(state.window_start),
            closed_at=torch.where(state.closed_at == OPEN, OPEN, closed_at),
            text_start=self.text_start,
        )


def plan_eviction(
    state: WindowState, rules: WindowRules, keep: torch.Tensor, num_sink_tokens: torch.Tensor
) -> TextEviction | None:
    """Choose what stays.

    Args:
        state: the windows of the cache.
        rules: who sees whom.
        keep: (batch,) number of text tokens that each row keeps, sinks included.
        num_sink_tokens: (batch,) number of first tokens that stay.

    Returns:
        The plan; None if all would stay where it is. The delimiters between the images of a group stay or go together.
    """
    preallocated, state = state.slots is not None, state.growing()
    assert isinstance(state.length, int)
    valid, length = state.valid, state.length
    count = valid.sum(1)
    before = nn.functional.pad(valid.long().cumsum(1), (1, 0))  # texts before each slot

    def text_before(slots: torch.Tensor) -> torch.Tensor:
        return before.gather(1, slots.clamp(0, length)[:, None])[:, 0]

    first_image, last_image = text_before(state.window_start), text_before(state.last_image)
    has_image = state.image_tokens > 0
    # Text [first, cut) of each row goes, as indices into its text.
    first = count.minimum(num_sink_tokens)
    first = torch.where(has_image & (first_image < first) & (first <= last_image), last_image + 1, first)
    cut = (count - (keep - num_sink_tokens)).maximum(first)
    cut = torch.where(has_image & (first <= first_image) & (first_image < cut) & (cut <= last_image), first_image, cut)
    index = before[:, :-1]
    kept = valid & ((index < first[:, None]) | (index >= cut[:, None]))
    num_kept = kept.sum(1)
    new_length = int(num_kept.max())
    drops = bool((cut > first).any())
    if new_length == length and not drops:
        return None

    # Stable sorting by "kept" moves the kept slots to the end of each row, in their order.
    slots = kept.long().argsort(dim=1, stable=True)[:, length - new_length :]
    padding = (new_length - num_kept)[:, None]
    moved = padding + nn.functional.pad(kept.long().cumsum(1), (1, 0))
    shift, image_shift = _shifts(state, first, cut, first_image, last_image)
    needed = torch.where(has_image | rules.text_windows, state.window_start, length)
    needed = moved.gather(1, needed.clamp(max=length)[:, None])
    return TextEviction(
        drops=drops,
        length=new_length,
        slots=slots,
        valid=kept.gather(1, slots),
        shift=torch.where(index >= cut[:, None], shift[:, None], 0).gather(1, slots),
        image_shift=image_shift,
        moved=moved,
        text_start=0 if preallocated or rules.keys == "context" else int(needed.min()),
        old_text_start=state.text_start,
    )


def _shifts(
    state: WindowState,
    first: torch.Tensor,
    cut: torch.Tensor,
    first_image: torch.Tensor,
    last_image: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch,) positions that text [first, cut) and images gone before `cut` leave free: before the text from `cut`
    on, and before the current images."""
    # Slots of each row's text, in order, then padding.
    order = (~state.valid).long().argsort(dim=1, stable=True)
    by_text = state.positions.gather(1, order)

    def position(text: torch.Tensor) -> torch.Tensor:
        return by_text.gather(1, text.clamp(0, by_text.shape[1] - 1)[:, None])[:, 0]

    def after(text: torch.Tensor) -> torch.Tensor:
        """The position after that of the text before."""
        return torch.where(text > 0, position(text - 1) + 1, 0)

    start = after(first)
    # What the current images, and delimiters between them, take up between the evicted text and what follows: nothing
    # under contiguous positions, but for a group whose delimiters go.
    stands_here = (state.image_tokens > 0) & (first <= first_image) & (first_image <= cut)
    gap = torch.where(stands_here, position(last_image.minimum(cut)) - after(first_image), 0)
    shift = torch.where(cut > first, position(cut) - start - gap, 0)
    image_shift = torch.where(first_image < first, 0, torch.where(stands_here, after(first_image) - start, shift))
    return shift, torch.where(cut > first, image_shift, 0)


@torch.no_grad()
def evict_text(
    cache: Cache,
    rules: WindowRules,
    rotation: Callable[[], KeyRotation],
    keep: int | torch.Tensor,
    num_sink_tokens: int | torch.Tensor = 4,
) -> torch.Tensor | None:
    """Drop the text between the first tokens and the most recent ones from every layer of a cache, in place.

    Self-attention and fusion layers forget it alike, also where it belongs to a window that is still open; images stay
    as long as they are seen. Padding between the tokens of a row goes too. Positions are counted without what went.

    Args:
        cache: a cache that a CASA model has filled, growing or static.
        rules: who sees whom.
        rotation: gives that of the model's keys, or refuses; asked if text is to go, and not only padding.
        keep: number of text tokens that stay in each row, sinks included; one number, or (batch,). A row that holds
            fewer keeps all.
        num_sink_tokens: number of first tokens that stay; one number, or (batch,).

    Returns:
        (batch, length) the old slot of each slot that is there now, -1 for padding (on the left of rows with fewer
        tokens); None if nothing changed.

    Raises:
        NotImplementedError: for quantised cache layers.
        TypeError: if the cache isn't one that a CASA model has filled.
        ValueError: if no recent token would stay.
    """
    if not cache.layers or not isinstance(cache.layers[0], CasaLayerMixin) or cache.layers[0].window_state is None:
        raise TypeError(
            f"Text is evicted from a cache that a CASA model has filled; this {type(cache).__name__} is none. Pass "
            "the cache of a forward or generate call."
        )
    state: WindowState = cache.layers[0].window_state
    keep, sinks = (
        _per_row(name, value, state) for name, value in (("keep", keep), ("num_sink_tokens", num_sink_tokens))
    )
    for tokens, num_sinks in torch.stack([keep, sinks], dim=1).tolist():
        check_text_window(tokens, num_sinks)
    for layer in cache.layers:
        layer.require_evictable()
    plan = plan_eviction(state, rules, keep, sinks)
    if plan is None:
        return None
    moves = rotation() if plan.drops else None

    def tables(shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        return moves.tables(shift) if moves is not None and bool(shift.any()) else None

    def rotated(stored: KeysValues, tables: tuple[torch.Tensor, torch.Tensor] | None) -> KeysValues:
        return stored._replace(keys=moves.rotate(stored.keys, tables)) if moves is not None and tables else stored

    text, images = tables(plan.shift), tables(plan.image_shift[:, None])
    window = None if text is None else (text[0][:, plan.text_start :], text[1][:, plan.text_start :])
    for layer in cache.layers:
        new = dict(layer.fusion)
        for name, stored in layer.fusion.items():
            if name == "window":
                new[name] = rotated(plan.window(stored), window)
            elif rules.with_text or name == "update":  # else without positions
                new[name] = rotated(stored, images)
        kept = None
        if layer.keys is not None:
            kept = rotated(plan.text(KeysValues(layer.keys, layer.values)), text)
        layer.replace_text(kept, new, plan.length)
    cache.layers[0].store_state(plan.state(state.growing()))
    return plan.slots.masked_fill(~plan.valid, -1)


def check_text_window(tokens: int, num_sink_tokens: int) -> None:
    """Refuse a window without room for recent text.

    Raises:
        ValueError: if `tokens` isn't larger than `num_sink_tokens`, or that is negative.
    """
    if num_sink_tokens < 0 or tokens <= num_sink_tokens:
        raise ValueError(
            f"A window of {tokens} text tokens with {num_sink_tokens} sink tokens has no room for recent text. Keep "
            "more tokens than there are sinks, and at least 0 sinks."
        )


def check_history(rules: WindowRules) -> None:
    """Refuse models that keep every image.

    Raises:
        ValueError: for the history "all".
    """
    if "all" in (rules.image_history, rules.video_history):
        raise ValueError(
            'Text can\'t be evicted where casa_image_history or casa_video_history is "all": every image is kept for '
            'ever, so memory grows without bound all the same. Use "latest" or "group".'
        )


def _per_row(name: str, value: int | torch.Tensor, state: WindowState) -> torch.Tensor:
    numbers = torch.as_tensor(value, device=state.valid.device)
    if numbers.ndim > 1 or (numbers.ndim and len(numbers) != state.batch_size):
        raise ValueError(
            f"{name} has shape {tuple(numbers.shape)}; expected a number, or one for each of {state.batch_size} rows."
        )
    return numbers.expand(state.batch_size)


def _gather(stored: KeysValues, slots: torch.Tensor) -> KeysValues:
    """The keys/values in the given slots (batch, length) of each row."""
    index = slots.to(stored.keys.device)[:, None, :, None]
    return KeysValues(*(t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[3])) for t in stored))
