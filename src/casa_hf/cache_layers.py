# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Cache layers with what fusion layers keep beside the text of self-attention: growing, preallocated, or around
another layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from .window_state import WindowState, at_fixed_address, selected_rows
from .windows import WindowPlan

# Room for further tokens that growing keys/values are given at least.
_SPARE_ROOM = 64


class KeysValues(NamedTuple):
    """Keys and values, each (batch, kv_heads, length, head_dim)."""

    keys: torch.Tensor
    values: torch.Tensor

    def append(self, *others: KeysValues) -> KeysValues:
        """All, one after the other."""
        return KeysValues(*(torch.cat(parts, dim=2) for parts in zip(self, *others, strict=True)))

    def between(self, start: int, end: int) -> KeysValues:
        """Views of those from `start` up to `end`."""
        return KeysValues(self.keys[:, :, start:end], self.values[:, :, start:end])


class FusionKeys(NamedTuple):
    """What a fusion layer attends to in one call.

    Attributes:
        images: keys/values of all image columns; None without any.
        text: keys/values of all text of the current windows; None where fusion has no text keys.
        stored: both in one piece of memory, where the cache keeps them so.
    """

    images: KeysValues | None
    text: KeysValues | None
    stored: KeysValues | None = None

    def joined(self) -> KeysValues:
        """[image columns ; text] of each row."""
        parts = self.parts()
        return parts[0] if len(parts) == 1 else parts[0].append(parts[1])

    def parts(self) -> list[KeysValues]:
        """The same in as few pieces as there are without a copy."""
        if self.stored is not None:
            return [self.stored]
        return [part for part in (self.images, self.text) if part is not None]


class GrowingMemory:
    """Keys/values with room behind them, so that appending doesn't copy what is there.

    Attributes:
        tensors: keys and values, each (batch, kv_heads, allocated length, head_dim).
        used: length that has been written. Views shorter than that are never written behind: somebody else may hold
            the rest.
    """

    def __init__(self, tensors: KeysValues, used: int):
        self.tensors = tensors
        self.used = used

    def consists_of(self, *parts: KeysValues) -> bool:
        """Whether these parts, one after the other, are all that has been written, and more can be written behind
        them: tensors of inference mode can't be changed outside it."""
        if self.tensors.keys.is_inference() and not torch.is_inference_mode_enabled():
            return False
        own, place = self.tensors.keys, 0
        first, step = own.data_ptr(), own.stride(2) * own.element_size()
        for part, _ in parts:
            length = part.shape[2]
            if length and (part.data_ptr() != first + place * step or part.shape[:2] != own.shape[:2]):
                return False
            place += length
        return place == self.used

    def append(self, new: KeysValues) -> bool:
        """Write `new` behind what is there, if there is room for it."""
        total = self.used + new.keys.shape[2]
        if total > self.tensors.keys.shape[2]:
            return False
        for tensor, part in zip(self.tensors, new, strict=True):
            tensor[:, :, self.used : total] = part
        self.used = total
        return True

    @classmethod
    def copy_of(cls, *parts: KeysValues, room: int = 0) -> GrowingMemory:
        """Memory that holds a copy of the parts, with room for `room` more and some to spare."""
        batch_size, heads, _, head_dim = parts[0].keys.shape
        length = sum(part.keys.shape[2] for part in parts)
        allocated = length + room + max(_SPARE_ROOM, length // 4)
        memory = cls(KeysValues(*(t.new_empty(batch_size, heads, allocated, head_dim) for t in parts[0])), 0)
        for part in parts:
            memory.append(part)
        return memory


class CasaLayerMixin:
    """A cache layer that also holds one decoder block's image keys/values and window text.

    Attributes:
        fusion: keys/values by name.
            "image": image columns of the fusion layer, right-aligned.
            "update": image columns by self-attention's projections, where image states are updated by attention and
            the fusion layer's own don't serve.
            "window": text from `WindowState.text_start` on, where the fusion layer has text keys that aren't those of
            self-attention.
        memory: buffers of growing keys/values, by name; "text" for those of self-attention.
        window_state: state of the windows, in the home layer only.
        block_has_text: whether the block has self-attention, which fills the layer with text.
        beside_recurrent: whether any layer of the cache has a recurrent state.
    """

    keys: torch.Tensor | None
    values: torch.Tensor | None
    fusion: dict[str, KeysValues]
    memory: dict[str, GrowingMemory]
    window_state: WindowState | None
    block_has_text: bool
    beside_recurrent: bool

    # Whether text is added behind what is there, so that rows and text can be taken away again.
    grows = False

    def extend(
        self, images: KeysValues | None, text: KeysValues | None, plan: WindowPlan, name: str = "image"
    ) -> FusionKeys:
        """Add new keys/values and return all that this call can see; only what later calls can see is stored.

        Args:
            images: keys/values of the call's new image columns; None without any.
            text: keys/values of the call's text; None where fusion has no text keys of its own.
            plan: windows of the call.
            name: entry of `fusion` that image keys/values are kept in.
        """
        if images is not None and text is not None and self.grows and not torch.is_grad_enabled():
            return self._extend_joined(images, text, plan)
        stored = None if text is None else self._append_joined(text)
        all_text = None if text is None else self._extend_text(text, plan, appended=stored is not None)
        if images is not None or plan.num_dropped_text:
            stored = None  # what is stored has changed since
        return FusionKeys(self._extend_images(name, images, plan), all_text, stored)

    def _extend_joined(self, images: KeysValues, text: KeysValues, plan: WindowPlan) -> FusionKeys:
        """The same where both are new and none is read by a backward pass: copied once for this call, and what stays
        once more into memory of its own."""
        stored = self.fusion.get("image") if plan.state.image_columns else None
        parts = [part for part in (stored, images, self.fusion.get("window"), text) if part is not None]
        everything = parts[0].append(*parts[1:])
        all_images = everything.between(0, plan.num_columns)
        all_text = everything.between(plan.num_columns, everything.keys.shape[2])
        kept = KeysValues(*(plan.kept(tensor) for tensor in all_images))
        self._join(kept, all_text.between(plan.num_dropped_text, all_text.keys.shape[2]))
        return FusionKeys(all_images, all_text, everything)

    def _extend_images(self, name: str, new: KeysValues | None, plan: WindowPlan) -> KeysValues | None:
        # Without columns of its own, what a static layer holds is left over from an earlier use.
        stored = self.fusion.get(name) if plan.state.image_columns else None
        if new is None:
            return stored
        everything = new if stored is None else stored.append(new)
        self._store_images(name, KeysValues(*(plan.keep(tensor) for tensor in everything)), plan)
        return everything

    def _store_images(self, name: str, kept: KeysValues, plan: WindowPlan) -> None:
        self.fusion[name] = kept
        if name == "image" and "window" in self.fusion and not torch.is_grad_enabled():
            self._join(kept, self.fusion["window"])

    def _extend_text(self, new: KeysValues, plan: WindowPlan, appended: bool) -> KeysValues:
        """All text of the windows; that of closed windows is dropped."""
        if not appended:
            self.fusion["window"] = self._appended("window", self.fusion.get("window"), new)
        everything, dropped = self.fusion["window"], plan.num_dropped_text
        if dropped:
            # A copy of the rest, so that the dropped part's memory is freed.
            self.fusion["window"] = KeysValues(*(tensor[:, :, dropped:].clone() for tensor in everything))
            self.memory.pop("window", None)
        return everything

    def _join(self, images: KeysValues, window: KeysValues, room: int = 0) -> GrowingMemory:
        """Bring images and window text into one piece of memory, so that a step attends to both without a copy."""
        memory = self.memory["window"] = GrowingMemory.copy_of(images, window, room=room)
        num_columns = images.keys.shape[2]
        self.fusion["image"] = memory.tensors.between(0, num_columns)
        self.fusion["window"] = memory.tensors.between(num_columns, memory.used)
        return memory

    def _append_joined(self, new: KeysValues) -> KeysValues | None:
        """[image columns ; window text ; `new`]; None if images and text aren't in one piece of memory."""
        memory, images, window = self.memory.get("window"), self.fusion.get("image"), self.fusion.get("window")
        if memory is None or images is None or window is None or torch.is_grad_enabled():
            return None
        if not memory.consists_of(images, window):
            return None
        if not memory.append(new):
            memory = self._join(images, window, room=new.keys.shape[2])
            memory.append(new)
        self.fusion["window"] = memory.tensors.between(images.keys.shape[2], memory.used)
        return memory.tensors.between(0, memory.used)

    def _appended(self, name: str, stored: KeysValues | None, new: KeysValues) -> KeysValues:
        """`stored`, if any, with `new` behind it, without a copy of `stored` where there is room for more.

        The first ones are copied too: they are views of what a block makes of all its text, queries included, which
        nobody needs any longer.
        """
        if torch.is_grad_enabled():  # a backward pass may still read what would be written behind
            return new if stored is None else stored.append(new)
        memory = self.memory.get(name)
        if stored is None:
            memory = GrowingMemory.copy_of(new)
        elif memory is None or not memory.consists_of(stored) or not memory.append(new):
            memory = GrowingMemory.copy_of(stored, room=new.keys.shape[2])
            memory.append(new)
        self.memory[name] = memory
        return memory.tensors.between(0, memory.used)

    def copied(self) -> Self:
        """A layer that holds what this one holds now, and goes its own way; they share memory that neither writes."""
        new = copy.copy(self)
        new.fusion, new.memory = dict(self.fusion), {}
        return new

    def store_state(self, state: WindowState) -> None:
        """Remember the windows; in the home layer."""
        self.window_state = state

    def get_seq_length(self) -> int | torch.Tensor:
        if self._without_text and self.window_state is not None:
            return self.window_state.length
        return super().get_seq_length()  # type: ignore[misc]

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` works on this layer; `generate` asks before it relies on it."""
        return self.grows and not self.beside_recurrent

    def crop(self, tokens_to_remove: int) -> None:
        self._require_dynamic("crop")
        removed = self._number_to_remove(tokens_to_remove)
        # What may refuse comes first: a refused crop leaves the cache as it was.
        state = None if self.window_state is None else self.window_state.crop(removed)
        if not self._without_text:
            super().crop(tokens_to_remove)  # type: ignore[misc]
        self.window_state = state
        if removed and "window" in self.fusion:
            window = self.fusion["window"]
            self.fusion["window"] = window.between(0, max(0, window.keys.shape[2] - removed))

    def require_replaceable(self, operation: str) -> None:
        """Refuse an operation that reads and replaces what is held, before anything has changed: a quantized layer
        can't do it."""
        self._require_dynamic(operation)

    def content(self, state: WindowState) -> dict[str, KeysValues]:
        """Keys/values by name, as in `fusion`, and "text" for those of self-attention.

        Args:
            state: windows of the cache, growing, as `WindowState.compact` gives them.
        """
        own = {} if self.keys is None or self.values is None else {"text": KeysValues(self.keys, self.values)}
        return own | self.fusion

    def load(self, content: dict[str, KeysValues], state: WindowState, joined: bool) -> None:
        """Hold the `content` of another layer, in an empty one.

        Args:
            content: keys/values, which become this layer's own.
            state: windows that they belong to, growing.
            joined: whether images and window text are to stand in one piece of memory.
        """
        own = dict(content)
        if (text := own.pop("text", None)) is not None:
            self.lazy_initialization(*text)  # type: ignore[attr-defined]
            self.keys, self.values = text
        self.fusion = own
        if joined and {"image", "window"} <= own.keys():
            self._join(own["image"], own["window"])

    def select_rows(self, rows: Sequence[int | None]) -> None:
        """Hold these rows, in their order; None stands for an empty one."""
        self._require_dynamic("select_rows")
        self._map_rows(lambda tensor: selected_rows(tensor, rows))
        if not self._without_text:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = selected_rows(self.keys, rows), selected_rows(self.values, rows)
        if self.window_state is not None:
            self.window_state = self.window_state.select_rows(rows)

    def replace_text(self, text: KeysValues | None, fusion: dict[str, KeysValues], length: int) -> None:
        """Hold other keys/values from now on, those of `length` cache positions.

        Args:
            text: keys and values of self-attention; None in a layer without.
            fusion: keys and values of the fusion layer, as in `fusion`.
            length: number of cache positions.
        """
        self.memory = {}
        if text is not None:
            self.keys, self.values = text
        self.fusion = fusion
        if "image" in fusion and "window" in fusion and not torch.is_grad_enabled():
            self._join(fusion["image"], fusion["window"])

    def reset(self) -> None:
        self._reset_fusion()
        super().reset()  # type: ignore[misc]

    def _reset_fusion(self) -> None:
        self.fusion, self.memory = {}, {}
        self.window_state = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map_rows(lambda tensor: tensor[beam_idx.to(tensor.device)])
        if self.window_state is not None:
            self.window_state = self.window_state.select(beam_idx)
        if not self._without_text:
            super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._require_dynamic("batch_select_indices")
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])
        if self.window_state is not None:
            self.window_state = self.window_state.select(indices)
        if not self._without_text:
            super().batch_select_indices(indices)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._require_dynamic("batch_repeat_interleave")
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        if self.window_state is not None:
            self.window_state = self.window_state.repeat_interleave(repeats)
        if not self._without_text:
            super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def append_empty_rows(self, number: int) -> None:
        """Add rows without text and images to those that are held."""
        self._require_dynamic("append_empty_rows")

        def longer(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor.new_zeros(number, *tensor.shape[1:])])

        self._map_rows(longer)
        if not self._without_text:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = longer(self.keys), longer(self.values)
        if self.window_state is not None:
            self.window_state = self.window_state.append_empty_rows(number)

    def _require_dynamic(self, operation: str) -> None:
        """Refuse what Transformers implements for growing, unquantized layers only, before anything has changed."""
        if not self.grows:
            raise NotImplementedError(
                f"{operation} isn't supported by a {type(self).__name__}, a layer of a static or quantized "
                "cache; use a DynamicCache."
            )

    def _number_to_remove(self, tokens_to_remove: int | torch.Tensor) -> int:
        """How many tokens `crop` is asked to take back.

        Raises:
            NotImplementedError: where no text can be taken back, before any layer has changed.
            ValueError: for a length to keep, which earlier versions of Transformers took.
        """
        removed = -int(tokens_to_remove)  # a tensor, from some versions of `generate`
        if removed < 0:
            raise ValueError(
                f"crop({tokens_to_remove}) must get the number of tokens to remove as a negative number; a length "
                "to keep isn't supported, because blocks without self-attention don't know theirs."
            )
        if removed and self.beside_recurrent:
            raise NotImplementedError(
                "crop isn't possible with blocks of linear attention, from whose recurrent state text can't be taken "
                "back. Keep a copy of the cache (copy.deepcopy) from before the text that may have to go."
            )
        return removed

    @property
    def _without_text(self) -> bool:
        """Whether the layer holds no text, as in blocks whose self-attention is replaced. `generate` may have given
        it room for some all the same."""
        return self.keys is None or not self.block_has_text

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change the rows of what isn't text."""
        self.fusion = {name: KeysValues(*map(change, stored)) for name, stored in self.fusion.items()}
        self.memory = {}


class CasaDynamicLayer(CasaLayerMixin, DynamicLayer):
    """A growing cache layer with fusion state.

    Text keys/values are appended to memory that has room for more, so that a decoding step doesn't copy all earlier
    text.
    """

    grows = True

    def reset(self) -> None:
        # Transformers 5.17 zeroes a dynamic layer without shortening it.
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stored = None
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            stored = KeysValues(self.keys, self.values)
        else:
            self.lazy_initialization(key_states, value_states)
        everything = self._appended("text", stored, KeysValues(key_states, value_states))
        self.keys, self.values = everything
        return everything


class FixedFusion(CasaLayerMixin):
    """Fusion state of a preallocated cache, preallocated too.

    Images have columns of their own, `WindowState.reserved_columns` of them unless a window needs more, and window
    text has the cache positions of the text. All are written in place, so that a compiled decoding step meets the same
    shapes and addresses from token to token, window to window and image size to image size.
    """

    max_cache_len: int

    def _store_images(self, name: str, kept: KeysValues, plan: WindowPlan) -> None:
        _write_last(self._allocated(name, kept.keys, plan.next_state.image_columns), kept)

    def _append_joined(self, new: KeysValues) -> None:
        return None

    def _extend_text(self, new: KeysValues, plan: WindowPlan, appended: bool) -> KeysValues:
        everything = self._allocated("window", new.keys, self.max_cache_len)
        cache_positions = torch.arange(new.keys.shape[2], device=new.keys.device) + plan.state.length
        for tensor, part in zip(everything, new, strict=True):
            tensor.index_copy_(2, cache_positions, part)
        return everything.between(*plan.text_range)

    @property
    def is_croppable(self) -> bool:
        return not self.beside_recurrent

    def require_replaceable(self, operation: str) -> None:
        pass

    def copied(self) -> Self:
        return copy.deepcopy(self)  # all of it is written in place

    def content(self, state: WindowState) -> dict[str, KeysValues]:
        """See `CasaLayerMixin.content`; the parts are views of what is held."""
        assert isinstance(state.length, int)
        text_start = {"text": 0, "window": state.text_start}
        held = super().content(state)
        if not self.block_has_text:
            held.pop("text", None)
        content = {}
        for name, stored in held.items():
            if name in text_start:
                if text_start[name] < state.length:
                    content[name] = stored.between(text_start[name], state.length)
            elif state.image_columns:
                length = stored.keys.shape[2]
                content[name] = stored.between(length - state.image_columns, length)
        return content

    def load(self, content: dict[str, KeysValues], state: WindowState, joined: bool) -> None:
        """See `CasaLayerMixin.load`; the state is that of the cache."""
        for name, new in content.items():
            if name == "text":
                self._load_text(new)
            elif name == "window":
                room = self._allocated(name, new.keys, self.max_cache_len)
                _write_first(room.between(state.text_start, self.max_cache_len), new)
            else:
                _write_last(self._allocated(name, new.keys, state.image_columns), new)

    def _load_text(self, text: KeysValues) -> None:
        raise NotImplementedError  # of layers without text none is saved

    def moment(self, images: bool) -> dict[str, Any]:
        """What a forward writes over, for `return_to`: it only adds behind the text.

        Args:
            images: whether the forward may bring images.
        """
        names = self.fusion.keys() - {"window"} if images else ()
        return {
            "images": {name: KeysValues(*(tensor.clone() for tensor in self.fusion[name])) for name in names},
            "windows": None if self.window_state is None else self.window_state.moment(),
        }

    def return_to(self, moment: dict[str, Any]) -> None:
        """Hold what was held at a `moment`, in place."""
        for name, images in moment["images"].items():
            _write_last(self._allocated(name, images.keys, images.keys.shape[2]), images)
        windows = moment["windows"]
        self.window_state = None if windows is None else self.window_state.assign(windows)  # type: ignore[union-attr]

    def select_rows(self, rows: Sequence[int | None]) -> None:
        """See `CasaLayerMixin.select_rows`; with as many rows as there are, addresses stay."""
        self.fusion = {
            name: KeysValues(*(with_rows(tensor, rows) for tensor in stored)) for name, stored in self.fusion.items()
        }
        if self.window_state is not None:
            self.window_state = self.window_state.select_rows(rows)

    def replace_text(self, text: KeysValues | None, fusion: dict[str, KeysValues], length: int) -> None:
        for name, new in fusion.items():
            _write_first(self.fusion[name], new)

    def allocate_images(self, name: str, like: torch.Tensor, num_columns: int) -> None:
        """Have room for so many image tokens in each row.

        Args:
            name: entry of `fusion`.
            like: (batch, kv_heads, any, head_dim) keys as they will be.
            num_columns: number of image tokens.
        """
        self._allocated(name, like, num_columns)

    def _allocated(self, name: str, like: torch.Tensor, length: int) -> KeysValues:
        """Keys/values of this length: those that are there, or new ones of zeros."""
        held = self.fusion.get(name)
        if held is None or held.keys.shape[2] != length or held.keys.shape[0] != like.shape[0]:
            shape = (*like.shape[:2], length, like.shape[3])
            held = KeysValues(*(at_fixed_address(like.new_zeros(shape)) for _ in range(2)))
            self.fusion[name] = held
        return held

    def store_state(self, state: WindowState) -> None:
        if self.window_state is None:
            self.window_state = state if state.capacity is not None else state.fixed(self.max_cache_len)
        else:
            self.window_state = self.window_state.assign(state)

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for stored in self.fusion.values():
            for tensor in stored:
                tensor.copy_(change(tensor))

    def _reset_fusion(self) -> None:
        """Forget what was seen, and keep the memory for the next use."""
        if self.window_state is not None:
            state = self.window_state
            empty = WindowState.empty(state.batch_size, state.valid.device)
            pinned = None if state.pinned is None else torch.zeros_like(state.pinned)
            self.window_state = state.assign(replace(empty, image_columns=state.image_columns, pinned=pinned))


def _write_first(held: KeysValues, new: KeysValues) -> None:
    """Write over the first of what is held. What is behind is seen by nobody, and written over later."""
    for tensor, part in zip(held, new, strict=True):
        tensor[:, :, : part.shape[2]].copy_(part)


def _write_last(held: KeysValues, new: KeysValues) -> None:
    """Write over the last of what is held."""
    for tensor, part in zip(held, new, strict=True):
        tensor[:, :, tensor.shape[2] - part.shape[2] :].copy_(part)


def with_rows(tensor: torch.Tensor, rows: Sequence[int | None]) -> torch.Tensor:
    """The tensor (rows, ...) with these rows written into it; a new one if their number is another."""
    if len(rows) != len(tensor):
        return at_fixed_address(selected_rows(tensor, rows))
    changed = [number for number, row in enumerate(rows) if row != number]
    if changed:
        tensor[changed] = selected_rows(tensor, [rows[number] for number in changed])
    return tensor


class CasaStaticLayer(FixedFusion, StaticLayer):
    """A preallocated cache layer with preallocated fusion state."""

    def crop(self, tokens_to_remove: int) -> None:
        # Keys and values stay; what comes next is written over them.
        removed = self._number_to_remove(tokens_to_remove)
        if self.window_state is not None:
            self.window_state = self.window_state.assign(self.window_state.growing().crop(removed))
        if not self._without_text:
            self.cumulative_length.sub_(removed)

    def replace_text(self, text: KeysValues | None, fusion: dict[str, KeysValues], length: int) -> None:
        super().replace_text(text, fusion, length)
        if text is not None:
            assert self.keys is not None and self.values is not None
            _write_first(KeysValues(self.keys, self.values), text)
            self.cumulative_length.fill_(length)

    def moment(self, images: bool) -> dict[str, Any]:
        length = self.cumulative_length.clone() if self.is_initialized else None
        return super().moment(images) | {"length": length}

    def return_to(self, moment: dict[str, Any]) -> None:
        super().return_to(moment)
        if moment["length"] is not None:
            self.cumulative_length.copy_(moment["length"])
        elif self.is_initialized:
            self.__init__(self.max_cache_len)  # type: ignore[misc]

    def _load_text(self, text: KeysValues) -> None:
        self.lazy_initialization(*text)
        assert self.keys is not None and self.values is not None
        _write_first(KeysValues(self.keys, self.values), text)
        self.cumulative_length.fill_(text.keys.shape[2])

    def select_rows(self, rows: Sequence[int | None]) -> None:
        super().select_rows(rows)
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = with_rows(self.keys, rows), with_rows(self.values, rows)
            self.batch_size = len(rows)


class _LayerOfText(CacheLayerMixin):
    """A cache layer whose text another layer keeps."""

    is_compileable = False
    is_sliding = False

    def __init__(self, text: Any):
        self.text = text

    keys = property(lambda self: self.text.keys)
    values = property(lambda self: self.text.values)
    is_initialized = property(lambda self: self.text.is_initialized)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.text.lazy_initialization(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.text.update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.text.get_mask_sizes(query_length)

    def get_seq_length(self) -> int | torch.Tensor:
        return self.text.get_seq_length()

    def get_max_length(self) -> int:
        return self.text.get_max_length()

    def offload(self) -> None:
        self.text.offload()

    def prefetch(self) -> None:
        self.text.prefetch()

    def reset(self) -> None:
        # What has been quantized is left behind, where Transformers 5.17 keeps it.
        self.text.keys = self.text.values = None
        self.text.is_initialized = False
        self.text.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.text.reorder_cache(beam_idx)


class CasaWrappedLayer(CasaLayerMixin, _LayerOfText):
    """A layer whose text another growing layer keeps in its own way, such as a quantized one; images and window text
    are kept as they are."""

    def copied(self) -> CasaWrappedLayer:
        new = super().copied()
        new.text = copy.copy(self.text)
        return new
