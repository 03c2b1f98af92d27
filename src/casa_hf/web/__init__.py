# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A page in the browser that shows a stream: the video, its captions as they are generated, latency and memory."""

from .server import DEFAULT_HOST, DEFAULT_PORT, CaptionServer, create_app, serve

__all__ = ["DEFAULT_HOST", "DEFAULT_PORT", "CaptionServer", "create_app", "serve"]
