# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Which image tokens and which text a token may attend to in a fusion layer.

Every rule of the design space comes down to two ranges per text token: a range of columns of its row's image tokens,
and a range of text slots that starts where its window starts and ends at the token itself. `plan_windows` computes
both once per forward, for all layers, from where the images stand (`ImagePlacement`) and from what earlier calls left
behind (`WindowState`). A *slot* is the index of a text token in its row counted over all calls, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

# Slot of the first text after an image while there is none: the image's group is still open.
OPEN = torch.iinfo(torch.long).max


@dataclass(frozen=True)
class ImagePlacement:
    """Images of one call, in reading order over the batch.

    Attributes:
        rows: (num_images,) row of each image.
        indices: (num_images,) index, in the row's new tokens, of the token that the image precedes.
        grids: (num_images, 2) height and width in merged-grid units.
        is_frame: (num_images,) whether the image is a video frame.
        max_row_tokens: the largest number of image tokens that one row receives.
    """

    rows: torch.Tensor
    indices: torch.Tensor
    grids: torch.Tensor
    is_frame: torch.Tensor
    max_row_tokens: int

    def to(self, device: torch.device) -> ImagePlacement:
        """The placement with its tensors on `device`."""
        return replace(
            self,
            rows=self.rows.to(device),
            indices=self.indices.to(device),
            grids=self.grids.to(device),
            is_frame=self.is_frame.to(device),
        )

    @property
    def num_tokens(self) -> torch.Tensor:
        """(num_images,) tokens per image."""
        return self.grids.prod(-1)

    def token_images(self) -> torch.Tensor:
        """(num_image_tokens,) the image that each image token belongs to."""
        return torch.repeat_interleave(self.num_tokens)

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
        length: text slots so far, the same for all rows.
        valid: (batch, length) whether a slot holds text rather than padding.
        padded: whether any call came with a padding mask.
        next_position: (batch,) position of the next text token.
        image_columns: number of columns of the stored image keys/values; rows are right-aligned in them.
        image_tokens: (batch,) image tokens that stay visible, 0 before the first image.
        last_image: (batch,) slot of the token that the last image precedes.
        window_start: (batch,) first slot of the current window.
        closed_at: (batch,) slot of the first text after the last image, `OPEN` while there is none.
        is_frame: (batch,) whether the last image is a video frame.
        text_start: first slot whose text keys fusion layers still need.
    """

    length: int
    valid: torch.Tensor
    padded: bool
    next_position: torch.Tensor
    image_columns: int
    image_tokens: torch.Tensor
    last_image: torch.Tensor
    window_start: torch.Tensor
    closed_at: torch.Tensor
    is_frame: torch.Tensor
    text_start: int

    @classmethod
    def empty(cls, batch_size: int, device: torch.device, length: int = 0) -> WindowState:
        """The state before the first image, after `length` slots of text in every row."""
        zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
        return cls(
            length=length,
            valid=torch.ones(batch_size, length, dtype=torch.bool, device=device),
            padded=False,
            next_position=zeros + length,
            image_columns=0,
            image_tokens=zeros,
            last_image=zeros - 1,
            window_start=zeros,
            closed_at=zeros + OPEN,
            is_frame=zeros.bool(),
            text_start=length,
        )

    @property
    def batch_size(self) -> int:
        return self.valid.shape[0]

    def select(self, rows: torch.Tensor) -> WindowState:
        """The state with the given rows, in their order."""
        rows = rows.to(self.valid.device)
        return replace(self, **{name: value[rows] for name, value in self._tensors().items()})

    def repeat_interleave(self, repeats: int) -> WindowState:
        """The state with each row repeated."""
        return replace(
            self, **{name: value.repeat_interleave(repeats, dim=0) for name, value in self._tensors().items()}
        )

    def to(self, device: torch.device) -> WindowState:
        """The state with its tensors on `device`."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def crop(self, num_tokens: int) -> WindowState:
        """The state without the last `num_tokens` slots.

        Raises:
            ValueError: if an image whose keys/values are stored would have to be taken back.
        """
        length = self.length - num_tokens
        last_image = int(self.last_image.max()) if self.image_columns else -1
        if length < 0 or last_image >= length:
            raise ValueError(
                f"Can't crop {num_tokens} of {self.length} tokens: the current image stands before token "
                f"{last_image}, so at most {self.length - last_image - 1} can be taken back. "
                "Earlier windows are no longer stored; start again from a copy of the cache taken before the image."
            )
        return replace(
            self,
            length=length,
            valid=self.valid[:, :length],
            next_position=self.next_position - self.valid[:, length:].sum(-1),
            closed_at=torch.where(self.closed_at < length, self.closed_at, OPEN),
            text_start=self.text_start if self.image_columns else length,
        )

    def _tensors(self) -> dict[str, Any]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}


@dataclass(frozen=True)
class WindowPlan:
    """The windows of one call, shared by all fusion layers.

    Image columns are the stored ones, followed by those of the call's new images (left-aligned per row).

    Attributes:
        state: what was remembered before the call.
        next_state: what to remember after it.
        image_start, image_end: (batch, tokens) range of image columns that a token sees, end excluded.
        text_start: (batch, tokens) first slot of a token's window.
        sees: (batch, tokens) whether a token sees any image; False for padding.
        new_columns: number of columns for new images.
        token_rows, token_columns: (num_image_tokens,) where each new image token goes; None without new images.
        kept_columns: (batch, next_state.image_columns) columns that stay stored; None if nothing changes.
    """

    state: WindowState
    next_state: WindowState
    image_start: torch.Tensor
    image_end: torch.Tensor
    text_start: torch.Tensor
    sees: torch.Tensor
    new_columns: int = 0
    token_rows: torch.Tensor | None = None
    token_columns: torch.Tensor | None = None
    kept_columns: torch.Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether any token of the call can see an image."""
        return self.state.image_columns + self.new_columns > 0

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
            if isinstance(value := getattr(self, f.name), torch.Tensor | WindowState)
        }
        return replace(self, **moved)

    def mask(self, with_text: bool) -> torch.Tensor:
        """Boolean attention mask (batch, 1, tokens, image columns [+ stored and new text slots]).

        Tokens that see no image get all-True rows, so that no back end meets an empty softmax; their output is
        discarded through `sees`.
        """
        columns = torch.arange(self.state.image_columns + self.new_columns, device=self.sees.device)
        mask = (columns >= self.image_start[..., None]) & (columns < self.image_end[..., None])
        if with_text:
            key_slots = torch.arange(self.state.text_start, self.next_state.length, device=self.sees.device)
            query_slots = torch.arange(self.state.length, self.next_state.length, device=self.sees.device)
            text = (key_slots >= self.text_start[..., None]) & (key_slots <= query_slots[:, None])
            text = text & self.next_state.valid[:, None, self.state.text_start :]
            mask = torch.cat([mask, text], dim=-1)
        return (mask | ~self.sees[..., None])[:, None]

    def place(self, tokens: torch.Tensor) -> torch.Tensor:
        """Distribute new image tokens over their rows.

        Args:
            tokens: (num_image_tokens, heads, head_dim).

        Returns:
            (batch, heads, new_columns, head_dim), zero where a row has fewer tokens.
        """
        if self.sees.shape[0] == 1:
            return tokens.transpose(0, 1)[None]
        padded = tokens.new_zeros(self.sees.shape[0], self.new_columns, *tokens.shape[1:])
        return padded.index_put((self.token_rows, self.token_columns), tokens).transpose(1, 2)

    def keep(self, columns: torch.Tensor) -> torch.Tensor:
        """The part of (batch, heads, image columns, head_dim) that stays stored, as a tensor of its own."""
        if self.kept_columns is None:
            return columns
        index = self.kept_columns[:, None, :, None].expand(-1, columns.shape[1], -1, columns.shape[3])
        return columns.gather(2, index)


def plan_windows(
    state: WindowState,
    token_valid: torch.Tensor,
    closes_group: torch.Tensor,
    positions: torch.Tensor,
    images: ImagePlacement | None,
    *,
    image_history: str,
    video_history: str,
    samples: torch.Tensor | None = None,
) -> WindowPlan:
    """Compute the windows of one call.

    Args:
        state: what earlier calls left behind.
        token_valid: (batch, tokens) False for padding.
        closes_group: (batch, tokens) True for text that ends a run of images (valid and no delimiter).
        positions: (batch, tokens) position of each text token.
        images: where the call's new images stand; None without images.
        image_history, video_history: "latest" or "group", which images of its kind a token sees.
        samples: (batch, tokens) index of the packed sample that a token belongs to; None without packing.

    Returns:
        The plan; `plan.next_state` is to be stored once the call has succeeded.
    """
    length = state.length + token_valid.shape[1]
    advanced = replace(
        state,
        length=length,
        valid=torch.cat([state.valid, token_valid], dim=1),
        next_position=torch.where(token_valid, positions + 1, 0).amax(-1).maximum(state.next_position),
        text_start=state.text_start if state.image_columns else length,
    )
    image_end = torch.full_like(positions, state.image_columns)
    image_start = image_end - state.image_tokens[:, None]
    text_start = state.window_start[:, None].expand_as(positions)
    if images is None:
        return WindowPlan(
            state=state,
            next_state=replace(advanced, closed_at=_close(state, closes_group, state.closed_at)),
            image_start=image_start,
            image_end=image_end,
            text_start=text_start,
            sees=token_valid & (image_end > image_start),
        )

    starts, ends, window_starts = _visible_ranges(state, closes_group, images, image_history, video_history, samples)
    rows, indices = images.rows, images.indices

    # The last image at or before each token, as an index into `images`.
    seen = torch.zeros_like(positions).index_put((rows, indices), torch.ones_like(rows), accumulate=True).cumsum(1)
    per_row = torch.zeros_like(state.image_tokens).index_put((rows,), torch.ones_like(rows), accumulate=True)
    first_of_row = per_row.cumsum(0) - per_row
    last = (first_of_row[:, None] + seen - 1).clamp(0, len(rows) - 1)
    has_new = seen > 0
    if samples is not None:
        has_new = has_new & (samples == samples[rows, indices][last])
    image_start = torch.where(has_new, starts[last], image_start)
    image_end = torch.where(has_new, ends[last], image_end)
    text_start = torch.where(has_new, window_starts[last], text_start)

    # What stays stored: the range of each row's last image.
    received = per_row > 0
    final = (first_of_row + per_row - 1).clamp(0, len(rows) - 1)
    kept_end = torch.where(received, ends[final], state.image_columns)
    kept_tokens = torch.where(received, ends[final] - starts[final], state.image_tokens)
    window_start = torch.where(received, window_starts[final], state.window_start)
    needed_from = torch.where(kept_tokens > 0, window_start, length)
    image_columns, first_slot = torch.stack([kept_tokens.max(), needed_from.min()]).tolist()
    kept_columns = torch.arange(image_columns, device=rows.device) + (kept_end - image_columns)[:, None]

    since_last = (
        torch.arange(token_valid.shape[1], device=rows.device) >= torch.where(received, indices[final], 0)[:, None]
    )
    token_images = images.token_images()
    first_columns = ends - images.num_tokens - state.image_columns
    return WindowPlan(
        state=state,
        next_state=replace(
            advanced,
            image_columns=image_columns,
            image_tokens=kept_tokens,
            last_image=torch.where(received, state.length + indices[final], state.last_image),
            window_start=window_start,
            closed_at=_close(state, closes_group & since_last, torch.where(received, OPEN, state.closed_at)),
            is_frame=torch.where(received, images.is_frame[final], state.is_frame),
            text_start=first_slot,
        ),
        image_start=image_start,
        image_end=image_end,
        text_start=text_start,
        sees=token_valid & (image_end > image_start),
        new_columns=images.max_row_tokens,
        token_rows=rows[token_images],
        token_columns=first_columns[token_images] + images.token_offsets(),
        kept_columns=kept_columns.clamp(min=0),
    )


def _visible_ranges(
    state: WindowState,
    closes_group: torch.Tensor,
    images: ImagePlacement,
    image_history: str,
    video_history: str,
    samples: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each image: the column range that tokens after it see, and the slot where their window starts."""
    rows, indices = images.rows, images.indices
    order = torch.arange(len(rows), device=rows.device)
    previous = (order - 1).clamp(min=0)
    same_row = (rows == rows[previous]) & (order > 0)
    # Text of this call before each image; equal counts mean that nothing closed the group in between.
    text_before = (closes_group.long().cumsum(1) - closes_group.long())[rows, indices]
    # Images that follow each other share a window if both have the history "group" and nothing closed it in between.
    by_kind = torch.tensor([image_history == "group", video_history == "group"], device=rows.device)
    grouped = by_kind[images.is_frame.long()]

    joins = grouped & grouped[previous] & same_row & (text_before == text_before[previous])
    if samples is not None:
        of_image = samples[rows, indices]
        joins = joins & (of_image == of_image[previous])
    joins_stored = grouped & ~same_row & (text_before == 0) & (state.image_tokens > 0)[rows]
    joins_stored = joins_stored & (state.closed_at == OPEN)[rows] & by_kind[state.is_frame.long()][rows]
    leader = torch.where(joins, 0, order).cummax(0).values
    from_stored = joins_stored[leader]

    num_tokens = images.num_tokens
    tokens_before = num_tokens.cumsum(0) - num_tokens
    first_in_row = torch.where(same_row, 0, order).cummax(0).values
    columns = state.image_columns + tokens_before - tokens_before[first_in_row]
    starts = torch.where(from_stored, state.image_columns - state.image_tokens[rows], columns[leader])
    window_starts = torch.where(from_stored, state.window_start[rows], state.length + indices[leader])
    return starts, columns + num_tokens, window_starts


def _close(state: WindowState, closes_group: torch.Tensor, closed_at: torch.Tensor) -> torch.Tensor:
    """`closed_at` after text of this call."""
    slots = torch.arange(closes_group.shape[1], device=closes_group.device) + state.length
    return torch.where(closes_group, slots, OPEN).amin(-1).minimum(closed_at)
