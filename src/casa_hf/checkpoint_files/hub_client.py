# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What every request to the Hub needs: a valid token, a time-out, and the reason when it fails."""

from __future__ import annotations

import re
from textwrap import shorten
from typing import Any

from huggingface_hub import get_token, set_client_factory
from huggingface_hub.utils import _http

from ..folder_files import CheckpointError

# Seconds to wait for a connection, and for the next byte of an answer or of what is sent: a commit of many files takes
# the Hub a while, and a gateway gives up after a minute.
CONNECT_TIMEOUT, READ_TIMEOUT = 20.0, 120.0

_PRINTABLE = re.compile(r"[!-~]+")


def hub_token(token: str | bool | None = None) -> str | None:
    """The token to send, or None if there is none.

    Args:
        token: Token of the Hub; None or True for that of `hf auth login` or HF_TOKEN, False for none.

    Raises:
        CheckpointError: if it has an invalid character; the message doesn't show the token, as the client's would.
    """
    if token is False:
        return None
    found = token if isinstance(token, str) else get_token()
    if not found:
        return None
    if not _PRINTABLE.fullmatch(found):
        place = next(index for index, character in enumerate(found) if not _PRINTABLE.fullmatch(character))
        kind = "line break" if found[place] in "\r\n" else "space" if found[place].isspace() else "character"
        raise CheckpointError(
            f"The token for the Hub has an invalid character: a {kind} at place {place + 1} of {len(found)}. Copy the "
            "token again, log in with `hf auth login`, or set HF_TOKEN."
        )
    return found


def limit_waiting() -> None:
    """Give the requests of the Hub's client a time-out from now on, where they have none.

    By default the client waits for most answers without a limit. Limits of a single request, or of a client that was
    set up with `huggingface_hub.set_client_factory`, are kept.
    """
    make = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
    if getattr(make, "has_timeouts", False):
        return

    def client() -> Any:
        made = make()
        made.event_hooks["request"].append(_limit)
        return made

    client.has_timeouts = True  # type: ignore[attr-defined]
    set_client_factory(client)


def _limit(request: Any) -> None:
    """Add the limits that a request lacks; the client's own default isn't used where a call has `timeout=None`."""
    limits = {"connect": CONNECT_TIMEOUT, "read": READ_TIMEOUT, "write": READ_TIMEOUT, "pool": READ_TIMEOUT}
    given = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = limits | {name: value for name, value in given.items() if value is not None}


def reason(error: BaseException) -> str:
    """Why a request has failed, in one short line; the Hub's own words if it gave any."""
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return shorten(said, 160, placeholder=" ...")
