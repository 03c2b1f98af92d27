# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Which image tokens and which text a token may attend to in a fusion layer.

Every rule of the design space comes down to two ranges per text token: a range of columns of its row's image tokens,
and a range of text that starts where its window starts and ends at the token itself. Images that stay visible for ever
(the history "all") are *pinned* columns beside the first range. `plan_windows` computes all this once per forward, for
all layers, from where the images stand (`ImagePlacement`) and from what earlier calls left behind (`WindowState`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from .transfers import moved
from .window_state import OPEN, WindowState, in_doublings, tensors_of


@dataclass(frozen=True)
class WindowRules:
    """The part of a configuration that decides who sees whom.

    Attributes:
        keys: "image", "window" or "context".
        image_history, video_history: "latest", "group" or "all".
        text_windows: whether text before the first image attends to itself in fusion layers.
    """

    keys: str
    image_history: str
    video_history: str
    text_windows: bool

    @property
    def with_text(self) -> bool:
        """Whether fusion layers have text keys."""
        return self.keys != "image"

    @property
    def keeps_all_images(self) -> bool:
        """Whether images of any kind stay visible for ever."""
        return "all" in (self.image_history, self.video_history)

    def awaits_more(self, state: WindowState) -> bool:
        """Whether it matters, for a state on the CPU, when text closes its last window: further images may join it."""
        return state.image_columns > 0 and bool(self.history_is("group", state.is_frame).any())

    def history_is(self, history: str, is_frame: torch.Tensor) -> torch.Tensor:
        """Whether images of these kinds have the given history."""
        of_images, of_frames = self.image_history == history, self.video_history == history
        if of_images == of_frames:
            return torch.full_like(is_frame, of_images)
        return is_frame if of_frames else ~is_frame


@dataclass(frozen=True)
class ImagePlacement:
    """Images of one call, in reading order over the batch.

    Attributes:
        rows: (num_images,) row of each image.
        indices: (num_images,) index, in the row's new tokens, of the token that the image precedes.
        grids: (num_images, 3) temporal patches, height and width, the last two in merged-grid units.
        is_frame: (num_images,) whether the image is a video frame, or a whole video.
        total_tokens: number of image tokens.
        max_row_tokens: largest number of image tokens that one row receives.
        time_steps: (num_images,) by how many positions the temporal patches of each image are apart; None where each
            image has one.
    """

    rows: torch.Tensor
    indices: torch.Tensor
    grids: torch.Tensor
    is_frame: torch.Tensor
    total_tokens: int
    max_row_tokens: int
    time_steps: torch.Tensor | None = None

    @cached_property
    def num_tokens(self) -> torch.Tensor:
        """(num_images,) tokens per image."""
        return self.grids.prod(-1)

    @cached_property
    def token_images(self) -> torch.Tensor:
        """(num_image_tokens,) image that each image token belongs to."""
        return torch.repeat_interleave(self.num_tokens, output_size=self.total_tokens)

    @cached_property
    def token_offsets(self) -> torch.Tensor:
        """(num_image_tokens,) index of each image token within its image."""
        first = self.num_tokens.cumsum(0) - self.num_tokens
        return torch.arange(self.total_tokens, device=first.device) - first[self.token_images]

    @cached_property
    def token_grid(self) -> torch.Tensor:
        """(2, num_image_tokens) row and column of each image token in its temporal patch."""
        _, height, width = self.grids[self.token_images].unbind(-1)
        return torch.stack([self.token_offsets // width % height, self.token_offsets % width])

    @cached_property
    def token_times(self) -> torch.Tensor | None:
        """(num_image_tokens,) by how many positions each token's temporal patch is after the first one of its image;
        None where each image has one."""
        if self.time_steps is None:
            return None
        patches = self.token_offsets // self.grids[:, 1:].prod(-1)[self.token_images]
        return (patches * self.time_steps[self.token_images]).long()


@dataclass(frozen=True)
class ImageUpdatePlan:
    """What the tokens of each new image attend to besides their own image; all (num_images,).

    Attributes:
        rows: row of the image.
        first_column: its first image column.
        num_tokens: its number of columns.
        image_start: first image column of its window.
        text_start, text_end: range of cache positions of the text before it, in its sample.
        pinned_start: first column of its sample; None without packing.
    """

    rows: torch.Tensor
    first_column: torch.Tensor
    num_tokens: torch.Tensor
    image_start: torch.Tensor
    text_start: torch.Tensor
    text_end: torch.Tensor
    pinned_start: torch.Tensor | None


@dataclass(frozen=True)
class WindowPlan:
    """The windows of one call, shared by all layers.

    Image columns are the stored ones, followed by those of the call's new images (left-aligned per row).

    Attributes:
        state: state before the call.
        next_state: state after the call.
        rules: rules of who sees which image.
        image_start, image_end: (batch, tokens) image columns of a token's window, end excluded.
        text_start: (batch, tokens) first cache position of a token's text keys.
        text_end: (batch, tokens) cache position after the last of them; at most the token's own plus one.
        sees: (batch, tokens) whether a token attends to anything; False for padding.
        pinned: (batch, image columns) columns that every later token of their sample sees; None without any.
        pinned_start: (batch, tokens) first column of a token's sample; None without packing.
        new_columns: number of columns for new images.
        token_rows, token_columns: (num_image_tokens,) place of each new image token; None without new images.
        kept_columns: (batch, num_kept) columns that stay stored, as the last ones; None if nothing changes.
        update: keys that new image tokens attend to when their own states are updated; None without new images.
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
    def text_range(self) -> tuple[int, int]:
        """First and past-the-last of the cache positions whose text keys this call works on."""
        if self.state.capacity is not None:
            return 0, self.state.capacity
        assert isinstance(self.next_state.length, int)
        return self.state.text_start, self.next_state.length

    @property
    def active(self) -> bool:
        """Whether fusion layers have anything to do: images to see, or text before them that attends to itself."""
        return self.num_columns > 0 or self.rules.text_windows

    @property
    def num_dropped_text(self) -> int:
        """Number of cache positions, the first of the stored window text, that no later token needs."""
        return self.next_state.text_start - self.state.text_start

    def on(self, device: torch.device) -> WindowPlan:
        """The plan with all that masks and blocks read on a device; the states before and after stay where they are,
        but for which text is valid."""
        valid = moved(self.next_state.valid, device)
        own = {name: moved(tensor, device) for name, tensor in tensors_of(self).items()}
        return replace(
            self, **own, update=moved(self.update, device), next_state=replace(self.next_state, valid=valid)
        )

    def for_blocks(self, device: torch.device, all_see: bool) -> WindowPlan:
        """The plan with what blocks read on a device: nothing, for one row in which every token sees something."""
        names = () if all_see else ("sees",)
        if len(self.sees) > 1 or self.pinned is not None:
            names = (*names, "token_rows", "token_columns", "kept_columns")
        return replace(self, **{name: moved(getattr(self, name), device) for name in names})

    def mask(self) -> torch.Tensor:
        """Boolean mask of fusion layers (batch, 1, tokens, image columns [+ `text_range`]).

        Tokens that see nothing get all-True rows, so that no backend meets an empty softmax; their output is discarded
        through `sees`.
        """
        columns = torch.arange(self.num_columns, device=self.sees.device)
        mask = _in_range(columns, self.image_start, self.image_end)
        if self.pinned is not None:
            mask = mask | pinned_before(self.pinned, self.pinned_start, columns, self.image_end)
        if self.rules.with_text:
            mask = torch.cat([mask, self._text_mask(self.text_start, self.text_end, *self.text_range)], dim=-1)
        return (mask | ~self.sees[..., None])[:, None]

    def update_mask(self) -> torch.Tensor:
        """Boolean mask (batch, 1, new_columns, image columns + all text) for updates of image states.

        An image token sees its own image up to itself, the earlier images that text at its place sees, and the text
        before its image (contract: axis D4, "full").
        """
        update = self.update
        assert update is not None and self.token_rows is not None
        images = torch.repeat_interleave(update.num_tokens, output_size=len(self.token_rows))
        image = self.place(images)  # (batch, new_columns), of each column
        columns = torch.arange(self.num_columns, device=self.sees.device)
        past_own = columns[self.state.image_columns :] + 1
        mask = _in_range(columns, update.image_start[image], past_own)
        if self.pinned is not None:
            start = None if update.pinned_start is None else update.pinned_start[image]
            mask = mask | pinned_before(self.pinned, start, columns, past_own)
        text = self._text_mask(update.text_start[image], update.text_end[image], 0, self.text_range[1])
        is_token = self.place(torch.ones_like(images, dtype=torch.bool))
        return (torch.cat([mask, text], dim=-1) | ~is_token[..., None])[:, None]

    def _text_mask(self, start: torch.Tensor, end: torch.Tensor, first: int, past: int) -> torch.Tensor:
        """(batch, queries, past - first) text from `start` to `end`, (batch, queries), that isn't padding."""
        cache_positions = torch.arange(first, past, device=self.sees.device)
        return _in_range(cache_positions, start, end) & self.next_state.valid[:, None, first:past]

    def place(self, tokens: torch.Tensor) -> torch.Tensor:
        """Distribute new image tokens over their rows.

        Args:
            tokens: (num_image_tokens, ...).

        Returns:
            (batch, new_columns, ...), zero where a row has fewer tokens.
        """
        assert self.token_rows is not None and self.token_columns is not None
        return _placed(tokens, len(self.sees), self.new_columns, self.token_rows, self.token_columns)

    def collect(self, columns: torch.Tensor) -> torch.Tensor:
        """Inverse of `place`: (batch, new_columns, ...) to (num_image_tokens, ...)."""
        return columns[self.token_rows, self.token_columns]

    def kept(self, columns: torch.Tensor) -> torch.Tensor:
        """The part of (batch, heads, image columns, head_dim) that stays stored, as a view where it can be one."""
        if self.kept_columns is None:
            return columns
        num_kept = self.kept_columns.shape[1]
        if self.pinned is None and len(columns) == 1:  # the window of a single row is what comes last
            return columns[:, :, columns.shape[2] - num_kept :]
        index = self.kept_columns[:, None, :, None].expand(-1, columns.shape[1], -1, columns.shape[3])
        return columns.gather(2, index)

    def keep(self, columns: torch.Tensor) -> torch.Tensor:
        """The same as a tensor of its own."""
        kept = self.kept(columns)
        return kept.clone() if kept._is_view() and kept.shape != columns.shape else kept


def plan_windows(
    state: WindowState,
    rules: WindowRules,
    token_valid: torch.Tensor,
    closes_window: torch.Tensor | None,
    positions: torch.Tensor,
    images: ImagePlacement | None,
    *,
    samples: torch.Tensor | None = None,
    gist: torch.Tensor | None = None,
) -> WindowPlan:
    """Compute the windows of one call.

    Args:
        state: state that earlier calls have left.
        rules: rules of who sees which image.
        token_valid: (batch, tokens) False for padding.
        closes_window: (batch, tokens) True for text that ends a run of images (valid and no delimiter). Of a decoding
            step on the CPU it may be on a device, or None if nothing depends on it.
        positions: (batch, tokens) position of each text token.
        images: places of the call's new images; None without images.
        samples: (batch, tokens) index of the packed sample that a token belongs to; None without packing.
        gist: (batch, tokens) True for gist tokens; None without any.

    Returns:
        The plan; `plan.next_state` is to be stored once the call has succeeded.
    """
    cache_positions = torch.arange(token_valid.shape[1], device=token_valid.device) + state.length
    sample_start = _sample_start(cache_positions, positions, samples)
    text = _Text(cache_positions, sample_start, token_valid, closes_window, positions, samples)
    new = None if images is None else _images_of_call(state, rules, text, images)
    windows = _windows_of_tokens(state, text, new)
    text_start, text_end = _visible_text(rules, text, windows, gist)
    pinned, pinned_start = _pinned_columns(state, rules, text, new)
    next_state, kept_columns = _after_text(state, rules, text), None
    if new is not None:
        current = windows.of_last_tokens()
        num_columns = state.image_columns + new.placement.max_row_tokens
        kept_columns, first_text = _retained(rules, next_state, current, pinned, num_columns)
        next_state = _after_images(next_state, text, new, current, pinned, kept_columns, first_text)
    return WindowPlan(
        state=state,
        next_state=next_state,
        rules=rules,
        image_start=windows.image_start,
        image_end=windows.image_end,
        text_start=text_start,
        text_end=text_end,
        sees=_sees(rules, text, windows, gist, pinned, pinned_start),
        pinned=pinned,
        pinned_start=pinned_start,
        new_columns=0 if images is None else images.max_row_tokens,
        token_rows=None if new is None else new.token_rows,
        token_columns=None if new is None else new.token_columns,
        kept_columns=kept_columns,
        update=None if new is None else new.update,
    )


# The steps of `plan_windows`, from top to bottom.


@dataclass(frozen=True)
class _Text:
    """The text of a call.

    Attributes:
        cache_positions: (tokens,) cache position of each token, the same in all rows.
        sample_start: (batch, tokens) cache position of the first token of each token's sample.
        valid, closes_window, positions, samples: (batch, tokens) arguments of `plan_windows`.
    """

    cache_positions: torch.Tensor
    sample_start: torch.Tensor
    valid: torch.Tensor
    closes_window: torch.Tensor | None
    positions: torch.Tensor
    samples: torch.Tensor | None

    @property
    def sample(self) -> torch.Tensor:
        """(batch, tokens) number of each token's sample in the batch; that of its row without packing."""
        rows = torch.arange(len(self.valid), device=self.valid.device)[:, None].expand_as(self.valid)
        return rows if self.samples is None else rows * self.valid.shape[1] + self.samples


@dataclass(frozen=True)
class _Windows:
    """Windows that tokens are in, (batch, tokens), or images, (num_images,); or the current ones of rows, (batch,).

    Attributes:
        image_start, image_end: their image columns, end excluded.
        text_start: their first cache position.
    """

    image_start: torch.Tensor
    image_end: torch.Tensor
    text_start: torch.Tensor

    @property
    def with_images(self) -> torch.Tensor:
        """Whether there is an image in each."""
        return self.image_end > self.image_start

    def of_last_tokens(self) -> _Windows:
        """Of (batch, tokens) the last in each row."""
        return _Windows(self.image_start[:, -1], self.image_end[:, -1], self.text_start[:, -1])


@dataclass(frozen=True)
class _NewImages:
    """The images of a call.

    Attributes:
        placement: places of the images in the text.
        windows: (num_images,) window that each of them is in, up to its own last column.
        token_rows, token_columns, update: fields of `WindowPlan`.
        latest: (batch, tokens) last image at or before each token, as an index into the images; any if there is none.
        has_latest: (batch, tokens) whether there is one, in the token's sample.
    """

    placement: ImagePlacement
    windows: _Windows
    token_rows: torch.Tensor
    token_columns: torch.Tensor
    update: ImageUpdatePlan
    latest: torch.Tensor
    has_latest: torch.Tensor


def _sample_start(
    cache_positions: torch.Tensor, positions: torch.Tensor, samples: torch.Tensor | None
) -> torch.Tensor:
    if samples is None:
        return torch.zeros_like(positions)
    starts = torch.diff(samples, dim=1, prepend=samples[:, :1] - 1) != 0
    return torch.where(starts, cache_positions, 0).cummax(dim=1).values


def _images_of_call(state: WindowState, rules: WindowRules, text: _Text, images: ImagePlacement) -> _NewImages:
    rows, indices = images.rows, images.indices  # (num_images,)
    sample = text.sample[rows, indices]
    windows = _windows_of_images(state, rules, text, images, sample)
    first_column = windows.image_end - images.num_tokens
    latest, has_latest = _latest_images(text, images, sample)
    update = ImageUpdatePlan(
        rows=rows,
        first_column=first_column,
        num_tokens=images.num_tokens,
        image_start=windows.image_start,
        text_start=text.sample_start[rows, indices],
        text_end=state.length + indices,
        pinned_start=first_column[first_of_run(sample)] if text.samples is not None else None,
    )
    token_columns = (first_column - state.image_columns)[images.token_images] + images.token_offsets
    return _NewImages(images, windows, rows[images.token_images], token_columns, update, latest, has_latest)


def _windows_of_images(
    state: WindowState, rules: WindowRules, text: _Text, images: ImagePlacement, sample: torch.Tensor
) -> _Windows:
    """The window of each image, (num_images,): one that it opens, or that of its group."""
    rows, indices, num_tokens = images.rows, images.indices, images.num_tokens
    first_of_row = first_of_run(rows)
    tokens_before = num_tokens.cumsum(0) - num_tokens
    first_column = state.image_columns + tokens_before - tokens_before[first_of_row]

    # Images with as much closing text before them have none in between.
    assert text.closes_window is not None
    closes = text.closes_window.long()
    closed_before = (closes.cumsum(1) - closes)[rows, indices]
    grouped = rules.history_is("group", images.is_frame)
    order = torch.arange(len(rows), device=rows.device)
    opener = torch.where(grouped, first_of_run(sample, closed_before, grouped), order)
    # A group may have been opened by an earlier call.
    is_open = (state.image_tokens > 0) & (state.closed_at == OPEN) & rules.history_is("group", state.is_frame)
    in_stored = grouped & is_open[rows] & (closed_before == 0) & (opener == first_of_row)
    stored_start = state.image_columns - state.image_tokens
    return _Windows(
        image_start=torch.where(in_stored, stored_start[rows], first_column[opener]),
        image_end=first_column + num_tokens,
        text_start=torch.where(in_stored, state.window_start[rows], state.length + indices[opener]),
    )


def _latest_images(text: _Text, images: ImagePlacement, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`latest` and `has_latest` of images that are in `sample`, (num_images,)."""
    counts = torch.zeros_like(text.positions)
    counts = counts.index_put((images.rows, images.indices), torch.ones_like(images.rows), accumulate=True)
    so_far = counts.flatten().cumsum(0).view_as(counts)  # over all rows, as images are in reading order
    latest = (so_far - 1).clamp(min=0)
    return latest, (so_far > 0) & (sample[latest] == text.sample)


def _windows_of_tokens(state: WindowState, text: _Text, new: _NewImages | None) -> _Windows:
    """The window of each token, (batch, tokens): that of the latest image, else the stored one of its row."""
    image_end = torch.full_like(text.positions, state.image_columns)
    image_start = image_end - state.image_tokens[:, None]
    text_start = state.window_start[:, None].expand_as(image_end)
    if text.samples is not None:
        text_start = text.sample_start  # without a cache, so that nothing is stored
    if new is None:
        return _Windows(image_start, image_end, text_start)
    return _Windows(
        image_start=torch.where(new.has_latest, new.windows.image_start[new.latest], image_start),
        image_end=torch.where(new.has_latest, new.windows.image_end[new.latest], image_end),
        text_start=torch.where(new.has_latest, new.windows.text_start[new.latest], text_start),
    )


def _pinned_columns(
    state: WindowState, rules: WindowRules, text: _Text, new: _NewImages | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`pinned` and `pinned_start` of the plan."""
    if new is None or not rules.keeps_all_images:
        return state.pinned, None
    images, batch_size = new.placement, state.batch_size
    stored = text.valid.new_zeros(batch_size, state.image_columns) if state.pinned is None else state.pinned
    stays = rules.history_is("all", images.is_frame)[images.token_images]
    added = _placed(stays, batch_size, images.max_row_tokens, new.token_rows, new.token_columns)
    pinned = torch.cat([stored, added], dim=1)
    if new.update.pinned_start is None:
        return pinned, None
    return pinned, torch.where(new.has_latest, new.update.pinned_start[new.latest], pinned.shape[1])


def _visible_text(
    rules: WindowRules, text: _Text, windows: _Windows, gist: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`text_start` and `text_end` of the plan."""
    text_end = (text.cache_positions + 1).expand_as(text.positions)
    if rules.keys == "context":  # one attention: all text of the sample, by every token
        return text.sample_start, text_end
    return windows.text_start, text_end if gist is None else torch.where(gist, 0, text_end)


def _sees(
    rules: WindowRules,
    text: _Text,
    windows: _Windows,
    gist: torch.Tensor | None,
    pinned: torch.Tensor | None,
    pinned_start: torch.Tensor | None,
) -> torch.Tensor:
    """(batch, tokens) whether a token attends to anything."""
    if rules.keys == "context" or (rules.text_windows and gist is None):
        return text.valid
    sees = windows.with_images
    if pinned is not None:
        columns = torch.arange(pinned.shape[1], device=pinned.device)
        sees = sees | pinned_before(pinned, pinned_start, columns, windows.image_end).any(-1)
    if rules.text_windows and gist is not None:
        sees = sees | ~gist  # gist tokens read images only; without one there is nothing to read
    return text.valid & sees


def _after_text(state: WindowState, rules: WindowRules, text: _Text) -> WindowState:
    """The state after the text of a call, with the windows as they were."""
    length = state.length + len(text.cache_positions)
    text_start = state.text_start
    if rules.keys == "context":
        text_start = 0
    elif isinstance(length, int) and not (state.image_columns or rules.text_windows):
        text_start = length  # no window, so none of it
    closed_at, late = state.closed_at, state.late_closed_at
    if text.closes_window is None:
        pass
    elif text.closes_window.device == closed_at.device:
        closed_at = _first(text.closes_window, text.cache_positions).minimum(closed_at)
    else:  # a decoding step, whose token only the device knows
        here = torch.where(text.closes_window[:, 0], state.length, OPEN)
        late = here if late is None else here.minimum(late)
    return replace(
        state,
        length=length,
        valid=state.valid_with(text.valid),
        positions=state.positions_with(text.positions),
        next_position=torch.where(text.valid, text.positions + 1, 0).amax(-1).maximum(state.next_position),
        closed_at=closed_at,
        late_closed_at=late,
        text_start=text_start,
    )


def _retained(
    rules: WindowRules, state: WindowState, windows: _Windows, pinned: torch.Tensor | None, num_columns: int
) -> tuple[torch.Tensor, int]:
    """What later calls need: image columns, (batch, num_kept), and text from a cache position on.

    Args:
        rules: rules of who sees which image.
        state: the state after the text of the call.
        windows: (batch,) current windows.
        pinned: (batch, num_columns) columns that stay visible to all later text; None without any.
        num_columns: number of image columns of the call.
    """
    kept = _in_range(torch.arange(num_columns, device=state.valid.device), windows.image_start, windows.image_end)
    if pinned is not None:
        kept = kept | pinned
    text_start = torch.where(windows.with_images | rules.text_windows, windows.text_start, state.length)
    num_kept, first_text = torch.stack([kept.sum(-1).max(), text_start.min()]).tolist()
    # Stable sorting by "kept" moves the kept columns to the end of each row, in their order.
    columns = kept.long().argsort(dim=-1, stable=True)[:, num_columns - num_kept :]
    return columns, 0 if rules.keys == "context" else first_text


def _after_images(
    state: WindowState,
    text: _Text,
    new: _NewImages,
    windows: _Windows,
    pinned: torch.Tensor | None,
    kept_columns: torch.Tensor,
    text_start: int,
) -> WindowState:
    """The state after a call with new images, made from that after its text; `windows` are the current ones."""
    image_columns = num_kept = kept_columns.shape[1]
    if state.reserved_columns:
        # Never less again: shapes change as rarely as they can.
        image_columns = max(in_doublings(num_kept, state.reserved_columns), state.image_columns)
    if pinned is not None:
        pinned = nn.functional.pad(pinned.gather(1, kept_columns), (image_columns - num_kept, 0))
    received, last = new.has_latest[:, -1], new.latest[:, -1]  # (batch,)
    last_image = torch.where(received, new.update.text_end[last], state.last_image)
    assert text.closes_window is not None and state.late_closed_at is None
    closes = text.closes_window & (text.cache_positions >= last_image[:, None])
    return replace(
        state,
        image_columns=image_columns,
        image_tokens=windows.image_end - windows.image_start,
        pinned=pinned,
        last_image=last_image,
        window_start=windows.text_start,
        closed_at=torch.where(received, _first(closes, text.cache_positions), state.closed_at),
        is_frame=torch.where(received, new.placement.is_frame[last], state.is_frame),
        text_start=text_start,
    )


def _first(chosen: torch.Tensor, cache_positions: torch.Tensor) -> torch.Tensor:
    """(batch,) cache position of the first chosen token, (batch, tokens), of each row; `OPEN` without any."""
    return torch.where(chosen, cache_positions, OPEN).amin(-1)


# What several of these steps need.


def pinned_before(
    pinned: torch.Tensor, start: torch.Tensor | None, columns: torch.Tensor, end: torch.Tensor
) -> torch.Tensor:
    """(batch, queries, image columns) pinned columns before `end` and, with packing, from `start` on.

    Args:
        pinned: (batch, image columns) columns that stay visible to all later text.
        start: (batch, queries) first column of each query's sample; None without packing.
        columns: (image columns,) numbers of the columns.
        end: (batch, queries) column at which each query's images end.
    """
    mask = pinned[:, None] & (columns < end[..., None])
    return mask if start is None else mask & (columns >= start[..., None])


def _in_range(places: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """(..., places) which of the places are in each range from `start` to `end`, (...), the end excluded."""
    return (places >= start[..., None]) & (places < end[..., None])


def first_of_run(*keys: torch.Tensor) -> torch.Tensor:
    """(n,) index of the first entry of the run that each entry is in: neighbours with the same keys, (n,) each."""
    differs = torch.stack([key[1:] != key[:-1] for key in keys]).any(0)
    order = torch.arange(1, len(differs) + 1, device=differs.device)
    return nn.functional.pad(torch.where(differs, order, 0), (1, 0)).cummax(0).values


def _placed(
    tokens: torch.Tensor, batch_size: int, num_columns: int, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """(batch, num_columns, ...) with `tokens` (num_image_tokens, ...) at the given rows and columns, else zero."""
    if batch_size == 1:
        return tokens[None]
    padded = tokens.new_zeros(batch_size, num_columns, *tokens.shape[1:])
    return padded.index_put((rows, columns), tokens)
