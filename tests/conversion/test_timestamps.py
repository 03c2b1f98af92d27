# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether frames of a video have their times before them: a setting that conversion writes into configuration and
processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from casa_hf import CasaConfig, CasaForConditionalGeneration, CasaProcessor, CheckpointError
from casa_hf.conversion import convert_checkpoint, convert_to_source, inspect_checkpoint, plan_conversion
from casa_hf.hub.publishable import check_checkpoint
from examples.tiny_source import build_tiny_helium, build_tiny_source
from tests.clips import picture
from tests.conversion.helpers import altered

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_source(tmp_path_factory.mktemp("qwen3_vl") / "source", family="qwen3_vl")


def settings(folder: Path) -> tuple[str | None, str | None]:
    """Of the configuration and of the processor, as loading finds them."""
    return (
        CasaConfig.from_pretrained(folder).video_timestamps,
        CasaProcessor.from_pretrained(folder).video_timestamps,
    )


def captions(folder: Path, **options: Any) -> torch.Tensor:
    """What the model says to three frames of a video."""
    model: Any = CasaForConditionalGeneration.from_pretrained(folder).eval()
    processor = CasaProcessor.from_pretrained(folder, max_pixels=256**2, frame_max_pixels=256**2)
    frames = [picture(number, 128, 96) for number in (3, 90, 200)]
    metadata = {"fps": 1.0, "frames_indices": [0, 2, 4]}
    inputs = processor(text=f"Look {VIDEO}", videos=[frames], video_metadata=metadata, return_tensors="pt", **options)
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)[0]


@pytest.mark.parametrize(
    ("given", "expected"), [(None, "native"), ("native", "native"), ("text", "text"), ("none", None)]
)
def test_each_setting(qwen3_vl: Path, tmp_path: Path, given: str | None, expected: str | None) -> None:
    report = convert_checkpoint(qwen3_vl, tmp_path / "casa", video_timestamps=given)
    assert settings(tmp_path / "casa") == (expected, expected)
    assert report.config.variant == "casa"
    written = CasaProcessor.from_pretrained(tmp_path / "casa").decode(captions(tmp_path / "casa"))
    form = {"native": "<2.0 seconds>", "text": "[2.0 seconds]", None: "<|vision_end|><|vision_start|>"}[expected]
    assert form in written and ("seconds" in written) == (expected is not None)
    card = (tmp_path / "casa" / "README.md").read_text()
    assert (f"--video-timestamps {given}" in card) == (given is not None)
    said = "" if expected is None else {"native": "`<0.5 seconds>`", "text": "`[0.5 seconds]`"}[expected]
    assert said in card and ("(`video_timestamps=" in card) == (expected is not None)
    check_checkpoint(tmp_path / "casa")
    assert inspect_checkpoint(tmp_path / "casa").video_timestamps == expected
    convert_to_source(tmp_path / "casa", tmp_path / "back")
    assert "timestamps" not in (tmp_path / "back" / "config.json").read_text()


def test_families_without_have_none_or_plain_text(source_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(source_folder, tmp_path / "casa")
    assert settings(tmp_path / "casa") == (None, None)
    convert_checkpoint(source_folder, tmp_path / "timed", video_timestamps="text")
    assert settings(tmp_path / "timed") == ("text", "text")
    helium = build_tiny_helium(tmp_path / "helium")
    convert_checkpoint(helium, tmp_path / "helium-casa", vision_from=source_folder, video_timestamps="text")
    assert settings(tmp_path / "helium-casa") == ("text", "text")
    convert_checkpoint(helium, tmp_path / "helium-plain", vision_from=source_folder)
    assert settings(tmp_path / "helium-plain") == (None, None)
    with pytest.raises(ValueError, match=r"video_timestamps='native' is for sources.*Qwen2\.5-VL doesn't; use 'text'"):
        plan_conversion(source_folder, video_timestamps="native")
    with pytest.raises(CheckpointError, match=r"video_timestamps='texts' is unknown; did you mean 'text'\?"):
        plan_conversion(source_folder, video_timestamps="texts")
    with pytest.raises(ValueError, match=r"video_timestamps='text' is for frames, but casa_video_layout='native'"):
        plan_conversion(source_folder, "insertion", casa_video_layout="native", video_timestamps="text")


def test_another_design_keeps_the_setting_unless_it_is_told(qwen3_vl: Path, tmp_path: Path) -> None:
    convert_checkpoint(qwen3_vl, tmp_path / "casa", video_timestamps="text")
    convert_checkpoint(tmp_path / "casa", tmp_path / "after", casa_video_history="all")
    assert settings(tmp_path / "after") == ("text", "text")
    convert_checkpoint(tmp_path / "casa", tmp_path / "native", video_timestamps="native")
    assert settings(tmp_path / "native") == ("native", "native")
    convert_checkpoint(tmp_path / "native", tmp_path / "none", video_timestamps="none")
    assert settings(tmp_path / "none") == (None, None)


def test_a_checkpoint_that_does_not_say_has_none(qwen3_vl: Path, tmp_path: Path) -> None:
    """Such as those of earlier versions, which say what they said before."""
    convert_checkpoint(qwen3_vl, tmp_path / "none", video_timestamps="none")
    convert_checkpoint(qwen3_vl, tmp_path / "native")
    old = altered(tmp_path / "native", tmp_path / "old", config=lambda config: config.pop("video_timestamps"))
    file = old / "processor_config.json"
    content = json.loads(file.read_text())
    del content["video_timestamps"]
    file.write_text(json.dumps(content))
    assert settings(old) == (None, None)
    assert torch.equal(captions(old), captions(tmp_path / "none"))
    assert len(captions(old)) < len(captions(old, video_timestamps="native"))  # which the model takes as it comes
    convert_checkpoint(old, tmp_path / "again", casa_video_history="all")
    assert settings(tmp_path / "again") == (None, None)
    file = tmp_path / "native" / "processor_config.json"
    file.write_text(file.read_text().replace('"video_timestamps": "native"', '"video_timestamps": "text"'))
    with pytest.raises(CheckpointError, match=r"video_timestamps is native in config\.json and text in the processor"):
        check_checkpoint(tmp_path / "native")
    with pytest.raises(ValueError, match="no timestamps before them"):
        captions(tmp_path / "native", video_timestamps=None)


def test_an_unconverted_source_has_its_own(qwen3_vl: Path) -> None:
    model: Any = CasaForConditionalGeneration.from_pretrained(qwen3_vl)
    assert model.config.video_timestamps == CasaProcessor.from_source(qwen3_vl).video_timestamps == "native"
    model = CasaForConditionalGeneration.from_pretrained(qwen3_vl, video_timestamps=None)
    assert model.config.video_timestamps is None
