# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The page as an ASGI application, and a server for it."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .player import Player

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from ..streaming import CasaStream

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
# Two events for each word: an hour of a talkative model.
MAX_HISTORY = 20_000
THIS_MACHINE = ("127.0.0.1", "localhost", "[::1]")

# A browser that holds a video still keeps its download open; the end of the server doesn't wait for it.
_SHUTDOWN_SECONDS = 1
_MAX_CONNECTIONS = 256


def create_app(
    stream: CasaStream | Callable[[], CasaStream],
    source: Iterable[tuple[float, Any]],
    *,
    video_file: str | os.PathLike[str] | None = None,
    title: str | None = None,
    max_new_tokens: int = 64,
    max_history: int = MAX_HISTORY,
    allowed_hosts: Iterable[str] | None = THIS_MACHINE,
) -> Starlette:
    """The page as a Starlette application.

    One thread runs the model; it starts and ends with the application, and takes the first frame when the first page
    is opened.

    Args:
        stream: a stream that nobody else uses meanwhile; or a function that makes one, which the thread calls, and
            closes what it made.
        source: (timestamp in seconds, image) one after another, such as `casa_hf.video.open_video` gives.
        video_file: a file that the page plays beside the captions; `source` gives its frames. None: the page shows the
            frames themselves.
        title: of the page; None for the name of the file.
        max_new_tokens: length of an answer at most.
        max_history: events that are kept for pages that are opened later, or come back.
        allowed_hosts: names under which a browser may ask for the page; None for any. It refuses other sites whose
            names have been made to point to this machine.

    Raises:
        ValueError: if `video_file` isn't a file, or a number isn't positive.
        ImportError: without Starlette.
    """
    try:
        from .application import Page
    except ImportError as error:
        raise _missing() from error
    for name, value in (("max_new_tokens", max_new_tokens), ("max_history", max_history)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer.")
    file = None if video_file is None else Path(video_file).resolve()
    if file is not None and not file.is_file():
        raise ValueError(f"The video {str(video_file)!r} doesn't exist; give the path of a file, or no video_file.")
    player = Player(stream, source, max_history=max_history, max_new_tokens=max_new_tokens)
    app = Page(player, file, title or (file.name if file else "Live captions")).application(
        ["*"] if allowed_hosts is None else list(allowed_hosts)
    )
    app.state.player = player
    return app


class CaptionServer:
    """An HTTP server for the page of a stream.

    Args:
        stream, source, **options: see [`create_app`].
        host: address to listen on. Anything but this machine's own addresses lets others watch, pause and ask:
            there is no password and no encryption.
        port: 0 takes a free one.

    Attributes:
        url: where the page is.

    Raises:
        ValueError: if the address can't be had, and as `create_app`.
        ImportError: without Starlette or Uvicorn.
    """

    def __init__(
        self,
        stream: CasaStream | Callable[[], CasaStream],
        source: Iterable[tuple[float, Any]],
        *,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        **options: Any,
    ) -> None:
        try:
            import uvicorn
        except ImportError as error:
            raise _missing() from error
        options.setdefault("allowed_hosts", THIS_MACHINE if _is_loopback(host) else None)
        app = create_app(stream, source, **options)
        self._player: Player = app.state.player
        self._socket = _listen(host, port)
        port = self._socket.getsockname()[1]
        shown = "localhost" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{port}/"
        player = self._player

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                player.hang_up()  # pages listen for as long as there is something to hear
                await super().shutdown(sockets)

        self._server = Server(
            uvicorn.Config(
                app,
                lifespan="on",
                log_level="warning",
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
                server_header=False,
            )
        )

    def run(self) -> None:
        """Serve until `stop`, or a signal that ends the process; then the thread of the model has ended.

        Raises:
            Exception: what ended the stream, if an error did.
        """
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()
        if self._player.error is not None:
            raise self._player.error

    def stop(self) -> None:
        """Let `run` return; may be called from any thread."""
        self._server.should_exit = True


def serve(
    stream: CasaStream | Callable[[], CasaStream],
    source: Iterable[tuple[float, Any]],
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    on_start: Callable[[str], None] | None = None,
    **options: Any,
) -> None:
    """Serve the page of a stream until Ctrl-C.

    Args:
        stream, source, host, port, **options: see [`CaptionServer`].
        on_start: told the page's URL before it is served.
    """
    server = CaptionServer(stream, source, host=host, port=port, **options)
    if on_start is not None:
        on_start(server.url)
    server.run()


def _missing() -> ImportError:
    return ImportError("The page needs Starlette and Uvicorn: pip install casa_hf[web]")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        return listener
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"The page can't be served at {host}:{port} ({error}); choose another --host or --port."
        ) from error
