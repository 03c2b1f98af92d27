# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Many streams at once, from JPEG to text: how much a batch gives, and whether it keeps up with cameras.

**As fast as it goes.** In a turn every stream is shown a JPEG file and says so many tokens.

| contender | |
|---|---|
| `one by one` | a `CasaStream` for each, one after the other |
| `batch` | one `CasaStreamBatch` |
| `insertion` | a batch of the source model of the same weights, in a greedy loop behind its image processor |
| `insertion-last-K` | the same; keys and values of all but the last K frames are dropped |

All do the same work, turn by turn in one process. What the batch says must be what the single streams say, or nothing
is reported. Beside the times stand the bytes that a decoding step must read.

**In real time.** Cameras give frames at their times, each at one of its own; a `CasaStreamBatch` takes the newest one
of each as soon as its stream is free, and one that gives way to a newer is dropped. Latency runs from the frame's time
to the end of its text. On a CPU the model is the captioner that ships with the repository, whose captions are known;
on a GPU it has the shapes above. It keeps up if no frame is dropped and the 95th percentile of latency is below half a
frame's time. Times on a CPU are for ratios; the last line is JSON.

    python -m benchmarks.streams
    python -m benchmarks.streams --live-only
    python -m benchmarks.streams --device cuda --attn torch_varlen --source-attn torch_varlen
"""

from __future__ import annotations

import functools
import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    begin,
    casa_model,
    choices,
    design,
    legend_below,
    let_stop,
    plot_name,
    positive,
    quantile,
    random_source,
    report,
    save_figure,
    source_config,
    start,
    table,
    timed,
)
from benchmarks.counting import language_parameters
from benchmarks.streaming import (
    PROMPT,
    SIZES,
    Camera,
    InsertionContender,
    Sizes,
    StreamRunner,
    greedy,
)
from casa_hf import CasaConfig, CasaForConditionalGeneration, CasaProcessor, CasaStreamBatch, cache_nbytes
from casa_hf.design_space import VARIANTS
from examples.tiny_world import live as captioner

FPS = 2.0
IMAGES = 4
KEPT_FRAMES = 4
CLIP = 100  # frames that are drawn at a time
PLAIN: dict[str, Any] = {"repetition_penalty": None, "no_repeat_ngram_size": None, "stop_bias": None}


# ---------------------------------------------------------------- as fast as it goes


class Singles:
    """A `CasaStream` for each camera."""

    def __init__(self, model: CasaForConditionalGeneration, camera: Camera, streams: int, **settings: Any):
        self.model = model
        self.runners = [StreamRunner(model, camera, **settings) for _ in range(streams)]
        self.contender = self.runners[0].contender

    def turn(self, frames: list[bytes]) -> list[tuple[int, ...]]:
        """Show every stream its frame; what each says."""
        return [runner.turn(frame).tokens for runner, frame in zip(self.runners, frames, strict=True)]

    def cache_bytes(self) -> int:
        return sum(runner.cache_bytes() for runner in self.runners)


class Batch:
    """A `CasaStreamBatch`."""

    def __init__(self, model: CasaForConditionalGeneration, camera: Camera, streams: int, **settings: Any):
        self.model = model
        self.contender = StreamRunner(model, camera).contender
        answer = {"max_new_tokens_per_frame": camera.sizes.answer, "prompt": PROMPT}
        self.batch = CasaStreamBatch(model, camera.processor, **{**answer, **PLAIN, **settings})
        self.streams = [self.batch.add() for _ in range(streams)]

    def turn(self, frames: list[bytes]) -> list[tuple[int, ...]]:
        said = {}
        for stream, event in self.batch.push(dict(zip(self.streams, frames, strict=True))):
            if event.kind == "error":
                raise RuntimeError(f"Stream {stream} failed: {event.message}")
            said[stream] = event.token_ids
        return [said[stream] for stream in self.streams]

    def cache_bytes(self) -> int:
        return sum(self.batch.nbytes.values())


class Inserted:
    """A batch of the source model."""

    def __init__(self, contender: InsertionContender, camera: Camera, opening: Sequence[int], streams: int):
        self.model = contender.model
        self.contender = contender
        self.camera = camera
        prompts = torch.tensor([opening] * streams, device=self.model.device)
        with torch.no_grad():
            contender.begin(prompts)
        self.tokens = prompts[:, -1:]

    @torch.no_grad()
    def turn(self, frames: list[bytes]) -> list[tuple[int, ...]]:
        pixels = torch.cat([self.camera.pixels(frame) for frame in frames]).to(self.model.device, self.model.dtype)
        logits, said = self.contender.frame(self.tokens, pixels), []
        while True:
            self.tokens = greedy(logits)
            said.append(self.tokens[:, 0].tolist())
            if len(said) == self.camera.sizes.answer:
                return list(zip(*said, strict=True))
            logits = self.contender.step(self.tokens)

    def cache_bytes(self) -> int:
        return sum(cache_nbytes(self.contender.cache).values())


def fleets(sizes: Sizes, camera: Camera, streams: int, source: Any, model: Any, **settings: Any) -> dict[str, Any]:
    """All contenders, by name."""
    single = Singles(model, camera, streams, **settings)
    opening = single.runners[0].stream.turns.opening
    sizes = replace(sizes, prompt=len(opening))
    found: dict[str, Any] = {"one by one": single, "batch": Batch(model, camera, streams, **settings)}
    for name, window in (("insertion", None), (f"insertion-last-{KEPT_FRAMES}", KEPT_FRAMES)):
        found[name] = Inserted(InsertionContender(source, sizes, window), camera, opening, streams)
    return found


def run(found: dict[str, Any], camera: Camera, streams: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every turn by contender.

    Raises:
        RuntimeError: if the batch says anything else than the single streams, in single precision.
    """
    contents = [camera.jpeg(number) for number in range(IMAGES)]
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(camera.sizes.turns):
        frames = [contents[(turn + row) % IMAGES] for row in range(streams)]
        said = {}
        for name, contender in found.items():
            said[name], taken = timed(functools.partial(contender.turn, frames), device)
            seconds[name].append(taken)
        if said["batch"] != said["one by one"] and found["batch"].model.dtype == torch.float32:
            raise RuntimeError(f"In turn {turn} the batch says other tokens than single streams; nothing is reported.")
    return seconds


def step_bytes(contender: Any, turn: int, streams: int) -> int:
    """Bytes that a decoding step of a batch must read: weights once, and every stream's cache."""
    config = contender.model.config
    if not isinstance(config, CasaConfig):
        config = design(contender.model, "insertion")
    weights = language_parameters(config) * contender.model.dtype.itemsize
    return weights + streams * (contender.predict(turn)["decode_bytes"] - weights)


def summary(
    found: dict[str, Any], seconds: dict[str, list[float]], sizes: Sizes, streams: int
) -> dict[str, dict[str, float]]:
    """The figures of every contender; the first turn warms up."""
    figures = {}
    for name, contender in found.items():
        counted = seconds[name][1:]
        batch = 1 if name == "one by one" else streams
        figures[name] = {
            "frames_per_s": streams / statistics.median(counted),
            "turn_p50_s": quantile(counted, 50),
            "turn_p95_s": quantile(counted, 95),
            "cache_bytes": contender.cache_bytes(),
            "predicted_step_bytes": step_bytes(contender.contender, sizes.turns, batch),
        }
    return figures


def results_table(figures: dict[str, dict[str, float]], absolute: bool) -> str:
    """Throughput and turns as multiples of one by one's if not absolute."""
    first = figures["one by one"]
    rate, second = (1.0, 1e-3) if absolute else (first["frames_per_s"], first["turn_p50_s"])
    rows = [
        [
            name,
            f"{own['frames_per_s'] / rate:,.2f}",
            f"{own['turn_p50_s'] / second:,.2f}, {own['turn_p95_s'] / second:,.2f}",
            f"{own['cache_bytes'] / 1e6:,.1f}",
            f"{own['predicted_step_bytes'] / 1e6:,.0f}",
        ]
        for name, own in figures.items()
    ]
    units = ("frames/s of all", "turn, ms: p50, p95")
    ratios = ("frames/s, one by one = 1", "turn, its median one by one = 1: p50, p95")
    return table(
        ["contender", *(units if absolute else ratios), "caches, MB", "MB read per step, predicted"],
        rows,
    )


# ---------------------------------------------------------------- in real time


@dataclass
class Live:
    """What cameras have seen.

    Attributes:
        streams: number of cameras.
        fps: frames per second of each.
        seconds: from the first frame's time to the end.
        cpu_seconds: that the process had of the CPUs meanwhile.
        latency: seconds from a frame's time to the end of its text, of all frames that were shown.
        frames, dropped, wrong: number of frames, of those that gave way to newer ones, and of texts that aren't the
            ones that are wanted, where these are known.
        tokens: that were said.
    """

    streams: int
    fps: float
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    latency: list[float] = field(default_factory=list)
    frames: int = 0
    dropped: int = 0
    wrong: int = 0
    tokens: int = 0

    @property
    def keeps_up(self) -> bool:
        return not self.dropped and quantile(self.latency, 95) < 0.5 / self.fps

    def figures(self) -> dict[str, Any]:
        p50, p95 = (1e3 * quantile(self.latency, percent) for percent in (50, 95))
        known = {name: value for name, value in asdict(self).items() if name != "latency"}
        return {**known, "p50_ms": p50, "p95_ms": p95, "keeps_up": self.keeps_up}

    def told(self) -> str:
        """In a sentence."""
        own = self.figures()
        return (
            f"{self.streams} cameras at {self.fps:g} frames per second for {self.seconds:.0f} s: {self.frames} "
            f"frames, {self.dropped} dropped, {self.wrong} wrong captions; latency p50 {own['p50_ms']:.0f} ms, p95 "
            f"{own['p95_ms']:.0f} ms (half a frame's time: {500 / self.fps:.0f} ms); "
            f"{self.cpu_seconds / self.seconds:.2f} CPUs used: {'keeps up' if self.keeps_up else 'does not keep up'}"
        )


Shown = tuple[bytes, str | None]  # a JPEG file, and what is to be said to it where that is known


def watch(batch: CasaStreamBatch, cameras: Sequence[Iterator[Shown]], fps: float, seconds: float) -> Live:
    """Let a batch caption cameras in real time.

    Args:
        batch: without streams.
        cameras: what each of them sees.
        fps: frames per second of each; their times are spread evenly.
        seconds: how long they run.
    """
    found = Live(len(cameras), fps)
    streams = [batch.add() for _ in cameras]
    waiting: dict[int, tuple[float, Shown]] = {}  # the newest frame of each stream that wasn't shown yet
    shown: dict[int, tuple[float, str | None]] = {}  # frames whose text isn't at its end
    # Drawn before, so that it isn't part of the time.
    taken = [[next(camera) for _ in range(round(seconds * fps))] for camera in cameras]
    due = sorted(
        ((number + row / len(cameras)) / fps, streams[row], frame)
        for row, frames in enumerate(taken)
        for number, frame in enumerate(frames)
    )
    events: Iterator[Any] = iter(())
    began, cpu, place = time.perf_counter(), time.process_time(), 0
    while place < len(due) or waiting or shown:
        now = time.perf_counter() - began
        while place < len(due) and due[place][0] <= now:
            moment, stream, frame = due[place]
            place += 1
            found.frames += 1
            found.dropped += stream in waiting
            waiting[stream] = (moment, frame)
        ready = {stream: waiting.pop(stream) for stream in list(waiting) if stream not in shown}
        if ready:
            shown |= {stream: (moment, wanted) for stream, (moment, (_, wanted)) in ready.items()}
            events = batch.push({stream: content for stream, (_, (content, _)) in ready.items()})
        if not shown:
            time.sleep(max(0.0, due[place][0] - now) if place < len(due) else 0.0)
            continue
        stream, event = next(events)
        if event.kind == "error":
            raise RuntimeError(f"Stream {stream} failed: {event.message}")
        if event.kind == "end":
            moment, wanted = shown.pop(stream)
            found.latency.append(time.perf_counter() - began - moment)
            found.wrong += wanted is not None and event.text.strip() != wanted
            found.tokens += len(event.token_ids)
    found.seconds = time.perf_counter() - began
    found.cpu_seconds = time.process_time() - cpu
    return found


def clips(stream: int) -> Iterator[Shown]:
    """What a camera of the captioner's world sees."""
    before = ""
    for index in count():
        clip = captioner.clip(1_000 * stream + index, CLIP)
        for frame, caption in zip(clip.frames, clip.captions, strict=True):
            content = io.BytesIO()
            frame.save(content, "JPEG", quality=95)
            # A clip always begins with a caption; here its object may be the one that is shown already.
            yield content.getvalue(), "" if caption == before else caption
            before = caption or before


def pictures(camera: Camera) -> Iterator[Shown]:
    """Random frames, to which a random model says something."""
    contents = [camera.jpeg(number) for number in range(IMAGES)]
    for number in count():
        yield contents[number % IMAGES], None


def watch_captioner(streams: int, fps: float, seconds: float, device: torch.device, **settings: Any) -> Live:
    """The captioner that ships, on this many clips."""
    model = CasaForConditionalGeneration.from_pretrained(captioner.CHECKPOINT).to(device).eval()
    processor = CasaProcessor.from_pretrained(captioner.CHECKPOINT)
    of_captioner = {"prompt": captioner.PROMPT, "max_new_tokens_per_frame": 6, "max_text_tokens": 64, "fps": fps}
    with CasaStreamBatch(model, processor, **{**of_captioner, **PLAIN, **settings}) as batch:
        watch(batch, [clips(-1 - stream) for stream in range(streams)], fps, min(seconds, 2.0))  # warms up
    with CasaStreamBatch(model, processor, **{**of_captioner, **PLAIN, **settings}) as batch:
        return watch(batch, [clips(stream) for stream in range(streams)], fps, seconds)


def watch_random(model: Any, camera: Camera, streams: int, fps: float, seconds: float, **settings: Any) -> Live:
    """A random model on random pictures."""
    answer = {"max_new_tokens_per_frame": camera.sizes.answer, "max_text_tokens": 1024, "prompt": PROMPT, "fps": fps}
    with CasaStreamBatch(model, camera.processor, **{**answer, **PLAIN, **settings}) as batch:
        watch(batch, [pictures(camera) for _ in range(streams)], fps, min(seconds, 2.0))  # warms up
    with CasaStreamBatch(model, camera.processor, **{**answer, **PLAIN, **settings}) as batch:
        return watch(batch, [pictures(camera) for _ in range(streams)], fps, seconds)


# ---------------------------------------------------------------- the program


def plot(seconds: dict[str, list[float]], absolute: bool, path: Path) -> None:
    """Median and longest time of a turn, for each way to serve the streams."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panel = figure.subplots()
    unit = 1e-3 if absolute else statistics.median(seconds["one by one"][1:])
    turns = {plot_name(name): [value / unit for value in own[1:]] for name, own in seconds.items()}
    places = range(len(turns))
    panel.barh(
        [place - 0.2 for place in places], [statistics.median(own) for own in turns.values()], 0.4, label="median turn"
    )
    panel.barh([place + 0.2 for place in places], [max(own) for own in turns.values()], 0.4, label="longest turn")
    panel.set_yticks(places, turns)
    panel.invert_yaxis()
    panel.set_xlabel("ms" if absolute else "turn, its median one by one = 1")
    panel.grid(alpha=0.3, axis="x")
    legend_below(figure)
    save_figure(figure, path)


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--streams", type=positive, help="as fast as it goes (default: 8, on a GPU 32)")
    parser.add_argument("--cameras", type=positive, default=32, help="in real time (default: %(default)s)")
    parser.add_argument("--seconds", type=positive, default=30, help="in real time (default: %(default)s)")
    parser.add_argument("--live-only", action="store_true", help="only what runs in real time")
    parser.add_argument("--turns", type=positive, default=12, help="turns (default: %(default)s)")
    parser.add_argument("--answer", type=positive, default=5, help="tokens per turn (default: %(default)s)")
    parser.add_argument("--variant", default="casa", help="CASA model (default: %(default)s)")
    parser.add_argument("--attn", default="sdpa", help="attn_implementation of CASA (default: %(default)s)")
    parser.add_argument("--source-attn", default="sdpa", help="and of the source (default: %(default)s)")
    arguments = parser.parse_args()
    (variant,) = choices(parser, "--variant", arguments.variant, VARIANTS)
    if arguments.turns < 2:
        parser.error(f"--turns {arguments.turns} must be at least 2: the first one warms up.")
    if arguments.live_only and arguments.plot:
        parser.error("--plot draws what --live-only leaves out.")
    device = begin(parser, arguments)

    absolute = arguments.device == "cuda"
    streams = arguments.streams or (32 if absolute else 8)
    sizes = replace(
        SIZES["tiny" if arguments.tiny else arguments.device], turns=arguments.turns, answer=arguments.answer
    )
    if absolute and not arguments.tiny:
        sizes = replace(sizes, frame=448)
    camera = Camera(sizes)

    def models() -> tuple[Any, Any]:
        dtype = torch.bfloat16 if absolute else torch.float32
        source = random_source(source_config(sizes.text, sizes.vision), device, dtype, arguments.source_attn)
        let_stop(source, camera.processor)
        model = casa_model(source, variant, arguments.attn)
        let_stop(model, camera.processor)
        return source, model

    results: dict[str, Any] = {}
    watched: Callable[..., Live] = functools.partial(watch_captioner, device=device)
    if absolute or not arguments.live_only:
        source, model = models()
        if absolute:
            watched = functools.partial(watch_random, model, camera)
    if not arguments.live_only:
        print(
            f"{streams} streams, {sizes.turns} turns of a frame of {sizes.frame_tokens} tokens and {sizes.answer} "
            f"tokens of text; {variant}"
        )
        found = fleets(sizes, camera, streams, source, model)
        seconds = run(found, camera, streams, device)
        results["figures"] = summary(found, seconds, sizes, streams)
        results["turns"] = seconds
        print(results_table(results["figures"], absolute))
        if arguments.plot:
            plot(seconds, absolute, arguments.plot)
    record = watched(arguments.cameras, FPS, arguments.seconds)
    print(record.told())
    report(
        "streams",
        device,
        sizes,
        streams={"number": streams, "variant": variant},
        attn={"casa": arguments.attn, "source": arguments.source_attn},
        live=record.figures(),
        **results,
    )


if __name__ == "__main__":
    main()
