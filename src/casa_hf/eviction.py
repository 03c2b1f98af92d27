# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A budget of text for a cache: what is older, except the first tokens, is evicted.

The first tokens stay because attention leans on them (attention sinks, arXiv 2309.17453). What stays is re-based:
positions continue from the sinks, as if the evicted text had never been there. Keys are stored rotated, so they are
rotated back by the positions that went before them, and so are the keys of images. Among recent text, images and what
is still to come the relative geometry stays what it was; only the sinks come closer. Positions then are bounded,
however long the stream, by the budget and, with insertion positions, by what the images of the retained text advance:
float32 rotary angles lose 8e-2 at position 2,000,000.

Rows of a batch have budgets of their own. Padding between their tokens is closed up on the same way.

Three words for where a token stands: its *text index* counts the text of its row, its *cache position* (see
`window_state`) padding too, and its *position* is what its key is rotated by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache_casa import home_layer
from .cache_layers import KeysValues
from .positions import Rotary
from .transfers import moved
from .window_state import OPEN, WindowState
from .windows import WindowRules

# Rope types whose frequencies depend on the length of the text: a stored key can't be moved from one to another.
_CHANGING_ROPE_TYPES = ("dynamic", "longrope")


class KeyRotation:
    """Rotates keys that are stored rotated to other positions.

    Args:
        rotary: rotary embedding of the backbone.
        rotations: functions, one for each block, that rotate its keys `(keys, (cos, sin)) -> keys`; one that leaves
            keys as they are, for a block without positions; None for a block without keys.

    Raises:
        ValueError: if the frequencies depend on the length of the text.
    """

    def __init__(self, rotary: nn.Module, rotations: Sequence[Callable[[torch.Tensor, Rotary], torch.Tensor] | None]):
        rope_type = getattr(rotary, "rope_type", "default")
        if rope_type in _CHANGING_ROPE_TYPES:
            raise ValueError(
                f"Text can't be evicted with rope_type={rope_type!r}: its frequencies change with the length of the "
                "text, so stored keys can't be moved to other positions. Use a rope type with fixed frequencies "
                '("default", "linear", "yarn", "llama3"), or keep all text.'
            )
        self.inv_freq: Any = rotary.inv_freq
        self.rotations = rotations

    def tables(self, shift: torch.Tensor) -> Rotary:
        """cos and sin, float64 on the CPU, that rotate keys back by `shift` (batch, length) positions.

        The angles are exact products: to what a key's own float32 angle has lost, nothing is added here. They carry no
        attention scaling, which stored keys have already. All axes of M-RoPE move by the same amount.
        """
        angles = -shift.cpu().double()[..., None] * self.inv_freq.cpu().double()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def rotate(self, layer_idx: int, keys: torch.Tensor, tables: Rotary) -> torch.Tensor:
        """Keys (batch, heads, length, head_dim) of a block, rotated in at least float32 by tables of `length` or 1."""
        dtype = torch.promote_types(keys.dtype, torch.float32)
        cos, sin = (table.to(keys.device, dtype, non_blocking=True) for table in tables)
        rotate = self.rotations[layer_idx]
        assert rotate is not None
        return rotate(keys.to(dtype), (cos, sin)).to(keys.dtype)


@dataclass(frozen=True)
class TextEviction:
    """Which text stays in a cache, and by how much what stays is moved.

    Attributes:
        drops: whether any text goes, and not only padding.
        length: number of cache positions afterwards.
        kept: (batch, length) old cache position of each; rows with fewer tokens are padded on the left.
        valid: (batch, length) False for that padding.
        shift: (batch, length) positions by which each token moves back.
        image_shift: (batch,) positions by which each row's images move back.
        moved: (batch, old length + 1) new cache position, for each old one, of the first text that stays at or
            after it.
        text_start: first new cache position whose text keys fusion layers still need.
        old_text_start: the same before, as an old cache position.
    """

    drops: bool
    length: int
    kept: torch.Tensor
    valid: torch.Tensor
    shift: torch.Tensor
    image_shift: torch.Tensor
    moved: torch.Tensor
    text_start: int
    old_text_start: int

    def text(self, stored: KeysValues) -> KeysValues:
        """What stays of self-attention's keys/values."""
        return _gather(stored, self.kept)

    def window(self, stored: KeysValues) -> KeysValues:
        """What stays of fusion layers' own text keys/values, which begin at `old_text_start`."""
        # Rows whose windows begin later have no keys there; nor will they look.
        return _gather(stored, (self.kept[:, self.text_start :] - self.old_text_start).clamp(min=0))

    def state(self, state: WindowState) -> WindowState:
        """The state of the windows afterwards."""
        return replace(
            state,
            length=self.length,
            valid=self.valid,
            padded=not bool(self.valid.all()),
            positions=torch.where(self.valid, state.positions.gather(1, self.kept) - self.shift, 0),
            next_position=state.next_position - (self.shift[:, -1] if self.length else 0),
            last_image=torch.where(state.last_image < 0, state.last_image, _at(self.moved, state.last_image)),
            window_start=_at(self.moved, state.window_start),
            closed_at=torch.where(state.closed_at == OPEN, OPEN, self._closed_at(state)),
            text_start=self.text_start,
        )

    def _closed_at(self, state: WindowState) -> torch.Tensor:
        """(batch,) new cache position of the text that has closed each window, or would have if it had stayed."""
        last = self.moved.shape[1] - 1
        closed_at = state.closed_at.clamp(max=last)
        moved = _at(self.moved, closed_at)
        stays = _at(self.moved, closed_at + 1) > moved
        # A window that evicted text has closed stays closed, wherever the cache is cropped to.
        return torch.where(stays, moved, moved - 1)


def plan_eviction(
    state: WindowState, rules: WindowRules, keep: torch.Tensor, num_sink_tokens: torch.Tensor
) -> TextEviction | None:
    """Choose what stays.

    Args:
        state: windows of the cache.
        rules: rules of who sees which image.
        keep: (batch,) number of text tokens that each row keeps, sinks included.
        num_sink_tokens: (batch,) number of first tokens that stay.

    Returns:
        The plan; None if all would stay where it is. The delimiters between the images of a group stay or go together.
    """
    is_static, state = state.capacity is not None, state.growing()
    old_length = state.valid.shape[1]
    evicted = _evicted_text(state, keep, num_sink_tokens)
    index = evicted.text_index[:, :-1]  # (batch, old_length)
    begin, end = evicted.begin[:, None], evicted.end[:, None]
    stays = state.valid & ((index < begin) | (index >= end))
    num_kept = stays.sum(1)
    length, drops = int(num_kept.max()), bool((end > begin).any())
    if length == old_length and not drops:
        return None

    # Stable sorting by "stays" moves what stays to the end of each row, in its order.
    kept = stays.long().argsort(dim=1, stable=True)[:, old_length - length :]
    moved = (length - num_kept)[:, None] + _count_before(stays)
    shift, image_shift = _shifts(state, evicted)
    text_start = 0
    if not is_static and rules.keys != "context":
        has_window = (state.image_tokens > 0) | rules.text_windows
        text_start = int(_at(moved, torch.where(has_window, state.window_start, old_length)).min())
    return TextEviction(
        drops=drops,
        length=length,
        kept=kept,
        valid=stays.gather(1, kept),
        shift=torch.where(index >= end, shift[:, None], 0).gather(1, kept),
        image_shift=image_shift,
        moved=moved,
        text_start=text_start,
        old_text_start=state.text_start,
    )


@dataclass(frozen=True)
class _EvictedText:
    """The text that goes from each row, as text indices, (batch,) unless said.

    Attributes:
        text_index: (batch, length + 1) number of text tokens before each cache position, and in all.
        begin, end: range of what is evicted, end excluded.
        first_image, last_image: the tokens that the first and the last of the current images precede.
        has_image: whether there are any.
    """

    text_index: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    first_image: torch.Tensor
    last_image: torch.Tensor
    has_image: torch.Tensor


def _evicted_text(state: WindowState, keep: torch.Tensor, num_sink_tokens: torch.Tensor) -> _EvictedText:
    """What lies between the sinks and the recent text, neither of which ends between the images of a group."""
    text_index = _count_before(state.valid)
    count = text_index[:, -1]
    first_image, last_image = _at(text_index, state.window_start), _at(text_index, state.last_image)
    has_image = state.image_tokens > 0
    begin = count.minimum(num_sink_tokens)
    splits_group = has_image & (first_image < begin) & (begin <= last_image)
    begin = torch.where(splits_group, last_image + 1, begin)
    end = (count - (keep - num_sink_tokens)).maximum(begin)
    splits_group = has_image & (begin <= first_image) & (first_image < end) & (end <= last_image)
    end = torch.where(splits_group, first_image, end)
    return _EvictedText(text_index, begin, end, first_image, last_image, has_image)


def _shifts(state: WindowState, evicted: _EvictedText) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch,) positions that the evicted text, and images gone with it, leave free: for the text after it, and for
    the current images."""
    begin, end, first_image = evicted.begin, evicted.end, evicted.first_image
    # Positions by text index; padding comes last.
    of_text = state.positions.gather(1, (~state.valid).long().argsort(dim=1, stable=True))

    def after_previous(index: torch.Tensor) -> torch.Tensor:
        """The position after that of the text before this one."""
        return torch.where(index > 0, _at(of_text, index - 1) + 1, 0)

    start = after_previous(begin)
    # What the current images, and delimiters between them, take up between the evicted text and what follows: nothing
    # under contiguous positions, but for a group whose delimiters go.
    images_between = evicted.has_image & (begin <= first_image) & (first_image <= end)
    taken = _at(of_text, evicted.last_image.minimum(end)) - after_previous(first_image)
    shift = _at(of_text, end) - start - torch.where(images_between, taken, 0)
    image_shift = torch.where(images_between, after_previous(first_image) - start, shift)
    image_shift = torch.where(first_image < begin, 0, image_shift)  # before all that goes
    goes = end > begin
    return torch.where(goes, shift, 0), torch.where(goes, image_shift, 0)


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
        cache: cache that a CASA model has filled, growing or static.
        rules: rules of who sees which image.
        rotation: function that gives the rotation of the model's keys, or refuses; called if text is to go, and not
            only padding.
        keep: number of text tokens that stay in each row, sinks included; one number, or (batch,). A row that holds
            fewer keeps all.
        num_sink_tokens: number of first tokens that stay; one number, or (batch,).

    Returns:
        (batch, length) the old cache position of each that is there now, -1 for padding (on the left of rows with
        fewer tokens); None if nothing changed.

    Raises:
        NotImplementedError: for quantized cache layers.
        TypeError: if the cache isn't one that a CASA model has filled.
        ValueError: if no recent token would stay.
    """
    state = _state_of(cache)
    budget, sinks = _per_row("keep", keep, state), _per_row("num_sink_tokens", num_sink_tokens, state)
    for row in torch.stack([budget, sinks], dim=1).tolist():
        check_text_budget(*row)
    for layer in cache.layers:
        layer.require_replaceable("evict_text")
    plan = plan_eviction(state, rules, budget, sinks)
    if plan is None:
        return None
    moves = _Moves(plan, rotation() if plan.drops else None, image_positions=rules.with_text)
    for index, layer in enumerate(cache.layers):
        text = None if layer.keys is None else moves.text(index, KeysValues(layer.keys, layer.values))
        fusion = {name: moves.fusion(index, name, stored) for name, stored in layer.fusion.items()}
        layer.replace_text(text, fusion, plan.length)
    home_layer(cache).store_state(plan.state(state.growing()))
    held = next(tensor for layer in cache.layers for tensor in _held(layer))
    return moved(plan.kept.masked_fill(~plan.valid, -1), held.device)


def _held(layer: Any) -> Iterator[torch.Tensor]:
    """The keys that a cache layer holds."""
    if layer.keys is not None:
        yield layer.keys
    yield from (stored.keys for stored in layer.fusion.values())


class _Moves:
    """What stays of stored keys/values, at its new positions.

    Args:
        plan: plan of what stays, and by how much it moves.
        rotation: rotation of the model's keys; None if no text goes, so that nothing moves.
        image_positions: whether the image keys of fusion layers have positions.
    """

    def __init__(self, plan: TextEviction, rotation: KeyRotation | None, image_positions: bool):
        self.plan = plan
        self.rotation = rotation
        self.image_positions = image_positions
        self.tables = self._tables(plan.shift), self._tables(plan.image_shift[:, None])
        self._there: dict[torch.device, tuple[TextEviction, tuple[Rotary | None, Rotary | None]]] = {}

    def text(self, layer_idx: int, stored: KeysValues) -> KeysValues:
        """Of self-attention's text."""
        plan, (of_text, _) = self._on(stored.keys.device)
        return self._rotated(layer_idx, plan.text(stored), of_text)

    def fusion(self, layer_idx: int, name: str, stored: KeysValues) -> KeysValues:
        """Of what a fusion layer has stored under this name."""
        plan, (of_text, of_images) = self._on(stored.keys.device)
        if name == "window":
            start = plan.text_start
            of_window = None if of_text is None else (of_text[0][:, start:], of_text[1][:, start:])
            return self._rotated(layer_idx, plan.window(stored), of_window)
        # Self-attention's keys for updates of image states always have positions.
        if self.image_positions or name == "update":
            return self._rotated(layer_idx, stored, of_images)
        return stored

    def _on(self, device: torch.device) -> tuple[TextEviction, tuple[Rotary | None, Rotary | None]]:
        """Plan and tables on a device, where they are brought once."""
        if device not in self._there:
            self._there[device] = moved((self.plan, self.tables), device)
        return self._there[device]

    def _tables(self, shift: torch.Tensor) -> Rotary | None:
        return None if self.rotation is None or not bool(shift.any()) else self.rotation.tables(shift)

    def _rotated(self, layer_idx: int, stored: KeysValues, tables: Rotary | None) -> KeysValues:
        if self.rotation is None or tables is None:
            return stored
        return stored._replace(keys=self.rotation.rotate(layer_idx, stored.keys, tables))


def check_text_budget(keep: int, num_sink_tokens: int) -> None:
    """Refuse a budget of text without room for recent text.

    Args:
        keep: number of text tokens that stay, sinks included.
        num_sink_tokens: number of first tokens that always stay.

    Raises:
        ValueError: if `keep` isn't larger than `num_sink_tokens`, or that is negative.
    """
    if num_sink_tokens < 0:
        raise ValueError(f"num_sink_tokens={num_sink_tokens} must be 0 or more.")
    if keep <= num_sink_tokens:
        raise ValueError(
            f"keep={keep} must be larger than num_sink_tokens={num_sink_tokens}, so that some recent text stays."
        )


def check_history(rules: WindowRules) -> None:
    """Refuse models that keep every image.

    Raises:
        ValueError: for the history "all".
    """
    if rules.keeps_all_images:
        raise ValueError(
            'Text can\'t be evicted where casa_image_history or casa_video_history is "all": every image is '
            'kept, so that memory grows without bound. Use "latest" or "group".'
        )


def _state_of(cache: Cache) -> WindowState:
    """The state of a cache that a CASA model has filled."""
    home = home_layer(cache)
    if home is None or home.window_state is None:
        raise TypeError(
            "Text can only be evicted from a cache that a CASA model has filled, but this "
            f"{type(cache).__name__} isn't one. Pass the cache that forward or generate has returned."
        )
    return home.window_state


def _per_row(name: str, value: int | torch.Tensor, state: WindowState) -> torch.Tensor:
    """(batch,) the number of each row."""
    numbers = torch.as_tensor(value, device=state.valid.device)
    if numbers.ndim > 1 or (numbers.ndim and len(numbers) != state.batch_size):
        raise ValueError(
            f"{name} has shape {tuple(numbers.shape)}; expected a number, or one for each of {state.batch_size} rows."
        )
    return numbers.expand(state.batch_size)


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(batch,) one of the values (batch, length) of each row; an index outside takes the nearest."""
    return values.gather(1, index.clamp(0, values.shape[1] - 1)[:, None])[:, 0]


def _count_before(chosen: torch.Tensor) -> torch.Tensor:
    """(batch, length + 1) how many of (batch, length) are chosen before each, and in all."""
    return nn.functional.pad(chosen.long().cumsum(1), (1, 0))


def _gather(stored: KeysValues, kept: torch.Tensor) -> KeysValues:
    """The keys/values at the given cache positions (batch, length) of each row."""
    index = kept.to(stored.keys.device)[:, None, :, None]
    return KeysValues(*(t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[3])) for t in stored))
