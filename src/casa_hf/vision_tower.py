# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What Transformers' vision towers are given beside pixels, so that they read no sizes off the device.

Stock towers derive positions and bounds where the sizes of images are, and read those sizes, image by image. On a GPU
that waits for the device many times, and sizes that stayed on the CPU end in an operation on two devices. The towers
take all of it as keyword arguments too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils.generic import get_max_seqlen, is_flash_attention_requested
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from .tower_attention import SDPA_TOWER, tower_images, tower_windows
from .transfers import moved


def tower_inputs(tower: nn.Module, grids: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a tower's forward beside pixels and grids.

    Args:
        tower: vision tower of Transformers, of a family in `backbones.VISION_TOWERS`.
        grids: (num_images, 3) patches in time, height and width; on the CPU.
        device: device of the pixels.
    """
    config: Any = tower.config
    merge, by_length = config.spatial_merge_size, config._attn_implementation == SDPA_TOWER
    inputs: dict[str, Any] = {"position_ids": get_vision_position_ids(grids, merge)}
    inputs["cu_seqlens"] = get_vision_cu_seqlens(grids)
    inputs["max_seqlen"] = tower_images(grids) if by_length else get_max_seqlen(inputs["cu_seqlens"], config)
    if hasattr(tower, "window_size") and by_length:
        windows = tower_windows(grids, merge, config.window_size, config.patch_size)
        inputs["window_index"], inputs["max_window_seqlen"] = windows
        inputs["cu_window_seqlens"] = inputs["cu_seqlens"]  # nobody reads them
    elif hasattr(tower, "window_size"):
        inputs["window_index"], inputs["cu_window_seqlens"] = get_vision_window_index(
            grids, merge, tower.window_size, config.patch_size
        )
        inputs["max_window_seqlen"] = get_max_seqlen(inputs["cu_window_seqlens"], config)
    if hasattr(tower, "num_grid_per_side"):
        inputs["interp_indices"], inputs["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grids,
            tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
    # Kernels read the bounds of images on the device; the other backends split by them on the host.
    on_host = by_length or not is_flash_attention_requested(config)
    stays = ("cu_seqlens", "cu_window_seqlens") if on_host else ()
    return {
        name: moved(value, device) if isinstance(value, torch.Tensor) and name not in stays else value
        for name, value in inputs.items()
        if value is not None
    }
