# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks of what callers give: numbers of every kind, Python's and NumPy's, but not True and False; strings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, cast

_MAX_SHOWN = 100
_MAX_LISTED = 4


def is_number(value: Any, kind: type = Real) -> bool:
    """Whether this is a number of a kind of `numbers`; as Real, one that a float can hold, or infinite or NaN."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    try:
        return kind is not Real or isinstance(float(cast(Any, value)), float)
    except OverflowError:  # such as 10**400
        return False


def shown(value: Any) -> str:
    """A value as an error message shows it, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are, for an error message."""
    names = list(names)
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def counted(number: int, noun: str) -> str:
    """A number and its noun, in the plural where it needs one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


def is_positive(value: Any) -> bool:
    """Whether this is a number, positive and finite."""
    return is_number(value) and 0 < float(value) < math.inf


def check_number(name: str, value: Any, kind: type, allowed: Callable[[Any], bool], expected: str) -> None:
    """Refuse a value that is not a number of this kind, or isn't allowed.

    Raises:
        ValueError: with the name, the value and what is expected.
    """
    if not is_number(value, kind) or not allowed(value):
        raise ValueError(f"{name}={shown(value)} must be {expected}.")


def check_positive(name: str, value: Any, expected: str = "a positive number") -> None:
    """Refuse what isn't positive and finite.

    Raises:
        ValueError: with the name, the value and what is expected.
    """
    check_number(name, value, Real, is_positive, expected)


def check_count(name: str, value: Any) -> None:
    """Refuse what isn't an integer of 1 or more.

    Raises:
        ValueError: with the name, the value and what is expected.
    """
    check_number(name, value, Integral, lambda number: number >= 1, "a positive integer")


def check_text(name: str, text: Any) -> None:
    """Refuse what is not a string, or has a lone surrogate, which can be neither tokenized nor written to a file.

    Raises:
        ValueError: with the name, the character and its place.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = error.start
        raise ValueError(
            f"{name} has {text[place]!r} at index {place}, which is half a character (a lone surrogate): it comes "
            "from bytes that aren't UTF-8, or from half of an escape such as \\ud83d\\ude00 in JSON. Replace it by "
            "a whole character."
        ) from None


def check_asks(name: str, text: Any, visuals: bool = False) -> None:
    """Refuse a message that asks nothing: blank text without an image or a video.

    Raises:
        ValueError: with the name.
    """
    if isinstance(text, str) and not text.strip() and not visuals:
        raise ValueError(f"{name} is {text!r}, which asks nothing; expected a question or an instruction. Write one.")
