# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""8-bit patches of images: resized and cut by torch, as the stock torchvision processor does it.

It takes a seventh of the CPU time of the stock PIL processor or less, which computes in floating-point numbers and
holds every frame twice. The resizing is torch's antialiased bicubic one on bytes, which torchvision calls too; that of
Pillow differs from it by two steps of 255 at most in photographs. Normalisation is the model's part then
(`patch_embedding.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

# The modules of the image processor of all supported families: its forms with and without torchvision.
_STOCK = tuple(f"transformers.models.qwen2_vl.image_processing_{form}qwen2_vl" for form in ("", "pil_"))
# Options of a call by which a processor normalises.
_NORMALIZATION = ("do_normalize", "image_mean", "image_std", "do_rescale", "rescale_factor")


def normalization_of(image_processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation, by channel, by which an image processor normalises values from 0 to 1; None if it
    makes something else of pixels."""
    rescales = image_processor.do_rescale and math.isclose(image_processor.rescale_factor, 1 / 255)
    if not (rescales and image_processor.do_normalize):
        return None
    return tuple(image_processor.image_mean), tuple(image_processor.image_std)


def level_patches(
    images: Sequence[np.ndarray], size: Mapping[str, int], image_processor: Any, **options: Any
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The 8-bit patches of images, each with one frame.

    Args:
        images: (height, width, 3) pixels from 0 to 255 of each image.
        size: limits of its pixels, "shortest_edge" and "longest_edge".
        image_processor: image processor whose patches they are to be. One that isn't the stock one, or resizes
            otherwise than it, makes them itself.
        **options: further options of a call of the image processor, with which it makes them itself.

    Returns:
        For each image, (patches, channels x patch size x patch size) of dtype uint8, in the order of the stock
        processor; and (images, 3) grids.

    Raises:
        ValueError: if its normalisation, or that among the options, isn't what a model does to 8-bit pixels.
    """
    if named := [name for name in _NORMALIZATION if name in options]:
        raise ValueError(
            f"{named[0]} can't be combined with uint8_pixels=True: the model normalises, by its configuration's "
            "image_mean and image_std. Leave one of them out."
        )
    if normalization_of(image_processor) is None:
        raise ValueError(
            "uint8_pixels=True needs an image processor that rescales by 1/255 and normalises; this one has "
            f"do_rescale={image_processor.do_rescale}, rescale_factor={image_processor.rescale_factor} and "
            f"do_normalize={image_processor.do_normalize}. Leave uint8_pixels out."
        )
    if options or not _is_stock(image_processor):
        return _made_otherwise(images, size, image_processor, options)
    patch, merge = image_processor.patch_size, image_processor.merge_size
    patches, grids = [], []
    for image in images:
        height, width = smart_resize(
            *image.shape[:2], patch * merge, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]
        )
        patches.append(_cut(_resized(image, height, width), patch, merge))
        grids.append([1, height // patch, width // patch])
    return patches, torch.tensor(grids)


def _is_stock(image_processor: Any) -> bool:
    """Whether an image processor does what this module does."""
    resizes = image_processor.do_resize and image_processor.resample == Image.Resampling.BICUBIC
    return type(image_processor).__module__ in _STOCK and resizes


def _made_otherwise(
    images: Sequence[np.ndarray], size: Mapping[str, int], image_processor: Any, options: Mapping[str, Any]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """As `level_patches`, by the image processor itself."""
    options = {**options, "size": dict(size), "do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    made = image_processor(images=[Image.fromarray(image) for image in images], **options)
    frames = made["pixel_values"].unflatten(1, (3, image_processor.temporal_patch_size, -1))[:, :, 0].flatten(1)
    levels = frames.round().clamp(0, 255).to(torch.uint8)
    return list(levels.split(made["image_grid_thw"].prod(-1).tolist())), made["image_grid_thw"]


def _resized(image: np.ndarray, height: int, width: int) -> torch.Tensor:
    """(3, height, width) of an image."""
    if not image.flags.writeable or min(image.strides) < 0:  # of which torch makes no tensor, or warns
        image = image.copy()
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    if pixels.shape[1:] == (height, width):
        return pixels
    # With the three channels of a pixel side by side, as they come, torch has the faster kernel.
    resized = torch.nn.functional.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)
    return resized[0]


def _cut(pixels: torch.Tensor, patch: int, merge: int) -> torch.Tensor:
    """(patches, 3 x patch x patch) of (3, height, width): those of a merged token after each other."""
    channels, height, width = pixels.shape
    blocks = pixels.reshape(channels, height // (patch * merge), merge, patch, width // (patch * merge), merge, patch)
    # -> (rows of tokens, tokens, rows of a token, patches, channels, patch, patch)
    return blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, channels * patch * patch)
