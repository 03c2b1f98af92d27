# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the Hub's client raises, in one line with the way out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError

from ..checkpoint_files.disk import disk_is_full
from ..checkpoint_files.hub_client import reason
from ..folder_files import CheckpointError

AGAIN = "Nothing was published. Try again: only what is missing is sent."
_LOGIN = "Log in again with `hf auth login`, or set another HF_TOKEN."


@contextmanager
def explained(repository: str, doing: str, user: str | None = None, when_lost: str = AGAIN) -> Iterator[None]:
    """Explain whatever the Hub's client raises.

    Args:
        repository: Hub id.
        doing: Action that failed, as the subject of a sentence.
        user: Name of the token's user, once known.
        when_lost: Advice for when there was no answer, or none of the Hub itself.

    Raises:
        CheckpointError: for any error inside.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the Hub's client lets many kinds through, also wrapped in each other
        cause = _cause(error)
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            raise CheckpointError(_refusal(cause, repository, doing, user, when_lost)) from error
        if _is_local(cause):
            raise CheckpointError(f"{doing} failed ({reason(cause)}). {AGAIN}") from error
        remedy = "Free some space on the disk." if disk_is_full(error) else "Check the connection."
        raise CheckpointError(f"{doing} failed ({reason(cause)}). {remedy} {when_lost}") from error


def is_lost(error: BaseException) -> bool:
    """Whether the Hub may have done what was asked despite an error: no answer, or one of a gateway before the Hub."""
    cause = _cause(error)
    response = getattr(cause, "response", None)
    return not _is_local(cause) if response is None else _is_of_gateway(response.status_code)


def _refusal(error: HfHubHTTPError, repository: str, doing: str, user: str | None, when_lost: str) -> str:
    said, status = reason(error), error.response.status_code
    if status == 401:
        return f"The Hub doesn't accept the token ({said}). {_LOGIN}"
    if status == 403:
        own = f"{user}/{repository.rpartition('/')[2]}"
        other = f", or a name of your own such as {own}" if user is not None and own != repository else ""
        return (
            f"The Hub doesn't let {user or 'you'} write to {repository} ({said}). Use a token with write "
            f"access{other}."
        )
    if status in (409, 412):
        return f"{repository} was changed during the upload ({said}). {AGAIN}"
    if status in (402, 413, 507):
        return f"The Hub has no room for this ({said}). Free some storage in your account's settings. {AGAIN}"
    return f"{doing} failed ({said}). {when_lost if _is_of_gateway(status) else AGAIN}"


def _cause(error: BaseException) -> BaseException:
    """The error that the Hub's client has wrapped."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error


def _is_local(error: BaseException) -> bool:
    """Whether this client has raised an error by itself; an answer that isn't JSON comes from elsewhere."""
    return isinstance(error, ValueError | TypeError) and not isinstance(error, json.JSONDecodeError)


def _is_of_gateway(status: int) -> bool:
    """Whether a gateway answers with this status in the Hub's place."""
    return status == 408 or (status >= 500 and status != 507)
