# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`CasaStreamBatch`: many streams of one model, served together.

Each stream is a `CasaStream` without a cache of its own: it has a row of the batch's. Streams that need a forward at
the same time share it; the others wait. What pads their rows meanwhile is masked, and closed up when there is much.

Threads make frames ready for the model, which continues other texts meanwhile. New frames and the next tokens of other
streams then go through one forward: nobody waits for longer than that, and the weights are read once for all.

Forwards of one token per row are compiled if the setting says so. Their cache has a fixed number of rows, of which
some may be empty, so that streams join and leave without another graph.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ..cache_casa import CacheMoment, cache_nbytes, cache_snapshot, cache_state, home_layer, select_rows
from ..checks import check_count, check_number
from ..window_state import in_doublings
from .compiled import CompiledSteps, max_image_tokens
from .drawing import History, TokenDraws, TokenRules, uniform_number
from .events import CaptionEvent, refusal
from .frame_collecting import FrameCollector
from .frame_pool import FramePool
from .graphs import StepsByShape
from .session import CasaStream, check_pair, stop_tokens
from .settings import StreamSettings
from .state import filled_cache
from .steps import Forward, Steps, on_device
from .tower import FrameTower

if TYPE_CHECKING:
    from ..modeling_casa import CasaForConditionalGeneration
    from ..processing_casa import CasaProcessor

# Padding is closed up when the cache has so many positions more than a quarter above the tokens of its longest row.
_SPARE_POSITIONS = 64
# Numbers of rows that a cache of fixed size has; beyond the last, multiples of it.
_NUM_ROWS = (1, 2, 4, 8, 16, 32)
# Number of text tokens that a stream without a limit of them has room for at first, in a cache of fixed size.
_FIRST_TOKENS = 512
# Rows are parts of the batch's compiled steps.
_NOT_COMPILED: dict[str, Any] = {"compile": False}


class CasaStreamBatch:
    """Live captions of many streams with one model; each says what a `CasaStream` of its own would say.

    Streams join and leave, and their frames come, at any time, also while the texts of others are being generated.
    Threads may use a batch one after another; a call while another thread uses it is refused.

    A forward that fails ends the text of those streams alone that it fails for: an event "error" says why, they are as
    they were before it, and may continue with their next frame. It is run again for the others, which say what they
    would have said. Ctrl-C during a forward ends the texts that waited for it; all streams are as they were before it.

    Args:
        model: model that captions the frames.
        processor: processor of the model.
        settings: settings of the streams for which `add` says nothing else; None for the defaults.
        collect_seconds: seconds for which a frame that is ready waits for frames of other streams that are still being
            prepared, so that they share a forward; texts of other streams are continued meanwhile.
        **changes: fields of [`StreamSettings`] that replace those of `settings`.

    Attributes:
        settings: the [`StreamSettings`] that streams have unless `add` says otherwise.

    Raises:
        TypeError: if there is no such setting.
        ValueError: if a setting can't be, `collect_seconds` is negative or not finite, or model and processor don't
            fit.
    """

    # The cache of all streams, the number of its positions in use, and, if its size is fixed, how many rows and
    # positions it has.
    _cache: Any
    _length: int
    _shape: tuple[int, int] | None

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        processor: CasaProcessor,
        settings: StreamSettings | None = None,
        *,
        collect_seconds: float = 0.005,
        **changes: Any,
    ):
        check_number("collect_seconds", collect_seconds, Real, lambda x: 0 <= x < math.inf, "a number, 0 or more")
        self.settings = StreamSettings.of(settings, **changes)
        check_pair(model, processor, self.settings)
        self.model = model
        if not model.training:
            model.fuse_projections()
        self.processor = processor
        self._rows: dict[int, _Row] = {}
        # By row of the cache the stream that it is for; None for an empty one, of which only a static cache has any.
        self._places: list[int | None] = []
        self._compiled = CompiledSteps.of(model, processor, self.settings)
        options = None if self._compiled is None else self._compiled.options
        self._one_token = None if options is None else StepsByShape.of(model, options)
        self._tower = FrameTower.of(model, options)
        self._draws = TokenDraws(model, stop_tokens(model))
        self._pool = FramePool()
        self._forget()
        self._next_id = 0
        self._closed = False
        # Texts in the making: their steps, the forwards that some of them wait for, and events to be given out.
        self._steps: dict[int, Steps] = {}
        self._forwards: dict[int, Forward] = {}
        self._events: deque[tuple[int, CaptionEvent]] = deque()
        self._broken: list[int] = []  # streams that couldn't read their token
        self._preparing = FrameCollector(collect_seconds)  # frames of texts that haven't begun
        self._in_use = threading.Lock()

    # ---------------------------------------------------------------- streams come and go

    @property
    def streams(self) -> tuple[int, ...]:
        """Ids of the streams in the batch."""
        return tuple(self._rows)

    def add(self, **changes: Any) -> int:
        """Let a stream join.

        Args:
            **changes: fields of [`StreamSettings`] that replace the batch's, such as `prompt` and `seed`.

        Returns:
            Its id, which no other stream of this batch has or had.

        Raises:
            TypeError: if there is no such setting.
            ValueError: if a setting can't be, or the prompt leaves no room within `max_text_tokens`.
            RuntimeError: if the batch is closed.
        """
        with self._alone():
            self._require_open()
            row = _Row(self.model, self.processor, self.settings, **{**changes, **_NOT_COMPILED})
            row._pool = self._pool
            return self._named(row, None)

    def remove(self, stream: int) -> None:
        """Let a stream leave, with its events that haven't been taken; what it holds is freed.

        Raises:
            ValueError: if there is no such stream.
        """
        with self._alone():
            self._row(stream)
            self._end(stream)
            self._discard_events(stream)
            del self._rows[stream]
            self._leave(stream)

    def fork(self, stream: int) -> int:
        """Add a stream that continues by itself from where this one is.

        Returns:
            The new stream's id.

        Raises:
            ValueError: if there is no such stream.
        """
        with self._alone():
            other = self._row(stream).fork()
            assert isinstance(other, _Row)
            return self._named(other, stream)

    def reset(self, stream: int) -> None:
        """Let a stream forget everything, its events that haven't been taken too, and start from scratch.

        Raises:
            ValueError: if there is no such stream.
        """
        with self._alone():
            self._row(stream)
            self._end(stream)
            self._discard_events(stream)
            self._restart(stream)

    def close(self) -> None:
        """End all streams and free the cache; of what comes later, only `close` and the properties work."""
        with self._alone():
            for stream in self._rows:
                self._end(stream)
            self._rows, self._places = {}, []
            self._events.clear()
            self._forget()
            self._pool.close()
            self._closed = True

    @property
    def closed(self) -> bool:
        return self._closed

    def __enter__(self) -> CasaStreamBatch:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------- frames and questions

    def push(self, frames: Mapping[int, Any]) -> Iterator[tuple[int, CaptionEvent]]:
        """Show streams their next frames, and receive what the model says in these and in other open streams.

        Arguments are checked at once; the model works while events are taken. A text that is still in the making when
        its stream is given the next frame, or a question, ends there. The texts of other streams are continued by this
        call; events that weren't taken from an earlier one are given out by this one.

        Args:
            frames: dictionary with, for each stream by its id, the frame, a list of frames, or a tuple (frame or
                frames, timestamp); as in [`CasaStream.push`].

        Yields:
            (stream, event); the events of each stream are those of `CasaStream.push`. What can't be pushed to one
            stream, as with a timestamp that doesn't ascend, is an "error" of that stream, with the `frame_index` -1,
            and changes nothing else.

        Raises:
            ValueError: if `frames` isn't a dictionary, or there is no such stream. Then nothing was pushed.
            RuntimeError: if the batch is closed, or another thread is using it.
        """
        with self._alone():
            self._require_open()
            _check_mapping("frames", frames, "frame")
            rows = {stream: self._row(stream) for stream in frames}
            for stream, frame in frames.items():
                pair = frame if isinstance(frame, tuple) else (frame, None)
                try:
                    if len(pair) != 2:
                        raise ValueError(
                            f"frames[{stream}] is a tuple of {len(pair)}; give a frame, a list of frames, or (frame, "
                            "timestamp)."
                        )
                    given, timestamp = pair
                    given = given if isinstance(given, list | tuple) else [given]
                    prepared = [rows[stream].prepare(one) for one in given]
                    steps = rows[stream].push(prepared, timestamp)
                except ValueError as error:
                    self._events.append((stream, refusal(error)))
                else:
                    self._start(stream, steps)
                    own = [frame for frame, one in zip(prepared, given, strict=True) if frame is not one]
                    self._preparing.add(stream, prepared, own)
            return self._serve()

    def flush(self, streams: Iterable[int]) -> Iterator[tuple[int, CaptionEvent]]:
        """Show what waits in streams for another frame to share an image with, and receive the events of all open
        streams.

        Args:
            streams: ids of the streams.

        Yields:
            (stream, event); the events of each stream are those of `CasaStream.flush`.

        Raises:
            ValueError: if there is no such stream. Then nothing was shown.
            RuntimeError: if the batch is closed, or another thread is using it.
        """
        with self._alone():
            self._require_open()
            rows = {stream: self._row(stream) for stream in streams}
            for stream, row in rows.items():
                self._start(stream, row.flush())
            return self._serve()

    def ask(
        self, questions: Mapping[int, str], max_new_tokens: int | None = None
    ) -> Iterator[tuple[int, CaptionEvent]]:
        """Ask streams questions about what is shown, and receive what the model says in all open streams.

        Args:
            questions: dictionary with the question of each stream, by its id.
            max_new_tokens: number of tokens that an answer may have; as in [`CasaStream.ask`].

        Yields:
            (stream, event); the events of each stream are those of `CasaStream.ask`. A question that can't be asked is
            an "error" of its stream, and changes nothing else.

        Raises:
            ValueError: if `questions` isn't a dictionary, there is no such stream, or `max_new_tokens` isn't a
                positive integer. Then nothing was asked.
            RuntimeError: if the batch is closed, or another thread is using it.
        """
        with self._alone():
            self._require_open()
            _check_mapping("questions", questions, "question")
            if max_new_tokens is not None:
                check_count("max_new_tokens", max_new_tokens)
            rows = {stream: self._row(stream) for stream in questions}
            for stream, question in questions.items():
                try:
                    steps = rows[stream].ask(question, max_new_tokens)
                except Exception as error:  # of many kinds: chat templates and tokenizers have their own
                    self._events.append((stream, refusal(error, question=question)))
                else:
                    self._start(stream, steps)
            return self._serve()

    def drop(self, stream: int, timestamp: float, message: str, count: int = 1) -> CaptionEvent:
        """Count a frame that isn't looked at, or several; as [`CasaStream.drop`].

        Raises:
            ValueError: if there is no such stream, timestamps don't ascend, or `count` isn't a positive integer.
        """
        with self._alone():
            return self._row(stream).drop(timestamp, message, count)

    def num_frames(self, stream: int) -> int:
        """Frames that were pushed to a stream or dropped."""
        return self._row(stream).num_frames

    def num_text_tokens(self, stream: int) -> int:
        """Text tokens that a stream holds."""
        return self._row(stream).num_text_tokens

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes that the cache holds for all streams, padding included, by part, as `CasaStream.nbytes`.

        That is the content, without the room behind it: at most a quarter more, at least 64 tokens; if steps are
        compiled, the rest of what a cache of fixed size has room for.
        """
        return cache_nbytes(self._cache)

    # ---------------------------------------------------------------- texts in the making

    def _start(self, stream: int, steps: Any) -> None:
        self._end(stream)
        self._steps[stream] = steps

    def _end(self, stream: int) -> None:
        """End the text that is being generated for a stream."""
        self._forwards.pop(stream, None)
        self._preparing.remove(stream)
        steps = self._steps.pop(stream, None)
        if steps is not None:
            steps.close()

    def _discard_events(self, stream: int) -> None:
        self._events = deque(event for event in self._events if event[0] != stream)

    def _serve(self) -> Iterator[tuple[int, CaptionEvent]]:
        """The events of all open streams; whoever takes them makes the model work."""
        while True:
            with self._alone():
                while self._steps and not self._events:
                    self._step()
                if not self._events:
                    return
                taken = self._events.popleft()
            yield taken

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse calls of other threads meanwhile."""
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                "The batch is being used by another thread. Wait until that has taken its event, or make one batch "
                "for each thread."
            )
        try:
            yield
        finally:
            self._in_use.release()

    def _step(self) -> None:
        """One forward for all streams with a text in the making.

        Before and after it, every stream can be continued, like a single one.
        """
        held_back = self._preparing.held_back(wait=all(stream in self._preparing for stream in self._steps))
        for stream in [stream for stream in self._steps if stream not in self._forwards and stream not in held_back]:
            self._preparing.remove(stream)
            self._advance(stream, None)
        self._restart_broken()
        if self._forwards:
            self._run(dict(self._forwards))

    def _restart_broken(self) -> None:
        """Start streams from scratch that couldn't read their token."""
        for stream in self._broken:
            self._restart(stream)
        self._broken.clear()

    @torch.inference_mode(False)  # in which a cache couldn't be written to outside of it
    def _run(self, forwards: dict[int, Forward]) -> None:
        """One forward for these streams; where it fails, one for each half, down to those that it fails for."""
        num_events = len(self._events)
        failure: Exception | None = None
        go_back: Callable[[], None] | None = None
        try:
            # As one: between them the cache holds tokens that still wait to be read.
            try:
                if self._compiled is not None:
                    self._fit_text(forwards)
                go_back = self._moment(images=any(forward.images for forward in forwards.values()))
                if self._compiled is None:
                    self._bound_text(forwards)
                tokens = self._next_tokens(forwards)
            except Exception as error:
                failure = error
            else:
                for stream, token in tokens.items():
                    self._advance(stream, token)
        except BaseException:
            if go_back is not None:
                go_back()
            self._broken.clear()
            while len(self._events) > num_events:
                self._events.pop()
            for stream in forwards:
                self._end(stream)
            raise
        if failure is None:
            self._restart_broken()
            return
        if go_back is not None:
            go_back()
        if len(forwards) == 1:
            [stream] = forwards
            self._forwards.pop(stream)
            event = self._steps[stream].throw(failure)
            assert isinstance(event, CaptionEvent)
            self._events.append((stream, event))
            self._end(stream)
            return
        waiting = list(forwards)
        for half in (waiting[: len(waiting) // 2], waiting[len(waiting) // 2 :]):
            self._run({stream: forwards[stream] for stream in half})

    def _moment(self, images: bool) -> Callable[[], None]:
        """A function that takes all back to what it is now, after a forward."""
        moment, cache, length = CacheMoment(self._cache, images), self._cache, self._length
        rows = {stream: row.moment() for stream, row in self._rows.items()}

        def go_back() -> None:
            moment.restore()
            self._cache, self._length = cache, length
            for stream, earlier in rows.items():
                self._rows[stream].return_to(earlier)

        return go_back

    def _advance(self, stream: int, token: Any) -> None:
        """Continue a stream, with the token that it waited for, until it needs another forward or is done.

        A stream that can't read its token is reset, with an event that says why: the cache holds what it hasn't taken
        in.
        """
        self._forwards.pop(stream, None)
        steps = self._steps[stream]
        try:
            step = steps.send(token)
            while not isinstance(step, Forward):
                self._events.append((stream, step))
                step = next(steps)
        except StopIteration:
            del self._steps[stream]
        except Exception as error:
            del self._steps[stream]
            self._broken.append(stream)
            self._events.append((stream, refusal(error, note="the stream has been reset")))
        else:
            self._forwards[stream] = step

    @torch.no_grad()
    def _next_tokens(self, forwards: dict[int, Forward]) -> dict[int, int]:
        """Run the forward that these streams wait for; by stream, the token that follows."""
        # A row that waits for no token is given one too, which nobody reads.
        nothing = TokenRules.of(self.settings), None, 1.0
        draws = [nothing if place is None else self._rows[place].draws(forwards.get(place)) for place in self._places]
        draw = self._draws.of([rules for rules, *_ in draws])
        numbers = draw.numbers([history for _, history, _ in draws], [uniform for *_, uniform in draws])
        tokens = draw.tokens(self._logits(forwards), numbers).tolist()  # the device is waited for here
        for stream, forward in forwards.items():
            self._rows[stream].held += len(forward.ids)
        return {place: token for place, token in zip(self._places, tokens, strict=True) if place in forwards}

    def _logits(self, forwards: dict[int, Forward]) -> torch.Tensor:
        """(rows, vocabulary) logits after the forward."""
        inputs = self._inputs(forwards)
        num_tokens = inputs["input_ids"].shape[1]
        if self._one_token is not None and num_tokens == 1 and "pixel_values" not in inputs:
            mask = inputs["attention_mask"].to(self.model.device, non_blocking=True)
            logits = self._one_token(inputs["input_ids"], mask, self._cache)
        else:
            inputs = self._tower.inputs(inputs)
            logits = self.model(cache=self._cache, use_cache=True, logits_to_keep=1, **inputs).logits[:, -1]
        self._length += num_tokens
        return logits

    def _inputs(self, forwards: dict[int, Forward]) -> dict[str, torch.Tensor]:
        """Inputs of the forward that streams wait for: new ids at the end of each row, padding before them."""
        width = _width(forwards)
        ids = torch.zeros(len(self._places), width, dtype=torch.long)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        images: dict[str, list[torch.Tensor]] = {}
        for number, place in enumerate(self._places):
            forward = None if place is None else forwards.get(place)
            if forward is None:
                continue
            first = width - len(forward.ids)
            ids[number, first:] = torch.tensor(forward.ids)
            mask[number, first:] = 1
            for name, value in forward.images.items():
                if name == "mm_token_type_ids":
                    types[number, first:] = value[0]
                    continue
                if name == "image_positions":
                    value = value + torch.tensor([number, first])
                images.setdefault(name, []).append(value)
        pixels = images.pop("pixel_values", None)
        inputs: dict[str, Any] = {"input_ids": ids, **{name: torch.cat(values) for name, values in images.items()}}
        if pixels is not None:
            inputs["pixel_values"] = pixels
        if images:
            inputs["mm_token_type_ids"] = types
        # Compiled steps always have a mask, and read one that says that there is padding.
        if self._compiled is not None or not bool(mask.all()):
            inputs["attention_mask"] = mask
        return on_device(inputs, self.model.device)

    # ---------------------------------------------------------------- rows of the cache

    def _is_too_long(self, forwards: dict[int, Forward]) -> bool:
        """Whether text of these streams is to be evicted before their forward, or padding to be closed up."""
        held, keep = self._held_and_kept(forwards)
        return any(held) and (keep != held or self._length > self._padded_limit(max(held), forwards))

    def _held_and_kept(self, forwards: dict[int, Forward]) -> tuple[list[int], list[int]]:
        """By row of the cache the number of text tokens that it holds, and that it is to keep."""
        rows = [None if place is None else self._rows[place] for place in self._places]
        held = [0 if row is None else row.held for row in rows]
        return held, [0 if row is None else row.tokens_to_keep(row.stream in forwards) for row in rows]

    def _bound_text(self, forwards: dict[int, Forward]) -> bool:
        """Keep the text of these streams within their `max_text_tokens`, and close up padding where there is much.

        Returns:
            Whether anything was evicted or closed up.
        """
        held, keep = self._held_and_kept(forwards)
        if self._length and not any(held):
            self._forget()
        if not self._is_too_long(forwards):
            return False
        rows = [None if place is None else self._rows[place] for place in self._places]
        sinks = torch.tensor([0 if row is None else row.num_sink_tokens for row in rows])
        # A row that has no more than its sinks yet keeps them.
        positions = self.model.evict_text(self._cache, torch.tensor(keep).maximum(sinks + 1), sinks)
        if positions is None:
            return False
        self._length = positions.shape[1]
        for row, number in zip(rows, (positions >= 0).sum(1).tolist(), strict=True):
            if row is not None:
                row.held = number
        return True

    def _padded_limit(self, longest: int, forwards: dict[int, Forward]) -> int:
        """Number of cache positions from which on padding is closed up before a forward.

        Args:
            longest: number of tokens of the longest row.
            forwards: what the forward is for.
        """
        if self._compiled is None:
            return longest * 5 // 4 + _SPARE_POSITIONS
        return int(home_layer(self._cache).max_cache_len) - _width(forwards)

    def _fit_text(self, forwards: dict[int, Forward]) -> None:
        """Bound the text of a cache of fixed size, and see that there is room; if that fails, all is as before.

        Keys and values are moved in place, of which a copy is kept meanwhile.
        """
        cache, length, shape = self._cache, self._length, self._shape
        held = {stream: row.held for stream, row in self._rows.items()}
        if self._is_too_long(forwards):
            cache = cache_snapshot(cache)
        try:
            closed_up = self._bound_text(forwards)
            needed = self._length + _width(forwards)
            # Not to have to close up padding again soon.
            self._make_room(needed * 8 // 7 if closed_up else needed)
        except BaseException:
            self._cache, self._length, self._shape = cache, length, shape
            for stream, number in held.items():
                self._rows[stream].held = number
            raise

    def _make_room(self, num_tokens: int) -> None:
        """Let a cache of fixed size have room for so many cache positions; a larger one is another shape."""
        if not self._length and self._shape != (len(self._places), self._room(num_tokens)):
            self._cache = self._static_cache(num_tokens)
            self._shape = len(self._places), self._room(num_tokens)
        elif num_tokens > home_layer(self._cache).max_cache_len:
            larger = self._static_cache(num_tokens)
            rules = self.model.get_decoder().window_rules
            self._cache = filled_cache(larger, cache_state(self._cache, rules), self.model)
            self._shape = len(self._places), self._room(num_tokens)

    def _static_cache(self, num_tokens: int) -> Any:
        columns = max_image_tokens(self.processor)
        return self.model.get_decoder().static_cache(self._room(num_tokens), columns, len(self._places))

    def _room(self, num_tokens: int) -> int:
        """Number of cache positions of a cache of fixed size: what all streams may hold, and padding. More, as texts
        without a limit need, is a doubling of that, so that there are few sizes."""
        limits = [row.settings.max_text_tokens or _FIRST_TOKENS for row in self._rows.values()]
        usual = max(limits, default=_FIRST_TOKENS) + _SPARE_POSITIONS
        return in_doublings(num_tokens + _SPARE_POSITIONS, -(-usual * 5 // (4 * 256)) * 256)

    # ---------------------------------------------------------------- rows of the cache

    def _forget(self) -> None:
        """Have an empty cache."""
        self._cache = DynamicCache(config=self.model.config.get_text_config())
        self._length, self._shape = 0, None

    def _arrange(self, places: list[int | None], sources: Mapping[int, int | None]) -> None:
        """Let the rows of the cache be for these streams.

        Args:
            places: stream of each row, or None.
            sources: for streams whose row isn't to stay what it is, the stream whose row is copied; None for an empty
                one.
        """
        numbers = {place: number for number, place in enumerate(self._places) if place is not None}
        origins = [None if place is None else sources.get(place, place) for place in places]
        rows = [None if origin is None else numbers[origin] for origin in origins]
        self._places = places
        if any(row is not None for row in rows):
            if self._length:
                select_rows(self._cache, rows)
                if self._shape is not None:
                    self._shape = len(places), self._shape[1]
        else:
            self._forget()

    def _named(self, row: _Row, source: int | None) -> int:
        """Give a new stream a name, and a row: a copy of another stream's, or an empty one."""
        stream = row.stream = self._next_id
        self._next_id += 1
        self._rows[stream] = row
        places = list(self._places)
        if self._compiled is None:
            places.append(stream)
        else:
            if None not in places:
                places += [None] * (_num_rows(len(self._rows)) - len(places))
            places[places.index(None)] = stream
        self._arrange(places, {stream: source})
        return stream

    def _leave(self, stream: int) -> None:
        """Empty the row of a stream, or let there be fewer."""
        others = [place for place in self._places if place != stream]
        if self._compiled is not None:
            number = _num_rows(len(self._rows))
            if self._rows and 4 * number > len(self._places):
                others = [None if place == stream else place for place in self._places]
            else:
                others = [place for place in others if place is not None]
                others += [None] * (number - len(others)) if others else []
        self._arrange(others, {})

    def _restart(self, stream: int) -> None:
        """Give a stream, whose text has ended, an empty row."""
        self._rows[stream].reset()
        self._arrange(self._places, {stream: None})

    def _row(self, stream: int) -> _Row:
        self._require_open()
        if stream not in self._rows:
            raise ValueError(f"stream={stream!r} must be one of the batch: {list(self._rows)}. Streams join by add().")
        return self._rows[stream]

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("The batch is closed. Make a new CasaStreamBatch.")


class _Row(CasaStream):
    """A stream whose forwards the batch runs: `push` and `ask` return its steps instead of its events.

    Attributes:
        held: text tokens in its row of the cache.
        stream: its id.
    """

    held: int
    stream: int

    def moment(self) -> tuple[dict[str, Any], torch.Tensor, Any, torch.Tensor | None]:
        """What a forward changes, but for the cache; `return_to` takes it."""
        kept = {name: getattr(self, name) for name in ("held", "_pending", "_begun", "_answered")}
        random = None if self._generator is None else self._generator.get_state()
        return kept, self._history.ids, self._pieces.state(), random

    def return_to(self, moment: tuple[dict[str, Any], torch.Tensor, Any, torch.Tensor | None]) -> None:
        """Be what it was at a `moment`."""
        kept, self._history.ids, pieces, random = moment
        self.__dict__.update(kept)
        self._pieces.load(pieces)
        if self._generator is not None and random is not None:
            self._generator.set_state(random)

    def draws(self, forward: Forward | None) -> tuple[TokenRules, History | None, float]:
        """What its token after the forward is chosen by: rules, text and a random number; None for no token."""
        if forward is None:
            return self._caption_rules, None, 1.0
        return forward.rules, forward.history, uniform_number(self._generator)

    def tokens_to_keep(self, continues: bool) -> int:
        """Number of its text tokens that the stream keeps before a forward that continues it, or one that doesn't."""
        limit = self.settings.max_text_tokens
        full = limit is not None and continues and self.held > limit
        return self._kept_tokens if full else self.held

    @property
    def num_text_tokens(self) -> int:
        return self.held

    def _served(self, steps: Steps) -> Any:
        return steps

    def _begin(self) -> None:
        super()._begin()
        self._cache = None
        self.held = 0


def _num_rows(number: int) -> int:
    """How many rows a cache of fixed size has for so many streams."""
    return next((size for size in _NUM_ROWS if size >= number), -(-number // _NUM_ROWS[-1]) * _NUM_ROWS[-1])


def _width(forwards: dict[int, Forward]) -> int:
    """Number of tokens that a forward has in each row."""
    return max(len(forward.ids) for forward in forwards.values())


def _check_mapping(name: str, given: Any, item: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{name} is a {type(given).__name__}; give a dictionary with the {item} of each stream, by its id."
        )
