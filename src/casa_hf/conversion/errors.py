# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The one exception of the converter, and what keeps its messages in one line."""

from __future__ import annotations

from collections.abc import Iterable

_LISTED = 4


class ConversionError(ValueError):
    """A checkpoint that can't be converted or inspected; the message is one line and says what to do."""


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())
