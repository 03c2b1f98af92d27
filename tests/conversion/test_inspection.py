# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint's summary against the loaded model and the memory that it really takes."""

from __future__ import annotations

import shutil

import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from casa_hf import CasaForConditionalGeneration, CasaProcessor, CheckpointError, cache_nbytes
from casa_hf.checkpoint_files.download import SMALL_FILES, WEIGHT_FILES, download
from casa_hf.conversion import convert_checkpoint, inspect_checkpoint
from casa_hf.design_space import VARIANTS
from examples.tiny_source import build_tiny_helium, build_tiny_source
from tests.conversion.helpers import altered
from tests.conversion.test_download import REPOSITORY, hub

SIDE = 112
IMAGE_TOKENS = (SIDE // 28) ** 2


@pytest.fixture
def small_images(source_folder, tmp_path):
    """Converts, with a processor whose largest image is 112 x 112 pixels."""

    def convert(variant, **options):
        folder = convert_checkpoint(source_folder, tmp_path / "casa", variant, **options).output
        CasaProcessor.from_pretrained(folder, max_pixels=SIDE * SIDE).save_pretrained(folder)
        return folder

    return convert


DESIGNS = {
    "after": {"casa_placement": "after", "casa_gate": "tanh"},
    "after, shared": {"casa_placement": "after", "casa_share_projections": True},
    "full, own": {"casa_image_updates": "full", "casa_layers": [0, 2]},
    "full, shared": {"casa_image_updates": "full", "casa_share_projections": True, "casa_layers": [1]},
    "full, shared, image": {"casa_image_updates": "full", "casa_share_projections": True, "casa_keys": "image"},
    "full, before, shared": {
        "casa_image_updates": "full",
        "casa_share_projections": True,
        "casa_placement": "before",
        "casa_layers": [0, 1],
    },
    "context, none": {"casa_keys": "context", "casa_share_projections": True, "casa_layers": [2]},
    "context, full": {
        "casa_keys": "context",
        "casa_share_projections": True,
        "casa_image_updates": "full",
        "casa_layers": [0],
    },
    "replace everywhere": {"casa_placement": "replace", "casa_text_windows": True},
}


@pytest.mark.parametrize("design", DESIGNS)
def test_summary_of_other_designs(small_images, design):
    folder = small_images("casa", **DESIGNS[design])
    assert inspect_checkpoint(folder).variant is None
    assert_cache_is_as_told(folder)


def test_summary_of_other_families(tmp_path):
    """Heads of a width of their own, patches of another size, a tokenizer with other tokens."""
    qwen3 = build_tiny_source(tmp_path / "qwen3", family="qwen3_vl", num_attention_heads=2)
    convert_checkpoint(qwen3, tmp_path / "casa-qwen3", max_pixels=65536)
    vision = build_tiny_source(tmp_path / "vision", hidden_size=32)
    helium = build_tiny_helium(tmp_path / "helium", num_key_value_heads=1)
    convert_checkpoint(helium, tmp_path / "casa-helium", vision_from=vision, max_pixels=SIDE * SIDE)
    for family in ("qwen3_5", "qwen3_5_moe"):
        recurrent = build_tiny_source(tmp_path / family, family=family, num_attention_heads=2, num_hidden_layers=4)
        for variant in ("casa", "casa-replace", "exact"):  # keys and values in blocks of full attention alone
            convert_checkpoint(recurrent, tmp_path / variant, variant, max_pixels=65536, overwrite=True)
            assert_cache_is_as_told(tmp_path / variant)
    beside = {"casa_layers": [0, 1], "casa_gate": "tanh"}  # fusion layers beside linear attention too
    convert_checkpoint(recurrent, tmp_path / "beside", "casa", max_pixels=65536, **beside)
    assert_cache_is_as_told(tmp_path / "beside")
    for folder in (tmp_path / "casa-qwen3", tmp_path / "casa-helium"):
        assert_cache_is_as_told(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_summary_is_what_the_model_takes(small_images, variant):
    folder = small_images(variant)
    summary = inspect_checkpoint(folder)
    model = CasaForConditionalGeneration.from_pretrained(folder)
    added = sum(p.numel() for name, p in model.named_parameters() if "casa_" in name)
    assert (summary.variant, summary.backbone, summary.dtype) == (variant, "Qwen2.5-VL", "float32")
    assert summary.num_layers == 3
    assert summary.fusion_layers == tuple(i for i, b in enumerate(model.model.language_model.layers) if b.casa_attn)
    assert summary.added_parameters == added
    assert summary.source_parameters == model.num_parameters() - added
    assert summary.num_bytes == 4 * model.num_parameters()
    assert summary.image_tokens == IMAGE_TOKENS
    assert_cache_is_as_told(folder)


def assert_cache_is_as_told(folder):
    """Some text, the largest image, some text: what the cache then holds, byte by byte."""
    summary = inspect_checkpoint(folder)
    model = CasaForConditionalGeneration.from_pretrained(folder)
    processor = CasaProcessor.from_pretrained(folder)
    picture = Image.effect_noise((800, 800), 60).convert("RGB")
    inputs = processor(text=f"What is in {processor.image_placeholder} and why?", images=picture, return_tensors="pt")
    assert inputs["image_grid_thw"].prod() == 4 * summary.image_tokens
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).cache
    ids = inputs["input_ids"][0].tolist()
    in_window = len(ids) - ids.index(model.config.image_token_id)
    assert 0 < in_window < len(ids)
    assert cache_nbytes(cache) == {
        "image": summary.image_bytes,
        "text": len(ids) * summary.text_token_bytes + in_window * summary.window_text_bytes,
        **({"recurrent": summary.recurrent_bytes} if summary.recurrent_bytes else {}),
    }


def test_size_of_numbers(small_images):
    """Keys and values of 2 heads with 16 channels in bfloat16."""
    summary = inspect_checkpoint(small_images("casa", dtype="bfloat16", max_shard_size=200_000))
    assert summary.dtype == "bfloat16"
    assert summary.num_bytes == 2 * (summary.source_parameters + summary.added_parameters)
    assert summary.text_token_bytes == summary.window_text_bytes == 3 * 2 * 2 * 16 * 2
    assert summary.image_bytes == IMAGE_TOKENS * 3 * 2 * 2 * 16 * 2


def test_default_image_size(casa_folder):
    assert inspect_checkpoint(str(casa_folder)).image_tokens == (952 // 28) ** 2 == 1156


def test_a_hub_id_is_inspected_without_its_weights(casa_folder, use_hub, tmp_path, monkeypatch):
    with hub(casa_folder) as (address, _):
        use_hub(address)
        assert inspect_checkpoint(REPOSITORY, revision="main") == inspect_checkpoint(casa_folder)
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        download(REPOSITORY, None, (*SMALL_FILES, *WEIGHT_FILES))
    # What the cache has needs no Hub.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert inspect_checkpoint(REPOSITORY) == inspect_checkpoint(casa_folder)


def test_a_hub_id_of_another_kind_is_refused(source_folder, use_hub, tmp_path):
    folder = altered(source_folder, tmp_path / "source")
    with hub(folder) as (address, _):
        use_hub(address)
        with pytest.raises(CheckpointError, match=f"^{REPOSITORY} has .* so it is not a CASA checkpoint"):
            inspect_checkpoint(REPOSITORY)


def test_refusals(source_folder, casa_folder, tmp_path):
    def refused(folder, *words):
        with pytest.raises(CheckpointError) as error:
            inspect_checkpoint(folder)
        for word in words:
            assert word in str(error.value)

    refused(tmp_path / "nowhere", "nowhere is not a folder", "Hub id")
    refused(source_folder, "'qwen2_5_vl'", "not a CASA checkpoint", "casa-hf convert")
    folder = tmp_path / "casa"
    shutil.copytree(casa_folder, folder)
    for content in ("{}", '{"image_processor": {"size": {"height": 9}}}', '{"image_processor": null}'):
        (folder / "processor_config.json").write_text(content)
        refused(folder, "processor_config.json", "image_processor.size.longest_edge")
    (folder / "processor_config.json").unlink()
    refused(folder, "no processor_config.json")
    (folder / "model.safetensors").write_bytes(b"")
    refused(folder, "model.safetensors", "again")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "not valid JSON")
