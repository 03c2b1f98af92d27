# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The clock of live captions: frames come at their times, whether the model is ready for them or not.

What waits is bounded in every mode. A recorded video is played at its own speed: a frame is there when the clock says
so. Frames of a live one are there when they come; a thread takes them. Without a clock, a recorded video is read as
fast as the model goes, and no frame is lost.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from ..checks import check_count
from ..video import Frame, ReadAhead, VideoInput, VideoProblem
from .events import CaptionEvent, refusal
from .frame_pool import PreparedFrame
from .session import CasaStream

Late = Literal["drop", "merge", "wait"]

# How many frames wait at most, unless said: the newest one; as many as fit well into one forward; what decodes ahead.
_MAX_WAITING = {"drop": 1, "merge": 4, "wait": 8}
# Beyond these, the dropped frames are reported together, and so are the problems; questions are refused.
_MAX_REPORTS = 1000
_MAX_QUESTIONS = 16
# A recorded video that takes longer than this for its next frame has stalled; what waits is shown meanwhile.
_STALL_SECONDS = 0.1


class _Coming(NamedTuple):
    """A frame that has arrived, and whose pixels are being made; not yet, if it may have to make room for another."""

    frame: Frame
    prepared: PreparedFrame | None

    @property
    def timestamp(self) -> float:
        return self.frame.timestamp


@dataclass(frozen=True)
class _Report:
    """Something to tell before the next frame: a dropped frame or a problem of the video, or several of one kind.

    Kinds never go together: the times of dropped frames ascend in the stream, those of problems follow no order.
    """

    kind: Literal["dropped", "error"]
    timestamp: float  # of the last one
    message: str  # likewise
    count: int = 1


class LiveCaptions:
    """Captions of a video as it plays. Iterating yields the events, once.

    The times of events are the video's, whatever the stream has seen before. In the stream, whose timestamps must
    ascend, those of a further video follow: its first frame comes one frame period (1 / fps) after the last one.

    `ask`, `pause`, `resume` and `stop` may be called from other threads, and between events.

    Args:
        stream: stream that says the captions. It is not closed.
        video: input that the frames come from, see [`open_video`].
        late: treatment of frames that wait while the model is busy. "drop": the newest ones are kept, older ones
            dropped and reported. "merge": all that wait are shown in one forward and reported; more than `max_waiting`
            are dropped. "wait": none is lost by this object, and captions may fall behind without limit. Default:
            "drop" in real time, else "wait". After a stall that cost more than 1,000 frames one event reports all
            further ones; its `count` says how many.
        max_waiting: number of frames that wait at most. Default: 1 to drop, 4 to merge, 8 to wait.
        real_time: whether a recorded video is played at its own speed. Default: false; live ones always are.
        clock: function that tells the time in seconds, ascending.
        sleep: function that is called with the seconds until the next frame is due. Default: waits for them, and wakes
            up early when another thread asks or stops.
        on_frame: function that is called with every frame just before the model sees it.
        on_question: function that is called with every question just before the model is asked.

    Attributes:
        lag: seconds by which the frame that the model saw last was late at that moment, compared with the first one.
        shift: seconds by which the stream's timestamps are ahead of the video's; 0 where it had seen no frame before.

    Raises:
        ValueError: if `late` isn't known or needs real time, or `max_waiting` isn't a positive integer.
    """

    def __init__(
        self,
        stream: CasaStream,
        video: VideoInput,
        *,
        late: Late | None = None,
        max_waiting: int | None = None,
        real_time: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
        on_frame: Callable[[Frame], None] | None = None,
        on_question: Callable[[str], None] | None = None,
    ):
        real_time = video.live if real_time is None else real_time
        late = late or ("drop" if real_time else "wait")
        if late not in get_args(Late):
            raise ValueError(f"late={late!r} must be one of {', '.join(map(repr, get_args(Late)))}.")
        if video.live and not real_time:
            raise ValueError(f"real_time=False is for recorded videos, and {video.name} is live. Leave real_time out.")
        if late != "wait" and not real_time:
            raise ValueError(
                f"late={late!r} needs real_time=True: without a clock no frame is late. Add it, or leave late out."
            )
        max_waiting = _MAX_WAITING[late] if max_waiting is None else max_waiting
        check_count("max_waiting", max_waiting)
        self.stream, self.video, self.late, self.max_waiting = stream, video, late, max_waiting
        self.real_time = real_time
        self.lag = self.shift = 0.0
        self._clock, self._sleep, self._on_frame = clock, sleep, on_frame
        self._on_question = on_question
        self._changed = threading.Condition()
        self._waiting: deque[_Coming] = deque()
        self._reports: dict[int | str, _Report] = {}  # by number; beyond the bound by kind
        self._questions: deque[tuple[str, int | None]] = deque()
        self._drops = video.live and late != "wait"  # whether frames make room in the thread that reads
        self._arriving: ReadAhead[_Coming | VideoProblem] | None = None
        self._next: _Coming | None = None
        self._times: dict[int, float] = {}  # the video's, by index in the stream, of the frames that were shown last
        self._origin: float | None = None
        self._paused_at: float | None = None
        self._latest: float | None = None  # the video's time of the last frame
        self._stopped = self._ended = False

    # ---------------------------------------------------------------- from outside

    def ask(self, question: str, max_new_tokens: int | None = None) -> None:
        """Ask a question about what is shown; it is answered before the next frame, also while paused.

        Raises:
            RuntimeError: if the iteration has ended, or been stopped.
            ValueError: if too many questions wait already.
        """
        with self._changed:
            if self._ended or self._stopped:
                raise RuntimeError(
                    "The captions have ended, so that ask() would never be answered. Call answer() instead."
                )
            if len(self._questions) >= _MAX_QUESTIONS:
                raise ValueError(f"{_MAX_QUESTIONS} questions wait for an answer already. Ask again later.")
            self._questions.append((question, max_new_tokens))
            self._changed.notify_all()

    def pause(self) -> None:
        """Stop playing after the current frame; a live video continues without being watched."""
        with self._changed:
            if self._paused_at is None:
                self._paused_at = self._clock()
                self._pass_over()
                self._changed.notify_all()

    def resume(self) -> None:
        """Resume: where it stopped in a recorded video, with what comes next in a live one."""
        with self._changed:
            if self._paused_at is None:
                return
            if self._origin is not None and not self.video.live:
                self._origin += self._clock() - self._paused_at
            self._pass_over()
            self._paused_at = None
            self._changed.notify_all()

    @property
    def paused(self) -> bool:
        return self._paused_at is not None

    def stop(self) -> None:
        """End after the current frame."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    # ---------------------------------------------------------------- what happens

    def __iter__(self) -> Generator[CaptionEvent, None, None]:
        size = self.max_waiting if self.video.live or not self.real_time else self.video.read_ahead
        on_drop = self._lost if self._drops else None
        with ReadAhead(self._watch, size, on_drop=on_drop, condition=self._changed) as arriving:
            self._arriving = arriving
            try:
                while not (self._stopped or self._ended):
                    if self._questions:
                        yield from self.answer(*self._questions.popleft())
                    elif self.paused:
                        self._rest()
                    else:
                        more, reports = self._collect(arriving)
                        yield from self._report(reports)
                        if self._waiting and not self.paused:
                            yield from self._look()
                        with self._changed:  # a question comes before or is refused
                            self._ended = not more and not self._questions
                if not self._stopped and not self.stream.closed:
                    yield from self._shown(self.stream.flush())
            finally:
                self._ended = True

    def _collect(self, arriving: ReadAhead[_Coming | VideoProblem]) -> tuple[bool, list[_Report]]:
        """Gather what has arrived, waiting for it if nothing has.

        Returns:
            Whether there is or can be anything more; and what to tell before the frames that wait now.
        """
        if self.real_time and not self.video.live:
            return self._play(arriving), self._told()
        with self._changed:
            self._changed.wait_for(lambda: len(arriving) or self._reports or arriving.ended or self._interrupted())
            if self.paused:
                return True, self._told()
            # What is to be told comes before an error that has ended the video.
            taken = self.max_waiting if self.late == "merge" else 1
            for item in arriving.take(taken) if len(arriving) or not self._reports else ():
                if isinstance(item, VideoProblem):
                    self._lost(item)
                else:
                    self._waiting.append(item)
            more = bool(self._waiting or self._reports or not arriving.ended)
            # Under the lock: what is dropped from now on is later than the frames that were taken.
            return more, self._told()

    def _play(self, arriving: ReadAhead[_Coming | VideoProblem]) -> bool:
        """The same for a recorded video: what is due by now has arrived."""
        now = self._clock()
        while self._next is None or self._due(self._next) <= now:
            if self._next is not None:
                if self.late == "wait" and len(self._waiting) == self.max_waiting:
                    return True
                self._waiting.append(self._next)
                self._next = None
                if len(self._waiting) > self.max_waiting:
                    self._lost(self._waiting.popleft())
            with self._changed:
                patience = _STALL_SECONDS if self._waiting or self._reports else None
                self._changed.wait_for(lambda: len(arriving) or arriving.ended or self._interrupted(), patience)
            if not len(arriving) and (self._waiting or self._reports or not arriving.ended):
                return True
            for item in arriving.take(1):
                if isinstance(item, VideoProblem):
                    self._lost(item)
                else:
                    self._next = item
                break
            else:
                return False
        if not self._waiting and not self._reports:
            self._wait(self._due(self._next) - now)
        return True

    def _due(self, frame: _Coming) -> float:
        """When a frame is there, by the clock."""
        if self._origin is None:
            self._origin = self._clock() - frame.timestamp
        return self._origin + frame.timestamp

    def _wait(self, seconds: float) -> None:
        if self._sleep is not None:
            self._sleep(seconds)
            return
        with self._changed:
            self._changed.wait_for(self._interrupted, seconds)

    def _interrupted(self) -> bool:
        return bool(self._stopped or self.paused or self._questions)

    def _watch(self) -> Generator[_Coming | VideoProblem, None, None]:
        """What the video gives, read in a thread; what a live one shows during a pause passes.

        The thread that iterates may be held between two events meanwhile, and can't see to it. Where frames make room
        for others, problems don't wait among them: they would take the frames' places.
        """
        for item in self.video.read():
            if self._ended:  # nobody else would say so while nothing is yielded
                return
            if isinstance(item, VideoProblem) and self._drops:
                with self._changed:
                    if not self.paused:
                        self._lost(item)
                        self._changed.notify_all()
            elif not (self.video.live and self.paused):
                yield item if isinstance(item, VideoProblem) else self._coming(item)

    def _coming(self, frame: Frame) -> _Coming:
        # Where the newest frame is kept, most of a fast camera's are dropped; their pixels would be made for nothing.
        return _Coming(frame, None if self.late == "drop" else self.stream.prepare(frame.image))

    def _pass_over(self) -> None:
        """Forget what a live video has shown, and what was to be told of it; under the lock."""
        if self.video.live:
            if self._arriving is not None:
                self._arriving.clear()
            self._waiting.clear()
            self._reports.clear()

    def _rest(self) -> None:
        """Wait for the end of a pause, or a question."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self.paused or self._questions)

    def _lost(self, item: _Coming | VideoProblem) -> None:
        """Note a problem, or a frame that had to make room, whose image is freed."""
        if isinstance(item, VideoProblem):
            report = _Report("error", item.timestamp, item.message)
        else:
            if item.prepared is not None:
                item.prepared.cancel()
            report = _Report("dropped", item.timestamp, f"the model was busy; at most {self.max_waiting} may wait")
        number = len(self._reports)
        place = number if number < _MAX_REPORTS else report.kind
        if place in self._reports:
            report = replace(report, count=self._reports[place].count + 1)
        self._reports[place] = report

    def _told(self) -> list[_Report]:
        reports = list(self._reports.values())
        self._reports.clear()
        return reports

    def _report(self, reports: list[_Report]) -> Iterator[CaptionEvent]:
        for report in reports:
            message = report.message + (f" (the last of {report.count})" if report.count > 1 else "")
            if report.kind == "dropped":
                try:
                    event = self.stream.drop(self._placed(report.timestamp), message, report.count)
                except ValueError as error:
                    event = refusal(error, count=report.count)
            else:
                event = CaptionEvent("error", -1, 0.0, 0.0, 0.0, message=message, count=report.count)
            yield self._timed(event, report.timestamp)

    def _look(self) -> Iterator[CaptionEvent]:
        """Show the model one frame, or all that wait in one forward."""
        with self._changed:
            num_shown = len(self._waiting) if self.late == "merge" else min(1, len(self._waiting))
            coming = [self._waiting.popleft() for _ in range(num_shown)]
        if not coming:  # a pause has passed over them
            return
        if self.real_time:
            self.lag = max(0.0, self._clock() - self._due(coming[-1]))
        frames = [each.frame for each in coming]
        if self._on_frame is not None:
            for frame in frames:
                self._on_frame(frame)
        images = [each.prepared or each.frame.image for each in coming]
        timestamps = [self._placed(frame.timestamp) for frame in frames]
        self._times = {index: self._times[index] for index in self.stream.waiting_frames if index in self._times}
        self._times |= dict(enumerate((frame.timestamp for frame in frames), self.stream.num_frames))
        try:
            events = self.stream.push(images, timestamps)
        except ValueError as error:  # times that the stream can't tell apart, say
            yield self._timed(refusal(error, count=len(frames)), frames[-1].timestamp)
            return
        yield from self._shown(events)

    def _shown(self, events: Iterator[CaptionEvent]) -> Iterator[CaptionEvent]:
        """The events of frames, those that have waited for others among them, with the video's times."""
        for event in events:
            yield self._timed(event, self._times.get(event.frame_index, event.start - self.shift))

    def _placed(self, timestamp: float) -> float:
        """When a frame comes in the stream."""
        last = self.stream.last_timestamp
        if self._latest is None and last is not None:
            self.shift = last + 1 / self.stream.settings.fps - timestamp
        self._latest = timestamp
        return timestamp + self.shift

    def _timed(self, event: CaptionEvent, timestamp: float) -> CaptionEvent:
        """An event with the video's time."""
        return replace(event, start=timestamp, end=timestamp + 1 / self.stream.settings.fps)

    def answer(self, question: str, max_new_tokens: int | None = None) -> Iterator[CaptionEvent]:
        """What `ask` leads to; to be called in the thread that iterates, after the last event."""
        if self._on_question is not None:
            self._on_question(question)
        events: Iterator[CaptionEvent]
        try:
            events = self.stream.ask(question, max_new_tokens)
        except RuntimeError:  # the stream is closed, or another thread's
            raise
        except Exception as error:  # of many kinds: chat templates and tokenizers have their own
            events = iter([refusal(error, question=question)])
        for event in events:
            yield self._timed(event, self._latest or 0.0)
