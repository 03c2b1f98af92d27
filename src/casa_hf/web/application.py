# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the page's server answers.

A request chooses among fixed answers: nothing in it becomes the name of a file. The page is told what happens by
server-sent events, and asks for something with small POST requests in JSON. What a browser asks for on behalf of
another site is refused, whatever it is, but for a link to the page.

Imported where Starlette is known to be installed.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..checks import check_text
from .history import Entry
from .player import Player

MAX_QUESTION_CHARACTERS = 1000

_MAX_BODY_BYTES = 8192
_BODY_SECONDS = 5.0
_PIECE_BYTES = 4 << 20
_KEEP_ALIVE_SECONDS = 15.0
_RETRY_MILLISECONDS = 1000
_STATIC = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/events.js": ("events.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Page:
    """The answers to the requests of a page.

    Args:
        player: player that runs the model.
        file: video that the page plays; None where it shows frames.
        title: title of the page.
    """

    def __init__(self, player: Player, file: Path | None, title: str) -> None:
        self._player, self._file = player, file
        self._session = {"run": player.run, "title": title, "video": file is not None}

    def application(self, allowed_hosts: list[str]) -> Starlette:
        """The application; the player's thread lives as long as it runs."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self._player.start()
            try:
                yield
            finally:
                await run_in_threadpool(self._player.close)

        routes = [
            *(Route(path, _static(*content)) for path, content in _STATIC.items()),
            Route("/events", self.events),
            Route("/frames/{run}/{index:int}.jpg", self.frame),
            Route("/pause", self.pause, methods=["POST"]),
            Route("/resume", self.resume, methods=["POST"]),
            Route("/ask", self.ask, methods=["POST"]),
        ]
        if self._file is not None:
            routes.append(Route("/video", self.video))
        guards = [
            Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts, www_redirect=False),
            Middleware(_OwnSite),
        ]
        return Starlette(routes=routes, middleware=guards, lifespan=lifespan)

    async def events(self, request: Request) -> Response:
        """Server-sent events: what is kept of the history after the last event that the page knows, and what comes."""
        run, _, number = request.headers.get("last-event-id", "").rpartition("-")
        after = int(number) if run == self._player.run and number.isdecimal() else 0
        self._player.begin()
        return StreamingResponse(self._told(after), media_type="text/event-stream", headers=_HEADERS)

    async def _told(self, after: int) -> AsyncIterator[str]:
        yield f"retry: {_RETRY_MILLISECONDS}\n\n" + _event("session", json.dumps(self._session | self._player.state))
        async for entries in self._player.history.follow(after, patience=_KEEP_ALIVE_SECONDS):
            if not entries:
                yield ": still here\n\n"  # a connection that is gone shows when something is sent
                continue
            lost = entries[0].number - after - 1
            after = entries[-1].number
            gap = _event("gap", json.dumps({"lost": lost})) if lost else ""
            yield gap + "".join(self._numbered(entry) for entry in entries)

    def _numbered(self, entry: Entry) -> str:
        return f"id: {self._player.run}-{entry.number}\n" + _event(entry.name, entry.data)

    async def video(self, request: Request) -> Response:
        """The file, or the range of it that is asked for, in pieces.

        A browser that plays a video asks for all the rest, takes what it can hold, and keeps the connection: one of
        the six that all its pages share. It asks again where a piece ends.
        """
        assert self._file is not None
        if rest := re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", "")):
            piece = f"bytes={rest[1]}-{int(rest[1]) + _PIECE_BYTES - 1}"
            others = [(name, value) for name, value in request.scope["headers"] if name != b"range"]
            request.scope["headers"] = [*others, (b"range", piece.encode())]
        return FileResponse(self._file, headers=_HEADERS | {"Cache-Control": "no-cache"})

    def frame(self, request: Request) -> Response:
        """A frame as a JPEG; runs in a thread of the server's pool."""
        index = request.path_params["index"]
        image = self._player.image(index) if request.path_params["run"] == self._player.run else None
        if image is None:
            return _refusal(404, f"Frame {index} is no longer kept.")
        return Response(image, media_type="image/jpeg", headers=_HEADERS)

    async def pause(self, request: Request) -> Response:
        return await _command(request, lambda content: self._player.pause())

    async def resume(self, request: Request) -> Response:
        return await _command(request, lambda content: self._player.resume())

    async def ask(self, request: Request) -> Response:
        def ask(content: dict[str, Any]) -> None:
            question = content.get("question")
            if not isinstance(question, str) or not 0 < len(question.strip()) <= MAX_QUESTION_CHARACTERS:
                raise ValueError(f"question must be a string of 1 to {MAX_QUESTION_CHARACTERS} characters.")
            check_text("The question", question)
            self._player.ask(question.strip())

        return await _command(request, ask)


class _OwnSite:
    """Refuses what a browser asks for on behalf of a page of another site.

    Modern browsers say it themselves, on secure and on local addresses; elsewhere `Origin` does, where there is one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _is_foreign(Headers(scope=scope), scope["path"]):
            refusal = _refusal(403, "Other web sites can't use this page. Open its address in the browser.")
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _is_foreign(headers: Headers, path: str) -> bool:
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        followed = path == "/" and headers.get("sec-fetch-mode") == "navigate"  # a link
        return site not in ("same-origin", "none") and not followed
    return origin is not None and urlsplit(origin).netloc != headers.get("host")


def _static(name: str, media_type: str) -> Callable[[Request], Any]:
    content = files(__package__).joinpath("static", name).read_bytes()

    async def respond(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return respond


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


def _refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status, _HEADERS)


async def _command(request: Request, act: Callable[[dict[str, Any]], None]) -> Response:
    """Do what the content of a POST request asks for; a ValueError or RuntimeError says why not."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return _refusal(415, "The content type must be application/json. Send JSON.")
    body = b""
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _MAX_BODY_BYTES:
                    return _refusal(413, f"The request is longer than {_MAX_BODY_BYTES} bytes. Send less.")
    except ClientDisconnect:  # a page that was closed; nobody hears the answer
        return _refusal(400, "The request was broken off.")
    except TimeoutError:
        return _refusal(408, f"The request didn't arrive within {_BODY_SECONDS:g} s. Send it again.")
    try:
        content = json.loads(body)
        if not isinstance(content, dict):
            raise ValueError(f"The request holds a JSON {type(content).__name__}; send an object.")
        act(content)
    except ValueError as error:
        return _refusal(400, str(error))
    except RuntimeError as error:
        return _refusal(409, str(error))
    return JSONResponse({}, 202, _HEADERS)
