# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Files of images that careless readers see differently, and one file in all forms in which images are given."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def turned_photograph(folder: Path) -> tuple[Path, np.ndarray]:
    """A file that is to be turned by its EXIF data, and how it is to be seen."""
    lying = np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(lying).save(folder / "turned.png", exif=exif)
    return folder / "turned.png", np.rot90(lying, -1)


def transparent_drawing(folder: Path) -> tuple[Path, np.ndarray]:
    """A file with opacity, and how it looks on white."""
    colours = np.random.RandomState(0).randint(0, 256, (20, 30, 4), np.uint8)
    colours[:10, :, 3] = 0
    colours[10:, :, 3] = 255
    Image.fromarray(colours).save(folder / "drawing.png")
    seen = colours[..., :3].copy()
    seen[:10] = 255
    return folder / "drawing.png", seen


def forms_of(file: Path, address: str) -> dict[str, Any]:
    """A PNG file in every form but pixels; `address` is where its folder is served."""
    contents = file.read_bytes()
    text = base64.b64encode(contents).decode()
    decoded = Image.open(BytesIO(contents))
    decoded.load()
    return {
        "path": file,
        "name": str(file),
        "file URL": file.as_uri(),
        "opened": Image.open(file),
        "decoded": decoded,
        "bytes": contents,
        "base64": text,
        "base64 in lines": "\n".join(text[start : start + 76] for start in range(0, len(text), 76)),
        "data URL": f"data:image/png;base64,{text}",
        "URL": f"{address}/{file.name}",
    }
