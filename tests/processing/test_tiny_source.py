# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The small source checkpoints are complete checkpoints of their families and treat images as these do."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
)

from examples.tiny_source import FAMILIES, SPECIAL_TOKENS, build_tiny_helium, build_tiny_source


@pytest.fixture(scope="module")
def helium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_helium(tmp_path_factory.mktemp("helium"))


def test_stock_classes_load_it_completely(source):
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.generation_config.eos_token_id == [
        AutoTokenizer.from_pretrained(source).convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")
    ]


def test_no_parameter_is_degenerate(source):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source)
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.01, name


def test_ids_of_tokenizer_and_configuration_agree(source):
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    for field in ("vision_start", "vision_end"):
        assert getattr(config, f"{field}_token_id") == tokenizer.convert_tokens_to_ids(f"<|{field}|>")
    for field in ("image", "video"):
        assert getattr(config, f"{field}_token_id") == tokenizer.convert_tokens_to_ids(f"<|{field}_pad|>")
    assert len(tokenizer) <= config.text_config.vocab_size
    assert len({tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}) == len(SPECIAL_TOKENS)


TEXTS = ("What's in this picture?", "Größe 42 µm, 日本語 🙂\n\n  indented")


@pytest.mark.parametrize("text", [*TEXTS, "".join(SPECIAL_TOKENS)])
def test_the_tokenizer_loses_nothing(source, text):
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_has_learned_words(source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert tokenizer.tokenize(" picture") == ["Ġpicture"]
    assert tokenizer.tokenize("<|vision_start|><|vision_end|>") == ["<|vision_start|>", "<|vision_end|>"]


def test_the_image_matters_to_the_model(source, tokenizer, stock_pixels, photos):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source)
    logits = []
    for name in ("cat", "coffee"):
        features = stock_pixels([photos[name]])
        count = int(features["image_grid_thw"].prod()) // 4
        text = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>What is it?"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = model(input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).long(), **features)
        logits.append(output.logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 0.5


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state_alone(source, tmp_path):
    state = torch.get_rng_state()
    again, other = build_tiny_source(tmp_path / "again"), build_tiny_source(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    digests = [
        hashlib.sha256((folder / "model.safetensors").read_bytes()).digest() for folder in (source, again, other)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_its_shape_can_be_chosen(tmp_path):
    folder = build_tiny_source(
        tmp_path,
        tie_word_embeddings=True,
        hidden_size=96,
        num_hidden_layers=4,
        vision_depth=3,
        dtype=torch.bfloat16,
        max_shard_size=100_000,
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert len(model.model.language_model.layers) == 4 and len(model.model.visual.blocks) == 3
    assert len(list(folder.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_complete(tmp_path, family):
    folder = build_tiny_source(tmp_path, family=family, num_hidden_layers=4, vision_depth=3)
    model: Any
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert model.config.model_type == family and type(model) is FAMILIES[family].model
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.01, name
    assert len(model.model.language_model.layers) == 4 and len(model.model.visual.blocks) == 3
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert tokenizer.chat_template == FAMILIES[family].chat_template


def test_the_text_only_checkpoint_is_complete(helium):
    model, report = AutoModelForCausalLM.from_pretrained(helium, output_loading_info=True)
    assert model.config.model_type == "helium"
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.01, name
    tokenizer = AutoTokenizer.from_pretrained(helium)
    assert model.config.vocab_size == len(tokenizer) == tokenizer.vocab_size
    for kind in ("bos", "eos", "pad"):
        assert getattr(model.config, f"{kind}_token_id") == getattr(tokenizer, f"{kind}_token_id") is not None
    assert not set(SPECIAL_TOKENS) & tokenizer.get_vocab().keys()


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_only_tokenizer_loses_nothing(helium, text):
    tokenizer = AutoTokenizer.from_pretrained(helium)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.tokenize("the picture shows")[1:] == ["▁picture", "▁shows"]


def test_the_text_only_checkpoint_has_the_chosen_shape(tmp_path):
    folder = build_tiny_helium(tmp_path, tie_word_embeddings=True, hidden_size=48, num_hidden_layers=2, seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.hidden_size == 48 and len(model.model.layers) == 2
