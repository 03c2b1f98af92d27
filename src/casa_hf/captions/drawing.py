# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A caption drawn into an image, with a font that has its characters."""

from __future__ import annotations

import os
import unicodedata
from bisect import bisect_right
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

# As a part of the image's height.
_LETTER_HEIGHT = 1 / 18
_MIN_LETTER_PIXELS = 10
_MAX_LINES = 3
# Looked for in the system's folders of fonts: the letters of many languages, then Chinese, Japanese and Korean too.
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "arial.ttf",
    "Arial.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "msyh.ttc",
    "YuGothM.ttc",
    "malgun.ttf",
    "Hiragino Sans GB.ttc",
    "AppleSDGothicNeo.ttc",
)
# Not a character, so that fonts draw for it what they draw for any character that they lack.
_NO_CHARACTER = "\U0010ffff"


def captioned(image: Image.Image, text: str, font: str | os.PathLike[str] | None = None) -> Image.Image:
    """An image with a caption at its lower edge, on a dark ground.

    Long captions are broken into lines; of more than three lines the last three are drawn.

    Args:
        image: image of any size.
        text: text of the caption.
        font: file of a TrueType or OpenType font. None for the first of some usual ones that is installed and has all
            characters of the text; where there is none, the one that has the most of them. Pillow brings the last one.

    Raises:
        OSError: if the font can't be read.
    """
    size = _letter_size(image)
    letters, _ = _font(text, size, None if font is None else os.fspath(font))
    margin = size // 2
    lines = _lines(text, image.width - 4 * margin, letters.getlength)[-_MAX_LINES:]
    caption = "\n".join(lines)
    drawn = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(ground)
    x, y = image.width / 2, image.height - 2 * margin
    left, top, right, bottom = draw.multiline_textbbox((x, y), caption, font=letters, anchor="md", align="center")
    draw.rectangle((left - margin, top - margin, right + margin, bottom + margin), fill=(0, 0, 0, 160))
    draw.multiline_text((x, y), caption, font=letters, anchor="md", align="center", fill=(255, 255, 255, 255))
    return Image.alpha_composite(drawn, ground).convert("RGB")


def missing_letters(image: Image.Image, text: str, font: str | None) -> str:
    """The characters of a caption that `captioned` can't draw, since the font lacks them."""
    return _font(text, _letter_size(image), font)[1]


def _letter_size(image: Image.Image) -> int:
    return max(_MIN_LETTER_PIXELS, round(image.height * _LETTER_HEIGHT))


def _lines(text: str, width: float, length: Any) -> list[str]:
    """Text broken so that each line is at most so long, between words where they aren't longer themselves."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and length(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
            while len(line) > 1 and length(line) > width:
                fits = bisect_right(range(1, len(line)), width, key=lambda count: length(line[:count])) or 1
                lines.append(line[:fits])
                line = line[fits:]
        lines += [line] if line else []
    return lines


@lru_cache(maxsize=8)  # a caption is drawn into many frames
def _font(text: str, size: int, file: str | None) -> tuple[Any, str]:
    """The font for a text, as `captioned` says, and the characters that it lacks."""
    best: tuple[Any, str] | None = None
    for name in (*_FONTS, None) if file is None else (file,):
        font = _loaded(name, size)
        if font is None:
            continue
        missing = "".join(dict.fromkeys(letter for letter in text if not _has(font, letter)))
        if best is None or len(missing) < len(best[1]):
            best = font, missing
        if not missing:
            break
    if best is None:
        raise OSError(f"The font {file!r} can no longer be read.")
    return best


@lru_cache(maxsize=2 * len(_FONTS))
def _loaded(name: str | None, size: int) -> Any:
    """A font by its file, or its name in the system's folders; None stands for the one that Pillow brings.

    None if there is none.
    """
    try:
        return ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)
    except OSError:
        return None


def _has(font: Any, letter: str) -> bool:
    """Whether a font can draw a character, if there is anything to draw."""
    if unicodedata.category(letter)[0] in "CZ":
        return True
    return bytes(font.getmask(letter)) != bytes(font.getmask(_NO_CHARACTER))


def check_font(file: str | os.PathLike[str]) -> None:
    """Refuse a file that isn't a font.

    Raises:
        ValueError: with the file and the reason.
    """
    try:
        ImageFont.truetype(os.fspath(file), _MIN_LETTER_PIXELS)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The font {os.fspath(file)!r} can't be used ({error}); give the file of a TrueType or OpenType font."
        ) from error


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image in the middle of a frame of this size, scaled if it has to be."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # One more row or column, for an even size, is no reason to scale.
    if 0 <= width - image.width <= 1 and 0 <= height - image.height <= 1:
        size = image.size
    canvas = Image.new("RGB", (width, height))
    scaled = image if size == image.size else image.resize(size)
    canvas.paste(scaled, ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas
