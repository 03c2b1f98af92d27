# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The families of language models and vision towers that CASA can be built on.

One `Backbone` per family names the Transformers classes that are reused and the few facts in which families differ.
Classes are named here and imported on first use, so that configurations stay cheap to load.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Backbone:
    """Where the modules of one family live, and how its checkpoints are laid out.

    Attributes:
        source_model_type: `model_type` of the token-insertion checkpoint.
        text_model_type: `model_type` of its text configuration; the key of the table.
        vision_model_type: `model_type` of its vision configuration.
        display_name: the name people use.
        modeling: module that defines the classes below.
        decoder_layer, rotary_embedding, rms_norm, vision_tower: class names in that module. `decoder_layer` must have
            the children `self_attn`, `mlp`, `input_layernorm` and `post_attention_layernorm`.
        apply_rotary: function `(q, k, cos, sin) -> (q, k)` in that module.
        eager_attention: the family's plain attention, used for `attn_implementation="eager"`.
        source_class: the stock class of the token-insertion model.
        multimodal_rope: whether text positions have three rows (time, height, width).
        sentinel_id_fields: source configuration fields holding the ids of expanded image and video placeholders.
        load_renamings: (pattern, replacement) pairs that turn the older checkpoint layout into the one in memory.
    """

    source_model_type: str
    text_model_type: str
    vision_model_type: str
    display_name: str
    modeling: str
    decoder_layer: str
    rotary_embedding: str
    rms_norm: str
    vision_tower: str
    source_class: str
    apply_rotary: str = "apply_rotary_pos_emb"
    eager_attention: str = "eager_attention_forward"
    multimodal_rope: bool = True
    sentinel_id_fields: tuple[str, ...] = ("image_token_id", "video_token_id")
    load_renamings: tuple[tuple[str, str], ...] = ()

    def load(self, field: str) -> Any:
        """The object that `field` ("decoder_layer", "apply_rotary", ...) names."""
        return getattr(import_module(self.modeling), getattr(self, field))


_QWEN_VL_RENAMINGS = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)

BACKBONES: dict[str, Backbone] = {
    backbone.text_model_type: backbone
    for backbone in (
        Backbone(
            source_model_type="qwen2_5_vl",
            text_model_type="qwen2_5_vl_text",
            vision_model_type="qwen2_5_vl_vision",
            display_name="Qwen2.5-VL",
            modeling="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
            decoder_layer="Qwen2_5_VLDecoderLayer",
            rotary_embedding="Qwen2_5_VLRotaryEmbedding",
            rms_norm="Qwen2_5_VLRMSNorm",
            vision_tower="Qwen2_5_VisionTransformerPretrainedModel",
            source_class="Qwen2_5_VLForConditionalGeneration",
            load_renamings=_QWEN_VL_RENAMINGS,
        ),
    )
}

SOURCE_BACKBONES: dict[str, Backbone] = {backbone.source_model_type: backbone for backbone in BACKBONES.values()}


def supported_sources() -> str:
    """The supported families in words, for error messages."""
    return ", ".join(f"{b.display_name} (model_type {b.source_model_type!r})" for b in BACKBONES.values())
