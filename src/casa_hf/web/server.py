# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The page as an ASGI application, and a server for it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import check_count
from ..listening import listen, shown_host
from ..video import MediaInput, VideoInput
from .player import Player

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from ..streaming import CaptionEvent, CasaStream
    from ..streaming.live import Late

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
# Two events for each word: an hour of a talkative model.
MAX_HISTORY = 20_000
THIS_MACHINE = ("127.0.0.1", "localhost", "[::1]")

# A browser that holds a video still keeps its download open; the end of the server doesn't wait for it.
_SHUTDOWN_SECONDS = 1
_MAX_CONNECTIONS = 256
# So long a connection may take to send a request.
_REQUEST_SECONDS = 5.0
_server_log = logging.getLogger("uvicorn.error")


def create_app(
    stream: CasaStream | Callable[[], CasaStream],
    video: VideoInput,
    *,
    title: str | None = None,
    real_time: bool | None = None,
    late: Late | None = None,
    max_history: int = MAX_HISTORY,
    on_event: Callable[[CaptionEvent], None] | None = None,
    allowed_hosts: Iterable[str] | None = THIS_MACHINE,
) -> Starlette:
    """The page as a Starlette application.

    One thread runs the model; it starts and ends with the application, and takes the first frame when the first page
    is opened.

    Args:
        stream: stream that nobody else uses meanwhile; or a function that makes one, which the thread calls, and
            closes what it made.
        video: input that the frames come from, see [`open_video`]. A file is played by the page, with its sound; of
            anything else, and of files that the browser can't play, the page shows the frames that the model has seen.
        title: title of the page; None for the name of the video.
        real_time: whether a recorded video is played at its own speed. Default: true of a file. A page never plays on
            beyond what the model has looked at.
        late: treatment of frames when the model is late, see [`LiveCaptions`]. Default: frames of a live video are
            dropped; a recorded one waits for the model.
        max_history: number of events that are kept for pages that are opened later, or come back.
        on_event: function that is called with every event of the stream, in the model's thread; to write captions to a
            file, say.
        allowed_hosts: host names under which a browser may ask for the page; None for any. Other sites whose names
            have been made to point to this machine are refused.

    Raises:
        ValueError: if a number isn't positive, or `late` and `real_time` don't go together.
        ImportError: without Starlette.
    """
    try:
        from .application import Page
    except ImportError as error:
        raise _missing() from error
    check_count("max_history", max_history)
    file = video.files[0].resolve() if isinstance(video, MediaInput) and video.files else None
    player = Player(
        stream,
        video,
        real_time=(video.live or file is not None) if real_time is None else real_time,
        late=late or ("drop" if video.live else "wait"),
        max_history=max_history,
        on_event=on_event,
    )
    page = Page(player, file, title or Path(video.name).name)
    app = page.application(["*"] if allowed_hosts is None else list(allowed_hosts))
    app.state.player = player
    return app


class CaptionServer:
    """An HTTP server for the page of a stream.

    Args:
        stream, video, **options: arguments of [`~web.server.create_app`].
        host: address to listen on. Anything but this machine's own addresses lets others watch, pause and ask:
            there is no password and no encryption.
        port: port to listen on; 0 takes a free one.

    Attributes:
        url: address of the page.

    Raises:
        ValueError: if the address can't be had, and where `create_app` does.
        ImportError: without Starlette or Uvicorn.
    """

    def __init__(
        self,
        stream: CasaStream | Callable[[], CasaStream],
        video: VideoInput,
        *,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        **options: Any,
    ) -> None:
        try:
            import uvicorn
        except ImportError as error:
            raise _missing() from error
        shown = shown_host(host)
        options.setdefault("allowed_hosts", (*THIS_MACHINE, shown) if _is_loopback(host) else None)
        app = create_app(stream, video, **options)
        self._player: Player = app.state.player
        self._socket = listen(host, port, "The page")
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}/"
        player = self._player

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                player.hang_up()  # pages listen for as long as there is something to hear
                _server_log.setLevel(logging.CRITICAL)  # a download that is cut off isn't worth a traceback
                await super().shutdown(sockets)

        self._server = Server(
            uvicorn.Config(
                app,
                http=_patient_protocol(),
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
        level = _server_log.level
        try:
            self._server.run(sockets=[self._socket])
        except KeyboardInterrupt:
            if self._player.error is None:
                raise
        finally:
            _server_log.setLevel(level)
            self._player.close()
            self.close()
        if self._player.error is not None:
            raise self._player.error

    def stop(self) -> None:
        """Let `run` return; may be called from any thread."""
        self._server.should_exit = True

    def close(self) -> None:
        """Give back the address of a server that isn't to run, or has run."""
        self._socket.close()


def serve(
    stream: CasaStream | Callable[[], CasaStream],
    video: VideoInput,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    on_start: Callable[[str], None] | None = None,
    **options: Any,
) -> None:
    """Serve the page of a stream until Ctrl-C.

    Args:
        stream, video, host, port, **options: arguments of [`CaptionServer`].
        on_start: function that is called with the page's URL before it is served.
    """
    server = CaptionServer(stream, video, host=host, port=port, **options)
    if on_start is not None:
        on_start(server.url)
    server.run()


def _patient_protocol() -> type[asyncio.Protocol]:
    """Uvicorn's protocol, but that connections which don't send a request are closed: after a time, and before that
    where others need their place."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol

    class Protocol(base):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.wait()
            if len(self.connections) >= _MAX_CONNECTIONS:
                others = [each for each in self.connections if each.timer is not None and each is not self]
                if others:
                    min(others, key=lambda each: each.timer.when()).close()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.serves:
                self.stop_waiting()
            elif self.timer is None:
                self.wait()

        def connection_lost(self, error: Exception | None) -> None:
            self.stop_waiting()
            super().connection_lost(error)

        @property
        def serves(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def wait(self) -> None:
            self.timer = self.loop.call_later(_REQUEST_SECONDS, self.close)

        def stop_waiting(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
            self.timer = None

        def close(self) -> None:
            self.stop_waiting()
            if not self.serves:
                self.transport.abort()

    return Protocol


def _missing() -> ImportError:
    return ImportError("The page needs Starlette and Uvicorn: pip install casa_hf[web]")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
