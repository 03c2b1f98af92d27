# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints on the Hub: their model cards, the code that they can carry, and the ways to publish them."""
