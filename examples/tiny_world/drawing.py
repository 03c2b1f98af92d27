# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What images are made of: objects of one colour and shape, arrows, and characters.

An image is divided into tiles of 28 pixels, the size of one image token; only the object of a `scatter` crosses the
borders of tiles. Every drawing is slightly different: background, shade, size and place vary.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

TILE = 28

# Red, green and blue are far enough apart that shades of two colours never meet.
COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 150, 60),
    "blue": (50, 80, 215),
    "yellow": (220, 180, 20),
    "purple": (150, 55, 180),
    "black": (35, 35, 35),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

_SHADE = 12  # largest change of a colour channel
_LIGHTEST, _DARKEST = 255, 225  # of a background
_GLYPH = (12, 22)  # twice the font's size


class Thing(NamedTuple):
    """An object; `str(thing)` is what answers call it."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


def any_thing(rng: Random) -> Thing:
    """An object, each with the same probability."""
    return Thing(rng.choice(tuple(COLOURS)), rng.choice(SHAPES))


class Canvas:
    """A square image in the making.

    Args:
        side: in pixels.
        rng: decides everything that is left open.
    """

    def __init__(self, side: int, rng: Random):
        self.rng = rng
        self.image = Image.new("RGB", (side, side), tuple(rng.randint(_DARKEST, _LIGHTEST) for _ in range(3)))
        self._draw = ImageDraw.Draw(self.image)

    def thing(self, thing: Thing, centre: tuple[int, int], radius: int) -> None:
        """Draw an object around a centre (x, y)."""
        x, y = centre
        box = (x - radius, y - radius, x + radius, y + radius)
        colour = self._shade(COLOURS[thing.colour])
        if thing.shape == "circle":
            self._draw.ellipse(box, fill=colour)
        elif thing.shape == "square":
            self._draw.rectangle(box, fill=colour)
        elif thing.shape == "triangle":
            self._draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)
        elif thing.shape == "ring":
            self._draw.ellipse(box, outline=colour, width=max(2, radius // 3))
        else:
            arm = max(1, radius // 4)
            self._draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
            self._draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)

    def thing_in_tile(self, thing: Thing, row: int, column: int) -> None:
        """Draw an object somewhere in a tile."""
        radius = self.rng.randint(8, 11)
        slack = TILE // 2 - radius - 1
        self.thing(
            thing,
            (
                column * TILE + TILE // 2 + self.rng.randint(-slack, slack),
                row * TILE + TILE // 2 + self.rng.randint(-slack, slack),
            ),
            radius,
        )

    def arrow(self, direction: str, row: int, column: int) -> None:
        """Draw an arrow in a tile, dark grey."""
        down, right = DIRECTIONS[direction]
        x = column * TILE + TILE // 2 + self.rng.randint(-2, 2)
        y = row * TILE + TILE // 2 + self.rng.randint(-2, 2)
        length = self.rng.randint(8, 10)
        colour = self._shade((90, 90, 90))
        tip = (x + right * length, y + down * length)
        self._draw.line((x - right * length, y - down * length, *tip), fill=colour, width=3)
        # The head's corners lie beside the shaft, two thirds of the way back from the tip to the middle.
        back = (x + right * length // 4, y + down * length // 4)
        side = 6
        self._draw.polygon(
            [tip, (back[0] + down * side, back[1] + right * side), (back[0] - down * side, back[1] - right * side)],
            fill=colour,
        )

    def pair(self, key: str, number: str, row: int, column: int) -> None:
        """Write two characters into a tile, one in each half."""
        for offset, character in enumerate((key, number)):
            x = column * TILE + offset * TILE // 2 + (TILE // 2 - _GLYPH[0]) // 2 + self.rng.randint(-1, 1)
            y = row * TILE + (TILE - _GLYPH[1]) // 2 + self.rng.randint(-2, 2)
            self.image.paste(self._shade((35, 35, 35)), (x, y), glyph(character))

    def _shade(self, colour: tuple[int, int, int]) -> tuple[int, int, int]:
        red, green, blue = (max(0, min(255, channel + self.rng.randint(-_SHADE, _SHADE))) for channel in colour)
        return red, green, blue


@cache
def glyph(character: str) -> Image.Image:
    """The mask of a character, in Pillow's built-in bitmap font: the same on every machine."""
    font = ImageFont.load_default_imagefont()
    mask = Image.new("L", (_GLYPH[0] // 2, _GLYPH[1] // 2), 0)
    ImageDraw.Draw(mask).text((0, 0), character, fill=255, font=font)
    return mask.resize(_GLYPH, Image.Resampling.NEAREST)


def scatter(thing: Thing, rng: Random) -> Image.Image:
    """An image of two by two tiles with one object anywhere."""
    canvas = Canvas(2 * TILE, rng)
    radius = rng.randint(8, 12)
    slack = TILE - radius - 1
    canvas.thing(thing, (TILE + rng.randint(-slack, slack), TILE + rng.randint(-slack, slack)), radius)
    return canvas.image
