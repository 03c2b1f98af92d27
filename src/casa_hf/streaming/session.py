# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`CasaStream`: captions of frames as they come, for as long as they come.

A stream is one long assistant turn on one cache. Each frame is one forward of the public model: the token that ended
the last frame's text, which the cache doesn't hold yet, and the frame's delimiters with its pixels. Every further
token is one more. What was emitted stays token for token as it was; it is never decoded and tokenized again.
"""

from __future__ import annotations

import copy
import functools
import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ..cache_casa import cache_nbytes, cache_state
from ..checks import check_count, check_number
from ..image_inputs import FRAME_TYPE
from ..patches_casa import normalization_of
from ..temporal_patches import concatenate_patches
from .compiled import CompiledSteps
from .drawing import History, TokenDraws, TokenRules, uniform_number
from .events import CaptionEvent, EventKind
from .frame_pool import FramePool, PreparedFrame
from .pieces import TextPieces
from .settings import StreamSettings
from .state import IMAGES, STATE_VERSION, check_cache, check_state, filled_cache, model_design
from .steps import Forward, ShownFrame, Steps, on_device
from .timestamps import frame_timestamps
from .tower import FrameTower
from .turns import StreamTurns

if TYPE_CHECKING:
    from ..modeling_casa import CasaForConditionalGeneration
    from ..processing_casa import CasaProcessor

# Note on what interrupted a forward, of which the cache may hold a part.
_RESET_NOTE = "This interrupted a forward of the model; the stream has been reset."


class CasaStream:
    """Live captions of frames with one model, which other streams may use too.

    All state is in this object and its cache. The text of a frame ends with a stop token, after
    `max_new_tokens_per_frame` tokens or when `frame_budget` is used up, and resumes with the next frame; a frame may
    have no text. With `frames_per_image=2`, two frames are shown as one image: the first waits for the second.

    Between forwards the stream may be called from any thread; during one, a call from another thread is refused. If a
    forward fails or is interrupted, by Ctrl-C say, the cache may hold a part of it, and the stream is reset, as by
    `reset`; a note on the exception says so. What interrupts the program between forwards changes nothing.

    Args:
        model: model that captions the frames.
        processor: processor of the model.
        settings: settings of captions; None for the defaults.
        **changes: fields of [`StreamSettings`] that replace those of `settings`, such as
            `prompt="What happens here?"`.

    Attributes:
        settings: the [`StreamSettings`].
        num_sink_tokens: number of first tokens that are always kept.
        frames_per_image: number of frames that are shown as one image.
        stop_token_ids: the tokens that end the text of a frame: `model.generation_config.eos_token_id`.

    Raises:
        TypeError: if there is no such setting.
        ValueError: if a setting can't be, the prompt leaves no room within `max_text_tokens`, or model and processor
            don't fit.
    """

    # The state of the stream. `_cache` is None before the first forward, and `_held` the number of text tokens in it.
    # `_pending` are ids that the cache doesn't hold yet: the prompt, later the last token.
    # `_begun` says whether a frame was shown, `_answered` whether the last token belongs to an answer. `_waiting` are
    # frames that wait for others to share an image with. `_open` are the events of the last call, which may not all be
    # taken yet.
    _cache: Any
    _held: int
    _pending: list[int]
    _history: History
    _generator: torch.Generator | None
    _num_frames: int
    _last_timestamp: float | None
    _waiting: list[ShownFrame]
    _begun: bool
    _answered: bool
    _open: weakref.ref[Any] | None

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
        if not model.training:
            model.fuse_projections()
        self.processor = processor
        self.frames_per_image = shared_frames(processor, self.settings)
        self.stop_token_ids = stop_tokens(model)
        self.turns = StreamTurns(processor, self.settings, takes_uint8_pixels(model, processor))
        self._pool: FramePool | None = None
        self.num_sink_tokens = self.settings.sink_tokens(len(self.turns.opening))
        self._caption_rules = TokenRules.of(self.settings)
        self._answer_rules = TokenRules.of(self.settings, biased=False)
        self._draws = TokenDraws(model, self.stop_token_ids)
        self._compiled = CompiledSteps.of(model, processor, self.settings)
        self._tower = FrameTower.of(model, None if self._compiled is None else self._compiled.options)
        self._pieces = TextPieces(processor.tokenizer)
        self._closed = False
        self._open = None
        self._deadline = math.inf  # of the text that is being generated
        self.reset()

    # ---------------------------------------------------------------- frames and questions

    def push(self, frame: Any, timestamp: float | Sequence[float] | None = None) -> Iterator[CaptionEvent]:
        """Show the stream a frame and receive what the model says to it.

        Arguments are checked at once; the model works while the events are taken. Events that aren't taken aren't
        generated: the frame's text then ends where it is, or the frame isn't looked at if none was taken. The next
        `push` or `ask` ends what is open.

        Args:
            frame: frame to show, as a PIL image, a path, a URL, base64, bytes, or an array or tensor of pixels
                (height, width, 3) or (3, height, width), integers from 0 to 255 or floating values from 0 to 1, as
                `casa_hf.media_casa.rgb_image` takes them; or a list of such frames, which are shown one after the
                other in one forward, with text after the last.
            timestamp: time at which the frame was taken, in seconds, later than the one before; None for one over
                `fps` after it (0 at first). For a list of frames, the timestamps of all, as a list or array, or that
                of the last.

        Yields:
            "merged" for each frame of a list but the last; "text" whenever further characters are whole; at the end
            one "end", unless the text is cut short. A frame that can't be used yields "error" instead and changes
            nothing: its events are all there are, unless other frames of the list can be used. With several frames per
            image, a frame that waits for others yields nothing yet (its events have to be taken all the same), and
            "merged" when they are there; a frame of another size begins a new image.

        Raises:
            ValueError: if timestamps don't ascend, or the list of frames is empty.
            RuntimeError: if the stream is closed.
        """
        pushed = time.perf_counter()
        frames, timestamps = self._checked(frame, timestamp)
        self._end_open()
        first = self._num_frames
        self._num_frames += len(frames)
        self._last_timestamp = timestamps[-1]
        return self._opened(self._caption(frames, timestamps, first, pushed))

    def prepare(self, frame: Any) -> PreparedFrame:
        """Begin to decode and resize a frame in a pool of threads, while the model works; from any thread.

        Args:
            frame: frame as in `push`, which takes the result in its place; an array mustn't change until then.

        Raises:
            RuntimeError: if the stream is closed.
        """
        self._require_open()
        if self._pool is None:
            self._pool = FramePool()
        return self._pool.prepare(frame, self.turns.pixels, self.model.device)

    def flush(self) -> Iterator[CaptionEvent]:
        """Show the frame that waits for another one to share an image with, doubled, as at the end of a video.

        Yields:
            the events of that frame, as `push`; none if no frame waits.

        Raises:
            RuntimeError: if the stream is closed.
        """
        pushed = time.perf_counter()
        self._require_open()
        self._end_open()
        return self._opened(self._caption([], [], self._num_frames, pushed, flush=True))

    def ask(self, question: str, max_new_tokens: int | None = None) -> Iterator[CaptionEvent]:
        """Ask a question about what is shown; the captions resume with the next frame.

        A frame that waits for another one isn't shown yet, and waits on; call `flush` before to ask about it. The
        assistant's turn is closed as the chat template closes it, and the answer begins one of its own. It sees
        what a caption here would see. Repetition is controlled within the answer, not against the captions, and stop
        tokens aren't biased.

        Args:
            question: message of the user.
            max_new_tokens: number of tokens that the answer may have, its stop token included; None for the settings'
                `max_new_tokens_per_answer`.

        Yields:
            "answer" whenever further characters are whole; at the end one "answered".

        Raises:
            ValueError: if the question is blank or isn't valid Unicode, or `max_new_tokens` isn't a positive integer.
            RuntimeError: if the stream is closed.
        """
        pushed = time.perf_counter()
        self._require_open()
        limit = self.settings.max_new_tokens_per_answer if max_new_tokens is None else max_new_tokens
        check_count("max_new_tokens", limit)
        ids = self.turns.question(question)
        self._end_open()
        return self._opened(self._answer(question, ids, limit, pushed))

    def drop(self, timestamp: float, message: str, count: int = 1) -> CaptionEvent:
        """Count a frame that isn't looked at, or several.

        Args:
            timestamp: time at which it was taken, in seconds, later than the one before; of several, that of the last.
            message: reason why it isn't looked at.
            count: number of frames.

        Returns:
            The event "dropped"; one for all frames, with the index and time of the last.

        Raises:
            ValueError: if timestamps don't ascend, or `count` isn't a positive integer.
            RuntimeError: if the stream is closed.
        """
        self._require_open()
        check_count("count", count)
        [start] = self._timestamps(timestamp, 1)
        self._num_frames += int(count)
        self._last_timestamp = start
        index = self._num_frames - 1
        return self._event("dropped", index, start, time.perf_counter(), message=message, count=int(count))

    def extend_budget(self, seconds: float) -> None:
        """Give the frame that is being captioned more time than its `frame_budget`: that of a pause, for example.

        Without such a frame nothing happens. It may be called from another thread.

        Args:
            seconds: time to add.

        Raises:
            ValueError: if they are negative or not finite.
        """
        check_number("seconds", seconds, Real, lambda number: 0 <= number < math.inf, "a finite number, 0 or more")
        self._deadline += seconds

    # ---------------------------------------------------------------- the stream as a whole

    def reset(self) -> None:
        """Forget everything and start from scratch: with the prompt and, if a seed was given, the same random numbers.

        Raises:
            RuntimeError: if the stream is closed.
        """
        self._require_open()
        self._end_open()
        self._begin()

    def fork(self) -> CasaStream:
        """A second stream that continues from here by itself, with a copy of the cache and the same model.

        Given the same frames, both say the same, also where tokens are drawn at random.

        Raises:
            RuntimeError: if the stream is closed, or being read by another thread.
        """
        self._require_open()
        self._require_idle()
        other = copy.copy(self)
        other._open = None
        other._cache = copy.deepcopy(self._cache)
        other._load_text(self._text_state())
        return other

    def state_dict(self) -> dict[str, Any]:
        """What the stream has to remember, as tensors and numbers, which `torch.save` writes.

        Of the settings, it has those that the cache was made with: the ids of system message and prompt,
        `max_text_tokens`, `num_sink_tokens` and `frames_per_image`, and the processor's `video_timestamps`. The others
        are those of the stream that loads it.

        Raises:
            RuntimeError: if the stream is closed, or being read by another thread.
        """
        self._require_open()
        self._require_idle()
        rules = self.model.get_decoder().window_rules
        return {**self._state(), "cache": cache_state(self._cache, rules) if self._held else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where the stream that was saved stopped; the same frames lead to the same tokens.

        Args:
            state: result of `state_dict`, as it is or read by `torch.load(..., weights_only=True)`, on any device.

        Raises:
            ValueError: if the state is of another version, or of another design, size or precision of model, if the
                stream that was saved had another system message, prompt, `max_text_tokens`, `num_sink_tokens`,
                `frames_per_image` or `video_timestamps`, or if something is missing from it or doesn't fit the rest.
                The stream then stays as it was.
            RuntimeError: if the stream is closed.
        """
        self._require_open()
        other = copy.copy(self)  # made whole before anything of this one changes
        try:
            check_state(state, self._state(), self.model, self.processor.tokenizer)
            other._load_cache(state["cache"])
            other._load_text(state)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"The state is damaged ({type(error).__name__}: {error}); give what state_dict() of a CasaStream "
                "returned."
            ) from error
        self._end_open()
        self.__dict__.update(other.__dict__, _open=None)

    def close(self) -> None:
        """Free the cache; of what comes later, only the properties and `close` work."""
        self._end_open()
        self._cache, self._held = None, 0
        self._pool = None  # whose threads a fork may use on
        self._closed = True

    def __enter__(self) -> CasaStream:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_frames(self) -> int:
        """Frames that were pushed or dropped."""
        return self._num_frames

    @property
    def last_timestamp(self) -> float | None:
        """When the last frame was taken, in seconds; None before the first."""
        return self._last_timestamp

    @property
    def waiting_frames(self) -> tuple[int, ...]:
        """Indices of the frames that wait for others to share an image with."""
        return tuple(frame.index for frame in self._waiting)

    @property
    def num_text_tokens(self) -> int:
        """Text tokens that the cache holds."""
        return self._held

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes that the cache holds, by part: "text", "image" and, where the model has linear attention, "recurrent".

        That is the content, without the room behind it: at most a quarter more, at least 64 tokens; in a stream whose
        steps are compiled, the rest of what it has room for.
        """
        return cache_nbytes(self._growing_cache() if self._cache is None else self._cache)

    @property
    def closed(self) -> bool:
        return self._closed

    # ---------------------------------------------------------------- frames and answers

    def _caption(
        self, frames: list[Any], timestamps: list[float], first: int, pushed: float, flush: bool = False
    ) -> Steps:
        """The steps of frames with indices from `first` on, shown in one forward with those that wait.

        With `flush`, none of them waits on.
        """
        usable, errors = [], []
        for index, (frame, timestamp) in enumerate(zip(frames, timestamps, strict=True), first):
            try:
                pixels = frame.pixels() if isinstance(frame, PreparedFrame) else self.turns.pixels(frame)
                usable.append(ShownFrame(index, timestamp, pixels))
            except Exception as error:  # of as many kinds as there are broken images
                errors.append((index, timestamp, f"{type(error).__name__}: {error}"))
        images = by_size([*self._waiting, *usable], self.frames_per_image)
        waits = bool(images) and not flush and len(images[-1]) < self.frames_per_image
        self._waiting = images.pop() if waits else []
        shown = [frame for image in images for frame in image]
        others: list[tuple[int, float, EventKind, str]] = [
            (frame.index, frame.timestamp, "merged", f"shown together with frame {shown[-1].index}")
            for frame in shown[:-1]
        ]
        others += [(index, timestamp, "error", message) for index, timestamp, message in errors]
        for index, timestamp, kind, message in sorted(others):
            yield self._event(kind, index, timestamp, pushed, message=message)
        if not shown:
            return

        ids, inputs = self._shown_frames(images)
        forward = Forward(ids, inputs, self._caption_rules, self._history)
        self._deadline = math.inf if self.settings.frame_budget is None else pushed + self.settings.frame_budget
        last = shown[-1]
        event = functools.partial(self._event, index=last.index, start=last.timestamp, pushed=pushed)
        yield from self._speak(forward, ("text", "end"), event, self._pieces, self.settings.max_new_tokens_per_frame)

    def _answer(self, question: str, ids: list[int], max_new_tokens: int, pushed: float) -> Steps:
        """The steps of an answer to the question, which has these ids."""
        start = 0.0 if self._last_timestamp is None else self._last_timestamp
        ids = self._turn_to_close() + ids
        forward = Forward(ids, {}, self._answer_rules, self._new_history())
        index = self._num_frames - 1
        event = functools.partial(self._event, index=index, start=start, pushed=pushed, question=question)
        pieces = TextPieces(self.processor.tokenizer)
        self._deadline = math.inf
        yield from self._speak(forward, ("answer", "answered"), event, pieces, max_new_tokens)

    def _shown_frames(self, images: list[list[ShownFrame]]) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Text ids and image inputs of a forward with new frames, by image."""
        ids = list(self._pending)
        if self._answered:
            ids = self._turn_to_close() + self.turns.resumption
            self._pieces.reset()
        # Their places are given: an image placeholder that the model itself has written is text.
        types = [0] * len(ids)
        for frames in images:
            of_image, its_types = self.turns.image([frame.timestamp for frame in frames])
            ids += of_image
            types += its_types
        prefix = [] if self._begun else self.turns.prefix
        token_types = torch.tensor([types + [0] * len(prefix)])
        joined = [self.turns.joined(frames) for frames in images]
        pixels, grids = ([image[name] for image in joined] for name in IMAGES)
        inputs = {"pixel_values": concatenate_patches(pixels), "image_grid_thw": torch.cat(grids)}
        inputs |= {"image_positions": (token_types == FRAME_TYPE).nonzero(), "mm_token_type_ids": token_types}
        return ids + prefix, inputs

    def _speak(
        self,
        forward: Forward,
        kinds: tuple[EventKind, EventKind],
        event: Callable[..., CaptionEvent],
        pieces: TextPieces,
        limit: int,
    ) -> Steps:
        """The steps from a forward to the end of the text that follows it; `kinds` are those of its pieces and end.

        After this forward the stream can always be continued: the cache holds everything before the last
        token, and the token waits to be folded into the next forward, whichever that is.
        """
        emitted: list[int] = []
        text = ""
        while True:
            try:
                token_id = yield forward
            except Exception as error:  # that a batch says it couldn't be run
                yield event("error", message=f"{type(error).__name__}: {error}")
                return
            # Only now: a batch may end a text before its first forward, and then nothing was told.
            self._answered, self._begun = kinds[0] == "answer", self._begun or kinds[0] == "text"
            stops = token_id in self.stop_token_ids
            if not stops:
                forward.history.add(token_id)
            self._pending = [token_id]
            emitted.append(token_id)
            piece, token_ids = self._text_of(token_id, pieces)
            if piece:
                text += piece
                yield event(kinds[0], text=piece, token_ids=token_ids)
            if stops or len(emitted) == limit or time.perf_counter() >= self._deadline:
                break
            forward = replace(forward, ids=[token_id], images={})
        yield event(kinds[1], text=text, token_ids=tuple(emitted))

    def _served(self, steps: Steps) -> Iterator[CaptionEvent]:
        """The events of these steps, whose forwards are run."""
        step = next(steps, None)
        while step is not None:
            if not isinstance(step, Forward):
                yield step
                step = next(steps, None)
                continue
            try:
                # As one: between them the cache holds tokens that still wait to be read.
                step = steps.send(self._next_token(step))
            except BaseException as error:
                error.add_note(_RESET_NOTE)
                self._begin()
                raise

    @torch.inference_mode(False)  # in which a cache couldn't be written to outside of it
    @torch.no_grad()
    def _next_token(self, forward: Forward) -> int:
        """Run a forward of the model; the token that follows."""
        self._bound_text()
        self._make_room(len(forward.ids))
        draw = self._draws.of([forward.rules])
        numbers = draw.numbers([forward.history], [uniform_number(self._generator)])
        inputs = on_device({"input_ids": torch.tensor([forward.ids]), **forward.images}, self.model.device)
        inputs = self._tower.inputs(inputs)
        alone = len(forward.ids) == 1 and not forward.images
        model = self._compiled.step if self._compiled is not None and alone else self.model
        output = model(cache=self._cache, use_cache=True, logits_to_keep=1, **inputs)
        self._held += len(forward.ids)
        return int(draw.tokens(output.logits[:, -1], numbers))

    def _bound_text(self) -> None:
        """Keep the cached text within `max_text_tokens`; called before every forward."""
        if self.settings.max_text_tokens is not None and self.num_text_tokens > self.settings.max_text_tokens:
            kept = self.model.evict_text(self._cache, self._kept_tokens, self.num_sink_tokens)
            self._held = self._held if kept is None else kept.shape[1]

    def _make_room(self, num_tokens: int) -> None:
        """Let there be a cache that so many further tokens can be added to."""
        if self._compiled is None:
            self._cache = self._growing_cache() if self._cache is None else self._cache
        elif self._cache is None:
            self._cache = self._compiled.new_cache(num_tokens)
        else:
            self._cache = self._compiled.with_room(self._cache, self._held + num_tokens)

    @property
    def _kept_tokens(self) -> int:
        """Number of text tokens that stay when there are more than `max_text_tokens`.

        A quarter of what isn't a sink goes at once, so that evictions are rare, and a key of text is rotated to
        another position four times at most.
        """
        limit = self.settings.max_text_tokens
        assert limit is not None
        return limit - (limit - self.num_sink_tokens) // 4

    def _text_of(self, token_id: int, pieces: TextPieces) -> tuple[str, tuple[int, ...]]:
        """The text that this token completes; a stop token is none, even where the tokenizer has text for it."""
        return ("", ()) if token_id in self.stop_token_ids else pieces.add(token_id)

    def _turn_to_close(self) -> list[int]:
        """What waits for the next forward where the template closes the turn, which it does with a stop token of its
        own: one that was emitted gives way to it. The prompt stays as it is."""
        emitted = self.num_text_tokens > 0
        return [] if emitted and self._pending[-1] in self.stop_token_ids else list(self._pending)

    # ---------------------------------------------------------------- state

    def _begin(self) -> None:
        """The state before the first frame."""
        self._cache, self._held = None, 0
        self._pending = list(self.turns.opening)
        self._history = self._new_history()
        self._generator = self._new_generator()
        self._num_frames = 0
        self._last_timestamp = None
        self._waiting = []
        self._begun = self._answered = False
        self._pieces.reset()

    def _growing_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config())

    def _new_history(self) -> History:
        return History(self._caption_rules.lookback)

    def _new_generator(self) -> torch.Generator | None:
        if not self.settings.do_sample:
            return None
        generator = torch.Generator()  # the CPU's on every device: the same numbers, and nothing to wait for
        if self.settings.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.settings.seed)
        return generator

    def _state(self) -> dict[str, Any]:
        """What `state_dict` returns, but for the cache."""
        settings = {
            "opening": list(self.turns.opening),
            "max_text_tokens": self.settings.max_text_tokens,
            "num_sink_tokens": self.num_sink_tokens,
            "frames_per_image": self.frames_per_image,
            "video_timestamps": self.processor.video_timestamps,
        }
        design = model_design(self.model)
        return {"version": STATE_VERSION, "design": design, "settings": settings, **self._text_state()}

    def _text_state(self) -> dict[str, Any]:
        """Everything but the cache."""
        return {
            "pending": list(self._pending),
            "history": self._history.ids[None].long(),
            "num_frames": self._num_frames,
            "last_timestamp": self._last_timestamp,
            "waiting": [
                {"index": frame.index, "timestamp": frame.timestamp, **frame.images} for frame in self._waiting
            ],
            "begun": self._begun,
            "answered": self._answered,
            "pieces": self._pieces.state(),
            "random": None if self._generator is None else self._generator.get_state(),
        }

    def _load_cache(self, held: dict[str, Any] | None) -> None:
        self._cache, self._held = None, 0
        if held is None:
            return
        self._held = held["windows"]["length"]
        compiled = self._compiled
        cache = self._growing_cache() if compiled is None else compiled.new_cache(self._held)
        self._cache = filled_cache(cache, held, self.model)
        check_cache(held, self.model)

    def _load_text(self, state: dict[str, Any]) -> None:
        self._pending = list(state["pending"])
        self._history = History(self._caption_rules.lookback, state["history"][0].tolist())
        self._num_frames, self._last_timestamp = state["num_frames"], state["last_timestamp"]
        self._waiting = [
            ShownFrame(frame["index"], frame["timestamp"], {name: frame[name].cpu() for name in IMAGES})
            for frame in state["waiting"]
        ]
        self._begun, self._answered = state["begun"], state["answered"]
        self._pieces = TextPieces(self.processor.tokenizer)
        self._pieces.load(state["pieces"])
        self._generator = self._new_generator()
        if self._generator is not None:
            self._generator.set_state(state["random"].cpu())

    # ---------------------------------------------------------------- small things

    def _opened(self, steps: Steps) -> Iterator[Any]:
        events = self._served(steps)
        self._open = weakref.ref(events)  # the events refer to the stream already
        return events

    def _end_open(self) -> None:
        """End the events of the last call."""
        self._require_idle()
        events: Any = None if self._open is None else self._open()
        if events is not None:
            events.close()
        self._open = None

    def _require_idle(self) -> None:
        """Refuse what can't be done during a forward that another thread waits for."""
        events: Any = None if self._open is None else self._open()
        if events is not None and events.gi_running:
            raise RuntimeError(
                "The stream is being read by another thread; call it when that has taken its event, or make one "
                "stream for each thread."
            )

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("The stream is closed; make a new CasaStream.")

    def _checked(self, frame: Any, timestamp: float | Sequence[float] | None) -> tuple[list[Any], list[float]]:
        """The frames that `push` was given, and their timestamps."""
        self._require_open()
        frames = list(frame) if isinstance(frame, list | tuple) else [frame]
        if not frames:
            raise ValueError("push() was given an empty list; give a frame, or a list of at least one.")
        return frames, self._timestamps(timestamp, len(frames))

    def _timestamps(self, given: float | Sequence[float] | None, count: int) -> list[float]:
        return frame_timestamps(given, count, self._last_timestamp, 1 / self.settings.fps)

    def _event(self, kind: EventKind, index: int, start: float, pushed: float, **content: Any) -> CaptionEvent:
        latency = time.perf_counter() - pushed
        return CaptionEvent(kind, index, start, start + 1 / self.settings.fps, latency, **content)


def stop_tokens(model: CasaForConditionalGeneration) -> tuple[int, ...]:
    """The tokens that end the text of a frame."""
    ends = model.generation_config.eos_token_id
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)


def takes_uint8_pixels(model: Any, processor: Any) -> bool:
    """Whether a model normalises 8-bit pixels as the processor would; then its patch embedding is folded for them."""
    # Classes that come with a checkpoint may be older ones.
    if not hasattr(processor, "frame_pixels") or not hasattr(model, "fold_patch_embedding"):
        return False
    if normalization_of(processor.image_processor) != model.config.normalization:
        return False
    try:
        model.fold_patch_embedding()
    except ValueError:  # its weights aren't at hand; they normalise on the device
        model.unfold_patch_embedding()
    return True


def by_size(frames: list[ShownFrame], number: int) -> list[list[ShownFrame]]:
    """The frames of each image: so many at most, all of one size; only the last one may be open for further ones."""
    images: list[list[ShownFrame]] = []
    for frame in frames:
        if not images or len(images[-1]) == number or not images[-1][0].fits(frame):
            images.append([])
        images[-1].append(frame)
    return images


def shared_frames(processor: CasaProcessor, settings: StreamSettings) -> int:
    """Number of frames that a stream shows as one image.

    Raises:
        ValueError: if it is neither 1 nor that of a temporal patch of the vision tower.
    """
    given = processor.frames_per_image if settings.frames_per_image is None else settings.frames_per_image
    size = processor.image_processor.temporal_patch_size
    if type(given) is not int or given not in (1, size):
        raise ValueError(
            f"frames_per_image={given!r} is none of 1, {size}, the numbers of frames that a stream can show as one "
            "image; a whole video can't be one, since a stream never ends. Give the stream one of them "
            "(--frames-per-image on the command line)."
        )
    return int(given)


def check_pair(model: Any, processor: Any, settings: StreamSettings) -> None:
    """Refuse a model that can't stream with this processor or with these settings."""
    # By what they have: classes that come with a checkpoint are others than these.
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "casa" or not hasattr(model, "lm_head"):
        raise ValueError(f"model is a {type(model).__name__}; a stream needs a CasaForConditionalGeneration.")
    if not hasattr(processor, "gist_token_ids"):
        raise ValueError(f"processor is a {type(processor).__name__}; a stream needs the CasaProcessor of the model.")
    own = (config.image_token_id, list(config.gist_token_ids or []))
    given = (processor.image_token_id, list(processor.gist_token_ids))
    if own != given:
        raise ValueError(
            f"The processor writes images with token {given[0]} and gist tokens {given[1]}, the model reads {own[0]} "
            f"and {own[1]}. Load both from the same checkpoint."
        )
    if config.video_timestamps is not None and processor.video_timestamps is None:
        raise ValueError(
            f"The model reads frames with their times (video_timestamps={config.video_timestamps!r}), but the "
            f"processor writes none. Set processor.video_timestamps to {config.video_timestamps!r}, or load both from "
            "the same checkpoint."
        )
    if settings.max_text_tokens is not None:
        model.get_decoder().key_rotation()  # or says why text can't be evicted
