# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Frames of every kind become the pictures that they stand for."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from casa_hf.pictures import rgb_picture
from tests.clips import every_kind, picture


def test_every_kind_of_frame_is_the_same_picture(tmp_path: Path) -> None:
    for name, frame in every_kind(77, tmp_path / "77.png").items():
        found = rgb_picture(frame)
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), picture(77)), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_frame_on_an_accelerator() -> None:
    frame = torch.tensor(picture(77), device="cuda").permute(2, 0, 1)
    assert np.array_equal(np.asarray(rgb_picture(frame)), picture(77))
    assert np.array_equal(np.asarray(rgb_picture(frame.bfloat16() / 255)), picture(77))


def test_floating_values_are_the_nearest_levels() -> None:
    levels = np.random.RandomState(0).randint(0, 256, (20, 30, 3))
    beside = levels + np.random.RandomState(1).uniform(-0.49, 0.49, levels.shape)
    for frame in (beside / 255, torch.tensor(beside / 255).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(rgb_picture(frame)), levels)


def test_what_is_not_opaque_is_laid_on_white() -> None:
    """As recent image processors do: PIL alone would show the colour that is hidden."""
    colours = np.random.RandomState(0).randint(0, 256, (20, 30, 4), np.uint8)
    opacity = colours[..., 3:] / 255
    expected = colours[..., :3] * opacity + 255 * (1 - opacity)
    for frame in (Image.fromarray(colours), colours, torch.tensor(colours).permute(2, 0, 1) / 255):
        assert np.abs(np.asarray(rgb_picture(frame)) - expected).max() <= 1
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([9, 8, 7, 0, 0, 0])
    palette.info["transparency"] = 1
    assert np.asarray(rgb_picture(palette)).tolist() == [[[9, 8, 7], [255, 255, 255]]]


def test_grey_frames() -> None:
    grey = np.random.RandomState(0).randint(0, 256, (20, 30), np.uint8)
    for frame in (Image.fromarray(grey), grey[..., None], torch.tensor(grey)[None] / 255):
        assert np.array_equal(np.asarray(rgb_picture(frame)), np.repeat(grey[..., None], 3, axis=2))


def test_the_frame_stays_as_it_is() -> None:
    frame = Image.fromarray(picture(77))
    rgb_picture(frame).thumbnail((8, 8))
    assert np.array_equal(np.asarray(frame), picture(77))


def test_what_is_no_picture_is_an_error(tmp_path: Path) -> None:
    for frame, message in (
        (np.full((2, 2), np.nan), r"three dimensions or a file; got a ndarray of shape \(2, 2\)"),
        (np.zeros((0, 5, 3), np.uint8), r"got a ndarray of shape \(0, 5, 3\)"),
        (None, "got a NoneType"),
        (torch.full((3, 4, 4), 256), "integers from 0 to 255 .*; got int64 from 256 to 256"),
        (np.zeros((5, 5, 2), np.uint8), "channel dimension"),
        (tmp_path / "nowhere.png", "nowhere.png' can't be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            rgb_picture(frame)
    whole = BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)).save(whole, "JPEG")
    with pytest.raises(OSError, match="truncated"):
        rgb_picture(Image.open(BytesIO(whole.getvalue()[:1500])))
