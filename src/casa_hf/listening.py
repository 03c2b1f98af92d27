# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The address that a server of this package listens on, taken before anything slow is done."""

from __future__ import annotations

import os
import socket

LAST_PORT = 65_535


def listen(host: str, port: int, what: str) -> socket.socket:
    """A socket that listens on an address.

    Args:
        host: name or address of this machine.
        port: port; 0 takes a free one.
        what: what is served, as the error calls it, such as "The page".

    Raises:
        ValueError: if the address can't be had.
    """
    if not 0 <= port <= LAST_PORT:
        raise ValueError(f"port={port} must be from 0 to {LAST_PORT}; 0 takes a free one.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # who comes before the server runs has to wait, not to try again
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise ValueError(f"{what} can't be served at {host}:{port} ({error}); choose another host or port.") from error


def shown_host(host: str) -> str:
    """The host of a server in URLs that this machine opens."""
    return "localhost" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
