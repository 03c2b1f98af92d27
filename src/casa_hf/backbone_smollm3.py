# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""SmolLM3: some of its blocks attend without positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .backbone import Backbone, Projections, SelfAttention

if TYPE_CHECKING:
    import torch


class SmolLM3Projections(Projections):
    """Projections that leave queries and keys as they are in blocks without positions."""

    def __init__(self, backbone: Backbone, self_attn: SelfAttention):
        super().__init__(backbone, self_attn)
        of_block: Any = self_attn
        self.rotates = bool(of_block.use_rope)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().rotate(query, key, rotary) if self.rotates else (query, key)
