# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The decoding state of fusion layers, inside whatever cache the caller uses.

`prepare_cache` gives each layer of a Transformers `Cache` the fusion state; what the layer holds stays. Everything
that `generate` does to a cache (reorder beams, crop rejected candidates, repeat or select rows, reset) reaches the
layers one by one and so reaches this state too. One of them, the `home_layer`, also owns the `WindowState`.

Blocks of linear attention keep no text but a state of fixed size, from which nothing can be taken back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple, Self

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

from .windows import WindowPlan, WindowState, moved

# What a block's own attention keeps in a cache: keys/values of the text, the recurrent state of linear attention, or
# nothing where self-attention is replaced.
Kept = Literal["text", "recurrent", "nothing"]

# Room for further tokens that growing keys/values are given at least.
_SPARE_ROOM = 64


class KeysValues(NamedTuple):
    """Keys and values, each (batch, kv_heads, length, head_dim)."""

    keys: torch.Tensor
    values: torch.Tensor

    def append(self, other: KeysValues) -> KeysValues:
        """Both, one after the other."""
        return KeysValues(torch.cat([self.keys, other.keys], dim=2), torch.cat([self.values, other.values], dim=2))

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
        place = 0
        for part in parts:
            here, length = self.tensors.keys[:, :, place:], part.keys.shape[2]
            if length and (here.data_ptr() != part.keys.data_ptr() or here.shape[:2] != part.keys.shape[:2]):
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
        memory = cls(KeysValues(*(t.new_zeros(batch_size, heads, allocated, head_dim) for t in parts[0])), 0)
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
        stored = None if text is None else self._append_joined(text)
        all_text = None if text is None else self._extend_text(text, plan, appended=stored is not None)
        if images is not None or plan.num_dropped_text:
            stored = None  # what is stored has changed since
        return FusionKeys(self._extend_images(name, images, plan), all_text, stored)

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
            stored = self.fusion.get("window")
            self.fusion["window"] = new if stored is None else self._appended("window", stored, new)
        everything, dropped = self.fusion["window"], plan.num_dropped_text
        if dropped:
            # A copy of the rest, so that the dropped part's memory is freed.
            self.fusion["window"] = KeysValues(*(tensor[:, :, dropped:].clone() for tensor in everything))
            self.memory.pop("window", None)
        return everything

    def _join(self, images: KeysValues, window: KeysValues, room: int = 0) -> GrowingMemory:
        """Bring images and window text into one piece of memory, so that a step attends to both without a copy."""
        memory = self.memory["window"] = GrowingMemory.copy_of(images, window, room=room)
        self._view_joined(memory, images.keys.shape[2])
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
        return self._view_joined(memory, images.keys.shape[2])

    def _view_joined(self, memory: GrowingMemory, num_columns: int) -> KeysValues:
        everything = memory.tensors.between(0, memory.used)
        self.fusion["image"] = everything.between(0, num_columns)
        self.fusion["window"] = everything.between(num_columns, memory.used)
        return everything

    def _appended(self, name: str, stored: KeysValues, new: KeysValues) -> KeysValues:
        """`stored` with `new` behind it, without a copy of `stored` where there is room for more."""
        if torch.is_grad_enabled():  # a backward pass may still read what would be written behind
            return stored.append(new)
        memory = self.memory.get(name)
        if memory is None or not memory.consists_of(stored) or not memory.append(new):
            memory = self.memory[name] = GrowingMemory.copy_of(stored, room=new.keys.shape[2])
            memory.append(new)
        return memory.tensors.between(0, memory.used)

    def copied(self) -> Self:
        """A layer that shares what this one holds now, and goes its own way."""
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

    def require_evictable(self) -> None:
        """Refuse what text can't be evicted from, before anything has changed."""
        self._require_dynamic("evict_text")

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
        everything = KeysValues(key_states, value_states)
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            everything = self._appended("text", KeysValues(self.keys, self.values), everything)
        else:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = everything
        return everything


class _FixedFusion(CasaLayerMixin):
    """Fusion state of a preallocated cache, preallocated too.

    Images have columns of their own, `WindowState.reserved_columns` of them unless a window needs more, and window
    text has the cache positions of the text. All are written in place, so that a compiled decoding step meets the same
    shapes and addresses from token to token, window to window and image size to image size.
    """

    max_cache_len: int

    def _store_images(self, name: str, kept: KeysValues, plan: WindowPlan) -> None:
        num_kept = kept.keys.shape[2]
        for tensor, part in zip(self._allocated(name, kept.keys, plan.next_state.image_columns), kept, strict=True):
            tensor[:, :, tensor.shape[2] - num_kept :].copy_(part)

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

    def require_evictable(self) -> None:
        pass

    def replace_text(self, text: KeysValues | None, fusion: dict[str, KeysValues], length: int) -> None:
        for name, new in fusion.items():
            _write_first(self.fusion[name], new)

    def _allocated(self, name: str, like: torch.Tensor, length: int) -> KeysValues:
        """Keys/values of this length: those that are there, or new ones of zeros."""
        held = self.fusion.get(name)
        if held is None or held.keys.shape[2] != length or held.keys.shape[0] != like.shape[0]:
            shape = (*like.shape[:2], length, like.shape[3])
            held = KeysValues(like.new_zeros(shape), like.new_zeros(shape))
            for tensor in held:
                torch._dynamo.mark_static_address(tensor)
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
            self.window_state = state.assign(replace(empty, reserved_columns=state.reserved_columns))


def _write_first(held: KeysValues, new: KeysValues) -> None:
    """Write over the first of what is held. What is behind is seen by nobody, and written over later."""
    for tensor, part in zip(held, new, strict=True):
        tensor[:, :, : part.shape[2]].copy_(part)


class CasaStaticLayer(_FixedFusion, StaticLayer):
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


class _RecurrentState(CasaLayerMixin):
    """What layers of linear attention have in common: no text, and nothing to take back."""

    keys = values = None

    def activate_past_recording(self) -> None:
        """Nothing is recorded for `crop`, which is refused."""

    def crop(self, tokens_to_remove: int) -> None:
        self._number_to_remove(tokens_to_remove)


class CasaLinearLayer(_RecurrentState, LinearAttentionLayer):
    """The cache layer of a block of linear attention: a state of fixed size, instead of keys and values of its text.

    A new tensor is stored in each call, so that copies of a cache can share what both hold. Only Transformers' own
    modules write into `conv_states`; these are never shared.

    Attributes:
        conv_states: (batch, channels, kernel size) last inputs of the convolution, under the index 0; None before the
            first text.
        recurrent_states: likewise (batch, heads, key dim, value dim) memory of the linear attention.
    """

    grows = True

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        num_tokens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Append inputs of the convolution, and keep those that the next call needs.

        Args:
            conv_states: (batch, channels, tokens) inputs of the call.
            state_idx: index of the state.
            conv_kernel_size: number of inputs to keep; None for as many as were given in the first call.
            num_tokens: (batch,) number of tokens in each row, which come first; what is behind them is padding. None
                without padding, or with padding in front of the first text alone, whose inputs are zeros.

        Returns:
            (batch, channels, at least tokens) what was kept before, if anything, and the inputs.
        """
        num_new, earlier = conv_states.shape[-1], self.conv_states[state_idx]
        kernel_size = self.conv_kernel_size[state_idx] or conv_kernel_size or num_new
        if earlier is None:
            inputs = nn.functional.pad(conv_states, (max(0, kernel_size - num_new), 0))
        else:
            inputs = torch.cat([earlier, conv_states], dim=-1)
        self.conv_states[state_idx] = _last_inputs(inputs, kernel_size, num_new, num_tokens)
        self.conv_kernel_size[state_idx] = kernel_size
        self.is_conv_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
        self.dtype, self.device = inputs.dtype, inputs.device
        return inputs

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    @property
    def states(self) -> list[torch.Tensor]:
        """Inputs of the convolution and the memory of the linear attention; empty before the first text."""
        held = (*self.conv_states.values(), *self.recurrent_states.values())
        return [state for state in held if state is not None]

    def load_states(self, conv: torch.Tensor, recurrent: torch.Tensor) -> None:
        """Hold the `states` of another layer from now on."""
        self.update_conv_state(conv)
        self.update_recurrent_state(recurrent)

    def make_writable(self) -> None:
        """Let Transformers' modules write into the state in this call: tensors of inference mode can't be changed
        outside it."""
        state = self.conv_states[0]
        if state is not None and state.is_inference() and not torch.is_inference_mode_enabled():
            self.conv_states[0] = state.clone()

    def copied(self) -> Self:
        new = super().copied()
        new.__dict__.update({name: dict(value) for name, value in vars(new).items() if isinstance(value, dict)})
        new.conv_states = {
            index: None if state is None else state.clone() for index, state in self.conv_states.items()
        }
        return new

    def reset(self) -> None:
        self._reset_fusion()
        LinearAttentionLayer.__init__(self)

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_rows(change)
        for states in (self.conv_states, self.recurrent_states):
            states.update({index: change(state) for index, state in states.items() if state is not None})


class CasaStaticLinearLayer(_RecurrentState, _FixedFusion, LinearAttentionLayer):
    """The same in a preallocated cache: states are written in place, so that their addresses stay.

    Attributes:
        max_cache_len: number of tokens that other layers of the cache have room for.
    """

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        num_tokens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """See [`CasaLinearLayer.update_conv_state`]."""
        inputs = super().update_conv_state(conv_states, state_idx, conv_kernel_size, **kwargs)
        if num_tokens is not None:
            kept = self.conv_states[state_idx]
            kept.copy_(_last_inputs(inputs, kept.shape[-1], conv_states.shape[-1], num_tokens))
        return inputs

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_rows(change)
        for state in (*self.conv_states.values(), *self.recurrent_states.values()):
            if state is not None:
                state.copy_(change(state))


def _last_inputs(
    inputs: torch.Tensor, kernel_size: int, num_new: int, num_tokens: torch.Tensor | None
) -> torch.Tensor:
    """(batch, channels, kernel_size) copy of the last inputs of each row, of (batch, channels, length).

    Of the `num_new` last, each row has (batch,) `num_tokens`, which come first.
    """
    if num_tokens is None:
        return inputs[..., -kernel_size:].clone()
    before = nn.functional.pad(inputs, (kernel_size, 0))
    first = inputs.shape[-1] - num_new + num_tokens  # counted with the padding
    index = first[:, None] + torch.arange(kernel_size, device=first.device)
    return before.gather(2, index[:, None].expand(-1, before.shape[1], -1))


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
    prepared.__dict__.update(layer.__dict__)
    return prepared


def window_state(
    cache: Cache | None,
    batch_size: int,
    device: torch.device,
    attention_mask: Any = None,
    reserved_columns: int = 0,
) -> WindowState:
    """The window state that `cache` holds, or the one before the first image.

    Args:
        cache: prepared by `prepare_cache`, or None.
        batch_size: rows of the call.
        device: device for the state's tensors.
        attention_mask: mask of the call; if it covers the cached text of another model, (batch, all tokens), it says
            which of that is padding.
        reserved_columns: image columns that a static cache keeps at least.

    Raises:
        ValueError: if the cache was filled with another batch size, or by another model in between.
    """
    if cache is None:
        return WindowState.empty(batch_size, device)
    home, length = home_layer(cache), cache.get_seq_length()
    state = home.window_state
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
    return state if state.valid.device == device else moved(state, device)


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


def cache_snapshot(cache: Cache) -> Cache:
    """A cache that holds what this growing one holds now, whatever becomes of that one.

    It shares the memory of what both hold, which is never written again; only what the original frees stays for as
    long as the snapshot lives.
    """
    snapshot = copy.copy(cache)
    snapshot.layers = [
        layer.copied() if isinstance(layer, CasaLayerMixin) else copy.copy(layer) for layer in cache.layers
    ]
    return snapshot


def cache_state(cache: Cache) -> dict[str, Any]:
    """Everything that a growing cache holds, as tensors of their own and numbers; `restore_cache` takes it back.

    Args:
        cache: prepared by `prepare_cache`, of growing layers.
    """
    layers = []
    for layer in cache.layers:
        layer._require_dynamic("cache_state")
        of_layer = {
            "text": [] if layer.keys is None else [layer.keys.clone(), layer.values.clone()],
            "fusion": {name: [tensor.clone() for tensor in stored] for name, stored in layer.fusion.items()},
            "joined": "window" in layer.memory,
        }
        if isinstance(layer, CasaLinearLayer):
            of_layer["recurrent"] = [state.clone() for state in layer.states]
        layers.append(of_layer)
    state = home_layer(cache).window_state
    windows = {field.name: getattr(state, field.name) for field in fields(state)}
    copied = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in windows.items()}
    return {"layers": layers, "windows": copied}


def restore_cache(cache: Cache, state: dict[str, Any], devices: Sequence[torch.device], kept: Sequence[Kept]) -> None:
    """Fill an empty cache with what `cache_state` gave.

    Args:
        cache: empty cache of as many growing layers as the state has.
        state: result of `cache_state`; it isn't changed and shares nothing with the cache.
        devices: devices of the decoder blocks.
        kept: what the attention of each decoder block keeps.

    Raises:
        ValueError: if what it holds has lengths that don't fit together, or isn't what the blocks keep.
    """
    prepare_cache(cache, kept)
    for number, (layer, stored, device) in enumerate(zip(cache.layers, state["layers"], devices, strict=True)):
        states = stored.get("recurrent", ())
        if (kept[number] == "text") != bool(stored["text"]) or len(states) != 2 * (kept[number] == "recurrent"):
            raise ValueError(
                f"The saved state is damaged: layer {number} has a part too few or too many. Load the whole state, as "
                "it was saved."
            )
        if states:
            layer.load_states(*(tensor.to(device, copy=True) for tensor in states))
        if stored["text"]:
            text = KeysValues(*(tensor.to(device, copy=True) for tensor in stored["text"]))
            layer.lazy_initialization(*text)
            layer.keys, layer.values = text
        layer.fusion = {
            name: KeysValues(*(tensor.to(device, copy=True) for tensor in tensors))
            for name, tensors in stored["fusion"].items()
        }
        if stored["joined"] and {"image", "window"} <= layer.fusion.keys():
            layer._join(layer.fusion["image"], layer.fusion["window"])
    windows: dict[str, Any] = {
        name: value.to(devices[0], copy=True) if isinstance(value, torch.Tensor) else value
        for name, value in state["windows"].items()
    }
    home_layer(cache).window_state = WindowState(**windows)
    _check_lengths(cache)


def _check_lengths(cache: Cache) -> None:
    state: WindowState = home_layer(cache).window_state
    state.check()
    lengths = {"text": state.length, "window": state.length - state.text_start}
    lengths |= dict.fromkeys(("image", "update"), state.image_columns)
    like: torch.Tensor | None = None
    like_states: list[torch.Tensor] = []
    for number, layer in enumerate(cache.layers):
        text = {} if layer.keys is None else {"text": KeysValues(layer.keys, layer.values)}
        for name, stored in (text | layer.fusion).items():
            for tensor in stored:
                like = tensor if like is None else like
                batch_size, heads, length, head_dim = tensor.shape
                fits = (batch_size, heads, head_dim) == (state.batch_size, like.shape[1], like.shape[3])
                fits &= length == lengths[name] and tensor.dtype == like.dtype
                _check_tensor(f"{name} of layer {number}", tensor, fits)
        if isinstance(layer, CasaLinearLayer):
            like_states = like_states or layer.states
            for tensor, other in zip(layer.states, like_states, strict=True):
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


def cache_nbytes(cache: Cache) -> dict[str, int]:
    """Bytes that a cache holds, by part; quantized text counts only as far as it isn't quantized yet.

    That is the content. A growing cache has room for more behind it: at most a quarter, at least 64 tokens.

    Returns:
        "text": keys/values of self-attention and of the current windows' text in fusion layers.
        "image": keys/values of the visible images.
        "recurrent": states of linear attention, which don't grow; only where the model has any.
    """
    held = {"text": 0, "image": 0}
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            states = (*layer.conv_states.values(), *layer.recurrent_states.values())
            held["recurrent"] = held.get("recurrent", 0) + sum(s.nbytes for s in states if s is not None)
        held["text"] += sum(tensor.nbytes for tensor in _text_of(layer) if tensor is not None)
        for name, stored in getattr(layer, "fusion", {}).items():
            held["text" if name == "window" else "image"] += sum(tensor.nbytes for tensor in stored)
    return held


def _text_of(layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Keys and values of self-attention, which layers of linear attention don't have."""
    return getattr(layer, "keys", None), getattr(layer, "values", None)
