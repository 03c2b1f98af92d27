# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`CasaStreamBatch`: many streams of one model, served together.

Each stream is a `CasaStream` without a cache of its own: it has a row of the batch's. Streams that need a forward at
the same time share it; the others wait. What pads their rows meanwhile is masked, and closed up when there is much.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ..cache_casa import cache_nbytes, cache_snapshot
from ..checks import check_count
from .drawing import History, TokenDraws, TokenRules, uniform_number
from .events import CaptionEvent, refusal
from .frame_pool import FramePool, PreparedFrame, wait_for
from .session import CasaStream, check_pair, stop_tokens
from .settings import StreamSettings
from .steps import Forward, Steps, on_device

if TYPE_CHECKING:
    from ..modeling_casa import CasaForConditionalGeneration
    from ..processing_casa import CasaProcessor

# Padding is closed up when the cache has so many positions more than a quarter above the tokens of its longest row.
_SPARE_POSITIONS = 64


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
        **changes: fields of [`StreamSettings`] that replace those of `settings`.

    Attributes:
        settings: the [`StreamSettings`] that streams have unless `add` says otherwise.

    Raises:
        TypeError: if there is no such setting.
        ValueError: if a setting can't be, or model and processor don't fit.
    """

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        processor: CasaProcessor,
        settings: StreamSettings | None = None,
        **changes: Any,
    ):
        self.settings = StreamSettings.of(settings, **changes)
        check_pair(model, processor, self.settings)
        self.model = model
        self.processor = processor
        self._rows: dict[int, _Row] = {}  # in the order of the cache's rows
        self._cache = self._new_cache()
        self._draws = TokenDraws(model, stop_tokens(model))
        self._pool = FramePool()
        self._next_id = 0
        self._closed = False
        # Texts in the making: their steps, the forwards that some of them wait for, and events to be given out.
        self._steps: dict[int, Steps] = {}
        self._forwards: dict[int, Forward] = {}
        self._preparing: dict[int, list[PreparedFrame]] = {}  # frames of texts that haven't begun
        self._events: deque[tuple[int, CaptionEvent]] = deque()
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
            row = _Row(self.model, self.processor, self.settings, **changes)
            row._pool = self._pool
            self._append_empty_row()
            return self._named(row)

    def remove(self, stream: int) -> None:
        """Let a stream leave, with its events that haven't been taken; what it holds is freed.

        Raises:
            ValueError: if there is no such stream.
        """
        with self._alone():
            self._row(stream)
            self._end(stream)
            self._discard_events(stream)
            self._select([other for other in self._rows if other != stream])
            del self._rows[stream]

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
            self._select([*self._rows, stream])
            return self._named(other)

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
            self._rows = {}
            self._events.clear()
            self._cache = self._new_cache()
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
                    self._preparing[stream] = prepared
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

        That is the content, without the room behind it: at most a quarter more, at least 64 tokens.
        """
        return cache_nbytes(self._cache)

    # ---------------------------------------------------------------- texts in the making

    def _start(self, stream: int, steps: Any) -> None:
        self._end(stream)
        self._steps[stream] = steps

    def _end(self, stream: int) -> None:
        """End the text that is being generated for a stream."""
        self._forwards.pop(stream, None)
        self._preparing.pop(stream, None)
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
        waiting = [stream for stream in self._steps if stream not in self._forwards]
        # Frames that came together are shown together; other texts go on until their pixels are there.
        frames = [frame for of_stream in self._preparing.values() for frame in of_stream]
        if not self._forwards and len(waiting) == len(self._preparing):  # nothing else is to be done
            wait_for(frames)
        if all(frame.done() for frame in frames):
            self._preparing.clear()
        for stream in waiting:
            if stream not in self._preparing:
                self._advance(stream, None)
        if self._forwards:
            self._run(dict(self._forwards))

    def _run(self, forwards: dict[int, Forward]) -> None:
        """One forward for these streams; where it fails, one for each half, down to those that it fails for."""
        cache, before = cache_snapshot(self._cache), {stream: row.moment() for stream, row in self._rows.items()}
        num_events = len(self._events)
        failure: Exception | None = None
        try:
            # As one: between them the cache holds tokens that still wait to be read.
            try:
                tokens = self._next_tokens(forwards)
            except Exception as error:
                failure = error
            else:
                for stream, token in tokens.items():
                    self._advance(stream, token)
                return
        except BaseException:
            self._return_to(cache, before)
            while len(self._events) > num_events:
                self._events.pop()
            for stream in forwards:
                self._end(stream)
            raise
        self._return_to(cache, before)
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

    def _return_to(self, cache: DynamicCache, moments: dict[int, Any]) -> None:
        """Let the cache and its rows be what they were."""
        self._cache = cache
        self._rows = {stream: self._rows[stream] for stream in moments}
        for stream, moment in moments.items():
            self._rows[stream].return_to(moment)

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
            self._restart(stream)
            self._events.append((stream, refusal(error, note="the stream has been reset")))
        else:
            self._forwards[stream] = step

    @torch.no_grad()
    def _next_tokens(self, forwards: dict[int, Forward]) -> dict[int, int]:
        """Run the forward that these streams wait for; by stream, the token that follows."""
        self._bound_text(forwards)
        # A row that waits for no token is given one too, which nobody reads.
        draws = [row.draws(forwards.get(stream)) for stream, row in self._rows.items()]
        draw = self._draws.of([rules for rules, *_ in draws])
        numbers = draw.numbers([history for _, history, _ in draws], [uniform for *_, uniform in draws])
        output = self.model(cache=self._cache, use_cache=True, logits_to_keep=1, **self._inputs(forwards))
        tokens = draw.tokens(output.logits[:, -1], numbers).tolist()  # the device is waited for here
        for stream, forward in forwards.items():
            self._rows[stream].held += len(forward.ids)
        return {stream: token for stream, token in zip(self._rows, tokens, strict=True) if stream in forwards}

    def _inputs(self, forwards: dict[int, Forward]) -> dict[str, torch.Tensor]:
        """Inputs of the forward that streams wait for: new ids at the end of each row, padding before them."""
        width = max(len(forward.ids) for forward in forwards.values())
        ids = torch.zeros(len(self._rows), width, dtype=torch.long)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        images: dict[str, list[torch.Tensor]] = {}
        for number, stream in enumerate(self._rows):
            forward = forwards.get(stream)
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
        if not bool(mask.all()):
            inputs["attention_mask"] = mask
        return on_device(inputs, self.model.device)

    # ---------------------------------------------------------------- rows of the cache

    def _bound_text(self, forwards: dict[int, Forward]) -> None:
        """Keep the text of these streams within their `max_text_tokens`, and close up padding where there is much."""
        if not self._holds_text:
            return
        keep = [row.tokens_to_keep(stream in forwards) for stream, row in self._rows.items()]
        held = [row.held for row in self._rows.values()]
        if keep == held and self._cache.get_seq_length() <= max(held) * 5 // 4 + _SPARE_POSITIONS:
            return
        sinks = torch.tensor([row.num_sink_tokens for row in self._rows.values()])
        # A row that has no more than its sinks yet keeps them.
        positions = self.model.evict_text(self._cache, torch.tensor(keep).maximum(sinks + 1), sinks)
        if positions is not None:
            for row, number in zip(self._rows.values(), (positions >= 0).sum(1).tolist(), strict=True):
                row.held = number

    @property
    def _holds_text(self) -> bool:
        return bool(self._cache.layers) and self._cache.get_seq_length() > 0

    def _select(self, streams: list[int]) -> None:
        """Let the cache have the rows of these streams, in this order."""
        if not streams:
            self._cache = self._new_cache()
        elif self._holds_text:
            index = {stream: number for number, stream in enumerate(self._rows)}
            rows = torch.tensor([index[stream] for stream in streams], device=self.model.device)
            self._cache.batch_select_indices(rows)

    def _append_empty_row(self) -> None:
        if self._holds_text:
            for layer in self._cache.layers:
                layer.append_empty_rows(1)

    def _named(self, row: _Row) -> int:
        stream = self._next_id
        self._next_id += 1
        self._rows[stream] = row
        return stream

    def _row(self, stream: int) -> _Row:
        self._require_open()
        if stream not in self._rows:
            raise ValueError(f"stream={stream!r} must be one of the batch: {list(self._rows)}. Streams join by add().")
        return self._rows[stream]

    def _restart(self, stream: int) -> None:
        """Give a stream, whose text has ended, an empty row."""
        row = self._rows[stream]
        row.reset()
        self._select([other for other in self._rows if other != stream])
        del self._rows[stream]
        self._append_empty_row()
        self._rows[stream] = row

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config())

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("The batch is closed. Make a new CasaStreamBatch.")


class _Row(CasaStream):
    """A stream whose forwards the batch runs: `push` and `ask` return its steps instead of its events.

    Attributes:
        held: text tokens in its row of the cache.
    """

    held: int

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


def _check_mapping(name: str, given: Any, item: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{name} is a {type(given).__name__}; give a dictionary with the {item} of each stream, by its id."
        )
