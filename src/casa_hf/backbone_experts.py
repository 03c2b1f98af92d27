# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Families whose MLPs send each token to a few of many experts, as Qwen3-VL-MoE.

What goes through a block's experts are the tokens of the text and, where `casa_image_updates` isn't "none", those of
the images; the loss that balances the experts counts them all, as it does in the source, where both are one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .backbone import BlockAdapter, DecoderBlock, Shape

_GATE_UP, _DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


class ExpertBlocks(BlockAdapter):
    """Blocks with a router `mlp.gate` and experts `mlp.experts`, or in some places a dense MLP.

    Args:
        modeling: module that defines the classes below, and the loss `load_balancing_loss_func`.
        experts: name of the class of all experts of a block, with the parameters `gate_up_proj`, (experts, 2 * inner,
            hidden), and `down_proj`, (experts, hidden, inner).
        router: name of the class of the router, with the parameter `weight`, (experts, hidden), which returns logits
            (tokens, experts) first.
        conversions: key of Transformers' table of weight conversions under which it has the ways that checkpoints of
            the family store experts.
    """

    has_experts = True

    def __init__(self, modeling: str, experts: str, router: str, conversions: str):
        self.modeling, self.conversions = modeling, conversions
        self._names = experts, router

    @cached_property
    def _classes(self) -> tuple[type[nn.Module], ...]:
        module = import_module(self.modeling)
        return tuple(getattr(module, name) for name in self._names)

    def initialize(self, module: nn.Module, std: float) -> None:
        super().initialize(module, std)
        if isinstance(module, self._classes):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=std)

    def router_logits(self, block: DecoderBlock, states: torch.Tensor) -> torch.Tensor | None:
        # The block's MLP doesn't return those that it computes; the router is a small part of it.
        gate: Any = getattr(block.mlp, "gate", None)
        return gate(states)[0] if isinstance(gate, self._classes) else None

    def balance_loss(
        self, text_config: PreTrainedConfig, router_logits: Sequence[torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        config: Any = text_config
        loss = import_module(self.modeling).load_balancing_loss_func
        return loss(tuple(router_logits), config.num_experts, config.num_experts_per_tok, mask)

    def layouts(self, name: str, shape: Shape) -> Iterator[dict[str, Shape]]:
        if not name.endswith((_GATE_UP, _DOWN)):
            return
        yield {name: (shape[0], shape[2], shape[1])}  # the Hub's Qwen3-VL-MoE

    def active_parameters(self, text_config: PreTrainedConfig, name: str, numel: int) -> int:
        config: Any = text_config
        return numel * config.num_experts_per_tok // config.num_experts if ".mlp.experts." in name else numel
