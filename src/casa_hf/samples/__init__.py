# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Three photographs that come with the package, so that its examples run anywhere; README.md names their authors.

Each is the path of a JPEG file in the folder `PHOTOGRAPHS`.
"""

from pathlib import Path

PHOTOGRAPHS = Path(__file__).parent

CAT = str(PHOTOGRAPHS / "cat.jpg")
COFFEE = str(PHOTOGRAPHS / "coffee.jpg")
ROCKET = str(PHOTOGRAPHS / "rocket.jpg")

__all__ = ["CAT", "COFFEE", "PHOTOGRAPHS", "ROCKET"]
