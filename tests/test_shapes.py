# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The published sizes of every family, on the meta device: no tensor without an origin, none of another shape."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    HeliumConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SmolLM3Config,
)

from benchmarks.counting import added_parameters
from casa_hf import CasaConfig, CasaForConditionalGeneration
from casa_hf.backbones import SOURCE_BACKBONES

BLOCK = re.compile(r"(model\.language_model\.layers\.(\d+)\.)(.+)")
# New in a block with a fusion layer, and the tensor of the source that has its shape.
ORIGINS = (
    (re.compile(r"casa_attn\.([qkvo]_proj\.(?:weight|bias)|[qk]_norm\.weight)"), r"self_attn.\1"),
    (re.compile(r"casa_attn\.image_norm\.weight"), "input_layernorm.weight"),
    (re.compile(r"casa_layernorm\.weight"), "input_layernorm.weight"),
)
# A text-only source is given a vision tower and, where widths differ, a projector.
GIVEN = re.compile(r"model\.(visual|multi_modal_projector)\.")


def text(width: int, inner: int, blocks: int, heads: int, key_heads: int, vocabulary: int, **more: Any) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        **more,
    }


def qwen2_vl(dimensions: dict, tied: bool = False) -> PreTrainedConfig:
    vision = {"hidden_size": dimensions["hidden_size"]}
    return Qwen2VLConfig(text_config=dimensions, vision_config=vision, tie_word_embeddings=tied)


def qwen2_5_vl(dimensions: dict, tower_inner: int, tied: bool = False) -> PreTrainedConfig:
    vision = {
        "hidden_size": 1280,
        "intermediate_size": tower_inner,
        "out_hidden_size": dimensions["hidden_size"],
    }
    return Qwen2_5_VLConfig(text_config=dimensions, vision_config=vision, tie_word_embeddings=tied)


def qwen3_vl(dimensions: dict, tower: dict, tied: bool = False) -> PreTrainedConfig:
    vision = {**tower, "out_hidden_size": dimensions["hidden_size"]}
    dimensions = {**dimensions, "head_dim": 128}
    return Qwen3VLConfig(text_config=dimensions, vision_config=vision, tie_word_embeddings=tied)


def qwen3_vl_moe(dimensions: dict, expert_inner: int) -> PreTrainedConfig:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert_inner, "head_dim": 128}
    vision = {**LARGE_TOWER, "out_hidden_size": dimensions["hidden_size"]}
    return Qwen3VLMoeConfig(text_config={**dimensions, **experts}, vision_config=vision, tie_word_embeddings=False)


def qwen3_5(dimensions: dict, value_heads: int, tower: dict, tied: bool = False) -> PreTrainedConfig:
    tower = {name: value for name, value in tower.items() if name != "deepstack_visual_indexes"}
    dimensions = {**dimensions, "head_dim": 256, "linear_num_value_heads": value_heads}
    vision = {**tower, "out_hidden_size": dimensions["hidden_size"]}
    return Qwen3_5Config(text_config=dimensions, vision_config=vision, tie_word_embeddings=tied)


def qwen3_5_moe(width: int) -> PreTrainedConfig:
    return Qwen3_5MoeConfig(text_config={"hidden_size": width}, vision_config={"out_hidden_size": width})


def model(config: type[PreTrainedConfig], dimensions: dict, tied: bool = False) -> PreTrainedConfig:
    return config(**dimensions, tie_word_embeddings=tied)


SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}

# Configuration, and parameters of the whole model in billions.
MODELS: dict[str, tuple[Callable[[], PreTrainedConfig], float]] = {
    "Qwen2-VL-2B": (partial(qwen2_vl, text(1536, 8960, 28, 12, 2, 151936), tied=True), 2.21),
    "Qwen2-VL-7B": (partial(qwen2_vl, text(3584, 18944, 28, 28, 4, 152064)), 8.29),
    "Qwen2-VL-72B": (partial(qwen2_vl, text(8192, 29568, 80, 64, 8, 152064)), 73.41),
    "Qwen2.5-VL-3B": (partial(qwen2_5_vl, text(2048, 11008, 36, 16, 2, 151936), 3420, tied=True), 3.75),
    "Qwen2.5-VL-7B": (partial(qwen2_5_vl, text(3584, 18944, 28, 28, 4, 152064), 3420), 8.29),
    "Qwen2.5-VL-32B": (partial(qwen2_5_vl, text(5120, 27648, 64, 40, 8, 152064), 3456), 33.45),
    "Qwen2.5-VL-72B": (partial(qwen2_5_vl, text(8192, 29568, 80, 64, 8, 152064), 3456), 73.41),
    "Qwen3-VL-2B": (partial(qwen3_vl, text(2048, 6144, 28, 16, 8, 151936), SMALL_TOWER, tied=True), 2.13),
    "Qwen3-VL-4B": (partial(qwen3_vl, text(2560, 9728, 36, 32, 8, 151936), SMALL_TOWER, tied=True), 4.44),
    "Qwen3-VL-8B": (partial(qwen3_vl, text(4096, 12288, 36, 32, 8, 151936), LARGE_TOWER), 8.77),
    "Qwen3-VL-32B": (partial(qwen3_vl, text(5120, 25600, 64, 64, 8, 151936), LARGE_TOWER), 33.36),
    "Qwen3-VL-30B-A3B": (partial(qwen3_vl_moe, text(2048, 6144, 48, 32, 4, 151936), 768), 31.07),
    "Qwen3-VL-235B-A22B": (partial(qwen3_vl_moe, text(4096, 12288, 94, 64, 4, 151936), 1536), 235.67),
    "Qwen3.5-4B": (partial(qwen3_5, text(2560, 9216, 32, 16, 4, 248320), 32, SMALL_TOWER, tied=True), 4.54),
    "Qwen3.5-9B": (partial(qwen3_5, text(4096, 12288, 32, 16, 4, 248320), 32, LARGE_TOWER), 9.41),
    "Qwen3.5-27B": (partial(qwen3_5, text(5120, 17408, 64, 24, 4, 248320), 48, LARGE_TOWER), 27.36),
    "Qwen3.5-35B-A3B": (partial(qwen3_5_moe, 2048), 35.11),
    "Helium-1-preview-2B": (partial(model, HeliumConfig, text(2560, 7040, 24, 20, 20, 48000, head_dim=128)), 2.17),
    "Helium-1-2B": (partial(model, LlamaConfig, text(2048, 8192, 28, 16, 8, 64000)), 2.02),
    "Llama-3.2-1B": (partial(model, LlamaConfig, text(2048, 8192, 16, 32, 8, 128256), tied=True), 1.24),
    "Llama-3.2-3B": (partial(model, LlamaConfig, text(3072, 8192, 28, 24, 8, 128256), tied=True), 3.21),
    "Qwen2.5-1.5B": (partial(model, Qwen2Config, text(1536, 8960, 28, 12, 2, 151936), tied=True), 1.54),
    "Qwen3-1.7B": (
        partial(model, Qwen3Config, text(2048, 6144, 28, 16, 8, 151936, head_dim=128), tied=True),
        1.72,
    ),
    "Qwen3-4B": (partial(model, Qwen3Config, text(2560, 9728, 36, 32, 8, 151936, head_dim=128), tied=True), 4.02),
    "SmolLM3-3B": (partial(model, SmolLM3Config, text(2048, 11008, 36, 16, 4, 128256), tied=True), 3.08),
}
SMALLEST = ("Qwen3.5-4B", "Qwen2-VL-2B", "Qwen2.5-VL-3B", "Qwen3-VL-2B", "Helium-1-preview-2B", "SmolLM3-3B")
# One variant for every kind of change to the tensors; all sizes have the kind with most of them.
CASES = [
    *((name, "casa-before") for name in MODELS),
    *((name, variant) for name in SMALLEST for variant in ("casa", "ca-replace", "exact")),
]


@dataclass(frozen=True)
class Shapes:
    """A source and its CASA form: shapes by name in memory, tied heads apart."""

    source: dict[str, torch.Size]
    casa: dict[str, torch.Size]
    config: CasaConfig
    source_parameters: int


def build(name: str, variant: str) -> Shapes:
    source_config = MODELS[name][0]()
    given: dict[str, Any] = {}
    if SOURCE_BACKBONES[source_config.model_type].text_only:
        tower = MODELS["Qwen2.5-VL-3B"][0]().vision_config
        given = {"vision_config": tower, "image_token_id": 3}
    config = CasaConfig.from_source(source_config, variant, **given)
    with torch.device("meta"):
        source = config.backbone.load("source_class")(source_config)
        casa = CasaForConditionalGeneration(config)
    names = {}
    for key, tensor in source.state_dict().items():
        for pattern, replacement in config.backbone.load_renamings:
            key = re.sub(pattern, replacement, key)
        names[key] = tensor.shape
    shapes = {key: tensor.shape for key, tensor in casa.state_dict().items()}
    assert all(tensor.is_meta for tensor in casa.state_dict().values())
    return Shapes(names, shapes, config, source.num_parameters())


def origin(name: str, config: CasaConfig) -> str | None:
    """The tensor of the source that a new one is made like, or None if there is no reason for it."""
    match = BLOCK.fullmatch(name)
    if match is None or int(match[2]) not in config.fusion_layers:
        return None
    for pattern, replacement in ORIGINS:
        if pattern.fullmatch(match[3]):
            return match[1] + pattern.sub(replacement, match[3])
    return None


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_every_tensor_has_an_origin(name, variant):
    shapes = build(name, variant)
    config, source, casa = shapes.config, shapes.source, shapes.casa
    assert round(shapes.source_parameters / 1e9, 2) == MODELS[name][1]

    if "-A" in name:  # the parameters of the language model that compute a token, in billions
        block, text_config = config.backbone.block, config.text_config
        active = sum(
            math.prod(shape) * block.active_part(text_config, key)
            for key, shape in source.items()
            if not key.startswith("model.visual.")
        )
        assert name.endswith(f"-A{active / 1e9:.0f}B")

    both = source.keys() & casa.keys()
    assert {key: casa[key] for key in both} == {key: source[key] for key in both}

    replaced = {match[0] for key in source if (match := BLOCK.fullmatch(key)) and match[3].startswith("self_attn.")}
    replaced = {key for key in replaced if int(BLOCK.fullmatch(key)[2]) in config.fusion_layers}
    assert source.keys() - casa.keys() == (replaced if config.casa_placement == "replace" else set())

    new = casa.keys() - source.keys()
    given = {key for key in new if GIVEN.match(key)} if config.backbone.text_only else set()
    for key in new - given:
        assert casa[key] == source[origin(key, config)], key
    if config.backbone.text_only:
        width = config.text_config.hidden_size
        projector = casa.get("model.multi_modal_projector.weight")
        assert projector == (None if width == 2048 else (width, 2048))
        assert any(key.startswith("model.visual.") for key in given)

    added = sum(math.prod(casa[key]) for key in new - given)
    gone = sum(math.prod(source[key]) for key in source.keys() - casa.keys())
    assert added - gone == added_parameters(config)
    assert (added > 0) == (variant != "exact")
