# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Captions written down: as subtitles, and drawn into the video."""
