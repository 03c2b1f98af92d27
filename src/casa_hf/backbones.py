# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The families of language models and vision towers that CASA can be built on.

One `Backbone` per family of language models and one `VisionTower` per family of towers name the Transformers classes
that are reused and the few facts in which families differ. Classes are named here and imported on first use, so that
configurations stay cheap to load. docs/new-backbone.md tells how to add a family.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class VisionTower:
    """A family of vision towers.

    Attributes:
        model_type: of its configuration; the key of the table.
        modeling: module that defines its class.
        tower: name of the class. It is called with `(pixel_values, grid_thw=...)` and returns merged features as
            `pooler_output`.
        hidden_size_field: configuration field with the width of merged features.
        deepstack_field: configuration field that lists the layers whose features, returned as `deepstack_features`,
            are added to image states after the first decoder blocks; None for towers without any.
    """

    model_type: str
    modeling: str
    tower: str
    hidden_size_field: str = "out_hidden_size"
    deepstack_field: str | None = None

    def load(self) -> Any:
        """The class of the tower."""
        return getattr(import_module(self.modeling), self.tower)

    def hidden_size(self, config: Any) -> int:
        """Width of merged features."""
        return getattr(config, self.hidden_size_field)

    def num_deepstack(self, config: Any) -> int:
        """Number of features per token that are added after the first decoder blocks."""
        return 0 if self.deepstack_field is None else len(getattr(config, self.deepstack_field))


@dataclass(frozen=True)
class Backbone:
    """A family of language models, and how its checkpoints are laid out.

    Attributes:
        source_model_type: `model_type` of the source checkpoint.
        text_model_type: `model_type` of its text configuration; the key of the table.
        vision_model_type: `model_type` of its vision configuration; for a text-only family, of the towers it can be
            given.
        display_name: the name people use.
        modeling: module that defines the classes below.
        decoder_layer, rotary_embedding, rms_norm: class names in that module. `decoder_layer` must have the children
            `self_attn`, `mlp`, `input_layernorm` and `post_attention_layernorm`.
        source_class: the stock class of the source model.
        apply_rotary: function `(q, k, cos, sin) -> (q, k)` in that module.
        eager_attention: the family's plain attention, used for `attn_implementation="eager"`.
        multimodal_rope: whether text positions have three rows (time, height, width).
        text_only: whether the source has no vision tower.
        placeholder_id_fields: source configuration fields holding the ids of expanded image and video placeholders.
        load_renamings: (pattern, replacement) pairs that turn the older checkpoint layout into the one in memory.
        save_renamings: the same for the way back, from memory to the names in the source's published files; empty
            where these are the names in memory.
    """

    source_model_type: str
    text_model_type: str
    vision_model_type: str
    display_name: str
    modeling: str
    decoder_layer: str
    rotary_embedding: str
    rms_norm: str
    source_class: str
    apply_rotary: str = "apply_rotary_pos_emb"
    eager_attention: str = "eager_attention_forward"
    multimodal_rope: bool = True
    text_only: bool = False
    placeholder_id_fields: tuple[str, ...] = ("image_token_id", "video_token_id")
    load_renamings: tuple[tuple[str, str], ...] = (
        (r"^visual\.", "model.visual."),
        (r"^model\.(?!language_model\.|visual\.|multi_modal_projector\.)", "model.language_model."),
    )
    save_renamings: tuple[tuple[str, str], ...] = (
        (r"^model\.visual\.", "visual."),
        (r"^model\.language_model\.", "model."),
    )

    @property
    def vision(self) -> VisionTower:
        """The family's vision tower."""
        return VISION_TOWERS[self.vision_model_type]

    def load(self, field: str) -> Any:
        """The object that `field` ("decoder_layer", "apply_rotary", ...) names."""
        return getattr(import_module(self.modeling), getattr(self, field))


_QWEN2_VL = "transformers.models.qwen2_vl.modeling_qwen2_vl"
_QWEN2_5_VL = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
_QWEN3_VL = "transformers.models.qwen3_vl.modeling_qwen3_vl"

VISION_TOWERS: dict[str, VisionTower] = {
    tower.model_type: tower
    for tower in (
        VisionTower("qwen2_vl_vision", _QWEN2_VL, "Qwen2VisionTransformerPretrainedModel", "hidden_size"),
        VisionTower("qwen2_5_vl_vision", _QWEN2_5_VL, "Qwen2_5_VisionTransformerPretrainedModel"),
        VisionTower("qwen3_vl_vision", _QWEN3_VL, "Qwen3VLVisionModel", deepstack_field="deepstack_visual_indexes"),
    )
}

BACKBONES: dict[str, Backbone] = {
    backbone.text_model_type: backbone
    for backbone in (
        Backbone(
            source_model_type="qwen2_vl",
            text_model_type="qwen2_vl_text",
            vision_model_type="qwen2_vl_vision",
            display_name="Qwen2-VL",
            modeling=_QWEN2_VL,
            decoder_layer="Qwen2VLDecoderLayer",
            rotary_embedding="Qwen2VLRotaryEmbedding",
            rms_norm="Qwen2VLRMSNorm",
            source_class="Qwen2VLForConditionalGeneration",
        ),
        Backbone(
            source_model_type="qwen2_5_vl",
            text_model_type="qwen2_5_vl_text",
            vision_model_type="qwen2_5_vl_vision",
            display_name="Qwen2.5-VL",
            modeling=_QWEN2_5_VL,
            decoder_layer="Qwen2_5_VLDecoderLayer",
            rotary_embedding="Qwen2_5_VLRotaryEmbedding",
            rms_norm="Qwen2_5_VLRMSNorm",
            source_class="Qwen2_5_VLForConditionalGeneration",
        ),
        Backbone(
            source_model_type="qwen3_vl",
            text_model_type="qwen3_vl_text",
            vision_model_type="qwen3_vl_vision",
            display_name="Qwen3-VL",
            modeling=_QWEN3_VL,
            decoder_layer="Qwen3VLTextDecoderLayer",
            rotary_embedding="Qwen3VLTextRotaryEmbedding",
            rms_norm="Qwen3VLTextRMSNorm",
            source_class="Qwen3VLForConditionalGeneration",
            save_renamings=(),
        ),
        Backbone(
            source_model_type="helium",
            text_model_type="helium",
            vision_model_type="qwen2_5_vl_vision",
            display_name="Helium",
            modeling="transformers.models.helium.modeling_helium",
            decoder_layer="HeliumDecoderLayer",
            rotary_embedding="HeliumRotaryEmbedding",
            rms_norm="HeliumRMSNorm",
            source_class="HeliumForCausalLM",
            multimodal_rope=False,
            text_only=True,
            placeholder_id_fields=(),
        ),
    )
}

SOURCE_BACKBONES: dict[str, Backbone] = {backbone.source_model_type: backbone for backbone in BACKBONES.values()}


def supported_sources() -> str:
    """The supported families in words, for error messages."""
    return ", ".join(f"{b.display_name} (model_type {b.source_model_type!r})" for b in BACKBONES.values())
