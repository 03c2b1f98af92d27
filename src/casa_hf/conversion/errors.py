# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The one exception of the converter, and what keeps its messages in one line."""

from __future__ import annotations

import errno
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


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that a file couldn't grow."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False
