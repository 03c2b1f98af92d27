# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Videos: a few frames of a clip for a prompt, and frames one after another, each with its time, for a stream."""

from ..media_casa import DEFAULT_FPS, VideoProblem, VideoWarning, check_sampling, load_frames, sample_indices
from .inputs import (
    Frame,
    FrameIterator,
    ImageFolder,
    MediaInput,
    VideoInput,
    open_video,
)
from .read_ahead import ReadAhead

__all__ = [
    "DEFAULT_FPS",
    "Frame",
    "FrameIterator",
    "ImageFolder",
    "MediaInput",
    "ReadAhead",
    "VideoInput",
    "VideoProblem",
    "VideoWarning",
    "check_sampling",
    "load_frames",
    "open_video",
    "sample_indices",
]
