# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`CasaProcessor.from_source` for every family of vision-language models, compared with the family's stock parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from examples.tiny_source import build_tiny_source
from tests.processing.stock import stock_text

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
SIDE = 288
SMALLEST = {"qwen2_vl": 3136, "qwen2_5_vl": 3136, "qwen3_vl": 65536}
PATCH = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}


@pytest.fixture(scope="session", params=SMALLEST)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def folder(family: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source if family == "qwen2_5_vl" else build_tiny_source(tmp_path_factory.mktemp(family), family=family)


@pytest.fixture(scope="session")
def processor(folder: Path) -> CasaProcessor:
    return CasaProcessor.from_source(folder, max_pixels=SIDE**2, frame_max_pixels=260**2)


def pixels(folder: Path, images: list[Any], longest: int) -> Any:
    """Features by the stock image processor, as its files say but for the upper limit."""
    stock = AutoImageProcessor.from_pretrained(folder)
    size = {"shortest_edge": stock.size["shortest_edge"], "longest_edge": longest}
    return stock(images=images, size=size, return_tensors="pt")


def test_limits_and_patches_are_the_familys_and_the_training_limits(family, folder):
    processor = CasaProcessor.from_source(folder)
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (SMALLEST[family], 952 * 952)
    assert processor.frame_max_pixels == 504 * 504
    assert processor.image_processor.patch_size == PATCH[family]


def test_ids_are_the_stock_ids_without_placeholders_and_pixels_the_stock_pixels(folder, family, processor, photos):
    cat, rocket = photos["cat"], photos["rocket"].rotate(90, expand=True)
    content = [{"type": "image", "image": cat}, {"type": "text", "text": "What's new?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Nothing."}]
    messages.append({"role": "user", "content": [{"type": "video", "video": [rocket]}]})
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    placeholders = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    stock = tokenizer.apply_chat_template(messages, tokenize=False)
    assert set(placeholders) <= set(tokenizer(stock)["input_ids"])
    if family == "qwen3_vl":  # which writes the time of each frame
        stock = stock_text(tokenizer, stock, [(None, [0])])
    stock_ids = tokenizer(stock)["input_ids"]
    assert inputs["input_ids"].tolist() == [[token for token in stock_ids if token not in placeholders]]
    expected = [pixels(folder, [cat], SIDE**2), pixels(folder, [rocket], 260**2)]
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(inputs[name], torch.cat([part[name] for part in expected]))
    assert inputs["pixel_values"].shape[1] == 3 * 2 * PATCH[family] ** 2


def test_a_conversation_begins_as_the_family_has_it(family, processor):
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    default = "" if family == "qwen3_vl" else "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert prompt == f"{default}<|im_start|>user\n{IMAGE}<|im_end|>\n"


def test_every_processor_file_of_the_source_is_kept(family, folder, processor):
    names = ["preprocessor_config.json", *(["video_preprocessor_config.json"] if family == "qwen3_vl" else [])]
    assert processor.source_config == {name: json.loads((folder / name).read_text()) for name in names}


def test_a_limit_below_the_sources_minimum(family, folder):
    limit = SMALLEST[family] - 1
    with pytest.raises(ValueError, match=f"max_pixels={limit} is below min_pixels={SMALLEST[family]}"):
        CasaProcessor.from_source(folder, max_pixels=limit)


def test_saving_and_loading(processor, photos, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    options: dict[str, Any] = {"text": f"{IMAGE}{VIDEO}What?", "images": photos["cat"], "return_tensors": "pt"}
    expected, inputs = (each(**options, videos=[[photos["coffee"]]]) for each in (processor, loaded))
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


@torch.no_grad()
def test_the_insertion_model_gives_the_stock_models_logits(folder, processor, photos):
    """Both from the files of the source and from images, each in its own way."""
    images = [photos["cat"], photos["coffee"].rotate(90, expand=True)]
    text = f"Compare {IMAGE} with {IMAGE}: what's new?"
    model = CasaForConditionalGeneration.from_pretrained(folder, casa_variant="insertion").eval()
    inputs = processor(images=images, text=text, return_tensors="pt")

    stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
    features = pixels(folder, images, SIDE**2)
    for count in features["image_grid_thw"].prod(-1) // 4:
        text = text.replace("<|image_pad|>", "<placeholder>" * count, 1)
    text = text.replace("<placeholder>", "<|image_pad|>")
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    is_image = ids == stock.config.image_token_id
    expected = stock(input_ids=ids, mm_token_type_ids=is_image.long(), **features).logits[~is_image]
    logits = model(**inputs).logits[0]
    assert logits.shape == expected.shape and expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
