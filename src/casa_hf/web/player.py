# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The one thread that runs the model of a page, and what pages may ask of it."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from transformers.utils import logging

from .history import History

if TYPE_CHECKING:
    from ..streaming import CaptionEvent, CasaStream

logger = logging.get_logger(__name__)

State = Literal["waiting", "loading", "running", "paused", "finished", "failed", "closed"]

MAX_QUESTIONS = 8
_MAX_PICTURES = 8
_PICTURE_SIDE = 960


class Player:
    """Runs a stream on the frames of a source, and writes down what happens.

    Everything that touches the stream happens in one thread, which starts with `start` and waits for `begin`. A pause
    takes effect at once, after the token that is being generated. Questions are answered between two frames, also
    during a pause and after the last frame.

    Args:
        stream: a stream, or a function that makes one, called in the thread; what it makes is closed with the player.
        source: (timestamp in seconds, image) in ascending order.
        max_history: entries that `history` keeps.
        max_new_tokens: length of an answer at most.

    Attributes:
        history: of "state", "caption", "memory", "question" and "answer"; `docs/streaming.md` describes them.
        run: names this player among all, so that a page notices that the server is another one.
        error: what ended the stream, if an error did.
    """

    def __init__(
        self,
        stream: CasaStream | Callable[[], CasaStream],
        source: Iterable[tuple[float, Any]],
        *,
        max_history: int,
        max_new_tokens: int,
    ) -> None:
        self.history = History(max_history)
        self.run = secrets.token_hex(8)
        self.error: Exception | None = None
        self._stream_or_make, self._source = stream, source
        self._max_new_tokens = max_new_tokens
        self._changed = threading.Condition()
        self._questions: deque[str] = deque()
        self._pictures: OrderedDict[int, Any] = OrderedDict()
        self._begun = self._paused = self._closing = False
        self._state: State = "waiting"
        self._message = ""
        self._thread = threading.Thread(target=self._run, name="casa-player")

    @property
    def state(self) -> dict[str, str]:
        """What the thread is doing, as pages are told."""
        with self._changed:
            return {"state": self._state, "message": self._message}

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def begin(self) -> None:
        """Let the stream begin; later calls do nothing."""
        with self._changed:
            self._begun = True
            self._changed.notify_all()

    def pause(self) -> None:
        """Stop the model; nothing happens where it is paused already.

        Raises:
            RuntimeError: if the stream isn't running.
        """
        self._switch("running", "paused")

    def resume(self) -> None:
        """Let the model go on; nothing happens where it isn't paused.

        Raises:
            RuntimeError: if the stream isn't running.
        """
        self._switch("paused", "running")

    def ask(self, question: str) -> None:
        """Queue a question.

        Raises:
            RuntimeError: if too many questions wait, or no stream can answer.
        """
        with self._changed:
            if self._state not in ("running", "paused", "finished"):
                raise RuntimeError(f"Nobody can answer: the stream is {self._state}.")
            if len(self._questions) >= MAX_QUESTIONS:
                raise RuntimeError(f"{MAX_QUESTIONS} questions are waiting for an answer; ask again later.")
            self._questions.append(question)
            self._changed.notify_all()

    def picture(self, frame_index: int) -> bytes | None:
        """A recent frame as a JPEG; None where it is no longer kept."""
        with self._changed:
            frame = self._pictures.get(frame_index)
        return None if frame is None else _jpeg(frame)

    def hang_up(self) -> None:
        """Tell the pages that this was all. Doesn't wait for the thread."""
        with self._changed:
            self._closing = True
            self._set_state("closed")
            self._changed.notify_all()
        self.history.close()

    def close(self) -> None:
        """End the thread, which finishes the token that it is generating."""
        self.hang_up()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        stream = None
        try:
            if self._wait(lambda: self._begun):
                stream = self._make_stream()
                self._follow(stream)
        except Exception as error:
            logger.exception("An error has ended the stream.")
            self.error = error
            self._set_state("failed", f"{type(error).__name__}: {error}")
        finally:
            if stream is not None and stream is not self._stream_or_make:
                stream.close()

    def _make_stream(self) -> CasaStream:
        if not callable(self._stream_or_make):
            return self._stream_or_make
        self._set_state("loading")
        return self._stream_or_make()

    def _follow(self, stream: CasaStream) -> None:
        self._set_state("running")
        for event in self._events(stream):
            self._write("caption", event)
            if event.kind == "end":
                self._write_memory(stream)
            # A question doesn't cut the text of a frame short; it has its turn between two.
            if not self._wait(lambda: not self._paused or bool(self._questions)):
                return
            if event.kind in ("end", "error", "dropped"):
                while self._questions:
                    self._answer(stream)
                if not self._wait(lambda: not self._paused):
                    return
        self._set_state("finished")
        while self._wait(lambda: bool(self._questions)):
            self._answer(stream)

    def _events(self, stream: CasaStream) -> Iterator[CaptionEvent]:
        for timestamp, frame in self._source:
            with self._changed:
                self._pictures[stream.num_frames] = frame
                while len(self._pictures) > _MAX_PICTURES:
                    self._pictures.popitem(last=False)
            yield from stream.push(frame, timestamp)

    def _answer(self, stream: CasaStream) -> None:
        question = self._questions.popleft()
        self.history.append("question", {"text": question})
        for event in stream.ask(question, max_new_tokens=self._max_new_tokens):
            self._write("answer", event)
            if self._closing:
                return
        self._write_memory(stream)

    def _write(self, name: str, event: CaptionEvent) -> None:
        self.history.append(name, asdict(event))

    def _write_memory(self, stream: CasaStream) -> None:
        self.history.append("memory", {"frame_index": stream.num_frames - 1, **stream.nbytes})

    def _switch(self, before: State, after: State) -> None:
        with self._changed:
            if self._state == before:
                self._paused = after == "paused"
                self._set_state(after)
                self._changed.notify_all()
            elif self._state != after:
                raise RuntimeError(f"The stream is {self._state}; only a running one can be paused.")

    def _set_state(self, state: State, message: str = "") -> None:
        with self._changed:
            if self._state != "closed":
                self._state, self._message = state, message
                self.history.append("state", {"state": state, "message": message})

    def _wait(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition; False if the player is closing instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or condition())
            return not self._closing


def _jpeg(frame: Any) -> bytes:
    from PIL.Image import Image
    from transformers.image_transforms import to_pil_image

    image = frame if isinstance(frame, Image) else to_pil_image(frame)
    image = image.convert("RGB")
    image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
