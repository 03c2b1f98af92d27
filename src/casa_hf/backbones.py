# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The families of language models and vision towers that CASA can be built on, one row each."""

from __future__ import annotations

from typing import Any

from .backbone import Backbone, Projections, VisionTower
from .backbone_experts import TransposedExpertBlocks
from .backbone_helium import HeliumProjections
from .backbone_qwen3_5 import GatedProjections, Qwen3_5Blocks, Qwen3_5ExpertBlocks
from .backbone_smollm3 import SmolLM3Projections

_QWEN2_VL = "transformers.models.qwen2_vl.modeling_qwen2_vl"
_QWEN2_5_VL = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
_QWEN3_VL = "transformers.models.qwen3_vl.modeling_qwen3_vl"
_QWEN3_VL_MOE = "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe"
_QWEN3_5 = "transformers.models.qwen3_5.modeling_qwen3_5"
_QWEN3_5_MOE = "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe"

# Mean and standard deviation of CLIP's images.
_CLIP: dict[str, Any] = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}

VISION_TOWERS: dict[str, VisionTower] = {
    tower.model_type: tower
    for tower in (
        VisionTower("qwen2_vl_vision", _QWEN2_VL, "Qwen2VisionTransformerPretrainedModel", "hidden_size", **_CLIP),
        VisionTower(
            "qwen2_5_vl_vision",
            _QWEN2_5_VL,
            "Qwen2_5_VisionTransformerPretrainedModel",
            tokens_per_second_field="tokens_per_second",
            **_CLIP,
        ),
        VisionTower("qwen3_vl_vision", _QWEN3_VL, "Qwen3VLVisionModel", deepstack_field="deepstack_visual_indexes"),
        VisionTower(
            "qwen3_vl_moe_vision",
            _QWEN3_VL_MOE,
            "Qwen3VLMoeVisionModel",
            deepstack_field="deepstack_visual_indexes",
        ),
        VisionTower("qwen3_5_vision", _QWEN3_5, "Qwen3_5VisionModel"),
        VisionTower("qwen3_5_moe_vision", _QWEN3_5_MOE, "Qwen3_5MoeVisionModel"),
    )
}

BACKBONES: dict[str, Backbone] = {
    backbone.text_model_type: backbone
    for backbone in (
        Backbone(
            source_model_type="qwen2_vl",
            text_model_type="qwen2_vl_text",
            vision=VISION_TOWERS["qwen2_vl_vision"],
            display_name="Qwen2-VL",
            modeling=_QWEN2_VL,
            decoder_layer="Qwen2VLDecoderLayer",
            rotary_embedding="Qwen2VLRotaryEmbedding",
            rms_norm="Qwen2VLRMSNorm",
            source_class="Qwen2VLForConditionalGeneration",
            native_video="video",
            text_ties_head=True,
        ),
        Backbone(
            source_model_type="qwen2_5_vl",
            text_model_type="qwen2_5_vl_text",
            vision=VISION_TOWERS["qwen2_5_vl_vision"],
            display_name="Qwen2.5-VL",
            modeling=_QWEN2_5_VL,
            decoder_layer="Qwen2_5_VLDecoderLayer",
            rotary_embedding="Qwen2_5_VLRotaryEmbedding",
            rms_norm="Qwen2_5_VLRMSNorm",
            source_class="Qwen2_5_VLForConditionalGeneration",
            native_video="video",
            text_ties_head=True,
        ),
        Backbone(
            source_model_type="qwen3_vl",
            text_model_type="qwen3_vl_text",
            vision=VISION_TOWERS["qwen3_vl_vision"],
            display_name="Qwen3-VL",
            modeling=_QWEN3_VL,
            decoder_layer="Qwen3VLTextDecoderLayer",
            rotary_embedding="Qwen3VLTextRotaryEmbedding",
            rms_norm="Qwen3VLTextRMSNorm",
            source_class="Qwen3VLForConditionalGeneration",
            native_video="temporal patch",
            native_timestamps=True,
            save_renamings=(),
        ),
        Backbone(
            source_model_type="qwen3_vl_moe",
            text_model_type="qwen3_vl_moe_text",
            vision=VISION_TOWERS["qwen3_vl_moe_vision"],
            display_name="Qwen3-VL-MoE",
            modeling=_QWEN3_VL_MOE,
            decoder_layer="Qwen3VLMoeTextDecoderLayer",
            rotary_embedding="Qwen3VLMoeTextRotaryEmbedding",
            rms_norm="Qwen3VLMoeTextRMSNorm",
            source_class="Qwen3VLMoeForConditionalGeneration",
            block=TransposedExpertBlocks(_QWEN3_VL_MOE, "Qwen3VLMoeTextExperts", "Qwen3VLMoeTextTopKRouter"),
            native_video="temporal patch",
            native_timestamps=True,
            save_renamings=(),
        ),
        *(
            Backbone(
                source_model_type=model_type,
                text_model_type=f"{model_type}_text",
                vision=VISION_TOWERS[f"{model_type}_vision"],
                display_name=name,
                modeling=modeling,
                decoder_layer=f"{classes}DecoderLayer",
                rotary_embedding=f"{classes}TextRotaryEmbedding",
                rms_norm=f"{classes}RMSNorm",
                source_class=f"{classes}ForConditionalGeneration",
                projections=GatedProjections,
                block=block,
                dropped=((r"^mtp\.", "mtp.*, which predict further tokens in speculative decoding"),),
                native_video="temporal patch",
                native_timestamps=True,
                save_renamings=(),
            )
            for model_type, name, classes, modeling, block in (
                ("qwen3_5", "Qwen3.5", "Qwen3_5", _QWEN3_5, Qwen3_5Blocks()),
                (
                    "qwen3_5_moe",
                    "Qwen3.5-MoE",
                    "Qwen3_5Moe",
                    _QWEN3_5_MOE,
                    Qwen3_5ExpertBlocks(_QWEN3_5_MOE, "Qwen3_5MoeExperts", "Qwen3_5MoeTopKRouter"),
                ),
            )
        ),
        *(
            Backbone(
                source_model_type=model_type,
                text_model_type=model_type,
                vision=VISION_TOWERS["qwen2_5_vl_vision"],
                display_name=display_name,
                modeling=f"transformers.models.{model_type}.modeling_{model_type}",
                decoder_layer=f"{classes}DecoderLayer",
                rotary_embedding=f"{classes}RotaryEmbedding",
                rms_norm=f"{classes}RMSNorm",
                source_class=f"{classes}ForCausalLM",
                projections=projections,
                multimodal_rope=False,
                text_only=True,
                recipe="paper-helium",
                source_task="text-generation",
                other_towers=tuple(tower for name, tower in VISION_TOWERS.items() if name != "qwen2_5_vl_vision"),
                placeholder_id_fields=(),
                text_ties_head=True,
            )
            for model_type, display_name, classes, projections in (
                ("helium", "Helium", "Helium", HeliumProjections),
                ("llama", "Llama", "Llama", Projections),
                ("qwen2", "Qwen2", "Qwen2", Projections),
                ("qwen3", "Qwen3", "Qwen3", Projections),
                ("smollm3", "SmolLM3", "SmolLM3", SmolLM3Projections),
            )
        ),
    )
}

SOURCE_BACKBONES: dict[str, Backbone] = {backbone.source_model_type: backbone for backbone in BACKBONES.values()}


def supported_sources() -> str:
    """The supported families in words, for error messages."""
    return ", ".join(f"{b.display_name} (model_type {b.source_model_type!r})" for b in BACKBONES.values())


def convert_first(name: str, model_type: str) -> str:
    """What to do with a source checkpoint in the place of a CASA checkpoint, for error messages.

    Args:
        name: name of the checkpoint.
        model_type: its type, a key of `SOURCE_BACKBONES`.
    """
    tower = " --vision-from VISION_LANGUAGE_MODEL" if SOURCE_BACKBONES[model_type].text_only else ""
    return f"Convert it first: `casa-hf convert {name} OUTPUT{tower}`."
