# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Videos: a few frames of a video for a prompt, and frames one after another, each with its time, for a stream."""

from ..frames_casa import DEFAULT_FPS, VideoProblem, VideoWarning, check_sampling, load_frames, sample_indices
from .inputs import Frame, VideoInput
from .media import MediaInput
from .opening import open_video
from .read_ahead import ReadAhead
from .sequences import FrameIterator, ImageFolder

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
