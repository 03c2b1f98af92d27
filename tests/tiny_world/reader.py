# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Answers questions by looking at pixels: connected areas, their colours and outlines."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFont

from examples.tiny_world.world import Example

WORDS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
PALETTE = {
    "red": (210, 40, 40),
    "green": (40, 150, 60),
    "blue": (50, 80, 215),
    "yellow": (220, 180, 20),
    "purple": (150, 55, 180),
    "black": (35, 35, 35),
    "grey": (90, 90, 90),
}
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


class Area(NamedTuple):
    """A connected area: what it is (a colour and a shape, or "grey" and a direction), and its middle in pixels."""

    colour: str
    shape: str
    row: float
    column: float


def read(example: Example) -> str:
    """The answer to the first question."""
    question = example.turns[0][0]
    images = [areas(image) for image in example.images]
    numbers = [WORDS[word] for word in re.findall(r"\w+", question) if word in WORDS]
    words = question.rstrip("?").split()
    first = images[0]
    match example.task:
        case "pairs":
            return words[3] + characters(example.images[0])[words[3]]
        case "place":
            return _name(_tile(first, numbers[0] - 1, numbers[1] - 1))
        case "arrows":
            row, column = numbers[0] - 1, numbers[1] - 1
            steps = 0
            while (found := _tile(first, row, column)).colour == "grey":
                row, column = row + STEPS[found.shape][0], column + STEPS[found.shape][1]
                steps += 1
            assert steps == example.size
            return _name(found)
        case "frames":
            return _name(images[numbers[0] - 1][0])
        case "rule":
            rule = example.lead[0]
            assert rule is not None and rule.count(",") + 1 == example.size
            return re.search(rf"{_name(first[0])} \w+", rule)[0]
        case "colour":
            [found] = [area for area in first if area.shape == words[4]]
            return f"{found.shape} {found.colour}"
        case "shape":
            [found] = [area for area in first if area.colour == words[3]]
            return found.shape
        case "count":
            kind = {"crosses": "cross"}.get(words[2], words[2].removesuffix("s"))
            found = [area for area in first if kind in (area.colour, area.shape)]
            return next(word for word, number in WORDS.items() if number == len(found))
        case "change":
            before, after = images[0][0], images[-1][0]
            moved = [before.row // 28, before.column // 28] != [after.row // 28, after.column // 28]
            differences = {
                "colour": before.colour != after.colour,
                "shape": before.shape != after.shape,
                "place": moved,
            }
            changed = [name for name, differs in differences.items() if differs]
            assert len(changed) < 2 and len(images) == example.size
            return changed[0] if changed else "nothing"
    raise AssertionError(example.task)


def areas(image: Image.Image) -> list[Area]:
    """The connected areas of at least 20 pixels."""
    pixels = np.asarray(image).astype(int)
    left = _foreground(pixels)
    found = []
    while left.any():
        area = _spread(tuple(np.argwhere(left)[0]), left)
        left &= ~area
        if area.sum() >= 20:
            rows, columns = np.nonzero(area)
            mean = pixels[area].mean(0)
            colour = min(PALETTE, key=lambda name: np.abs(mean - PALETTE[name]).sum())
            outline = area[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            shape = _direction(outline) if colour == "grey" else _shape(outline)
            middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
            found.append(Area(colour, shape, *middle))
    return found


def characters(image: Image.Image) -> dict[str, str]:
    """The character to the right of each, by comparing halves of tiles with every character of the font, enlarged."""
    font = ImageFont.load_default_imagefont()
    alphabet = {}
    for character in map(chr, range(33, 127)):
        mask = _trim(np.array(font.getmask(character)).reshape(11, 6) > 0).repeat(2, 0).repeat(2, 1)
        alphabet[mask.tobytes(), mask.shape] = character
    ink = _foreground(np.asarray(image).astype(int))
    found = {}
    for row in range(0, ink.shape[0], 28):
        for column in range(0, ink.shape[1], 28):
            pair = [ink[row : row + 28, start : start + 14] for start in (column, column + 14)]
            if pair[0].any() or pair[1].any():
                key, number = (alphabet[_trim(cell).tobytes(), _trim(cell).shape] for cell in pair)
                assert key not in found
                found[key] = number
    return found


def _foreground(pixels: np.ndarray) -> np.ndarray:
    background, _ = Counter(map(tuple, pixels.reshape(-1, 3).tolist())).most_common(1)[0]
    return (np.abs(pixels - background) > 30).any(-1)


def _spread(start: tuple[int, ...], inside: np.ndarray) -> np.ndarray:
    """What is connected with a pixel, corners included."""
    area = np.zeros_like(inside)
    area[start] = True
    while True:
        grown = np.zeros_like(area)
        padded = np.pad(area, 1)
        for row in range(3):
            for column in range(3):
                grown |= padded[row : row + area.shape[0], column : column + area.shape[1]]
        grown &= inside
        if (grown == area).all():
            return area
        area = grown


def _shape(outline: np.ndarray) -> str:
    height, width = outline.shape
    if not outline[height // 2, width // 2]:
        return "ring"
    filled = outline.mean()
    if filled > 0.95:
        return "square"
    if filled > 0.7:
        return "circle"
    return "triangle" if outline[-1].mean() > 0.9 else "cross"


def _direction(outline: np.ndarray) -> str:
    """The widest line across the shaft belongs to the head."""
    height, width = outline.shape
    across = outline.sum(0) if width > height else outline.sum(1)
    towards_end = across.argmax() > len(across) / 2
    return ("right" if towards_end else "left") if width > height else ("down" if towards_end else "up")


def _trim(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.ascontiguousarray(mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])


def _tile(found: list[Area], row: int, column: int) -> Area:
    [area] = [area for area in found if (int(area.row) // 28, int(area.column) // 28) == (row, column)]
    return area


def _name(area: Area) -> str:
    return f"{area.colour} {area.shape}"
