# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Names and shapes: what becomes of every tensor of a source."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLConfig

from casa_hf import CasaConfig, CasaForConditionalGeneration, CheckpointError
from casa_hf.backbones import SOURCE_BACKBONES
from casa_hf.conversion.mapping import (
    casa_shapes,
    fusion_copies,
    map_tensors,
    stock_shapes,
)
from tests.test_shapes import MODELS

BLOCK = "model.language_model.layers.{}."

STOCK = Qwen2_5_VLConfig(
    text_config={"num_hidden_layers": 12, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32},
)


def test_both_layouts_have_the_same_names_in_memory():
    backbone = SOURCE_BACKBONES["qwen2_5_vl"]
    names = {
        "visual.blocks.0.attn.qkv.weight": "model.visual.blocks.0.attn.qkv.weight",
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.layers.11.mlp.up_proj.weight": "model.language_model.layers.11.mlp.up_proj.weight",
        "lm_head.weight": "lm_head.weight",
    }
    for old, new in names.items():
        assert backbone.in_memory_name(old) == new
        assert backbone.in_memory_name(new) == new
        assert backbone.source_name(new) == old
        assert SOURCE_BACKBONES["qwen3_vl"].source_name(new) == new
        for other in SOURCE_BACKBONES.values():
            assert other.in_memory_name(other.source_name(new)) == new


def test_fusion_layers_copy_their_own_block():
    config = CasaConfig.from_source(STOCK, "casa", casa_layers=[1, 11])
    names = [
        BLOCK.format(index) + name
        for index in (0, 1, 10, 11)
        for name in (
            "self_attn.q_proj.bias",
            "self_attn.q_norm.weight",
            "input_layernorm.weight",
            "mlp.up_proj.weight",
        )
    ]
    expected = {}
    for index in (1, 11):
        block = BLOCK.format(index)
        expected[f"{block}casa_attn.q_proj.bias"] = f"{block}self_attn.q_proj.bias"
        expected[f"{block}casa_attn.q_norm.weight"] = f"{block}self_attn.q_norm.weight"
        expected[f"{block}casa_attn.image_norm.weight"] = f"{block}input_layernorm.weight"
    assert fusion_copies(config, names) == expected


@pytest.mark.parametrize("variant", ["casa-shared", "ca-shared", "exact", "insertion"])
def test_shared_projections_add_nothing(variant):
    config = CasaConfig.from_source(STOCK, variant)
    assert fusion_copies(config, stock_shapes(STOCK, config)) == {}


@pytest.mark.parametrize("shared", [False, True])
def test_a_norm_of_its_own_before_or_after_self_attention(shared):
    config = CasaConfig.from_source(
        STOCK, "casa", casa_placement="after", casa_layers=[4], casa_share_projections=shared
    )
    block = BLOCK.format(4)
    copies = fusion_copies(config, stock_shapes(STOCK, config))
    assert copies[f"{block}casa_layernorm.weight"] == f"{block}input_layernorm.weight"
    assert len(copies) == (1 if shared else 9)


def test_replaced_self_attention_goes_on_as_the_fusion_layer():
    config = CasaConfig.from_source(STOCK, "casa-replace")
    expected = stock_shapes(STOCK, config)
    outcome = map_tensors(config, expected, expected)
    written = dict(outcome.written())
    for index in range(12):
        names = {name for name in written if name.startswith(BLOCK.format(index))}
        old = {name for name in names if ".self_attn." in name}
        new = {name for name in names if ".casa_attn." in name}
        assert (len(old), len(new)) == ((0, 8) if index % 2 else (7, 0))
    assert set(written.values()) == set(expected)


def test_every_stock_tensor_is_kept_in_order():
    config = CasaConfig.from_source(STOCK)
    expected = stock_shapes(STOCK, config)
    assert expected["lm_head.weight"] == (STOCK.text_config.vocab_size, 32)
    assert expected[BLOCK.format(3) + "self_attn.k_proj.weight"] == (16, 32)
    outcome = map_tensors(config, expected, dict(reversed(expected.items())))
    assert list(outcome.found) == list(expected)
    assert outcome.found == {name: name for name in expected}
    assert [name for name, _ in outcome.written() if name in expected] == list(expected)
    # q, k, v with bias, o without, and the norm of images.
    assert len(outcome.added) == 12 * 8
    assert outcome.dropped == {}


def test_rotary_frequencies_and_a_tied_head_are_dropped_with_a_reason():
    config = CasaConfig.from_source(STOCK, tie_word_embeddings=True)
    expected = stock_shapes(STOCK, config)
    assert "lm_head.weight" not in expected
    stored = expected | {
        "lm_head.weight": (1, 1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
        "visual.rotary_pos_emb.inv_freq": (4,),
    }
    dropped = map_tensors(config, expected, stored).dropped
    assert dropped.keys() == stored.keys() - expected.keys()
    assert "embed_tokens" in dropped["lm_head.weight"]
    assert "computed" in dropped["visual.rotary_pos_emb.inv_freq"]


def test_errors_name_the_tensors():
    config = CasaConfig.from_source(STOCK)
    expected = stock_shapes(STOCK, config)

    def refused(stored, *words):
        with pytest.raises(CheckpointError) as error:
            map_tensors(config, expected, stored)
        for word in words:
            assert word in str(error.value)

    norm = "model.language_model.norm.weight"
    refused(expected | {"model.layers.0.self_attn.lora_A": (1,)}, "1 tensors", "model.layers.0.self_attn.lora_A")
    refused({name: shape for name, shape in expected.items() if name != norm}, "lacks 1", norm)
    refused(expected | {norm: (33,)}, norm, "[33]", "[32]")
    refused(expected | {"model.norm.weight": (32,)}, norm, "model.norm.weight", "under two names")
    many = {f"extra.{index}": (1,) for index in range(10)}
    refused(expected | many, "10 tensors", "extra.0, extra.1, extra.2, extra.3 and 6 more")


@pytest.mark.parametrize("size", ["Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen2.5-VL-32B", "Qwen2.5-VL-72B"])
def test_every_tensor_of_published_sizes_has_a_source_or_is_new(size):
    source = MODELS[size][0]()
    for variant, design in (("casa-before", {"casa_gate": "tanh", "casa_layers": [1, 3]}), ("ca-replace", {})):
        config = CasaConfig.from_source(source, variant, **design)
        stock = stock_shapes(source, config)
        outcome = map_tensors(config, stock, stock)
        shapes = {name: stock[original] for name, original in outcome.written()} | outcome.computed
        with torch.device("meta"):
            model = CasaForConditionalGeneration(config)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        assert shapes == {k: tuple(t.shape) for k, t in model.state_dict().items() if k not in tied}
        assert shapes == casa_shapes(config, stock)
