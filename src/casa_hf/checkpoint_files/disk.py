# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether an error means that the disk is full."""

from __future__ import annotations

import errno
import re

_FAILED_WRITER = re.compile(r"PytorchStreamWriter failed writing|inline_container\.cc:\d+\] \. unexpected pos")


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
