# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Captions of frames as they come: a session over a model (`CasaStream`), many sessions in one batch
(`CasaStreamBatch`), and what they report (`CaptionEvent`)."""

from .batch import CasaStreamBatch
from .events import CaptionEvent
from .session import CasaStream

__all__ = ["CaptionEvent", "CasaStream", "CasaStreamBatch"]
