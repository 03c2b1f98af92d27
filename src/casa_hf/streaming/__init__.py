# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Captions of frames as they come: a session over a model (`CasaStream`), many of them in one batch
(`CasaStreamBatch`), how they caption (`StreamSettings`), their clock (`LiveCaptions`), and what they report
(`CaptionEvent`)."""

from .batch import CasaStreamBatch
from .events import CaptionEvent
from .live import LiveCaptions
from .session import CasaStream
from .settings import StreamSettings

__all__ = ["CaptionEvent", "CasaStream", "CasaStreamBatch", "LiveCaptions", "StreamSettings"]
