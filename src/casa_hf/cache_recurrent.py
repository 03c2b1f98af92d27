# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Cache layers of blocks of linear attention, which keep no text but a state of fixed size, from which nothing can be
taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import nn
from transformers.cache_utils import LinearAttentionLayer

from .cache_layers import CasaLayerMixin, FixedFusion, with_rows


class _RecurrentState(CasaLayerMixin):
    """What layers of linear attention have in common: no text, and nothing to take back."""

    keys = values = None
    conv_states: dict[int, torch.Tensor | None]
    recurrent_states: dict[int, torch.Tensor | None]

    def activate_past_recording(self) -> None:
        """Nothing is recorded for `crop`, which is refused."""

    def crop(self, tokens_to_remove: int) -> None:
        self._number_to_remove(tokens_to_remove)

    @property
    def states(self) -> list[torch.Tensor]:
        """Inputs of the convolution and the memory of the linear attention; empty before the first text."""
        held = (*self.conv_states.values(), *self.recurrent_states.values())
        return [state for state in held if state is not None]

    def load_states(self, conv: torch.Tensor, recurrent: torch.Tensor) -> None:
        """Hold the `states` of another layer from now on, in an empty one."""
        own: Any = self
        own.update_conv_state(conv)
        own.update_recurrent_state(recurrent)


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


class CasaStaticLinearLayer(_RecurrentState, FixedFusion, LinearAttentionLayer):
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
            kept: Any = self.conv_states[state_idx]
            kept.copy_(_last_inputs(inputs, kept.shape[-1], conv_states.shape[-1], num_tokens))
        return inputs

    def moment(self, images: bool) -> dict[str, Any]:
        """See `FixedFusion.moment`; with copies of the states."""
        return super().moment(images) | {"states": [state.clone() for state in self.states]}

    def return_to(self, moment: dict[str, Any]) -> None:
        """See `FixedFusion.return_to`."""
        super().return_to(moment)
        if not moment["states"]:
            self.reset()
        for state, earlier in zip(self.states, moment["states"], strict=False):
            state.copy_(earlier)

    def select_rows(self, rows: Sequence[int | None]) -> None:
        super().select_rows(rows)
        for states in (self.conv_states, self.recurrent_states):
            states.update({index: with_rows(state, rows) for index, state in states.items() if state is not None})

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_rows(change)
        for state in self.states:
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
