# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A small world of images and questions about them, and models that learn to see it (docs/results.md)."""
