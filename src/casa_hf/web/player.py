# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The one thread that runs the model of a page, and what pages may ask of it."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import asdict, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from PIL.Image import Image
from transformers.utils import logging

from ..media_casa import rgb_image
from ..streaming.live import LiveCaptions
from .history import History

if TYPE_CHECKING:
    from ..streaming import CaptionEvent, CasaStream
    from ..streaming.live import Late
    from ..video import Frame, VideoInput

logger = logging.get_logger(__name__)

State = Literal["waiting", "loading", "running", "paused", "finished", "failed", "closed"]

MAX_QUESTIONS = 8
_MAX_IMAGES = 8
_IMAGE_SIDE = 960


class Player:
    """Runs a stream on a video, and writes down what happens.

    Everything that touches the stream happens in one thread, which starts with `start` and waits for `begin`. A pause
    takes effect at once, after the token that is being generated, and isn't part of the frame's latency. Questions are
    answered between two frames, also during a pause and after the last frame.

    Args:
        stream: stream, or a function that makes one, called in the thread; what it makes is closed with the player.
        video: input that the frames come from.
        real_time, late: settings of the clock, see [`LiveCaptions`].
        max_history: number of entries that `history` keeps.
        on_event: function that is called with every event of the stream, in the thread.

    Attributes:
        history: history of "state", "caption", "memory", "question" and "answer"; `docs/streaming.md` describes them.
        run: names this player among all, so that a page notices that the server is another one.
        error: error that ended the stream, if one did.
    """

    def __init__(
        self,
        stream: CasaStream | Callable[[], CasaStream],
        video: VideoInput,
        *,
        real_time: bool,
        late: Late | None,
        max_history: int,
        on_event: Callable[[CaptionEvent], None] | None = None,
    ) -> None:
        self.history = History(max_history)
        self.run = secrets.token_hex(8)
        self.error: Exception | None = None
        self._make_stream = stream if callable(stream) else None
        self._video, self._real_time, self._late = video, real_time, late
        self._on_event = on_event
        self._changed = threading.Condition()
        self._questions: deque[str] = deque()
        self._paused_at: float | None = None
        self._held = 0.0  # seconds for which the frame that is in work was paused
        self._images: OrderedDict[int, Any] = OrderedDict()
        self._begun = self._closing = False
        self._state: State = "waiting"
        self._message = ""
        # Made at once if possible: bad settings are the caller's to hear of.
        self._captions = None if callable(stream) else self._captions_of(stream)
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
        """Let the model resume; nothing happens where it isn't paused.

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
                raise RuntimeError(f"The question can't be answered: the stream is {self._state}.")
            if len(self._questions) >= MAX_QUESTIONS:
                raise RuntimeError(f"{MAX_QUESTIONS} questions are waiting for an answer; ask again later.")
            self._questions.append(question)
            if self._state != "finished":
                assert self._captions is not None
                with suppress(RuntimeError):  # they have ended just now, and what is queued here is answered next
                    self._captions.ask(question)
            self._changed.notify_all()

    def image(self, frame_index: int) -> bytes | None:
        """A recent frame as a JPEG; None where it is no longer kept, or isn't an image."""
        with self._changed:
            frame = self._images.get(frame_index)
        try:
            return None if frame is None else _jpeg(frame)
        except Exception:  # of many kinds; the stream has an event that says more
            return None

    def hang_up(self) -> None:
        """Tell the pages that this was all. Doesn't wait for the thread."""
        with self._changed:
            self._closing = True
            if self._captions is not None:
                self._captions.stop()
            self._set_state("closed")
            self._changed.notify_all()
        self.history.close()

    def close(self) -> None:
        """End the thread, which finishes the token that it is generating."""
        self.hang_up()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            if self._wait(lambda: self._begun):
                if self._make_stream is None:
                    assert self._captions is not None
                    self._follow(self._captions)
                else:
                    self._set_state("loading")
                    with self._make_stream() as stream:
                        self._follow(self._captions_of(stream))
        except Exception as error:
            logger.exception("An error has ended the stream.")
            self.error = error
            self._set_state("failed", f"{type(error).__name__}: {error}")

    def _captions_of(self, stream: CasaStream) -> LiveCaptions:
        def show(frame: Frame) -> None:
            image = _kept(frame.image)
            with self._changed:
                # The frames of one forward come one after another before any of them is counted.
                following = next(reversed(self._images), -1) + 1
                self._images[max(stream.num_frames, following)] = image
                while len(self._images) > _MAX_IMAGES:
                    self._images.popitem(last=False)

        return LiveCaptions(
            stream,
            self._video,
            real_time=self._real_time,
            late=self._late,
            on_frame=show,
            on_question=self._begin_answer,
        )

    def _follow(self, captions: LiveCaptions) -> None:
        with self._changed:
            self._captions = captions
            if self._closing:
                return
            self._set_state("running")
        with closing(self._events(captions)) as events:
            for event in events:
                self._write(replace(event, latency=max(0.0, event.latency - self._held)), captions.stream)
                if not self._hold(captions):
                    return
                if event.kind in ("end", "answered", "dropped", "error"):
                    self._held = 0.0  # what is next begins after the pause

    def _hold(self, captions: LiveCaptions) -> bool:
        """Wait for the end of a pause; False if the player is closing instead."""
        with self._changed:
            begin = self._paused_at
            # A question is asked after the frame, whose text it doesn't cut short: so the frame is continued.
            continues = self._wait(lambda: not captions.paused or bool(self._questions))
            if begin is not None:
                now = time.perf_counter()
                self._held += now - begin
                captions.stream.extend_budget(now - begin)
                if self._paused_at is not None:
                    self._paused_at = now
            return continues

    def _events(self, captions: LiveCaptions) -> Generator[CaptionEvent, None, None]:
        yield from iter(captions)
        self._set_state("finished")
        while self._wait(lambda: bool(self._questions)):
            yield from captions.answer(self._questions[0])

    def _begin_answer(self, question: str) -> None:
        self.history.append("question", {"text": question})

    def _write(self, event: CaptionEvent, stream: CasaStream) -> None:
        if self._on_event is not None:
            self._on_event(event)
        told = asdict(event)
        if event.kind == "end":
            # Whether the text of the next frame continues this one's, maybe within a word.
            told["cut"] = bool(event.token_ids) and event.token_ids[-1] not in stream.stop_token_ids
        self.history.append("caption" if event.question is None else "answer", told)
        if event.kind in ("end", "answered"):
            self.history.append("memory", {"frame_index": event.frame_index, **stream.nbytes})
        if event.question is not None and event.kind in ("answered", "error"):
            self._questions.popleft()

    def _switch(self, before: State, after: State) -> None:
        with self._changed:
            if self._state == before:
                assert self._captions is not None
                if after == "paused":
                    self._captions.pause()
                    self._paused_at = time.perf_counter()
                else:
                    self._captions.resume()
                    self._paused_at = None
                self._set_state(after)
                self._changed.notify_all()
            elif self._state != after:
                raise RuntimeError(
                    f"The stream is {self._state}; only a running stream can be paused, and only a paused one resumed."
                )

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


def _kept(image: Any) -> Any:
    """What remains of a frame when its file is replaced, or its buffer filled again; None if it isn't an image.

    PIL images are made for each frame, and needn't be copied.
    """
    if isinstance(image, Image):
        return image
    try:
        return rgb_image(image)
    except Exception:  # of many kinds; the stream has an event that says more
        return None


def _jpeg(frame: Any) -> bytes:
    image = rgb_image(frame)
    image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
