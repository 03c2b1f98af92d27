# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a stream and whoever runs its forwards tell each other: a `CasaStream` runs its own, a `CasaStreamBatch` those
of many streams at once."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList

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
        processors: logits processors of the next token.
        history: and the text that they look at.
    """

    ids: list[int]
    images: dict[str, torch.Tensor]
    processors: LogitsProcessorList
    history: History


# What a stream does: it yields events, and the forwards that it needs, for which it is sent the (1, 1) next token, on
# the CPU.
Steps = Generator[CaptionEvent | Forward, torch.Tensor, None]


class History:
    """The last tokens of a text, for logits processors: (1, length) `ids` on a device, -1 before its beginning."""

    def __init__(self, length: int, device: torch.device):
        self.ids = torch.full((1, length), -1, dtype=torch.long, device=device)

    def add(self, tokens: torch.Tensor) -> None:
        """Append (1, tokens) ids, on any device."""
        length = self.ids.shape[1]
        tokens = tokens.to(self.ids.device, non_blocking=True)
        self.ids = torch.cat([self.ids, tokens], dim=1)[:, tokens.shape[1] :][:, -length:] if length else self.ids

    def tokens(self) -> torch.Tensor:
        """(1, tokens) the ids since the beginning."""
        return self.ids[:, self.ids[0] >= 0]


def on_device(inputs: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs of a forward: ids and pixels on the device, without waiting for it, and the rest, which the model looks
    at on the host, where it is."""
    return {
        name: value.to(device, non_blocking=True) if name in ("input_ids", "pixel_values") else value
        for name, value in inputs.items()
    }
