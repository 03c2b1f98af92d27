# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Helium: channels that rotate together are neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .backbone import Projections

if TYPE_CHECKING:
    import torch


class HeliumProjections(Projections):
    """Projections in which channels 2i and 2i + 1 rotate together, by the i-th entry of cos and sin."""

    def tables(self, rotary: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (table.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for table in rotary)
        return super().tables((cos, sin))

    def _swapped(self, heads: torch.Tensor) -> torch.Tensor:
        return heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)

    def _signed(self, sin: torch.Tensor) -> torch.Tensor:
        signed = sin.clone()
        signed[..., ::2].neg_()
        return signed
