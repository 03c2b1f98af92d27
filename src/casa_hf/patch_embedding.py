# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The patch embedding of a vision tower: of normalised patches, as the stock processors make them, and of 8-bit ones.

8-bit patches hold the pixels of a resized image as they are, from 0 to 255, and once: the stock ones, two frames in
float32, take eight times as many bytes. What the stock processors do to pixels is linear, and so is the embedding.
With scale s = 1 / (255 std) and shift m = mean / std by channel, and the frames of a temporal patch counted by t,

    sum_t W_t (s u - m) + b = (s sum_t W_t) (u - 128) + (b + sum_t W_t (128 s - m))

The right-hand side is what folding makes of the weights. u - 128 is exact in every floating-point type, and keeps the
constant part of the sum small, so that rounding is no larger than in the stock module, in half precision too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .own_copies import is_split

LEVELS = 255
_MIDDLE = 128


class PatchProjection(nn.Conv3d):
    """The patch embedding of a vision tower, as the matrix product that it is: its stride is its kernel size.

    The convolution itself is many times slower on some versions of torch.
    """

    @classmethod
    def like(cls, convolution: nn.Conv3d) -> PatchProjection:
        """The same projection; it takes over the parameters.

        Raises:
            ValueError: if patches overlap or leave gaps, so that the convolution is more than one product.
        """
        time, height, width = convolution.kernel_size
        if convolution.stride != convolution.kernel_size:
            raise ValueError(
                f"The patch embedding has kernel size {convolution.kernel_size} and stride {convolution.stride}; they "
                "must be equal."
            )
        projection = cls(
            convolution.in_channels,
            convolution.out_channels,
            (time, height, width),
            stride=(time, height, width),
            bias=convolution.bias is not None,
            device="meta",
        )
        projection.weight, projection.bias = convolution.weight, convolution.bias
        return projection

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.shape[2:] != self.kernel_size:
            return super().forward(input)
        patches = nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)
        return patches[:, :, None, None, None]


class PatchEmbedding(nn.Module):
    """The patch embedding of a vision tower, in the place of the stock module.

    Args:
        convolution: the stock module's convolution, whose parameters it takes over.
        mean: mean by which images are normalised, by channel; of values from 0 to 1.
        std: standard deviation by which images are normalised, by channel.

    Attributes:
        proj: projection of normalised patches.
        num_pixels: numbers of one frame of a patch: channels x patch size x patch size.
        temporal_patch_size: number of frames of a patch.
    """

    # What folding makes of the weights, derived from them and so never saved: (dim, pixels) for a patch whose frames
    # are one, (dim, frames x pixels) for one of different frames, and (dim,) for both.
    folded_frame: torch.Tensor | None
    folded_frames: torch.Tensor | None
    folded_bias: torch.Tensor | None

    def __init__(self, convolution: nn.Conv3d, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.proj: Any = PatchProjection.like(convolution)
        self.temporal_patch_size, height, width = convolution.kernel_size
        self.channels, self.pixels_per_channel = convolution.in_channels, height * width
        self.num_pixels = self.channels * self.pixels_per_channel
        self._kernel_size = convolution.kernel_size
        self._normalization: list[tuple[float, ...]] = [tuple(mean), tuple(std)]
        for name in ("folded_frame", "folded_frames", "folded_bias"):
            self.register_buffer(name, None, persistent=False)
        self._is_folded = False
        self._folded_from: tuple[tuple[int, int, int], ...] | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Embed patches.

        Args:
            hidden_states: (patches, channels x frames x patch size x patch size) normalised patches in floating-point
                numbers; or 8-bit ones of the type uint8, all with their frames or all with the one that they have
                twice: (patches, channels x patch size x patch size).

        Returns:
            (patches, dim) embedded patches.
        """
        if hidden_states.dtype != torch.uint8:
            return self._project(hidden_states)
        if self._uses_folded():
            is_frame = hidden_states.shape[1] == self.num_pixels
            weight = self.folded_frame if is_frame else self.folded_frames
            assert weight is not None
            return nn.functional.linear(hidden_states.to(weight.dtype).sub_(_MIDDLE), weight, self.folded_bias)
        return self._project(self._normalized(hidden_states))

    def fold(self) -> None:
        """Fold normalisation, and frames that are one, into weights of their own, for 8-bit patches in evaluation.

        The weights themselves stay as they are. Where they change, it is done again; of changes in evaluation mode
        that autograd isn't told of (`weight.data.mul_(2)`), nothing is known before `unfold` and `fold`.

        Raises:
            ValueError: if they aren't at hand.
        """
        if not self.can_fold:
            raise ValueError(
                "The patch embedding can't be folded: its weights are split over devices, offloaded, or replaced by "
                "an adapter's. Leave it as it is; 8-bit patches are normalised on the device then."
            )
        if not self._is_folded or self._folded_from != self._origin():
            self._is_folded = True
            self._fold()

    def unfold(self) -> None:
        """Undo `fold`."""
        self._is_folded, self._folded_from = False, None
        self.folded_frame = self.folded_frames = self.folded_bias = None

    @property
    def can_fold(self) -> bool:
        """Whether `fold` has what it needs."""
        if not isinstance(self.proj, PatchProjection):
            return False
        weight = self.proj.weight
        return weight.is_floating_point() and not (
            weight.is_meta or is_split(weight) or hasattr(weight, "full_tensor")
        )

    def train(self, mode: bool = True) -> PatchEmbedding:
        """As in torch. Training changes weights, and not every engine lets this be seen of them."""
        if mode:
            self._folded_from = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> PatchEmbedding:
        """As in torch, for `to` and the like; what was folded isn't converted, but made from what the weights are."""
        super()._apply(fn, recurse)
        if self._is_folded and self.can_fold:
            self._fold()
        return self

    def _uses_folded(self) -> bool:
        """Whether 8-bit patches are embedded by the folded weights, which are made again if they are too old."""
        if not self._is_folded or self.training or not self.can_fold:
            return False
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._weights()):
            return False
        if torch.compiler.is_compiling():
            return self._folded_from is not None
        if self._folded_from != self._origin():
            self._fold()
        return True

    def _origin(self) -> tuple[tuple[int, int, int], ...]:
        """What the folded weights are made from: parameters, where their numbers are, and how often they changed."""
        return tuple((id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in self._weights())

    def _weights(self) -> list[torch.Tensor]:
        """Those that are folded."""
        return [self.proj.weight] if self.proj.bias is None else [self.proj.weight, self.proj.bias]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fold(self) -> None:
        weight, bias = self.proj.weight.detach(), self.proj.bias
        double = weight.cpu().double().flatten(3)  # (dim, channels, frames, pixels)
        mean, std = (
            torch.tensor(by_channel, dtype=torch.float64)[:, None, None] for by_channel in self._normalization
        )
        scale = 1 / (LEVELS * std)
        constant = (double * (_MIDDLE * scale - mean / std)).sum((1, 2, 3))
        if bias is not None:
            constant = constant + bias.detach().cpu().double()
        scaled = double * scale
        made = {
            "folded_frame": scaled.sum(2).flatten(1),
            "folded_frames": scaled.flatten(1),
            "folded_bias": constant,
        }
        for name, value in made.items():
            held = getattr(self, name)
            if held is not None and (held.device, held.dtype) == (weight.device, weight.dtype):
                held.copy_(value)  # where recorded kernels look for it
            else:
                setattr(self, name, value.to(weight.device, weight.dtype))
        self._folded_from = self._origin()

    def _project(self, patches: torch.Tensor) -> torch.Tensor:
        patches = patches.view(-1, self.channels, *self._kernel_size)
        return self.proj(patches.to(self.proj.weight.dtype)).flatten(1)

    def _normalized(self, levels: torch.Tensor) -> torch.Tensor:
        """8-bit patches as the stock processors would have made them, in at least float32."""
        frames = levels.to(torch.promote_types(torch.float32, self.proj.weight.dtype))
        frames = frames.unflatten(1, (self.channels, -1, self.pixels_per_channel))
        channels = [
            (channel - LEVELS * mean) / (LEVELS * std)
            for channel, mean, std in zip(frames.unbind(1), *self._normalization, strict=True)
        ]
        return torch.stack(channels, 1).expand(-1, -1, self.temporal_patch_size, -1).flatten(1)


def check_patches(pixel_values: torch.Tensor, embedding: PatchEmbedding) -> None:
    """Check the form of patches.

    Args:
        pixel_values: (patches, patch dim) as the model was given them.
        embedding: patch embedding of the vision tower.

    Raises:
        ValueError: if they are neither normalised patches nor 8-bit ones of one frame or of all.
    """
    whole = embedding.num_pixels * embedding.temporal_patch_size
    is_8_bit = pixel_values.dtype == torch.uint8
    widths = [whole, embedding.num_pixels] if is_8_bit else [whole]
    if pixel_values.ndim != 2 or pixel_values.shape[1] not in widths:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)} and dtype {pixel_values.dtype}; expected (patches, "
            f"{' or '.join(map(str, widths))}). Pass them as the processor returned them."
        )
    if not is_8_bit and not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values has dtype {pixel_values.dtype}; expected normalised patches in floating-point numbers, or "
            "pixels from 0 to 255 of dtype uint8. Pass them as the processor returned them."
        )
