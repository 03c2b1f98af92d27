# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Which image tokens and which text a token may attend to in a fusion layer.

Every rule of the design space comes down to two ranges per text token: a range of columns of its row's image tokens,
and a range of text slots that starts where its window starts and ends at the token itself. Images that stay visible
for ever (the history "all") are *pinned* columns beside the first range. `plan_windows` computes all this once per
forward, for all layers, from where the images stand (`ImagePlacement`) and from what earlier calls left behind
(`WindowState`). A *slot* is the index of a text token in its row counted over all calls, padding included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

# Slot of the first text after an image while there is none: the image's window is still open.
OPEN = torch.iinfo(torch.long).max

# Fields of `WindowState` with an entry for every text slot.
_PER_SLOT = ("valid", "positions")


@dataclass(frozen=True)
class WindowRules:
    """The part of a configuration that decides who sees whom.

    Attributes:
        keys: "image", "window" or "context".
        image_history, video_history: "latest", "group" or "all".
        text_windows: whether text before the first image forms a window of its own.
    """

    keys: str
    image_history: str
    video_history: str
    text_windows: bool

    @property
    def with_text(self) -> bool:
        """Whether fusion layers have text keys."""
        return self.keys != "image"

    def history_is(self, history: str, is_frame: torch.Tensor) -> torch.Tensor:
        """Whether images of these kinds have the given history."""
        return torch.where(is_frame, self.video_history == history, self.image_history == history)


@dataclass(frozen=True)
class ImagePlacement:
    """Images of one call, in reading order over the batch.

    Attributes:
        rows: (num_images,) row of each image.
        indices: (num_images,) index, in the row's new tokens, of the token that the image precedes.
        grids: (num_images, 2) height and width in merged-grid units.
        is_frame: (num_images,) whether the image is a video frame.
        total_tokens: number of image tokens.
        max_row_tokens: the largest number of image tokens that one row receives.
    """

    rows: torch.Tensor
    indices: torch.Tensor
    grids: torch.Tensor
    is_frame: torch.Tensor
    total_tokens: int
    max_row_tokens: int

    def to(self, device: torch.device) -> ImagePlacement:
        """The placement with its tensors on `device`."""
        return replace(
            self,
            rows=self.rows.to(device, non_blocking=True),
            indices=self.indices.to(device, non_blocking=True),
            grids=self.grids.to(device, non_blocking=True),
            is_frame=self.is_frame.to(device, non_blocking=True),
        )

    @property
    def num_tokens(self) -> torch.Tensor:
        """(num_images,) tokens per image."""
        return self.grids.prod(-1)

    def token_images(self) -> torch.Tensor:
        """(num_image_tokens,) the image that each image token belongs to."""
        return torch.repeat_interleave(self.num_tokens, output_size=self.total_tokens)

    def token_offsets(self) -> torch.Tensor:
        """(num_image_tokens,) index of each image token within its image."""
        images = self.token_images()
        first = self.num_tokens.cumsum(0) - self.num_tokens
        return torch.arange(len(images), device=images.device) - first[images]

    def token_grid(self) -> torch.Tensor:
        """(2, num_image_tokens) row and column of each image token in its image."""
        offsets, width = self.token_offsets(), self.grids[self.token_images(), 1]
        return torch.stack([offsets // width, offsets % width])


@dataclass(frozen=True)
class WindowState:
    """What a stream remembers about its windows between calls; one entry per row unless said.

    Attributes:
        length: text slots so far, the same for all rows; a tensor without dimensions if `slots` is given.
        valid: (batch, length or slots) whether a slot holds text rather than padding.
        padded: whether any call came with a padding mask.
        positions: (batch, length or slots) position of the text in each slot, the largest of its axes; 0 for padding.
        next_position: (batch,) position of the next text token.
        image_columns: number of columns of the stored image keys/values; rows are right-aligned in them.
        image_tokens: (batch,) image tokens of the current window, 0 before the first image.
        pinned: (batch, image_columns) columns that stay visible for ever; None while no history is "all".
        last_image: (batch,) slot of the token that the last image precedes.
        window_start: (batch,) first slot of the current window.
        closed_at: (batch,) slot of the first text after the last image, `OPEN` while there is none.
        is_frame: (batch,) whether the last image is a video frame.
        text_start: first slot whose text keys fusion layers still need; always 0 if `slots` is given.
        slots: number of slots of a static cache; None where slots are added as they are needed.
        reserved_columns: image columns that a static cache keeps at least, so that images of any size up to that
            share one shape.
        only_row: whether the state has always been that of one row, so that all it has stored is that row's own.
    """

    length: int | torch.Tensor
    valid: torch.Tensor
    padded: bool
    positions: torch.Tensor
    next_position: torch.Tensor
    image_columns: int
    image_tokens: torch.Tensor
    pinned: torch.Tensor | None
    last_image: torch.Tensor
    window_start: torch.Tensor
    closed_at: torch.Tensor
    is_frame: torch.Tensor
    text_start: int
    slots: int | None = None
    reserved_columns: int = 0
    only_row: bool = False

    @classmethod
    def empty(cls, batch_size: int, device: torch.device, length: int = 0) -> WindowState:
        """The state before the first image, after `length` slots of text in every row."""
        zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
        return cls(
            length=length,
            valid=torch.ones(batch_size, length, dtype=torch.bool, device=device),
            padded=False,
            positions=torch.arange(length, device=device).expand(batch_size, -1),
            next_position=zeros + length,
            image_columns=0,
            image_tokens=zeros,
            pinned=None,
            last_image=zeros - 1,
            window_start=zeros + length,
            closed_at=zeros + OPEN,
            is_frame=zeros.bool(),
            text_start=length,
            only_row=batch_size == 1,
        )

    @property
    def batch_size(self) -> int:
        return self.valid.shape[0]

    def check(self) -> None:
        """Refuse a growing state whose fields don't fit together, as one that was read from a file may be.

        Raises:
            ValueError: with the name of the field.
        """
        like = WindowState.empty(self.batch_size, self.valid.device, self.valid.shape[1])
        expected: dict[str, Any] = {field.name: getattr(like, field.name) for field in fields(like)}
        if self.pinned is not None:
            expected["pinned"] = like.is_frame[:, None].expand(-1, self.image_columns)
        for name, other in expected.items():
            own = getattr(self, name)
            fits = type(own) is type(other)
            if fits and isinstance(own, torch.Tensor):
                fits = own.dtype == other.dtype and own.shape == other.shape
            elif fits and isinstance(own, int):
                fits = own == other if name == "length" else own >= 0
            if not fits:
                raise ValueError(
                    f"The state is damaged: {name} of its windows doesn't fit the rest; give all of it, as it was "
                    "saved."
                )
        length = self.valid.shape[1]
        bounds = {
            "positions": (0, None),
            "next_position": (0, None),
            "image_tokens": (0, self.image_columns),
            "last_image": (-1, length - 1),
            "window_start": (0, length),
        }
        for name, (least, most) in bounds.items():
            numbers = getattr(self, name)
            if bool((numbers < least).any()) or (most is not None and bool((numbers > most).any())):
                raise ValueError(
                    f"The state is damaged: {name} of its windows is {numbers.tolist()!r:.100}, where numbers from "
                    f"{least} to {'anything' if most is None else most} are expected; give all of it, as it was saved."
                )

    def select(self, rows: torch.Tensor) -> WindowState:
        """The state with the given rows, in their order."""
        rows = rows.to(self.valid.device)
        return self._map_rows(lambda value: value[rows])

    def repeat_interleave(self, repeats: int) -> WindowState:
        """The state with each row repeated."""
        return self._map_rows(lambda value: value.repeat_interleave(repeats, dim=0))

    def append_empty_rows(self, number: int) -> WindowState:
        """The state, a growing one, with further rows of which every slot so far is padding."""
        assert isinstance(self.length, int)
        new = WindowState.empty(number, self.valid.device, length=self.length)
        own = new._tensors() | {"valid": torch.zeros_like(new.valid), "positions": torch.zeros_like(new.positions)}
        own["next_position"] = torch.zeros_like(new.next_position)
        if self.pinned is not None:
            own["pinned"] = self.pinned.new_zeros(number, self.image_columns)
        rows: dict[str, Any] = {name: torch.cat([value, own[name]]) for name, value in self._tensors().items()}
        return replace(self, padded=self.padded or self.length > 0, only_row=False, **rows)

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> WindowState:
        rows: dict[str, Any] = {name: change(value) for name, value in self._tensors().items() if value.ndim}
        changed = replace(replace(self, only_row=False), **rows)
        return changed if self.slots is None else self.assign(changed)

    def to(self, device: torch.device) -> WindowState:
        """The state with its tensors on `device`."""
        if self.valid.device == device:
            return self
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def crop(self, num_tokens: int) -> WindowState:
        """The state without the last `num_tokens` slots.

        Raises:
            ValueError: if an image whose keys/values are stored would have to be taken back.
        """
        length = int(self.length) - num_tokens
        last_image = int(self.last_image.max()) if self.image_columns else -1
        if self.image_columns and last_image >= length:
            raise ValueError(
                f"Can't crop {num_tokens} of {self.length} tokens: the current image stands before token "
                f"{last_image}, so at most {self.length - last_image - 1} can be taken back. "
                "Earlier windows are no longer stored; start again from a copy of the cache taken before the image."
            )
        if length < 0:
            raise ValueError(f"Can't crop {num_tokens} of {self.length} tokens.")
        return replace(
            self,
            length=length,
            valid=self.valid[:, :length],
            positions=self.positions[:, :length],
            next_position=self.next_position - self.valid[:, length:].sum(-1),
            closed_at=torch.where(self.closed_at < length, self.closed_at, OPEN),
            text_start=min(self.text_start, length),
        )

    def fixed(self, slots: int) -> WindowState:
        """The state in the form that a static cache of `slots` slots keeps: tensors of its own, whose shapes and
        addresses stay, so that a compiled decoding step can change them in place."""
        own: dict[str, Any] = {name: value.clone() for name, value in self._tensors().items()}
        own["length"] = torch.tensor(int(self.length), device=self.valid.device)
        for name in _PER_SLOT:
            own[name] = torch.nn.functional.pad(own[name], (0, slots - own[name].shape[1]))
        for tensor in own.values():
            torch._dynamo.mark_static_address(tensor)
        return replace(replace(self, text_start=0, slots=slots), **own)

    def valid_with(self, token_valid: torch.Tensor) -> torch.Tensor:
        """(batch, slots) validity of all slots once those of new tokens are filled."""
        return self._with_new(self.valid, token_valid)

    def positions_with(self, positions: torch.Tensor) -> torch.Tensor:
        """(batch, slots) positions of all slots once those of new tokens are filled."""
        return self._with_new(self.positions, positions)

    def _with_new(self, per_slot: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self.slots is None:
            return torch.cat([per_slot, new], dim=1)
        places = torch.arange(new.shape[1], device=new.device) + self.length
        return per_slot.index_copy(1, places, new)

    def growing(self) -> WindowState:
        """The state in the form that calls with images work on; a fixed one is read off its device."""
        if self.slots is None:
            return self
        length = int(self.length)
        per_slot: dict[str, Any] = {name: getattr(self, name)[:, :length] for name in _PER_SLOT}
        return replace(self, length=length, slots=None, **per_slot)

    def assign(self, new: WindowState) -> WindowState:
        """Write what `new` says into the tensors of this fixed state, and return it with the numbers of `new`."""
        mine = self._tensors()
        if new.pinned is None:
            mine["pinned"] = None
        for name, value in new._tensors().items():
            if name in _PER_SLOT and new.slots is None:
                mine[name][:, : value.shape[1]].copy_(value)
                mine[name][:, value.shape[1] :].zero_()
            elif name in mine and mine[name].shape == value.shape:
                mine[name].copy_(value)
            else:
                mine[name] = value.clone()
                torch._dynamo.mark_static_address(mine[name])
        if new.slots is None:
            mine["length"].fill_(new.length)
        return replace(self, **mine, image_columns=new.image_columns, padded=new.padded)

    def _tensors(self) -> dict[str, Any]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}


@dataclass(frozen=True)
class WindowPlan:
    """The windows of one call, shared by all layers.

    Image columns are the stored ones, followed by those of the call's new images (left-aligned per row).

    Attributes:
        state: what was remembered before the call.
        next_state: what to remember after it.
        rules: who sees whom.
        image_start, image_end: (batch, tokens) image columns of a token's window, end excluded.
        pinned: (batch, image columns) columns that every later token of their sample sees; None without any.
        pinned_start: (batch, tokens) first column of a token's sample; None without packing.
        text_start: (batch, tokens) first slot of a token's text keys.
        text_end: (batch, tokens) slot after the last of them; at most the token's own plus one.
        sees: (batch, tokens) whether a token attends to anything; False for padding.
        new_columns: number of columns for new images.
        token_rows, token_columns: (num_image_tokens,) where each new image token goes; None without new images.
        kept_columns: (batch, num_kept) columns that stay stored, as the last ones; None if nothing changes.
        update: what new image tokens attend to when their own states are updated; None without new images.
    """

    state: WindowState
    next_state: WindowState
    rules: WindowRules
    image_start: torch.Tensor
    image_end: torch.Tensor
    text_start: torch.Tensor
    text_end: torch.Tensor
    sees: torch.Tensor
    pinned: torch.Tensor | None = None
    pinned_start: torch.Tensor | None = None
    new_columns: int = 0
    token_rows: torch.Tensor | None = None
    token_columns: torch.Tensor | None = None
    kept_columns: torch.Tensor | None = None
    update: ImageUpdatePlan | None = None

    @property
    def num_columns(self) -> int:
        """Number of image columns of the call."""
        return self.state.image_columns + self.new_columns

    @property
    def text_slots(self) -> tuple[int, int]:
        """First and past-the-last of the text slots whose keys this call works on."""
        if self.state.slots is not None:
            return 0, self.state.slots
        assert isinstance(self.next_state.length, int)
        return self.state.text_start, self.next_state.length

    @property
    def active(self) -> bool:
        """Whether fusion layers have anything to do: an image to see, or a window of text alone."""
        return self.num_columns > 0 or self.rules.text_windows

    @property
    def num_dropped_slots(self) -> int:
        """Leading slots of stored window text that no later token needs."""
        return self.next_state.text_start - self.state.text_start

    def to(self, device: torch.device | str | int, **kwargs: Any) -> WindowPlan:
        """The plan on another device; called by Accelerate when decoder blocks live on several devices."""
        device = torch.device(device)
        if self.sees.device == device:
            return self
        moved: dict[str, Any] = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor | WindowState | ImageUpdatePlan)
        }
        return replace(self, **moved)

    @cached_property
    def on_host(self) -> WindowPlan:
        """The plan with the tensors that blocks are made from on the CPU; a device is waited for once."""
        if self.sees.device.type == "cpu":
            return self
        stays = ("kept_columns", "token_rows", "token_columns")
        own = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor) and name not in stays}
        update = {name: x for name, x in vars(self.update).items() if x is not None} if self.update else {}
        tensors = [*own.values(), *update.values(), self.next_state.valid]
        values = torch.cat([x.flatten().long() for x in tensors]).cpu().split([x.numel() for x in tensors])
        copies = iter([value.view(x.shape).to(x.dtype) for x, value in zip(tensors, values, strict=True)])
        copied: dict[str, Any] = {name: next(copies) for name in own}
        if self.update is not None:
            of_images: dict[str, Any] = {name: next(copies) for name in update}
            copied["update"] = replace(self.update, **of_images)
        return replace(self, **copied, next_state=replace(self.next_state, valid=next(copies)))

    def mask(self) -> torch.Tensor:
        """Boolean mask of fusion layers (batch, 1, tokens, image columns [+ `text_slots`]).

        Tokens that see nothing get all-True rows, so that no back end meets an empty softmax; their output is
        discarded through `sees`.
        """
        columns = torch.arange(self.num_columns, device=self.sees.device)
        mask = (columns >= self.image_start[..., None]) & (columns < self.image_end[..., None])
        if self.pinned is not None:
            mask = mask | pinned_before(self.pinned, self.pinned_start, columns, self.image_end)
        if self.rules.with_text:
            first, past = self.text_slots
            slots = torch.arange(first, past, device=self.sees.device)
            text = (slots >= self.text_start[..., None]) & (slots < self.text_end[..., None])
            mask = torch.cat([mask, text & self.next_state.valid[:, None, first:past]], dim=-1)
        return (mask | ~self.sees[..., None])[:, None]

    def update_mask(self) -> torch.Tensor:
        """Boolean mask (batch, 1, new_columns, image columns + all text slots) for updates of image states.

        An image token sees its own image up to itself, the earlier images that text at its place sees, and the text
        before its image (contract: axis D4, "full").
        """
        update = self.update
        assert update is not None and self.token_rows is not None
        images = torch.repeat_interleave(update.num_tokens, output_size=len(self.token_rows))

        def per_column(of_images: torch.Tensor) -> torch.Tensor:
            return self.place(of_images[images])

        columns = torch.arange(self.num_columns, device=self.sees.device)
        own = columns[self.state.image_columns :, None]
        mask = (columns >= per_column(update.image_start)[..., None]) & (columns <= own)
        if self.pinned is not None:
            start = None if update.pinned_start is None else per_column(update.pinned_start)
            mask = mask | pinned_before(self.pinned, start, columns, own[:, 0] + 1)
        slots = torch.arange(self.text_slots[1], device=self.sees.device)
        text = (slots >= per_column(update.text_start)[..., None]) & (slots < per_column(update.text_end)[..., None])
        mask = torch.cat([mask, text & self.next_state.valid[:, None, : self.text_slots[1]]], dim=-1)
        return (mask | ~self.place(torch.ones_like(images, dtype=torch.bool))[..., None])[:, None]

    def place(self, tokens: torch.Tensor) -> torch.Tensor:
        """Distribute new image tokens over their rows.

        Args:
            tokens: (num_image_tokens, ...).

        Returns:
            (batch, new_columns, ...), zero where a row has fewer tokens.
        """
        if self.sees.shape[0] == 1:
            return tokens[None]
        padded = tokens.new_zeros(self.sees.shape[0], self.new_columns, *tokens.shape[1:])
        return padded.index_put((self.token_rows, self.token_columns), tokens)

    def collect(self, columns: torch.Tensor) -> torch.Tensor:
        """Inverse of `place`: (batch, new_columns, ...) to (num_image_tokens, ...)."""
        return columns[self.token_rows, self.token_columns]

    def keep(self, columns: torch.Tensor) -> torch.Tensor:
        """The part of (batch, heads, image columns, head_dim) that stays stored, as a tensor of its own."""
        if self.kept_columns is None:
            return columns
        if self.pinned is None and len(columns) == 1:
            # The window of a single row is what comes last.
            num_kept = self.kept_columns.shape[1]
            return columns if num_kept == columns.shape[2] else columns[:, :, -num_kept:].clone()
        index = self.kept_columns[:, None, :, None].expand(-1, columns.shape[1], -1, columns.shape[3])
        return columns.gather(2, index)


@dataclass(frozen=True)
class ImageUpdatePlan:
    """What the tokens of each new image attend to besides their own image; all (num_images,).

    Attributes:
        rows: row of the image.
        first_column: its first image column.
        num_tokens: its number of columns.
        image_start: first image column of its window.
        text_start, text_end: range of text slots before it, in its sample.
        pinned_start: first column of its sample; None without packing.
    """

    rows: torch.Tensor
    first_column: torch.Tensor
    num_tokens: torch.Tensor
    image_start: torch.Tensor
    text_start: torch.Tensor
    text_end: torch.Tensor
    pinned_start: torch.Tensor | None

    def to(self, device: torch.device) -> ImageUpdatePlan:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class _Ranges:
    """For each image of a call, what tokens after it see."""

    image_start: torch.Tensor  # first column of the image's window
    image_end: torch.Tensor  # column after the image's last token
    text_start: torch.Tensor  # slot where its window starts
    sample_start: torch.Tensor  # first column of its sample
    first_slot: torch.Tensor  # first slot of its sample


def plan_windows(
    state: WindowState,
    rules: WindowRules,
    token_valid: torch.Tensor,
    closes_window: torch.Tensor,
    positions: torch.Tensor,
    images: ImagePlacement | None,
    *,
    samples: torch.Tensor | None = None,
    gist: torch.Tensor | None = None,
) -> WindowPlan:
    """Compute the windows of one call.

    Args:
        state: what earlier calls left behind.
        rules: who sees whom.
        token_valid: (batch, tokens) False for padding.
        closes_window: (batch, tokens) True for text that ends a run of images (valid and no delimiter).
        positions: (batch, tokens) position of each text token.
        images: where the call's new images stand; None without images.
        samples: (batch, tokens) index of the packed sample that a token belongs to; None without packing.
        gist: (batch, tokens) True for gist tokens; None without any.

    Returns:
        The plan; `plan.next_state` is to be stored once the call has succeeded.
    """
    device = positions.device
    length = state.length + token_valid.shape[1]
    new_slots = torch.arange(token_valid.shape[1], device=device) + state.length
    slots = new_slots.expand_as(positions)
    first_slots = _first_slots(slots, samples)
    no_image = torch.full_like(positions, state.image_columns)
    plan = WindowPlan(
        state=state,
        next_state=replace(
            state,
            length=length,
            valid=state.valid_with(token_valid),
            positions=state.positions_with(positions),
            next_position=torch.where(token_valid, positions + 1, 0).amax(-1).maximum(state.next_position),
            closed_at=_close(state, closes_window, state.closed_at),
        ),
        rules=rules,
        image_start=no_image - state.image_tokens[:, None],
        image_end=no_image,
        text_start=state.window_start[:, None].maximum(first_slots),
        text_end=slots + 1,
        sees=token_valid,
        pinned=state.pinned,
    )
    if images is not None:
        plan = _with_images(plan, closes_window, images, samples, first_slots)

    has_image = plan.image_end > plan.image_start
    if plan.pinned is not None:
        columns = torch.arange(plan.num_columns, device=device)
        has_image = has_image | pinned_before(plan.pinned, plan.pinned_start, columns, plan.image_end).any(-1)
    if rules.keys == "context":
        # One attention: all text of the sample, by every token.
        return replace(plan, text_start=first_slots, next_state=replace(plan.next_state, text_start=0))
    if isinstance(length, int) and not (plan.next_state.image_columns or rules.text_windows):
        plan = replace(plan, next_state=replace(plan.next_state, text_start=length))
    if gist is not None:
        plan = replace(plan, text_end=torch.where(gist, 0, plan.text_end))
        # A gist token reads images only; without one there is nothing to read.
        return replace(plan, sees=token_valid & (has_image | (~gist & rules.text_windows)))
    return replace(plan, sees=token_valid & (has_image | rules.text_windows))


def _with_images(
    plan: WindowPlan,
    closes_window: torch.Tensor,
    images: ImagePlacement,
    samples: torch.Tensor | None,
    first_slots: torch.Tensor,
) -> WindowPlan:
    """The plan with the call's new images."""
    state, rules = plan.state, plan.rules
    rows, indices = images.rows, images.indices
    device, length = rows.device, plan.next_state.length
    ranges = _ranges(state, rules, closes_window, images, samples, first_slots)

    # The last image at or before each token, as an index into `images`.
    seen = (
        torch.zeros_like(plan.image_end).index_put((rows, indices), torch.ones_like(rows), accumulate=True).cumsum(1)
    )
    per_row = torch.zeros_like(state.image_tokens).index_put((rows,), torch.ones_like(rows), accumulate=True)
    first_of_row = per_row.cumsum(0) - per_row
    last = (first_of_row[:, None] + seen - 1).clamp(0, len(rows) - 1)
    has_new = seen > 0
    if samples is not None:
        has_new = has_new & (samples == samples[rows, indices][last])

    token_images = images.token_images()
    first_columns = ranges.image_end - images.num_tokens - state.image_columns
    plan = replace(
        plan,
        image_start=torch.where(has_new, ranges.image_start[last], plan.image_start),
        image_end=torch.where(has_new, ranges.image_end[last], plan.image_end),
        text_start=torch.where(has_new, ranges.text_start[last], plan.text_start),
        new_columns=images.max_row_tokens,
        token_rows=rows[token_images],
        token_columns=first_columns[token_images] + images.token_offsets(),
    )
    plan = replace(
        plan,
        update=ImageUpdatePlan(
            rows=rows,
            first_column=ranges.image_end - images.num_tokens,
            num_tokens=images.num_tokens,
            image_start=ranges.image_start,
            text_start=ranges.first_slot,
            text_end=state.length + indices,
            pinned_start=None if samples is None else ranges.sample_start,
        ),
    )
    if "all" in (rules.image_history, rules.video_history):
        stored = state.pinned
        if stored is None:
            stored = plan.sees.new_zeros(state.batch_size, state.image_columns)
        new = plan.place(rules.history_is("all", images.is_frame)[token_images])
        start = None if samples is None else torch.where(has_new, ranges.sample_start[last], plan.num_columns)
        plan = replace(plan, pinned=torch.cat([stored, new], dim=1), pinned_start=start)

    # What stays stored: the window of each row's last image, and pinned columns.
    received = per_row > 0
    final = (first_of_row + per_row - 1).clamp(0, len(rows) - 1)
    columns = torch.arange(plan.num_columns, device=device)
    kept_end = torch.where(received, ranges.image_end[final], state.image_columns)
    window_tokens = torch.where(received, ranges.image_end[final] - ranges.image_start[final], state.image_tokens)
    kept = (columns >= (kept_end - window_tokens)[:, None]) & (columns < kept_end[:, None])
    if plan.pinned is not None:
        kept = kept | plan.pinned
    window_start = torch.where(received, ranges.text_start[final], state.window_start)
    needed_from = torch.where((window_tokens > 0) | rules.text_windows, window_start, length)
    num_kept, first_slot = torch.stack([kept.sum(-1).max(), needed_from.min()]).tolist()
    image_columns = num_kept
    if state.reserved_columns:
        # In steps of what is reserved, and never less again: shapes change as rarely as they can.
        steps = -(-num_kept // state.reserved_columns)
        image_columns = max(steps * state.reserved_columns, state.image_columns)
    # Stable sorting by "kept" moves the kept columns to the end of each row, in their order.
    kept_columns = kept.long().argsort(dim=-1, stable=True)[:, plan.num_columns - num_kept :]
    since_last = (
        torch.arange(closes_window.shape[1], device=device) >= torch.where(received, indices[final], 0)[:, None]
    )
    return replace(
        plan,
        kept_columns=kept_columns,
        next_state=replace(
            plan.next_state,
            image_columns=image_columns,
            image_tokens=window_tokens,
            pinned=None
            if plan.pinned is None
            else torch.nn.functional.pad(plan.pinned.gather(1, kept_columns), (image_columns - num_kept, 0)),
            last_image=torch.where(received, state.length + indices[final], state.last_image),
            window_start=window_start,
            closed_at=_close(state, closes_window & since_last, torch.where(received, OPEN, state.closed_at)),
            is_frame=torch.where(received, images.is_frame[final], state.is_frame),
            text_start=first_slot,
        ),
    )


def _ranges(
    state: WindowState,
    rules: WindowRules,
    closes_window: torch.Tensor,
    images: ImagePlacement,
    samples: torch.Tensor | None,
    first_slots: torch.Tensor,
) -> _Ranges:
    rows, indices = images.rows, images.indices
    order = torch.arange(len(rows), device=rows.device)
    previous = (order - 1).clamp(min=0)
    same_sample = (rows == rows[previous]) & (order > 0)
    first_in_row = torch.where(same_sample, 0, order).cummax(0).values
    continues_stored = ~same_sample
    if samples is not None:
        of_image = samples[rows, indices]
        same_sample = same_sample & (of_image == of_image[previous])
    # Text of this call before each image; equal counts mean that nothing closed the window in between.
    text_before = (closes_window.long().cumsum(1) - closes_window.long())[rows, indices]
    # Images that follow each other share a window if both have the history "group" and nothing closed it in between.
    grouped = rules.history_is("group", images.is_frame)
    joins = grouped & grouped[previous] & same_sample & (text_before == text_before[previous])
    joins_stored = grouped & continues_stored & (text_before == 0) & (state.image_tokens > 0)[rows]
    joins_stored = joins_stored & (state.closed_at == OPEN)[rows] & rules.history_is("group", state.is_frame)[rows]
    leader = torch.where(joins, 0, order).cummax(0).values
    from_stored = joins_stored[leader]

    num_tokens = images.num_tokens
    tokens_before = num_tokens.cumsum(0) - num_tokens
    columns = state.image_columns + tokens_before - tokens_before[first_in_row]
    first_in_sample = torch.where(same_sample, 0, order).cummax(0).values
    return _Ranges(
        image_start=torch.where(from_stored, state.image_columns - state.image_tokens[rows], columns[leader]),
        image_end=columns + num_tokens,
        text_start=torch.where(from_stored, state.window_start[rows], state.length + indices[leader]),
        sample_start=columns[first_in_sample],
        first_slot=first_slots[rows, indices],
    )


def _first_slots(slots: torch.Tensor, samples: torch.Tensor | None) -> torch.Tensor:
    """(batch, tokens) first slot of each token's sample."""
    if samples is None:
        return torch.zeros_like(slots)
    starts = torch.diff(samples, dim=1, prepend=samples[:, :1] - 1) != 0
    return torch.where(starts, slots, 0).cummax(dim=1).values


def pinned_before(
    pinned: torch.Tensor, start: torch.Tensor | None, columns: torch.Tensor, end: torch.Tensor
) -> torch.Tensor:
    """(batch, queries, image columns) pinned columns before `end` and, with packing, from `start` on."""
    mask = pinned[:, None] & (columns < end[..., None])
    return mask if start is None else mask & (columns >= start[..., None])


def _close(state: WindowState, closes_window: torch.Tensor, closed_at: torch.Tensor) -> torch.Tensor:
    """`closed_at` after text of this call."""
    slots = torch.arange(closes_window.shape[1], device=closes_window.device) + state.length
    return torch.where(closes_window, slots, OPEN).amin(-1).minimum(closed_at)
