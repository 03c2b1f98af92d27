# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Frames of every kind as the RGB pictures that a model sees.

A stream shows its model these, and what is drawn or sent to a page is made from them too, so that everyone sees the
same.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, is_valid_image

from .checks import check_pixel_mode
from .processing_casa import load_picture

# Grey, RGB, RGB with opacity.
_NUM_CHANNELS = (1, 3, 4)


def rgb_picture(frame: Any) -> Image.Image:
    """A frame as an RGB picture.

    Args:
        frame: a PIL image, the path of a picture, or an array or tensor of RGB pixels, (height, width, 3) or
            (3, height, width), on any device: integers from 0 to 255, or floating values from 0 to 1, which become the
            nearest of these integers. Arrays of 1 or 4 channels are grey, or RGB with opacity. What isn't opaque is
            laid on white; of a file the opacity is left out. PIL images and files have at most 8 bits per channel.

    Returns:
        A picture of its own, never `frame` itself.

    Raises:
        Exception: of many kinds, if it can't be loaded, isn't whole, or is no picture.
    """
    if isinstance(frame, (str, os.PathLike)):
        return load_picture(frame)
    shape = getattr(frame, "shape", None)
    if not is_valid_image(frame) or (shape is not None and (len(shape) != 3 or 0 in shape)):
        given = f"a {type(frame).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")
        raise ValueError(f"a frame must be a PIL image, an array of three dimensions or a file; got {given}")
    if shape is None:
        check_pixel_mode("The image", frame)
    image = frame if shape is None else _image(_levels(frame))
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _image(pixels: np.ndarray) -> Image.Image:
    """The PIL image of integers from 0 to 255, with the channels first or last."""
    layout = infer_channel_dimension_format(pixels, num_channels=_NUM_CHANNELS)
    if layout == ChannelDimension.FIRST:
        pixels = pixels.transpose(1, 2, 0)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _levels(frame: Any) -> np.ndarray:
    """The pixels of an array or tensor as bytes; floating values from 0 to 1 become the nearest of 0 to 255."""
    if isinstance(frame, torch.Tensor):
        frame = (frame.detach().float() if frame.is_floating_point() else frame).cpu().numpy()
    if frame.dtype == np.uint8:
        return frame
    expected = "a frame must have integers from 0 to 255 or floating values from 0 to 1"
    if frame.dtype.kind not in "iuf":
        raise ValueError(f"{expected}; got {frame.dtype}")
    levels = frame
    if frame.dtype.kind == "f":
        with np.errstate(over="ignore"):
            levels = np.rint(frame * np.float32(255))
    if not 0 <= levels.min() <= levels.max() <= 255:  # nor where they aren't finite
        raise ValueError(f"{expected}; got {frame.dtype} from {frame.min():g} to {frame.max():g}")
    return levels.astype(np.uint8)
