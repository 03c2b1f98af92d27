# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a stream and whoever runs its forwards tell each other: a `CasaStream` runs its own, a `CasaStreamBatch` those
of many streams at once."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..temporal_patches import concatenate_patches
from ..transfers import pinned
from .drawing import History, TokenRules
from .events import CaptionEvent


@dataclass(frozen=True)
class ShownFrame:
    """A frame that is to be shown, or waits for others to share an image with.

    Attributes:
        index: number of the frame in its stream.
        timestamp: time at which it was taken, in seconds.
        images: its `pixel_values` and `image_grid_thw`.
    """

    index: int
    timestamp: float
    images: dict[str, torch.Tensor]

    def fits(self, other: ShownFrame) -> bool:
        """Whether it has the size of another one."""
        return torch.equal(self.images["image_grid_thw"], other.images["image_grid_thw"])


@dataclass(frozen=True)
class Forward:
    """A forward that a stream has to wait for.

    Attributes:
        ids: new text.
        images: image inputs with it, as for a batch of this row alone.
        rules: rules that the next token is chosen by.
        history: text that they look at.
    """

    ids: list[int]
    images: dict[str, torch.Tensor]
    rules: TokenRules
    history: History


# What a stream does: it yields events, and the forwards that it needs, for which it is sent the next token.
Steps = Generator[CaptionEvent | Forward, int, None]


def on_device(inputs: Mapping[str, torch.Tensor | Sequence[torch.Tensor]], device: torch.device) -> dict[str, Any]:
    """Inputs of a forward: ids and pixels on the device, without waiting for it, and the rest, which the model looks
    at on the host, where it is.

    Args:
        inputs: inputs; `pixel_values` may be a list, of each image, which is copied image by image and joined there.
        device: device of the model.
    """
    moved: dict[str, Any] = dict(inputs)
    moved["input_ids"] = moved["input_ids"].to(device, non_blocking=True)
    if (pixels := moved.get("pixel_values")) is not None:
        images = [pixels] if isinstance(pixels, torch.Tensor) else pixels
        moved["pixel_values"] = concatenate_patches(
            [pinned(image, device).to(device, non_blocking=True) for image in images]
        )
    return moved
