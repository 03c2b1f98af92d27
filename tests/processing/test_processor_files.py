# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Making a `CasaProcessor` from a source, saving and loading it, and its limits on pixels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, Qwen2Tokenizer

import casa_hf  # noqa: F401  (registers the processor)
from casa_hf import CasaProcessor

PAIR = "<|vision_start|><|vision_end|>"


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A copy of the source to change."""
    return Path(shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors")))


def limits(processor: CasaProcessor) -> tuple[int, int, int | None]:
    size = processor.image_processor.size
    return size["shortest_edge"], size["longest_edge"], processor.frame_max_pixels


def test_a_converted_processor_has_the_training_limits(source):
    assert limits(CasaProcessor.from_source(source)) == (3136, 952 * 952, 504 * 504)


def test_a_converted_processor_can_keep_the_limits_of_the_source(source, photos):
    processor = CasaProcessor.from_source(source, max_pixels=None, frame_max_pixels=None)
    assert limits(processor) == (3136, 12845056, None)
    video = f"{PAIR[:16]}<|video_pad|>{PAIR[16:]}"
    frame = processor(videos=[[photos["cat"]]], text=video, return_tensors="pt")
    image = processor(images=photos["cat"], text=PAIR, return_tensors="pt")
    assert torch.equal(frame["pixel_values"], image["pixel_values"])


def test_the_source_files_are_kept_for_the_way_back(copy):
    video_settings = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 1.5}
    (copy / "video_preprocessor_config.json").write_text(json.dumps(video_settings))
    processor = CasaProcessor.from_source(copy)
    assert processor.source_config == {
        "preprocessor_config.json": json.loads((copy / "preprocessor_config.json").read_text()),
        "video_preprocessor_config.json": video_settings,
    }


@pytest.mark.parametrize("load", [AutoProcessor.from_pretrained, CasaProcessor.from_pretrained])
def test_saving_and_loading(processor, photos, tmp_path, load):
    processor.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is CasaProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": photos["cat"]}, {"type": "text", "text": "What?"}]}],
        [{"role": "user", "content": [{"type": "video", "video": [photos["rocket"]] * 2}]}],
    ]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor.apply_chat_template(messages, **options)
    # Before it is used: a fast tokenizer's file also holds the padding of its last call.
    loaded.save_pretrained(tmp_path / "again")
    inputs = loaded.apply_chat_template(messages, **options)
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)
    for file in tmp_path.glob("*.j*"):
        again = (tmp_path / "again" / file.name).read_text()
        if file.name == "tokenizer_config.json":  # Transformers notes there where it was loaded from
            first, second = (json.loads(text) for text in (file.read_text(), again))
            assert first == {key: second[key] for key in first}
        else:
            assert again == file.read_text()


@pytest.mark.parametrize("load", [AutoProcessor.from_pretrained, CasaProcessor.from_pretrained])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_pixels": 40000}, (3136, 40000, 4900)),
        ({"min_pixels": 4000, "max_pixels": 40000}, (4000, 40000, 4900)),
        ({"size": {"shortest_edge": 4000, "longest_edge": 40000}}, (4000, 40000, 4900)),
        ({"frame_max_pixels": 3136}, (3136, 140**2, 3136)),
        ({"frame_max_pixels": None}, (3136, 140**2, None)),
    ],
    ids=str,
)
def test_limits_at_load_hold_and_are_saved(processor, photos, tmp_path, load, options, expected):
    processor.save_pretrained(tmp_path)
    loaded = load(tmp_path, **options)
    assert limits(loaded) == expected
    patches = loaded(images=photos["cat"], text=PAIR, return_tensors="pt")["pixel_values"]
    assert 0.5 * expected[1] < 14 * 14 * len(patches) <= expected[1]
    loaded.save_pretrained(tmp_path / "again")
    assert limits(CasaProcessor.from_pretrained(tmp_path / "again")) == expected
    assert not options.keys() & json.loads((tmp_path / "again" / "tokenizer_config.json").read_text()).keys()


def test_limits_at_load_must_fit_together(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="max_pixels=100 is below min_pixels=3136"):
        CasaProcessor.from_pretrained(tmp_path, max_pixels=100)


def test_a_source_that_transformers_saved_as_one_file(copy, source):
    """Newer versions write one processor_config.json in place of one file per part."""
    image_settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    settings = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": {**image_settings, "patch_size": 16}}
    (copy / "processor_config.json").write_text(json.dumps(settings))
    processor = CasaProcessor.from_source(copy)
    assert processor.image_processor.patch_size == 16
    assert processor.source_config == {"processor_config.json": settings}


def test_a_source_with_the_older_name_of_the_image_processor(copy):
    path = copy / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"Qwen2VLImageProcessor"', '"Qwen2VLImageProcessorFast"'))
    assert limits(CasaProcessor.from_source(copy)) == (3136, 952 * 952, 504 * 504)


def test_the_chat_template_comes_from_wherever_the_source_has_it(copy, processor):
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": template + "{# processor #}"}))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    assert CasaProcessor.from_source(copy).chat_template == template + "{# processor #}"
    (copy / "chat_template.json").unlink()
    assert CasaProcessor.from_source(copy).chat_template == template
    built = CasaProcessor(processor.image_processor, AutoTokenizer.from_pretrained(copy))
    assert built.chat_template == template


def test_a_tokenizer_without_vision_tokens(processor):
    plain = Qwen2Tokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[])
    with pytest.raises(ValueError, match=r"no <\|vision_start\|>, <\|vision_end\|>, .*Qwen vision-language"):
        CasaProcessor(processor.image_processor, plain)
    plain.add_special_tokens({"additional_special_tokens": ["<|vision_end|>"]})
    with pytest.raises(ValueError, match=r"The tokenizer has no <\|vision_start\|>, which are to stand"):
        CasaProcessor(processor.image_processor, plain)


def test_the_image_token_is_the_one_that_an_image_precedes(processor, tokenizer):
    assert processor.image_token == "<|vision_end|>"
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<|vision_end|>")


def test_missing_files_are_named(copy):
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match=r"preprocessor_config.json"):
        CasaProcessor.from_source(copy)


def test_broken_files_are_named(copy):
    (copy / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is not valid JSON"):
        CasaProcessor.from_source(copy)
