# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks of numbers that callers give: of every kind, Python's and NumPy's, but never True and False."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any


def is_number(value: Any, kind: type = Real) -> bool:
    """Whether this is a number of a kind of `numbers`."""
    return isinstance(value, kind) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
    """Whether this is a number, positive and finite."""
    return is_number(value) and 0 < value < math.inf


def check_number(name: str, value: Any, kind: type, allowed: Callable[[Any], bool], expected: str) -> None:
    """Refuse what is no number of this kind, or isn't allowed.

    Raises:
        ValueError: with the name, the value and what is expected.
    """
    if not is_number(value, kind) or not allowed(value):
        raise ValueError(f"{name}={value!r} must be {expected}.")


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
