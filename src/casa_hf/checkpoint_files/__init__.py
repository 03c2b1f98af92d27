# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint folders on disk: what conversion, publishing and training share."""
