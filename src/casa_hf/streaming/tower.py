# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The vision tower as streams use it: frames of one size at once, and compiled for sizes that come again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .graphs import GraphsOfModel, compiled

if TYPE_CHECKING:
    from ..modeling_casa import CasaForConditionalGeneration

# Frames go through a compiled tower in groups of these sizes, so that no more than these are compiled and nothing is
# padded: a GPU is busy with the largest one.
_GROUPS = (8, 4, 2, 1)
# Sizes of frames that the tower stays compiled for.
_MAX_SIZES = 8

Size = tuple[int, int, int]  # patches in time, height and width
Kind = tuple[Size, torch.device, str | None]  # with the device, and how the tower attends
Tower = Callable[[torch.Tensor], torch.Tensor]  # from pixels to features


class FrameTower(GraphsOfModel):
    """Features of frames by a model's vision tower.

    With `options`, the tower is compiled for each size of frames and each number of them in a group (1, 2, 4 or 8)
    when these come for the second time, and stays so for the last 8 sizes; what comes once isn't worth it.

    Args:
        model: model whose tower it is.
        options: arguments of `torch.compile`; None to run the tower as it is.
    """

    def __init__(self, model: CasaForConditionalGeneration, options: dict[str, Any] | None = None):
        super().__init__(model, options)
        self._compiled: dict[Kind, dict[int, Tower | None]] = {}  # by number of frames

    def inputs(self, images: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Image inputs of a forward, with features in place of pixels if the tower is compiled.

        Args:
            images: image inputs of a forward, pixels on the model's device and sizes on the CPU.
        """
        if self._options is None or "pixel_values" not in images:
            return images
        rest = {name: value for name, value in images.items() if name != "pixel_values"}
        return rest | {"image_embeds": self.features(images["pixel_values"], images["image_grid_thw"])}

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """(num_image_tokens, `config.image_features_size`) what `get_image_features` gives, of all images in order.

        Args:
            pixel_values: (patches, patch dim) of the images, on the model's device.
            grids: (num_images, 3) patches in time, height and width; on the CPU.
        """
        by_size: dict[Size, list[int]] = {}
        for number, (time, height, width) in enumerate(grids.tolist()):
            by_size.setdefault((time, height, width), []).append(number)
        patches = pixel_values.split(grids.prod(-1).tolist())
        features: dict[int, torch.Tensor] = {}
        for size, numbers in by_size.items():
            while numbers:
                count = next(count for count in _GROUPS if count <= len(numbers))
                group, numbers = numbers[:count], numbers[count:]
                pixels = torch.cat([patches[number] for number in group]) if count > 1 else patches[group[0]]
                features |= zip(group, self._of_group(size, count, pixels), strict=True)
        return torch.cat([features[number] for number in range(len(grids))])

    def _of_group(self, size: Size, count: int, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        """The features of each of so many images of this size."""
        grids = torch.tensor([size] * count)
        kind = size, pixels.device, getattr(self._model.config.vision_config, "_attn_implementation", None)
        with self._lock:
            of_kind = self._compiled.pop(kind, {})
            self._compiled[kind] = of_kind  # the last one used is the last one to go
            if len(self._compiled) > _MAX_SIZES:
                del self._compiled[next(iter(self._compiled))]
            comes_again = count in of_kind
            tower = of_kind.setdefault(count, None)
            if comes_again and tower is None:
                assert self._options is not None
                tower = of_kind[count] = compiled(self._model.tower_for(grids, pixels.device), self._options)
        if tower is None:
            return self._model.tower_for(grids, pixels.device)(pixels).chunk(count)
        # A copy: the next replay of a CUDA graph writes over its results.
        return tower(pixels).clone().chunk(count)
