# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The errors of conversion and publishing, and what keeps their messages in one line."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable

_LISTED = 4

_FAILED_WRITER = re.compile(r"PytorchStreamWriter failed writing|inline_container\.cc:\d+\] \. unexpected pos")


class ConversionError(ValueError):
    """A checkpoint that can't be converted or inspected; the message is one line and says what to do."""


class PublishingError(ValueError):
    """What can't be published, or wasn't; the message is one line and says what to do."""


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that a file couldn't grow.

    Of PyTorch's writer it is a guess: it doesn't say why a file isn't as long as it should be.
    """
    while error is not None:
        # Safetensors and tokenizers have exceptions of their own, with the number in their text.
        stated = None if isinstance(error, OSError) else re.search(r"\(os error (\d+)\)", str(error))
        number = int(stated[1]) if stated else getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if isinstance(error, RuntimeError) and _FAILED_WRITER.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
