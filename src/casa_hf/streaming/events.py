# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a stream reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

EventKind = Literal["text", "end", "answer", "answered", "dropped", "merged", "error"]


@dataclass(frozen=True)
class CaptionEvent:
    """Something that happened in a stream.

    Attributes:
        kind: "text": a piece of caption, as soon as it is whole characters. "end": the frame is done; every frame that
            the model looked at ends with exactly one, also if it had nothing to say, unless the next `push` or `ask`
            cut its text short, or its events were closed. "answer": a piece of an answer to a question. "answered":
            the answer is done, also if the model had none to give; its end as "end" is a frame's. "dropped": the frame
            came too late and wasn't looked at. "merged": the frame was looked at together with the next one. "error":
            a frame, a part of the video or a question could not be used; the stream continues without it.
        frame_index: index of the frame among all that were pushed or dropped, from 0; of the latest one for answers,
            -1 before the first; -1 for an error that isn't a frame's. Of several frames, the last one's.
        start: the frame's timestamp, in seconds; of several, the last one's.
        end: time at which the next frame is due, in seconds: `start` plus one over the stream's frames per second.
        latency: seconds from pushing the frame, or asking, to this event.
        text: the piece of text; for "end" and "answered", all the text of the frame or answer. A character that the
            frame ends within is in the text of the next frame, unless a question comes between.
        token_ids: the tokens that `text` was decoded from; for "end" and "answered", all that the model emitted, stop
            token included.
        message: why, for "dropped", "merged" and "error".
        question: question that was asked, where the event is about one: for "answer", "answered" and an "error" of it.
        count: number of frames that a "dropped" stands for: those with the indices from `frame_index - count + 1` to
            `frame_index`; and how many problems of the video an "error" that isn't a frame's. 1 for all others.
    """

    kind: EventKind
    frame_index: int
    start: float
    end: float
    latency: float
    text: str = ""
    token_ids: tuple[int, ...] = ()
    message: str = ""
    question: str | None = None
    count: int = 1


def refusal(error: Exception, note: str = "", **content: Any) -> CaptionEvent:
    """The event of what couldn't be shown or asked, before the model has looked at it.

    Args:
        error: error that was raised.
        note: further text for the message.
        **content: other fields of the event.
    """
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    message = f"{name}{error}" + (f" ({note})" if note else "")
    return CaptionEvent("error", -1, 0.0, 0.0, 0.0, message=message, **content)
