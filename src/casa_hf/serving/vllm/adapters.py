# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""LoRA adapters of requests: text tokens get theirs by vLLM's own layers; image tokens, which vLLM doesn't count among
a step's tokens, get that of their request here."""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.models.utils import WeightsMapper

_SERVED = "model.language_model.layers."


class Names(WeightsMapper):
    """From a checkpoint's names of tensors to vLLM's."""

    def _map_name(self, key: str) -> str | None:
        """As in vLLM, which gives it the names of an adapter's tensors too.

        Raises:
            ValueError: for a tensor of an adapter that would be ignored.
        """
        if (".lora_" in key or ".trainable_tokens_" in key) and not key.startswith(_SERVED):
            raise ValueError(
                f"vLLM serves LoRA adapters of the blocks of a CASA model's language model; this one has {key}. Merge "
                "it into the model (PeftModel.merge_and_unload, then save_pretrained) and serve that."
            )
        return super()._map_name(key)


def project_images(layer: Any, states: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """What a projection makes of image tokens, with the adapters of their requests.

    Args:
        layer: a linear layer of vLLM.
        states: (image tokens, hidden) their states.
        tokens: (image tokens,) the text tokens of the step that they precede; None without adapters.
    """
    if tokens is None or not isinstance(layer, BaseLayerWithLoRA):
        return layer(states)[0]
    adapted: Any = layer
    output = adapted.base_layer(states)[0]
    chosen = adapted.punica_wrapper.token_lora_indices[tokens]
    for slot in range(len(adapted.lora_a_stacked[0])):
        parts = [
            states.to(down.dtype) @ down[slot, 0].T @ up[slot, 0].T
            for down, up in zip(adapted.lora_a_stacked, adapted.lora_b_stacked, strict=True)
        ]
        output = output + torch.cat(parts, dim=-1).to(output.dtype) * (chosen == slot)[:, None]
    return output
