# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A stream of frames, from JPEG to text: CASA, token insertion, and the same with a bounded window, turn by turn.

The protocol is that of the authors' streaming benchmark (batch size 1): a turn is one frame and 16 greedy tokens on a
persistent cache, here as users run it. Time to the first token (TTFT) runs from the bytes of a JPEG file to the first
piece of text: decoding and resizing it, cutting it into patches, the vision tower and the language model. Decoding is
the other 15 tokens of the turn. The last of them enters the cache with the next frame.

| contender | |
|---|---|
| `insertion` | the source model: Transformers' Qwen2.5-VL with the frame's tokens in its sequence |
| `insertion-last-K` | the same; keys and values of all but the last K frames are dropped from its cache |
| a variant's name | a `CasaStream` of the CASA model that `from_pretrained` makes of the same weights |

There is no stream of the source, so that runs in a greedy loop over `forward` behind its image processor; its
positions are given, and nobody pays for `generate` or controls repetition. All run in one process, each turn of one
after the same turn of the other. Nothing is measured before the source's stream has given the logits of one call on
the whole conversation, and each `CasaStream` the tokens that such a call finds likeliest. Beside the times stand the
bytes that decoding a token must read and the FLOPs of a frame. Times on a CPU are for ratios; the last line is JSON.

    python -m benchmarks.streaming
    python -m benchmarks.streaming --device cuda --attn torch_varlen --source-attn torch_varlen
    python -m benchmarks.streaming --device cuda --attn torch_varlen --compile
"""

from __future__ import annotations

import functools
import gc
import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import Cache, DynamicCache, Qwen2_5_VLForConditionalGeneration, StaticCache

from benchmarks.common import (
    END,
    GATES,
    IMAGE_PAD,
    LARGE_TEXT,
    LARGE_VISION,
    SMALL_TEXT,
    SMALL_VISION,
    START,
    TINY_TEXT,
    TINY_VISION,
    WORDS,
    allocated_bytes,
    begin,
    casa_model,
    choices,
    design,
    gate,
    jpeg,
    legend_below,
    let_stop,
    numbers,
    peak_bytes,
    plot_name,
    positive,
    quantile,
    random_processor,
    random_source,
    report,
    running_median,
    save_figure,
    source_config,
    start,
    table,
    timed,
    weight_bytes,
    with_peak,
)
from benchmarks.counting import head_flops, image_flops, step_bytes, text_flops, tower_flops
from casa_hf import CasaConfig, CasaForConditionalGeneration, CasaProcessor, CasaStream, cache_nbytes
from casa_hf.design_space import VARIANTS
from casa_hf.streaming import StreamSettings
from casa_hf.streaming.turns import StreamTurns
from casa_hf.transformers_versions import CACHE

# A static cache of the source starts with room for a sixteenth of the turns and is made four times as long when full.
STATIC_START, STATIC_GROWTH = 16, 4
PROMPT = "Describe what happens in the video as it happens. Say only what can be seen."
PROFILED_TURNS = 2  # on a CPU, after those that are timed, for the memory


@dataclass(frozen=True)
class Sizes:
    """The model and the stream that are measured.

    Attributes:
        text, vision: fields of the configurations.
        frame: height and width of a frame in pixels.
        turns: of the stream.
        prompt: text tokens before the first frame.
        answer: tokens decoded per turn.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    frame: int
    turns: int
    prompt: int = 45
    answer: int = 16

    @property
    def patches(self) -> int:
        """Height and width of a frame in patches."""
        return self.frame // self.vision["patch_size"]

    @property
    def side(self) -> int:
        """Height and width of a frame in tokens."""
        return self.patches // 2

    @property
    def frame_tokens(self) -> int:
        return self.side**2

    @property
    def turn_text(self) -> int:
        """Text tokens of a turn: the two delimiters and the answer."""
        return 2 + self.answer


SIZES = {
    "cpu": Sizes(SMALL_TEXT, SMALL_VISION, frame=448, turns=64),
    "cuda": Sizes(LARGE_TEXT, LARGE_VISION, frame=896, turns=256),
    "tiny": Sizes(TINY_TEXT, TINY_VISION, frame=32, turns=10, prompt=5, answer=4),
}


class Camera:
    """Frames as JPEG files, and the processor that takes them.

    Attributes:
        grid: (1, 3) patches of a frame.
    """

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        patch_size = sizes.vision["patch_size"]
        self.processor: CasaProcessor = random_processor(sizes.text["vocab_size"], patch_size, sizes.frame**2)
        self.grid = torch.tensor([[1, sizes.patches, sizes.patches]])

    def jpeg(self, turn: int) -> bytes:
        """The frame of a turn."""
        return jpeg(self.sizes.frame, turn)

    def pixels(self, content: bytes) -> Tensor:
        """What models take: (patches, patch dim), by the source's own image processor."""
        with Image.open(io.BytesIO(content)) as image:
            return self.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]


class Contender(Protocol):
    """A model on a stream, or on several in step: one per row of the (streams, tokens) ids.

    Logits (streams, 1, vocabulary) are those after the last token.
    """

    model: Any
    cache: Cache

    def begin(self, prompt: Tensor) -> None:
        """Start a new stream with the prompt, all but its last token, in the cache."""

    def frame(self, token: Tensor, pixels: Tensor) -> Tensor:
        """The last token that isn't in the cache yet, and a frame; several streams' pixels one after the other."""

    def step(self, token: Tensor) -> Tensor:
        """One more token."""

    def at_once(self, calls: list[Tensor], pixels: list[Tensor]) -> Tensor:
        """The last logits of a conversation in a single forward without a cache.

        Args:
            calls: text tokens by turn: the prompt without its last token, then for each turn that begins with a
                frame the token before it and, after the delimiters, the tokens that were decoded.
            pixels: of the frames.
        """

    def kv_tokens(self) -> int:
        """Tokens in the sequence that the cache holds."""

    def predict(self, turn: int) -> dict[str, int]:
        """Bytes that decoding the last token of a turn must read, and FLOPs of the turn's first token."""


def greedy(logits: Tensor) -> Tensor:
    """The likeliest word; neither delimiters nor placeholders, which a stream has only around its frames."""
    return logits[:, -1:, WORDS:].argmax(-1) + WORDS


class CasaContender:
    """A CASA model called directly: the frame isn't in its sequence."""

    def __init__(self, model: CasaForConditionalGeneration, sizes: Sizes):
        self.model = model
        self.sizes = sizes
        self.grid = torch.tensor([[1, sizes.patches, sizes.patches]])
        self.delimiters = torch.tensor([[START, END]], device=model.device)

    def begin(self, prompt: Tensor) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self._forward(input_ids=prompt[:, :-1])

    def frame(self, token: Tensor, pixels: Tensor) -> Tensor:
        streams = len(token)
        return self._forward(
            input_ids=torch.cat([token, self.delimiters.expand(streams, -1)], dim=1),
            pixel_values=pixels,
            image_grid_thw=self.grid.expand(streams, -1),
            image_positions=torch.tensor([[row, 2] for row in range(streams)]),  # before the third token
        )

    def step(self, token: Tensor) -> Tensor:
        return self._forward(input_ids=token)

    def at_once(self, calls: list[Tensor], pixels: list[Tensor], keep: int = 1) -> Tensor:
        parts, places, length = [calls[0]], [], calls[0].shape[1]
        for call in calls[1:]:
            parts += [call[:, :1], self.delimiters, call[:, 1:]]
            places.append([0, length + 2])
            length += call.shape[1] + 2
        outputs = self.model(
            input_ids=torch.cat(parts, dim=1),
            pixel_values=torch.cat(pixels),
            image_grid_thw=self.grid.expand(len(pixels), -1),
            image_positions=torch.tensor(places),
            use_cache=False,
            logits_to_keep=keep,
        )
        return outputs.logits

    def kv_tokens(self) -> int:
        return int(self.cache.get_seq_length())

    def predict(self, turn: int) -> dict[str, int]:
        sizes, config, images = self.sizes, self.model.config, self.sizes.frame_tokens
        text = sizes.prompt + turn * sizes.turn_text - 1
        seen = images * turn if config.casa_image_history == "all" else images
        before = text - (sizes.answer - 1)
        flops = 3 * text_flops(config, before, 1, seen) + image_flops(config, images, before, seen)
        return {
            "decode_bytes": step_bytes(config, self.model.dtype.itemsize, text, sizes.answer, seen),
            "frame_flops": flops
            + head_flops(config)
            + tower_flops(config.vision_config, sizes.patches, sizes.patches),
        }

    def _forward(self, **inputs: Any) -> Tensor:
        return self.model(**inputs, cache=self.cache, use_cache=True, logits_to_keep=1).logits


class InsertionContender:
    """The source model, with all frames in its sequence or the last ones only.

    Args:
        model: the stock model.
        sizes: of the stream.
        window: frames whose keys and values are kept, the newest included; None for all.
        compiled: whether decoding is compiled, on a static cache; not with a window.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        sizes: Sizes,
        window: int | None = None,
        compiled: bool = False,
    ):
        self.model = model
        self.sizes = sizes
        self.window = window
        self.compiled = compiled and window is None
        self.grid = torch.tensor([[1, sizes.patches, sizes.patches]], device=model.device)
        pads = [IMAGE_PAD] * sizes.frame_tokens
        self.inserted = torch.tensor([[START, *pads, END]], device=model.device)
        rows, columns = torch.meshgrid(torch.arange(sizes.side), torch.arange(sizes.side), indexing="ij")
        image = 2 + torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1)
        text = [torch.full((3, 1), position) for position in (0, 1, 2 + sizes.side)]
        # (3, 1, tokens) rotary positions of a turn's first call, relative to its first token.
        self.offsets = torch.cat([text[0], text[1], image, text[2]], dim=1)[:, None].to(model.device)
        self._step: Callable = model.forward
        if self.compiled:
            self._step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def begin(self, prompt: Tensor) -> None:
        length = prompt.shape[1] - 1
        self.length = 0  # tokens in the cache
        self.frames: list[int] = []  # where the cache has the first token of each frame
        self.position = 0
        self.cache: Cache = DynamicCache(config=self.model.config)
        if self.compiled:
            turns = max(1, self.sizes.turns // STATIC_START)
            self.cache = self._static(length + turns * (self.sizes.frame_tokens + self.sizes.turn_text))
        positions = torch.arange(length, device=self.model.device).expand(3, len(prompt), -1)
        self._forward(self.model.forward, length, input_ids=prompt[:, :-1], position_ids=positions)

    def frame(self, token: Tensor, pixels: Tensor) -> Tensor:
        if self.window is not None and len(self.frames) == self.window:
            self._evict()
        new = self.sizes.frame_tokens + 3
        if self.compiled and self.length + new + self.sizes.answer > self.cache.get_max_length():
            self._grow()
        self.frames.append(self.length + 2)
        return self._forward(
            self.model.forward,
            3 + self.sizes.side,
            input_ids=torch.cat([token, self.inserted.expand(len(token), -1)], dim=1),
            pixel_values=pixels,
            image_grid_thw=self.grid.expand(len(token), -1),
            position_ids=(self.offsets + self.position).expand(-1, len(token), -1),
        )

    def step(self, token: Tensor) -> Tensor:
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        positions = torch.full((3, len(token), 1), self.position, device=self.model.device)
        return self._forward(self._step, 1, input_ids=token, position_ids=positions)

    def at_once(self, calls: list[Tensor], pixels: list[Tensor]) -> Tensor:
        parts, turns = [calls[0]], [torch.zeros(calls[0].shape[1])]
        for turn, call in enumerate(calls[1:], start=1):
            part = [call[:, :1], self.inserted, call[:, 1:]]
            parts += part
            turns.append(torch.full((sum(piece.shape[1] for piece in part),), turn))
        ids, turn_of = torch.cat(parts, dim=1), torch.cat(turns).to(self.model.device)
        positions, _ = self.model.model.get_rope_index(
            ids,
            image_grid_thw=self.grid.expand(len(pixels), -1),
            mm_token_type_ids=(ids == IMAGE_PAD).int(),
        )
        visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=self.model.device).tril()
        if self.window is not None:
            dropped = turn_of[None, :] <= turn_of[:, None] - self.window
            visible &= ~(dropped & (ids == IMAGE_PAD))
        mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=self.model.device)
        mask = mask.masked_fill(~visible, torch.finfo(self.model.dtype).min)
        backend = self.model.config._attn_implementation
        self.model.set_attn_implementation("sdpa")  # takes any mask
        try:
            outputs = self.model(
                input_ids=ids,
                attention_mask=mask[None, None],
                position_ids=positions,
                pixel_values=torch.cat(pixels),
                image_grid_thw=self.grid.expand(len(pixels), -1),
                use_cache=False,
                logits_to_keep=1,
            )
        finally:
            self.model.set_attn_implementation(backend)
        return outputs.logits

    def fill(self, turns: int) -> None:
        """Let the cache of one stream be as long as after so many turns, with random keys and values."""
        sizes = self.sizes
        self.length += turns * (sizes.frame_tokens + sizes.turn_text)
        self.position += turns * (sizes.turn_text + sizes.side)
        for layer in self.cache.layers:
            shape = (*layer.keys.shape[:2], self.length, layer.keys.shape[-1])
            layer.keys, layer.values = (
                torch.randn(shape, dtype=layer.keys.dtype, device=layer.keys.device) for _ in range(2)
            )

    def kv_tokens(self) -> int:
        return self.length

    def predict(self, turn: int) -> dict[str, int]:
        sizes, config = self.sizes, design(self.model, "insertion")
        text = sizes.prompt + turn * sizes.turn_text - 1
        seen = sizes.frame_tokens * (turn if self.window is None else min(turn, self.window))
        before = text - (sizes.answer - 1)
        flops = 3 * text_flops(config, before, 0, seen) + image_flops(config, sizes.frame_tokens, before, seen)
        return {
            "decode_bytes": step_bytes(config, self.model.dtype.itemsize, text, 0, seen),
            "frame_flops": flops
            + head_flops(config)
            + tower_flops(config.vision_config, sizes.patches, sizes.patches),
        }

    def _forward(self, forward: Callable, advance: int, **inputs: Any) -> Tensor:
        logits = forward(**{**inputs, CACHE: self.cache}, use_cache=True, logits_to_keep=1).logits
        self.length += inputs["input_ids"].shape[1]
        self.position += advance
        return logits

    def _evict(self) -> None:
        """Drop the oldest frame's keys and values; those of the text stay."""
        first, count = self.frames.pop(0), self.sizes.frame_tokens
        for layer in self.cache.layers:
            layer.keys, layer.values = (
                torch.cat([kept[:, :, :first], kept[:, :, first + count :]], dim=2)
                for kept in (layer.keys, layer.values)
            )
        self.frames = [frame - count for frame in self.frames]
        self.length -= count

    def _static(self, length: int) -> StaticCache:
        return StaticCache(config=self.model.config.get_text_config(), max_cache_len=length)

    def _grow(self) -> None:
        """A longer static cache with the same content."""
        old = self.cache
        self.cache = self._static(STATIC_GROWTH * self.cache.get_max_length())
        for index, layer in enumerate(old.layers):
            self.cache.update(layer.keys[:, :, : self.length], layer.values[:, :, : self.length], index)


# ---------------------------------------------------------------- from JPEG to text


@dataclass(frozen=True)
class Turn:
    """What a turn took and said: milliseconds to its first token, and per further one."""

    ttft_ms: float
    decode_ms: float
    tokens: tuple[int, ...]


class Runner(Protocol):
    """A stream as a user runs it.

    Attributes:
        contender: what is called; for a `CasaStream`, what predicts its costs.
    """

    contender: Any

    def begin(self) -> None:
        """Start a new stream."""

    def turn(self, content: bytes) -> Turn:
        """Show it a JPEG file and take all of its text."""

    def cache_bytes(self) -> int:
        """Bytes of keys and values."""

    def held_bytes(self) -> int:
        """Bytes of the memory that they stand in."""

    def kv_tokens(self) -> int:
        """Tokens in the sequence that the cache holds."""


class StreamRunner:
    """A `CasaStream`.

    Args:
        model: CASA model.
        camera: gives the frames.
        prompt: of the stream.
        settings: further ones.
    """

    def __init__(self, model: CasaForConditionalGeneration, camera: Camera, prompt: str = PROMPT, **settings: Any):
        off = {"repetition_penalty": None, "no_repeat_ngram_size": None, "stop_bias": None}
        self.settings = {"max_new_tokens_per_frame": camera.sizes.answer, "prompt": prompt, **off, **settings}
        self.camera = camera
        self.model = model
        self.begin()
        opening = len(self.stream.turns.opening)
        self.contender = CasaContender(model, replace(camera.sizes, prompt=opening))

    def begin(self) -> None:
        self.stream = CasaStream(self.model, self.camera.processor, **self.settings)

    def turn(self, content: bytes) -> Turn:
        started = time.perf_counter()
        events = [(1e3 * (time.perf_counter() - started), event) for event in self.stream.push(content)]
        (first_ms, first), (last_ms, last) = events[0], events[-1]
        if (first.kind, last.kind) != ("text", "end"):
            raise RuntimeError(f"The stream has no text: {last.message or last.token_ids}")
        return Turn(first_ms, (last_ms - first_ms) / max(1, len(last.token_ids) - 1), last.token_ids)

    def cache_bytes(self) -> int:
        return sum(self.stream.nbytes.values())

    def held_bytes(self) -> int:
        return self.cache_bytes()

    def kv_tokens(self) -> int:
        return self.stream.num_text_tokens


class LoopRunner:
    """The source model in a greedy loop behind its image processor.

    Args:
        contender: the model and its cache.
        camera: gives the frames.
        opening: ids before the first frame.
        answer: tokens of a turn; None for the camera's.
    """

    def __init__(
        self, contender: InsertionContender, camera: Camera, opening: Sequence[int], answer: int | None = None
    ):
        self.contender = contender
        self.camera = camera
        self.answer = camera.sizes.answer if answer is None else answer
        self.opening = torch.tensor([opening], device=contender.model.device)
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        self.contender.begin(self.opening)
        self.token = self.opening[:, -1:]

    @torch.no_grad()
    def turn(self, content: bytes) -> Turn:
        model, answer = self.contender.model, self.answer
        started = time.perf_counter()
        pixels = self.camera.pixels(content).to(model.device, model.dtype)
        logits, tokens, times = self.contender.frame(self.token, pixels), [], []
        while True:
            self.token = greedy(logits)
            tokens.append(int(self.token))  # text is what is read
            times.append(1e3 * (time.perf_counter() - started))
            if len(tokens) == answer:
                return Turn(times[0], (times[-1] - times[0]) / max(1, answer - 1), tuple(tokens))
            logits = self.contender.step(self.token)

    def cache_bytes(self) -> int:
        return sum(cache_nbytes(self.contender.cache).values())

    def held_bytes(self) -> int:
        return allocated_bytes(self.contender.cache)

    def kv_tokens(self) -> int:
        return self.contender.kv_tokens()


# ---------------------------------------------------------------- measured


@dataclass
class Record:
    """What is measured of one contender, by turn.

    Attributes:
        ttft, decode: milliseconds to a turn's first token, and per further token.
        peak: bytes: weights, cache, and the most that was allocated beside them. On a CPU one figure, of a turn
            after those that are timed.
        cache, kv_tokens: bytes of the cache, and text tokens that it holds, after the last turn.
    """

    ttft: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    cache: int = 0
    kv_tokens: int = 0


def contenders(
    sizes: Sizes,
    variants: list[str],
    windows: list[int],
    device: torch.device,
    attention: str,
    source_attention: str,
    compiled: bool = False,
    processor: CasaProcessor | None = None,
) -> dict[str, Contender]:
    """The source model of random weights, with and without windows, and CASA models of the same weights.

    With a processor, all of them have its stop token and never choose it.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = random_source(source_config(sizes.text, sizes.vision), device, dtype, source_attention)
    if processor is not None:
        let_stop(source, processor)
    found: dict[str, Contender] = {"insertion": InsertionContender(source, sizes, compiled=compiled)}
    for window in windows:
        found[f"insertion-last-{window}"] = InsertionContender(source, sizes, window)
    for name in variants:
        model = casa_model(source, name, attention)
        model.config.casa_static_image_tokens = sizes.frame_tokens
        if processor is not None:
            let_stop(model, processor)
        found[name] = CasaContender(model, sizes)
    return found


def runners(models: dict[str, Contender], camera: Camera, **settings: Any) -> dict[str, Runner]:
    """Streams of these models.

    Args:
        models: by name.
        camera: gives the frames.
        **settings: of `CasaStream`.
    """
    streams = {
        name: StreamRunner(contender.model, camera, **settings)
        for name, contender in models.items()
        if isinstance(contender, CasaContender)
    }
    settings_of_streams = StreamSettings(prompt=PROMPT)
    opening = StreamTurns(camera.processor, settings_of_streams).opening
    loops = {
        name: LoopRunner(contender, camera, opening)
        for name, contender in models.items()
        if isinstance(contender, InsertionContender)
    }
    return {name: (streams | loops)[name] for name in models}


@torch.no_grad()
def check(models: dict[str, Contender], sizes: Sizes, camera: Camera, turns: int) -> dict[str, float]:
    """Compare each contender's stream of random words with one forward on the whole conversation.

    Returns:
        By contender, the largest difference of the last logits divided by the largest of them.

    Raises:
        RuntimeError: if one is larger than its dtype explains.
    """
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for name, contender in models.items():
        device, dtype = contender.model.device, contender.model.dtype
        lengths = [sizes.prompt, *[sizes.answer] * turns]
        words = [torch.randint(WORDS, sizes.text["vocab_size"], (1, n), generator=generator) for n in lengths]
        words = [word.to(device) for word in words]
        pixels = [camera.pixels(camera.jpeg(turn)).to(device, dtype) for turn in range(turns)]
        contender.begin(words[0])
        token, calls = words[0][:, -1:], [words[0][:, :-1]]
        for frame, answer in zip(pixels, words[1:], strict=True):
            calls.append(torch.cat([token, answer[:, :-1]], dim=1))
            logits = contender.frame(token, frame)
            for index in range(sizes.answer - 1):
                logits = contender.step(answer[:, index : index + 1])
            token = answer[:, -1:]
        expected = contender.at_once(calls, pixels)
        errors[name] = gate(f"{name}, {turns} turns against one call,", logits, expected, dtype)
    return errors


@torch.no_grad()
def check_stream(name: str, runner: StreamRunner, turns: int) -> float:
    """Whether a stream's tokens are those that one forward on the whole conversation finds likeliest.

    Returns:
        By how much the logit of one of them is below the largest, at most, divided by the largest of all.

    Raises:
        RuntimeError: if that is more than rounding in its dtype explains.
    """
    runner.begin()
    model, camera, opening = runner.model, runner.camera, runner.stream.turns.opening
    frames = [camera.jpeg(turn) for turn in range(turns)]
    said = [runner.turn(frame).tokens for frame in frames]
    before, calls = opening[-1], [torch.tensor([opening[:-1]], device=model.device)]
    for tokens in said:
        calls.append(torch.tensor([[before, *tokens[:-1]]], device=model.device))
        before = tokens[-1]
    shown = [camera.pixels(frame).to(model.device, model.dtype) for frame in frames]
    logits = runner.contender.at_once(calls, shown, keep=0)[0].float()
    places = [len(opening) + turn * camera.sizes.turn_text + 1 for turn in range(turns)]  # of the second delimiter
    chosen = torch.tensor(said, device=model.device)
    rows = torch.stack([logits[place : place + camera.sizes.answer] for place in places])
    behind = rows.max(-1).values - rows.gather(-1, chosen[..., None])[..., 0]
    error = float(behind.max() / logits.abs().max())
    if not error <= GATES[model.dtype]:
        raise RuntimeError(
            f"{name}, {turns} turns: a token of the stream is {error:.1e} of the largest logit below the likeliest of "
            f"one call (bar {GATES[model.dtype]}); nothing is measured."
        )
    return error


def run_turn(contender: Contender, token: Tensor, pixels: Tensor, answer: int) -> tuple[Tensor, float, float]:
    """One turn: the last of its tokens, milliseconds to the first of them, and per further one."""
    device = pixels.device
    token, first = timed(lambda: greedy(contender.frame(token, pixels)), device)

    def decode() -> Tensor:
        last = token
        for _ in range(answer - 1):
            last = greedy(contender.step(last))
        return last

    last, rest = timed(decode, device)
    return last, 1e3 * first, 1e3 * rest / (answer - 1)


def stream(models: dict[str, Runner], sizes: Sizes, camera: Camera) -> tuple[dict[str, Record], list[float]]:
    """Run the stream.

    Returns:
        What was measured of each contender, and the milliseconds that the source's image processor took.
    """
    records = {name: Record() for name in models}
    names, preprocessing = list(models), []
    for runner in models.values():
        gc.collect()
        runner.begin()

    def held(name: str) -> int:
        return weight_bytes(models[name].contender.model) + models[name].held_bytes()

    device = models[names[0]].contender.model.device
    for turn in range(sizes.turns):
        frame = camera.jpeg(turn)
        preprocessing.append(1e3 * timed(functools.partial(camera.pixels, frame), torch.device("cpu"))[1])
        shift = turn % len(names)  # nobody is always the first
        for name in names[shift:] + names[:shift]:
            record, before = records[name], held(name)
            run = functools.partial(models[name].turn, frame)
            if device.type == "cuda":
                taken, above = with_peak(run, device)
                record.peak.append(before + above)
            else:
                taken = run()
            record.ttft.append(taken.ttft_ms)
            record.decode.append(taken.decode_ms)
        if (turn + 1) % max(1, sizes.turns // 8) == 0:
            print(f"turn {turn + 1} of {sizes.turns}", flush=True)
    for name, record in records.items():
        record.cache = models[name].cache_bytes()
        record.kv_tokens = models[name].kv_tokens()
        if device.type != "cuda":
            # The last one counts: what it frees was allocated before the profiler's eyes.
            profiled: Callable[[], Any] = functools.partial(models[name].turn, frame)
            parts = {str(number): profiled for number in range(PROFILED_TURNS)}
            record.peak.append(held(name) + peak_bytes(parts)[str(PROFILED_TURNS - 1)])
    return records, preprocessing


@torch.no_grad()
def tower_ms(models: dict[str, Contender], camera: Camera) -> dict[str, float]:
    """Milliseconds of each contender's vision tower for one frame, the median of 3."""
    pixels = camera.pixels(camera.jpeg(0))
    found = {}
    for name, contender in models.items():
        model = contender.model
        run = functools.partial(
            model.get_image_features, pixels.to(model.device, model.dtype), camera.grid.to(model.device)
        )
        found[name] = 1e3 * statistics.median(timed(run, model.device)[1] for _ in range(3))
    return found


# ---------------------------------------------------------------- judged


def tenths(values: list[float]) -> tuple[float, float]:
    """Medians of the first and of the last 10 % of turns."""
    count = max(1, len(values) // 10)
    return statistics.median(values[:count]), statistics.median(values[-count:])


def speedups(rival: list[float], own: list[float]) -> tuple[float, float]:
    """How many times faster than a rival, in the first and last 10 % of turns: medians of the ratios turn by turn, in
    which both met the machine in the same mood."""
    return tenths([theirs / mine for theirs, mine in zip(rival, own, strict=True)])


def summary(models: dict[str, Contender], records: dict[str, Record], turns: int) -> dict[str, dict[str, Any]]:
    """The figures of each contender."""
    found = {}
    for name, record in records.items():
        (first_ttft, last_ttft), (first_decode, last_decode) = tenths(record.ttft), tenths(record.decode)
        found[name] = {
            "ttft_ms": [first_ttft, last_ttft],
            "decode_ms": [first_decode, last_decode],
            "ttft_p50_p95_ms": [quantile(record.ttft, percent) for percent in (50, 95)],
            "decode_p50_p95_ms": [quantile(record.decode, percent) for percent in (50, 95)],
            "ttft_speedup": list(speedups(records["insertion"].ttft, record.ttft)),
            "decode_speedup": list(speedups(records["insertion"].decode, record.decode)),
            "kv_tokens": record.kv_tokens,
            "cache_bytes": record.cache,
            "weight_bytes": weight_bytes(models[name].model),
            "peak_bytes": max(record.peak),
            "predicted": [models[name].predict(1), models[name].predict(turns)],
        }
    return found


@dataclass(frozen=True)
class Bar:
    """What a contender must reach.

    Attributes:
        contender: its name.
        what: the figure in words, with its unit.
        measured: the figure.
        bar: the limit.
        at_least: whether the figure must be at least the bar, or at most.
    """

    contender: str
    what: str
    measured: float
    bar: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.measured >= self.bar if self.at_least else self.measured <= self.bar


def bars(models: dict[str, Contender], figures: dict[str, dict[str, Any]], device: str) -> list[Bar]:
    """The bars for variants in which a frame only becomes keys and values."""
    found = []
    for name, own in figures.items():
        config = models[name].model.config
        if not isinstance(config, CasaConfig) or config.casa_image_updates != "none":
            continue
        shared = config.casa_share_projections
        drift = {key: own[key][1] / own[key][0] for key in ("ttft_ms", "decode_ms")}
        first = 1 / own["decode_speedup"][0]
        if device == "cuda":
            found += [
                Bar(name, "decoding, last 10 %, tokens/s", 1e3 / own["decode_ms"][1], 200, True),
                Bar(name, "TTFT, last 10 %, ms", own["ttft_ms"][1], 35, False),
                Bar(name, "TTFT, last / first 10 %", drift["ttft_ms"], 1.03, False),
                Bar(name, "decoding time, last / first 10 %", drift["decode_ms"], 1.03, False),
                Bar(name, "peak memory, GiB", own["peak_bytes"] / 2**30, 8.1, False),
                Bar(name, "decoding time / insertion's, first 10 %", first, 1.15, False),
            ]
            continue
        faster = own["decode_speedup"][1]
        found += [
            Bar(name, "TTFT, times faster than insertion, last 10 %", own["ttft_speedup"][1], 7.5, True),
            Bar(name, "decoding, times faster, last 10 %", faster, 2.3 if shared else 2.0, True),
            Bar(name, "decoding time / insertion's, first 10 %", first, 1.1 if shared else 1.25, False),
            Bar(name, "TTFT, last / first 10 %", drift["ttft_ms"], 1.15, False),
            Bar(name, "decoding time, last / first 10 %", drift["decode_ms"], 1.15, False),
        ]
    return found


def _quantiles(records: dict[str, Record]) -> str:
    return "; ".join(
        f"{name} TTFT {quantile(r.ttft, 50):.1f} and {quantile(r.ttft, 95):.1f}, per token "
        f"{quantile(r.decode, 50):.2f} and {quantile(r.decode, 95):.2f}"
        for name, r in records.items()
    )


def _shares(tower: dict[str, float], figures: dict[str, dict[str, Any]]) -> list[str]:
    return [f"{name} {spent / figures[name]['ttft_ms'][1]:.0%}" for name, spent in tower.items()]


def figures_table(figures: dict[str, dict[str, Any]], absolute: bool) -> str:
    """Figures of the first and last 10 % of turns; times as multiples of insertion's first 10 % if not absolute."""
    unit = {key: 1.0 if absolute else figures["insertion"][key][0] for key in ("ttft_ms", "decode_ms")}
    rows = []
    for name, own in figures.items():
        first, last = own["predicted"]
        rows.append(
            [
                f"`{name}`",
                " -> ".join(f"{value / unit['ttft_ms']:.2f}" for value in own["ttft_ms"]),
                " -> ".join(f"{value / unit['decode_ms']:.2f}" for value in own["decode_ms"]),
                f"{own['kv_tokens']:,}",
                f"{own['cache_bytes'] / 1e6:,.1f}",
                f"{own['peak_bytes'] / 2**30:.2f}",
                f"{first['frame_flops'] / 1e9:,.1f} -> {last['frame_flops'] / 1e9:,.1f}",
                f"{first['decode_bytes'] / 1e6:,.0f} -> {last['decode_bytes'] / 1e6:,.0f}",
            ]
        )
    suffix = " ms" if absolute else " (insertion's first = 1)"
    return table(
        [
            "contender",
            "TTFT," + suffix,
            "decoding per token," + suffix,
            "KV tokens",
            "cache, MB",
            "peak memory, GiB",
            "GFLOP per frame, predicted",
            "MB read per token, predicted",
        ],
        rows,
    )


def bars_table(found: list[Bar]) -> str:
    """Bars and what was measured."""
    rows = [
        [
            f"`{bar.contender}`",
            bar.what,
            f"{'>=' if bar.at_least else '<='} {bar.bar:g}",
            f"{bar.measured:.2f}",
            "met" if bar.met else "not met",
        ]
        for bar in found
    ]
    return table(["contender", "figure", "bar", "measured", ""], rows)


def plot(records: dict[str, Record], absolute: bool, path: Path) -> None:
    """TTFT and decoding time by turn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for panel, key, title in zip(axes, ("ttft", "decode"), ("time to first token", "time per token"), strict=True):
        unit = 1.0 if absolute else tenths(getattr(records["insertion"], key))[0]
        for name, record in records.items():
            values = running_median([value / unit for value in getattr(record, key)])
            panel.plot(range(1, len(values) + 1), values, label=plot_name(name), linewidth=1.2)
        panel.set(title=f"{title} (median of 5 turns)", xlabel="turn", ylim=(0, None))
        panel.set_ylabel("ms" if absolute else "the source's first turns = 1")
        panel.grid(alpha=0.3)
    legend_below(figure)
    save_figure(figure, path)


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--turns", type=positive, help="turns of the stream (default: 64, on a GPU 256)")
    parser.add_argument(
        "--variants", default="casa,ca,casa-shared,ca-shared", help="CASA contenders (default: %(default)s)"
    )
    parser.add_argument(
        "--windows", default="4", help="frames that bounded insertion keeps, by commas (default: %(default)s)"
    )
    parser.add_argument("--attn", default="sdpa", help="attn_implementation of CASA (default: %(default)s)")
    parser.add_argument("--source-attn", default="sdpa", help="and of the source (default: %(default)s)")
    parser.add_argument(
        "--compile", action="store_true", help="compiled decoding on static caches, of streams and of insertion"
    )
    arguments = parser.parse_args()
    variants = choices(parser, "--variants", arguments.variants, VARIANTS)
    windows = numbers(parser, "--windows", arguments.windows)
    sizes = SIZES["tiny" if arguments.tiny else arguments.device]
    full_size = not arguments.tiny and arguments.turns in (None, sizes.turns)
    if arguments.turns:
        sizes = replace(sizes, turns=arguments.turns)
    device = begin(parser, arguments)

    camera = Camera(sizes)
    opening = StreamTurns(camera.processor, StreamSettings(prompt=PROMPT)).opening
    sizes = replace(sizes, prompt=len(opening))
    models = contenders(
        sizes, variants, windows, device, arguments.attn, arguments.source_attn, arguments.compile, camera.processor
    )
    parameters = sum(parameter.numel() for parameter in models["insertion"].model.parameters())
    print(
        f"source: {parameters / 1e6:,.1f} million parameters; {sizes.turns} turns of a {sizes.frame} x {sizes.frame} "
        f"frame ({sizes.frame_tokens} tokens) and {sizes.answer} tokens"
    )
    streams = runners(models, camera, compile=arguments.compile)
    turns = min(sizes.turns, max([2, *(window + 1 for window in windows)]))  # the last of them evicts a frame
    loops: dict[str, Contender] = {n: model for n, model in models.items() if isinstance(model, InsertionContender)}
    errors = check(loops, sizes, camera, turns)
    errors |= {
        name: check_stream(name, runner, turns) for name, runner in streams.items() if isinstance(runner, StreamRunner)
    }
    print("stream = one call, largest difference: " + ", ".join(f"{name} {e:.1e}" for name, e in errors.items()))
    records, preprocessing = stream(streams, sizes, camera)
    tower = tower_ms(models, camera)
    figures = summary(models, records, sizes.turns)
    absolute = arguments.device == "cuda"
    print(figures_table(figures, absolute))
    print(
        f"of TTFT, from JPEG to patches by the source's image processor: {statistics.median(preprocessing):.1f} ms; "
        f"p50 and p95 over all turns, ms: {_quantiles(records)}"
    )
    print("part of TTFT that is the vision tower's: " + ", ".join(_shares(tower, figures)))
    judged = bars(models, figures, arguments.device) if full_size else []
    if judged:
        print(bars_table(judged))
    if arguments.plot:
        plot(records, absolute, arguments.plot)
    report(
        "streaming",
        device,
        sizes,
        source_parameters=parameters,
        attn={"casa": arguments.attn, "source": arguments.source_attn, "compile": arguments.compile},
        difference=errors,
        preprocessing_ms=statistics.median(preprocessing),
        tower_ms=tower,
        figures=figures,
        turns={name: {"ttft_ms": record.ttft, "decode_ms": record.decode} for name, record in records.items()},
        bars=[asdict(bar) | {"met": bar.met} for bar in judged],
    )


if __name__ == "__main__":
    main()
