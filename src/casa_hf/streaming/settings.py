# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`StreamSettings`: how a stream captions, defined and checked here alone for streams, batches, the page and the
command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

from transformers import LogitsProcessorList

from ..checks import check_count, check_number, check_positive, check_text, is_number, shown
from ..design_space import unknown_value
from ..media_casa import MediaPolicy
from .repetition import (
    DecayingRepetitionPenalty,
    RecentNoRepeatNGram,
    StopBias,
    check_clamp,
    check_decay,
    check_factor,
    check_lookback,
)


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How a stream captions its frames.

    [`CasaStream`] and [`CasaStreamBatch`] take one, or single fields of it as keyword arguments. The defaults are
    those of the authors' live captioner. `dataclasses.replace` makes a copy with other values.

    Args:
        system: system message; None for what the chat template writes without one.
        prompt: user's message before the first frame.
        prefix: text behind the first frame that the captions begin with, such as "In this video"; not reported.
        sanitize_control_tokens: whether control tokens and image placeholders in the system message, the prompt, the
            prefix and questions are text like any other. False lets control tokens count; image placeholders are
            refused then.
        media_policy: limits on what frames may be read from, and how large they may be, as a
            [`~media_casa.MediaPolicy`] or a dictionary of its fields; None for the processor's.
        fps: frames per second that are to be expected; says when a frame ends, and spaces frames without timestamps.
        frames_per_image: number of frames that the model sees as one image: 1, or 2 to share what the vision tower
            takes at once. A frame then waits for the next one, and both have one text; `flush` shows one that is left
            over. None for the processor's.
        max_new_tokens_per_frame: number of tokens that a frame's text may have, its stop token included.
        max_new_tokens_per_answer: number of tokens that an answer may have, its stop token included, unless the call
            says otherwise.
        frame_budget: seconds after `push` from which on a frame gets no further token; it gets at least one. None for
            no limit.
        do_sample: whether tokens are drawn at random; False takes the likeliest.
        temperature: divisor of the logits before tokens are drawn; 1.0 or None changes nothing.
        top_k: number of likeliest tokens that are drawn from; 0 or None for all.
        seed: start of the random numbers; None for a new one. The global random state is neither used nor changed.
        repetition_penalty, repetition_decay, repetition_clamp: penalty on tokens that the captions had before; see
            [`DecayingRepetitionPenalty`]. A penalty of 1.0 or None switches it off.
        no_repeat_ngram_size, no_repeat_ngram_lookback: length of the n-grams that aren't repeated, and number of last
            tokens of the captions, over all frames, that are searched for them; see [`RecentNoRepeatNGram`]. A size
            of 0 or None switches this off.
        stop_bias: factor on the logits of stop tokens while captioning; see [`StopBias`]. 1.0 or None for none.
        max_text_tokens: number of text tokens that the cache may hold before a forward; beyond that the oldest quarter
            is evicted, and positions are counted from scratch. None keeps all.
        num_sink_tokens: number of first tokens that are always kept; None for the prompt's.
        compile: whether a step that reads a single token is compiled, on a cache with room for `max_text_tokens` and
            for the largest frame; None to compile where `generate` would: on accelerators, unless the model can't be.
            `model.generation_config.compile_config` says how.

    Raises:
        ValueError: if a value is of the wrong type or out of its range, or a text isn't valid Unicode; with the name
            of the field.
    """

    system: str | None = None
    prompt: str = "Describe what happens in the video as it happens. Say only what can be seen."
    prefix: str = ""
    sanitize_control_tokens: bool = True
    media_policy: MediaPolicy | Mapping[str, Any] | None = None
    fps: float = 2.0
    frames_per_image: int | None = None
    max_new_tokens_per_frame: int = 20
    max_new_tokens_per_answer: int = 64
    frame_budget: float | None = None
    do_sample: bool = False
    temperature: float | None = 0.4
    top_k: int | None = 256
    seed: int | None = None
    repetition_penalty: float | None = 1.15
    repetition_decay: float = 0.99
    repetition_clamp: float = 5.0
    no_repeat_ngram_size: int | None = 4
    no_repeat_ngram_lookback: int = 60
    stop_bias: float | None = 0.95
    max_text_tokens: int | None = None
    num_sink_tokens: int | None = None
    compile: bool | None = None

    def __post_init__(self) -> None:
        for name in ("system", "prompt", "prefix"):
            if getattr(self, name) is not None or name != "system":
                check_text(name, getattr(self, name))
        for name in ("sanitize_control_tokens", "do_sample"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be True or False.")
        if self.compile is not None and not isinstance(self.compile, bool):
            raise ValueError(f"compile={shown(self.compile)} must be True, False or None.")
        check_positive("fps", self.fps, "a positive number of frames per second")
        check_count("max_new_tokens_per_frame", self.max_new_tokens_per_frame)
        check_count("max_new_tokens_per_answer", self.max_new_tokens_per_answer)
        if self.frame_budget is not None:
            check_positive("frame_budget", self.frame_budget, "a positive number of seconds")
        self._check_drawing()
        self._check_repetition()
        self._check_text_budget()
        if self.media_policy is not None:
            object.__setattr__(self, "media_policy", MediaPolicy.of(self.media_policy))
        for field in fields(self):  # numbers of other kinds, such as NumPy's, become Python's
            if is_number(value := getattr(self, field.name)):
                object.__setattr__(self, field.name, int(value) if isinstance(value, Integral) else float(value))

    def _check_drawing(self) -> None:
        if self.temperature is not None:
            check_positive("temperature", self.temperature)
        if self.top_k is not None:
            expected = "an integer of 0 or more (0 for all tokens)"
            check_number("top_k", self.top_k, Integral, lambda number: number >= 0, expected)
        if self.seed is not None:
            expected = "an integer of 64 bits"
            check_number("seed", self.seed, Integral, lambda number: -(2**63) <= number < 2**64, expected)

    def _check_repetition(self) -> None:
        if self.repetition_penalty is not None:
            check_factor("repetition_penalty", self.repetition_penalty)
        check_decay("repetition_decay", self.repetition_decay)
        check_clamp("repetition_clamp", self.repetition_clamp)
        if (size := self.no_repeat_ngram_size) is not None:
            expected = "an integer of 0 or more (0 forbids no repeats)"
            check_number("no_repeat_ngram_size", size, Integral, lambda number: number >= 0, expected)
        check_lookback("no_repeat_ngram_lookback", self.no_repeat_ngram_lookback, "no_repeat_ngram_size", size or 0)
        if self.stop_bias is not None:
            check_factor("stop_bias", self.stop_bias)

    def _check_text_budget(self) -> None:
        if (sinks := self.num_sink_tokens) is not None:
            expected = "an integer of 0 or more"
            check_number("num_sink_tokens", sinks, Integral, lambda number: 0 <= number < 2**63, expected)
        if self.max_text_tokens is not None:
            check_count("max_text_tokens", self.max_text_tokens)
        self.sink_tokens(0)

    @classmethod
    def of(cls, settings: StreamSettings | None = None, **changes: Any) -> StreamSettings:
        """Settings, with other values for some fields.

        Args:
            settings: settings to start from; None for the defaults.
            **changes: values of the fields that differ.

        Raises:
            TypeError: if `settings` is something else, or there is no such field.
            ValueError: if a value can't be.
        """
        if settings is not None and not isinstance(settings, cls):
            raise TypeError(f"settings is a {type(settings).__name__}; give a StreamSettings, or its fields by name.")
        names = [field.name for field in fields(cls)]
        for name in changes:
            if name not in names:
                raise TypeError(f"{name!r} is not a setting of a stream; {unknown_value(name, names)}")
        return replace(settings or cls(), **changes)

    def sink_tokens(self, opening: int) -> int:
        """The number of first tokens that are always kept.

        Args:
            opening: number of tokens of the prompt, which `num_sink_tokens=None` stands for.

        Raises:
            ValueError: if that leaves no room within `max_text_tokens`.
        """
        sinks = opening if self.num_sink_tokens is None else self.num_sink_tokens
        if self.max_text_tokens is not None and self.max_text_tokens <= sinks:
            kept = "the prompt's tokens" if self.num_sink_tokens is None else "num_sink_tokens"
            raise ValueError(
                f"max_text_tokens={self.max_text_tokens} must be larger than the {sinks} first tokens that are always "
                f"kept ({kept}). Give a larger number, or leave it out to keep all text."
            )
        return sinks

    def repetition_control(
        self, stop_token_ids: Sequence[int] | int, *, prompt_ignore_length: int = 0
    ) -> LogitsProcessorList:
        """The logits processors that keep captions varied, in the order in which they are applied; for `generate` too.

        Args:
            stop_token_ids: tokens that end a caption; exempt from the penalty and the n-gram block.
            prompt_ignore_length: number of first tokens of `input_ids` that these two don't look at: the prompt's, in
                `generate` with every row padded to this length from the left. A stream looks at its captions alone.

        Raises:
            ValueError: if `prompt_ignore_length` isn't an integer of 0 or more.
        """
        processors = LogitsProcessorList()
        if self.repetition_penalty not in (None, 1.0):
            processors.append(
                DecayingRepetitionPenalty(
                    self.repetition_penalty,
                    self.repetition_decay,
                    self.repetition_clamp,
                    stop_token_ids,
                    prompt_ignore_length=prompt_ignore_length,
                )
            )
        if self.no_repeat_ngram_size:
            processors.append(
                RecentNoRepeatNGram(
                    self.no_repeat_ngram_size, self.no_repeat_ngram_lookback, stop_token_ids, prompt_ignore_length
                )
            )
        if self.stop_bias not in (None, 1.0):
            processors.append(StopBias(stop_token_ids, self.stop_bias))
        return processors
