# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How the frames of a video become images.

A vision tower takes two frames at once, as a temporal patch. A still image fills it twice, and so does a video frame
that is an image of its own; two frames of a video share one; and where a whole video is one image, it has as many as
it needs. An odd frame at the end is doubled, as in the sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")

_CHANNELS = 3
# The number of frames of an image that is a whole video.
ALL_FRAMES = "all"


def check_frames_per_image(value: Any, temporal_patch_size: int) -> None:
    """Check a number of frames per image.

    Args:
        value: number to check.
        temporal_patch_size: number of frames in a temporal patch of the vision tower.

    Raises:
        ValueError: if it is neither 1, nor those of a temporal patch, nor `ALL_FRAMES`.
    """
    allowed = (1, temporal_patch_size, ALL_FRAMES)
    if isinstance(value, bool) or not isinstance(value, str | Integral) or value not in allowed:
        raise ValueError(
            f"frames_per_image={value!r} is none of {', '.join(map(repr, allowed))}. Use 1 for each frame as an "
            f"image, {temporal_patch_size} for a temporal patch of the vision tower, or {ALL_FRAMES!r} for whole "
            "videos, of models with casa_video_layout='native' of Qwen2-VL or Qwen2.5-VL."
        )


def by_image(frames: Sequence[Item], frames_per_image: int | str) -> list[list[Item]]:
    """Distribute the frames of a video, or anything that there is one of for each, over images."""
    step = len(frames) if frames_per_image == ALL_FRAMES else int(frames_per_image)
    return [list(frames[start : start + step]) for start in range(0, len(frames), max(step, 1))]


def middle(times: Sequence[float]) -> float:
    """The time of an image: the mean of those of its first and its last frame."""
    return (times[0] + times[-1]) / 2


def num_temporal_patches(num_frames: int, temporal_patch_size: int) -> int:
    """How many temporal patches an image of so many frames has."""
    return -(-num_frames // temporal_patch_size)


def join_frames(frames: Sequence[torch.Tensor], temporal_patch_size: int) -> torch.Tensor:
    """The patches of an image of several frames.

    Args:
        frames: (patches, patch dim) patches of each frame, all of one size, as the processor makes them: with the
            frame in all places of a temporal patch, or of dtype uint8 with the frame once.
        temporal_patch_size: number of frames in a temporal patch.

    Returns:
        (temporal patches * patches, patch dim) patches, in order of time; of a single frame its own.
    """
    if len(frames) == 1:
        return frames[0]
    places = 1 if frames[0].dtype == torch.uint8 else temporal_patch_size
    single = [patches.unflatten(1, (_CHANNELS, places, -1))[:, :, 0] for patches in frames]
    single += [single[-1]] * (-len(single) % temporal_patch_size)
    joined = [
        torch.stack(single[start : start + temporal_patch_size], dim=2).flatten(1)
        for start in range(0, len(single), temporal_patch_size)
    ]
    return torch.cat(joined)


def concatenate_patches(patches: Sequence[torch.Tensor]) -> torch.Tensor:
    """The patches of several images as one tensor.

    Args:
        patches: (patches, patch dim) of each image. Those of dtype uint8 that hold their frame once hold it in all
            places of a temporal patch wherever others have several frames.
    """
    if len(patches) == 1:
        return patches[0]
    width = max(image.shape[1] for image in patches)

    def widened(image: torch.Tensor) -> torch.Tensor:
        if image.shape[1] == width:
            return image
        return image.unflatten(1, (_CHANNELS, 1, -1)).expand(-1, -1, width // image.shape[1], -1).flatten(1)

    return torch.cat([widened(image) for image in patches])
