# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Videos in a call of the processor: their options, what is known of their frames, and the images that these become.

To a placeholder of a prompt an image is a video of one frame.
"""

# Transformers reads the annotations of typed dictionaries at run time, so they must not become strings here.

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

from .checks import counted
from .temporal_patches import by_image, middle
from .timestamps_casa import ENCLOSED, timestamp_text


class CasaVideosKwargs(TypedDict, total=False):
    """Options for videos; see `CasaProcessor.__call__`."""

    fps: float | None
    num_frames: int | None
    do_sample_frames: bool | None
    frame_max_pixels: int | None
    frames_per_image: int | str | None
    video_timestamps: str | None
    video_metadata: Any


def take_video_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options for videos among those of a call, which are taken out."""
    return {name: options.pop(name) for name in CasaVideosKwargs.__annotations__ if name in options}


class Visual(NamedTuple):
    """The image, or the frames of the video, that one placeholder stands for.

    Attributes:
        type: `IMAGE_TYPE` or `FRAME_TYPE`.
        frames: frames in order; of an image the image itself.
        frames_per_image: number of frames of an image.
        seconds_apart: seconds from frame to frame; 0 for an image.
        times: seconds at which each frame appears; none for an image.
        timestamps: kind of the times that are written before frames.
    """

    type: int
    frames: list[Any]
    frames_per_image: int | str
    seconds_apart: float = 0.0
    times: Sequence[float] = ()
    timestamps: str | None = None

    @property
    def by_image(self) -> list[list[Any]]:
        """The frames of each image that the model sees."""
        return by_image(self.frames, self.frames_per_image)

    @property
    def written(self) -> tuple[list[str], bool]:
        """What stands before each image, and whether delimiters stand around them all."""
        if self.timestamps is None:
            return [""] * len(self.by_image), False
        times = [middle(of_image) for of_image in by_image(self.times, self.frames_per_image)]
        return [timestamp_text(self.timestamps, time) for time in times], self.timestamps in ENCLOSED

    @property
    def ends(self) -> list[int]:
        """The types of all closing delimiters: those of its images, and 0 for one around them."""
        return [self.type] * len(self.by_image) + [0] * self.written[1]

    def check_sizes(self, sizes: list[tuple[int, int]]) -> None:
        """Refuse frames of different sizes, (width, height), in one image."""
        for of_image in by_image(sizes, self.frames_per_image):
            other = next((size for size in of_image if size != of_image[0]), None)
            if other is not None:
                first = of_image[0]
                raise ValueError(
                    f"A video has frames of {first[0]} x {first[1]} and of {other[0]} x {other[1]} pixels in one "
                    f"image (frames_per_image={self.frames_per_image!r}), which takes one size; resize them, or pass "
                    "frames_per_image=1."
                )


def video_metadata(given: Any, number: int) -> list[Any]:
    """What is known of each of so many videos, from what a call was given."""
    if given is None:
        return [None] * number
    rows = given if isinstance(given, (list, tuple)) else [given]
    flat = [item for row in rows for item in (row if isinstance(row, (list, tuple)) else [row])]
    if len(flat) != number:
        raise ValueError(
            f"video_metadata has {counted(len(flat), 'element')} for {counted(number, 'video')}; give one for each, "
            "or None for a video of which nothing is known."
        )
    return flat
