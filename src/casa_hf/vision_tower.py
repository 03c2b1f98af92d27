# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What makes Transformers' vision towers faster: patches embedded by one matrix product, and sizes read on the host.

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
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)


class PatchProjection(nn.Conv3d):
    """The patch embedding of a vision tower, as the matrix product that it is: its stride is its kernel size.

    The convolution itself is many times slower on some versions of torch.
    """

    @classmethod
    def like(cls, convolution: nn.Conv3d) -> PatchProjection:
        """The same projection; it takes over the parameters.

        Raises:
            ValueError: if patches overlap or leave gaps, so that the convolution is more than one product.
        """
        time, height, width = convolution.kernel_size
        if convolution.stride != convolution.kernel_size:
            raise ValueError(
                f"The patch embedding has kernel size {convolution.kernel_size} and stride {convolution.stride}; they "
                "must be equal."
            )
        projection = cls(
            convolution.in_channels,
            convolution.out_channels,
            (time, height, width),
            stride=(time, height, width),
            bias=convolution.bias is not None,
            device="meta",
        )
        projection.weight, projection.bias = convolution.weight, convolution.bias
        return projection

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.shape[2:] != self.kernel_size:
            return super().forward(input)
        patches = nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)
        return patches[:, :, None, None, None]


def tower_inputs(tower: nn.Module, grids: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a tower's forward beside pixels and grids.

    Args:
        tower: vision tower of Transformers, of a family in `backbones.VISION_TOWERS`.
        grids: (num_images, 3) patches in time, height and width; on the CPU.
        device: device of the pixels.
    """
    config: Any = tower.config
    merge = config.spatial_merge_size
    inputs: dict[str, Any] = {"position_ids": get_vision_position_ids(grids, merge)}
    inputs["cu_seqlens"], inputs["max_seqlen"] = get_vision_attention_seqlens(grids, config)
    if hasattr(tower, "window_size"):
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
    stays = () if is_flash_attention_requested(config) else ("cu_seqlens", "cu_window_seqlens")
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) and name not in stays else value
        for name, value in inputs.items()
        if value is not None
    }
