# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Families whose MLPs send each token to a few of many experts, as Qwen3-VL-MoE.

What goes through a block's experts are the tokens of the text and, where `casa_image_updates` isn't "none", those of
the images; the loss that balances the experts counts them all, as it does in the source, where both are one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .backbone import BlockAdapter, DecoderBlock, Shape

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

_EXPERTS = "mlp.experts."
_GATE_UP, _DOWN = _EXPERTS + "gate_up_proj", _EXPERTS + "down_proj"


class ExpertBlocks(BlockAdapter):
    """Blocks with a router `mlp.gate` and experts `mlp.experts`, or in some places a dense MLP.

    Args:
        modeling: module that defines the classes below, and the loss `load_balancing_loss_func`.
        experts: name of the class of all experts of a block, with the parameters `gate_up_proj`, (experts, 2 * inner,
            hidden), and `down_proj`, (experts, hidden, inner).
        router: name of the class of the router, with the parameter `weight`, (experts, hidden), which returns logits
            (tokens, experts) first.
    """

    has_experts = True

    def __init__(self, modeling: str, experts: str, router: str):
        self.modeling = modeling
        self._names = experts, router

    @cached_property
    def _classes(self) -> tuple[type[nn.Module], ...]:
        module = import_module(self.modeling)
        return tuple(getattr(module, name) for name in self._names)

    def initialize(self, module: nn.Module, std: float) -> None:
        from transformers import initialization as init

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

    def active_part(self, text_config: PreTrainedConfig, name: str) -> float:
        config: Any = text_config
        return config.num_experts_per_tok / config.num_experts if _EXPERTS in name else 1.0


class TransposedExpertBlocks(ExpertBlocks):
    """As in Qwen3-VL-MoE, whose published files have the matrices of experts transposed; the stock class saves them as
    they are in memory."""

    def layouts(self, name: str, shape: Shape) -> Iterator[dict[str, Shape]]:
        if name.endswith((_GATE_UP, _DOWN)):
            yield {name: (shape[0], shape[2], shape[1])}

    def weight_converters(self) -> Sequence[Any]:
        from transformers.core_model_loading import Transpose, WeightConverter

        class OfExperts(Transpose):
            """Transposes what is transposed. Transformers' own compares whole shapes, which takes the part of the
            experts that a process has under expert parallelism for transposed."""

            def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
                [found] = input_dict.values()
                tensor = found[0] if isinstance(found, list) else found
                shape = kwargs["model"].get_parameter(kwargs["full_layer_name"]).shape
                if tensor.shape[-2:] == shape[:-3:-1] and shape[-1] != shape[-2]:
                    tensor = tensor.transpose(-2, -1).contiguous()
                return {target_patterns[0]: tensor}

        return [WeightConverter([name], [name], operations=[OfExperts(1, 2)]) for name in (_GATE_UP, _DOWN)]


class SeparateExpertBlocks(ExpertBlocks):
    """Experts that checkpoints may also store one by one, as the stock class of Qwen3.5-MoE saves them."""

    def layouts(self, name: str, shape: Shape) -> Iterator[dict[str, Shape]]:
        block = name.rpartition(_EXPERTS)[0] + _EXPERTS
        if name.endswith(_GATE_UP):
            parts = {"gate_proj": (shape[1] // 2, shape[2]), "up_proj": (shape[1] // 2, shape[2])}
        elif name.endswith(_DOWN):
            parts = {"down_proj": (shape[1], shape[2])}
        else:
            return
        yield {
            f"{block}{expert}.{part}.weight": of_part for expert in range(shape[0]) for part, of_part in parts.items()
        }

    def weight_converters(self) -> Sequence[Any]:
        from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

        each = _EXPERTS + "*."
        return [
            WeightConverter(
                [f"{each}gate_proj.weight", f"{each}up_proj.weight"],
                _GATE_UP,
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(f"{each}down_proj.weight", _DOWN, operations=[MergeModulelist(dim=0)]),
        ]
