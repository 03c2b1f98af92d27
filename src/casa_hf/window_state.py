# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a stream remembers about its windows between calls.

A *cache position* is the index of a text token in its row counted over all calls, padding included; not to be confused
with the position that its rotary embedding has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

# Cache position of the first text after an image while there is none: the image's window is still open.
OPEN = torch.iinfo(torch.long).max

# Fields of `WindowState` with an entry for every cache position.
_OF_TEXT = ("valid", "positions")


@dataclass(frozen=True)
class WindowState:
    """What a stream remembers about its windows between calls; one entry per row unless said.

    A *growing* state has exactly as many cache positions as there is text. A *fixed* one is that of a static cache:
    all its tensors stay where they are, and have as many cache positions as the cache.

    Attributes:
        length: number of cache positions with text or padding, the same for all rows; a tensor without dimensions if
            the state is fixed.
        valid: (batch, length or capacity) whether a cache position holds text rather than padding.
        padded: whether any call came with a padding mask.
        positions: (batch, length or capacity) position of the text at each cache position, the largest of its axes; 0
            for padding.
        next_position: (batch,) position of the next text token.
        image_columns: number of columns of the stored image keys/values; rows are right-aligned in them.
        image_tokens: (batch,) image tokens of the current window, 0 before the first image.
        pinned: (batch, image_columns) columns that stay visible to all later text; None while no history is "all".
        last_image: (batch,) cache position of the token that the last image precedes; -1 without an image.
        window_start: (batch,) first cache position of the current window.
        closed_at: (batch,) cache position of the first text after the last image, `OPEN` while there is none.
        is_frame: (batch,) whether the last image is a video frame.
        text_start: first cache position whose text keys fusion layers still need; always 0 if the state is fixed.
        capacity: number of cache positions of a fixed state; None if it is growing.
        reserved_columns: image columns that a static cache keeps at least, so that images of any size up to that
            share one shape; where more are needed, their number doubles.
        only_row: whether the state has always been that of one row, so that all it has stored is that row's own.
        late_closed_at: (batch,) what decoding steps have to say about `closed_at`, on their device: the lesser of both
            holds. None where `closed_at` says all. Steps of a state on the CPU write it, to wait for nothing.
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
    capacity: int | None = None
    reserved_columns: int = 0
    only_row: bool = False
    late_closed_at: torch.Tensor | None = None

    @classmethod
    def empty(cls, batch_size: int, device: torch.device, length: int = 0) -> WindowState:
        """The state before the first image, after `length` tokens of text in every row."""
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

    def settled(self) -> WindowState:
        """The state with `closed_at` that says all; a device is waited for if decoding steps have written there."""
        if self.late_closed_at is None:
            return self
        closed_at = self.closed_at.minimum(self.late_closed_at.to(self.closed_at.device))
        return replace(self, closed_at=closed_at, late_closed_at=None)

    # ---------------------------------------------------------------- rows

    def select_rows(self, rows: Sequence[int | None]) -> WindowState:
        """The state with the given rows, in their order; None stands for one in which all so far is padding."""
        of_empty: dict[str, Any] = {"last_image": -1, "window_start": self.length, "closed_at": OPEN}

        def selected(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return selected_rows(tensor, rows, empty=of_empty.get(name, 0))

        state = self.settled()
        changed: dict[str, Any] = {name: selected(name, t) for name, t in tensors_of(state).items() if t.ndim}
        padded = self.padded or (None in rows and (self.capacity is not None or bool(self.length)))
        new = replace(state, **changed, padded=padded, only_row=False)
        return new if self.capacity is None else self.assign(new)

    def select(self, rows: torch.Tensor) -> WindowState:
        """The state with the given rows, in their order."""
        rows = rows.to(self.valid.device)
        return self._map_rows(lambda of_rows: of_rows[rows])

    def repeat_interleave(self, repeats: int) -> WindowState:
        """The state with each row repeated."""
        return self._map_rows(lambda of_rows: of_rows.repeat_interleave(repeats, dim=0))

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> WindowState:
        state = self.settled()
        changed: dict[str, Any] = {name: change(t) for name, t in tensors_of(state).items() if t.ndim}
        new = replace(state, **changed | {"only_row": False})
        return new if self.capacity is None else self.assign(new)

    def append_empty_rows(self, number: int) -> WindowState:
        """The state, a growing one, with further rows in which all so far is padding."""
        assert isinstance(self.length, int)
        empty = WindowState.empty(number, self.valid.device, length=self.length)
        further = tensors_of(empty)
        for name in ("valid", "positions", "next_position"):
            further[name] = torch.zeros_like(further[name])
        if self.pinned is not None:
            further["pinned"] = self.pinned.new_zeros(number, self.image_columns)
        state = self.settled()
        rows: dict[str, Any] = {name: torch.cat([t, further[name]]) for name, t in tensors_of(state).items()}
        return replace(state, **rows | {"padded": self.padded or self.length > 0, "only_row": False})

    # ---------------------------------------------------------------- text

    def valid_with(self, token_valid: torch.Tensor) -> torch.Tensor:
        """(batch, cache positions) validity of all text once new tokens are there."""
        return self._with_new(self.valid, token_valid)

    def positions_with(self, positions: torch.Tensor) -> torch.Tensor:
        """(batch, cache positions) positions of all text once new tokens are there."""
        return self._with_new(self.positions, positions)

    def _with_new(self, stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self.capacity is None:
            return torch.cat([stored, new], dim=1)
        return stored.index_copy(1, torch.arange(new.shape[1], device=new.device) + self.length, new)

    def crop(self, num_tokens: int) -> WindowState:
        """The state, a growing one, without the last `num_tokens` tokens.

        Raises:
            ValueError: if an image whose keys/values are stored would have to be taken back.
        """
        state, length = self.settled(), int(self.length) - num_tokens
        last_image = int(self.last_image.max()) if self.image_columns else -1
        if self.image_columns and last_image >= length:
            raise ValueError(
                f"Can't crop {num_tokens} of {self.length} tokens: the current image stands before token "
                f"{last_image}, so at most {self.length - last_image - 1} can be removed. Earlier windows are "
                "no longer stored; start from a copy of the cache made before the image."
            )
        if length < 0:
            raise ValueError(f"Can't crop {num_tokens} of {self.length} tokens.")
        return replace(
            self,
            length=length,
            valid=self.valid[:, :length],
            positions=self.positions[:, :length],
            next_position=self.next_position - self.valid[:, length:].sum(-1),
            closed_at=torch.where(state.closed_at < length, state.closed_at, OPEN),
            late_closed_at=None,
            text_start=min(self.text_start, length),
        )

    # ---------------------------------------------------------------- static caches

    def fixed(self, capacity: int) -> WindowState:
        """The state in the form that a static cache of this capacity keeps: tensors of its own, whose shapes and
        addresses stay, so that a compiled decoding step can change them in place."""
        own: dict[str, Any] = {name: t.clone() for name, t in tensors_of(self.settled()).items()}
        own["length"] = torch.tensor(int(self.length), device=self.valid.device)
        for name in _OF_TEXT:
            own[name] = nn.functional.pad(own[name], (0, capacity - own[name].shape[1]))
        for tensor in own.values():
            at_fixed_address(tensor)
        # Left of a row's images is what earlier ones have left there, so that nothing is a row's own alone.
        return replace(self, **own | {"text_start": 0, "capacity": capacity, "only_row": False})

    def growing(self) -> WindowState:
        """The state in the form that calls with images work on; a fixed one is read off its device."""
        if self.capacity is None:
            return self.settled()
        length = int(self.length)
        of_text: dict[str, Any] = {name: getattr(self, name)[:, :length] for name in _OF_TEXT}
        return replace(self, **of_text | {"length": length, "capacity": None})

    def compact(self, all_text: bool, text_windows: bool) -> WindowState:
        """What a growing state would be after the same calls: without room behind the text, and without image columns
        and text that no row sees. A fixed state is read off its device.

        Args:
            all_text: whether fusion layers see all text, and not only that of the windows.
            text_windows: whether text before the first image attends to itself in fusion layers.
        """
        if self.capacity is None:
            return self
        state, num_columns = self.growing(), self.num_seen_columns()
        in_window = (state.image_tokens > 0) | text_windows
        first_text = torch.where(in_window, state.window_start, state.length).min()
        no_padding = bool(state.valid.all())
        return replace(
            state,
            padded=not no_padding,
            image_columns=num_columns,
            pinned=None if state.pinned is None or not num_columns else state.pinned[:, -num_columns:],
            text_start=0 if all_text else int(first_text),
            reserved_columns=0,
            only_row=no_padding and state.batch_size == 1,
        )

    def num_seen_columns(self) -> int:
        """Number of the last image columns before which no row sees any; the device is asked."""
        if not self.image_columns:
            return 0
        columns = torch.arange(self.image_columns, device=self.valid.device)
        seen = columns >= self.image_columns - self.image_tokens[:, None]
        if self.pinned is not None:
            seen = seen | self.pinned
        return self.image_columns - int(torch.where(seen, columns, self.image_columns).min())

    def moment(self) -> WindowState:
        """This fixed state as it is now, for `assign` to come back to it after a forward. What has an entry for every
        cache position isn't copied: a forward only adds to that."""
        own: dict[str, Any] = {name: t.clone() for name, t in tensors_of(self).items() if name not in _OF_TEXT}
        return replace(self, **own)

    def assign(self, new: WindowState) -> WindowState:
        """Write what `new` says into the tensors of this fixed state, and return it with the numbers of `new`."""
        own: dict[str, Any] = tensors_of(self)
        if new.pinned is None:
            own["pinned"] = None
        for name, tensor in tensors_of(new).items():
            if name in _OF_TEXT and new.capacity is None:
                own[name][:, : tensor.shape[1]].copy_(tensor, non_blocking=True)
                own[name][:, tensor.shape[1] :].zero_()
            elif name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor, non_blocking=True)
            else:
                own[name] = at_fixed_address(tensor.to(self.valid.device, non_blocking=True, copy=True))
        if new.capacity is None:
            own["length"].fill_(new.length)
        return replace(self, **own, image_columns=new.image_columns, padded=new.padded)

    # ---------------------------------------------------------------- files

    def check(self) -> None:
        """Refuse a growing state whose fields don't fit together, as one that was read from a file may be.

        Raises:
            ValueError: with the name of the field.
        """
        self._check_forms()
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
                    f"The saved state is damaged: {name} of its windows is {numbers.tolist()!r:.100}; expected "
                    f"numbers from {least} to {'anything' if most is None else most}. Load the whole state, as "
                    "it was saved."
                )

    def _check_forms(self) -> None:
        """Refuse fields of another type, dtype or shape than `valid` and `image_columns` imply."""
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
                    f"The saved state is damaged: {name} of its windows doesn't match the rest of it. Load the "
                    "whole state, as it was saved."
                )


def at_fixed_address(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, of which a compiled step is to know that it stays where it is. Another one in its place is no reason
    to compile again, only for CUDA graphs to be recorded again."""
    torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


def in_doublings(number: int, least: int) -> int:
    """The smallest of `least`, 2 `least`, 4 `least`, ... that isn't below `number`."""
    while least < number:
        least *= 2
    return least


def selected_rows(tensor: torch.Tensor, rows: Sequence[int | None], empty: Any = 0) -> torch.Tensor:
    """A copy of these rows of a tensor (rows, ...), in their order; None stands for one that is `empty` throughout."""
    index = torch.tensor([0 if row is None else row for row in rows], device=tensor.device)
    is_empty = torch.tensor([row is None for row in rows], device=tensor.device)
    is_empty = is_empty.view(-1, *[1] * (tensor.ndim - 1))
    return torch.where(is_empty, torch.as_tensor(empty, dtype=tensor.dtype, device=tensor.device), tensor[index])


def tensors_of(record: Any) -> dict[str, Any]:
    """The tensors among the fields of a dataclass, by name."""
    return {f.name: value for f in fields(record) if isinstance(value := getattr(record, f.name), torch.Tensor)}
