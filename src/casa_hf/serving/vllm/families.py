# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""vLLM's own language models and vision towers by the types of configurations, with fusion layers in their blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn
from vllm.config import VllmConfig


@dataclass(frozen=True)
class TextModel:
    """A language model of vLLM.

    Attributes:
        modeling: module of `vllm.model_executor.models` that defines it.
        model, decoder_layer: names of its classes. A block has `self_attn` with `qkv_proj`, `rotary_emb`, `attn` and
            `o_proj`, `mlp`, `input_layernorm` and `post_attention_layernorm`.
        architecture: name under which vLLM's registry knows the model alone.
    """

    modeling: str
    model: str
    decoder_layer: str
    architecture: str

    def load(self) -> tuple[type[nn.Module], type[nn.Module]]:
        """The classes of the model and of its blocks."""
        module = import_module(f"vllm.model_executor.models.{self.modeling}")
        return getattr(module, self.model), getattr(module, self.decoder_layer)


@dataclass(frozen=True)
class Tower:
    """A vision tower of vLLM; `modeling` and `tower` name its class."""

    modeling: str
    tower: str

    def build(self, vision_config: Any, **kwargs: Any) -> nn.Module:
        """The tower for a configuration."""
        return getattr(import_module(f"vllm.model_executor.models.{self.modeling}"), self.tower)(
            vision_config, norm_eps=1e-6, **kwargs
        )


_QWEN2 = TextModel("qwen2", "Qwen2Model", "Qwen2DecoderLayer", "Qwen2ForCausalLM")
_QWEN3 = TextModel("qwen3", "Qwen3Model", "Qwen3DecoderLayer", "Qwen3ForCausalLM")

TEXT_MODELS: dict[str, TextModel] = {
    "qwen2_vl_text": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen3_vl_text": _QWEN3,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "llama": TextModel("llama", "LlamaModel", "LlamaDecoderLayer", "LlamaForCausalLM"),
}

TOWERS: dict[str, Tower] = {
    "qwen2_vl_vision": Tower("qwen2_vl", "Qwen2VisionTransformer"),
    "qwen2_5_vl_vision": Tower("qwen2_5_vl", "Qwen2_5_VisionTransformer"),
    "qwen3_vl_vision": Tower("qwen3_vl", "Qwen3_VisionTransformer"),
}


def build_text_model(
    vllm_config: VllmConfig, prefix: str, with_fusion: Callable[[type[nn.Module]], type[nn.Module]]
) -> nn.Module:
    """The language model of a CASA configuration.

    Args:
        vllm_config: vLLM's configuration.
        prefix: name of the model.
        with_fusion: function that makes of the class of a block that of one with a fusion layer.
    """
    config = vllm_config.model_config.hf_config
    family = TEXT_MODELS[config.text_config.model_type]
    model, layer = family.load()
    fused = with_fusion(layer)
    arguments = {
        "vllm_config": vllm_config.with_hf_config(config.text_config, architectures=[family.architecture]),
        "prefix": prefix,
    }
    if family is _QWEN2:
        return model(**arguments, decoder_layer_type=fused)
    if family is _QWEN3:
        return type(model.__name__, (model,), {"decoder_layer_type": fused})(**arguments)
    return model(**arguments, layer_type=fused)
