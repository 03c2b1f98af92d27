# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Live captions without an end: whether a `CasaStream` is as fast, as small and as right at last as it was at first.

The captioner that ships with the repository (`examples/tiny_world`) watches one clip of 100,000 frames, in which an
object lies somewhere else in every frame and now and then is another one, and names it when it changes; its stream
keeps `--max-text-tokens` tokens of text. Everything that a user's stream does is part of it: images become patches,
tokens become events. Drawing the frames isn't measured.

By frame: latency (from the image to the end of the frame's text), bytes of the cache, memory of the process, and
whether the caption is right, silence included. Straight lines and their intervals are those of `benchmarks.forever`.
The exit code is 1 if latency or cache have a slope that is different from 0, latency may have risen by a fifth or
memory by a hundredth (upper ends of intervals), or captions become worse. The last line is JSON.

    python -m benchmarks.captions --plot docs/images/captions-cpu.svg
"""

from __future__ import annotations

import statistics
import sys
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path

from PIL import Image

from benchmarks.common import begin, legend_below, positive, report, save_figure, start, table
from benchmarks.forever import MAX_RISE, MAX_SLOWER, Line, line, resident_bytes
from casa_hf import CasaForConditionalGeneration, CasaProcessor
from examples.tiny_world import live

CLIP = 100  # frames that are drawn at a time
SLOPES = ("latency", "cache", "right")  # what is judged by its slope


@dataclass(frozen=True)
class Sizes:
    """What is watched.

    Attributes:
        frames: of the clip.
        max_text_tokens: text tokens that the stream keeps.
        blocks: number of means that a line is laid through.
    """

    frames: int = 100_000
    max_text_tokens: int = 64
    blocks: int = 50


@dataclass
class Record:
    """What is measured, by frame: milliseconds, bytes, bytes, and 1 for a right caption, else 0."""

    latency_ms: list[float]
    cache: list[float]
    memory: list[float]
    right: list[float]


def endless() -> Iterator[tuple[Image.Image, str]]:
    """Frames of test clips one after the other, and what is to be said to each."""
    before = ""
    for index in count():
        clip = live.clip(index, CLIP)
        for frame, caption in zip(clip.frames, clip.captions, strict=True):
            # A clip always begins with a caption; here its object may be the one that is shown already.
            yield frame, "" if caption == before else caption
            before = caption or before


def run(device: str, sizes: Sizes) -> Record:
    """Watch the clip."""
    model = CasaForConditionalGeneration.from_pretrained(live.CHECKPOINT).to(device).eval()
    processor = CasaProcessor.from_pretrained(live.CHECKPOINT)
    # Places that are there from the start: what is measured is the memory of the stream, not of its record.
    latency, cache, memory, right = (array("d", [1.0]) * sizes.frames for _ in range(4))
    with live.new_stream(model, processor, fps=2, max_text_tokens=sizes.max_text_tokens) as stream:
        for index, (frame, wanted) in enumerate(islice(endless(), sizes.frames)):
            *_, end = stream.push(frame)
            latency[index] = 1_000 * end.latency
            cache[index] = sum(stream.nbytes.values())
            memory[index] = resident_bytes(model.device)
            right[index] = end.text.strip() == wanted
    return Record(*map(list, (latency, cache, memory, right)))


def lines(record: Record, sizes: Sizes) -> dict[str, Line]:
    """The line of each figure, without the first hundredth of the frames, before the text reaches its limit."""
    figures = {"latency": record.latency_ms, "cache": record.cache, "memory": record.memory, "right": record.right}
    return {name: line(values[sizes.frames // 100 :], sizes.blocks, len(SLOPES)) for name, values in figures.items()}


def judgements(found: dict[str, Line], sizes: Sizes) -> dict[str, bool]:
    """What must hold, and whether it does. Memory is 0, and level, where the system doesn't tell it."""
    right = found["right"]
    return {
        **{f"{name}: slope not different from 0": found[name].flat for name in ("latency", "cache")},
        f"latency: rises by less than {MAX_SLOWER:.0%}": found["latency"].level(sizes.frames, MAX_SLOWER),
        f"memory: rises by less than {MAX_RISE:.0%}": found["memory"].level(sizes.frames, MAX_RISE),
        "captions: no worse at last": right.flat or right.slope > 0,
    }


def lines_table(found: dict[str, Line], sizes: Sizes, absolute: bool) -> str:
    """Means, and rises over the whole clip."""
    units = {"latency": ("ms", 1.0), "cache": ("kB", 1e-3), "memory": ("MB", 1e-6), "right": ("%", 100.0)}
    rows = []
    for name, own in found.items():
        unit, scale = units[name]
        mean = f"{scale * own.mean:,.1f} {unit}" if absolute or name != "latency" else "1"
        rise, low, high = own.over(sizes.frames)
        rows.append([name, mean, f"{rise:+.2%} [{low:+.2%}, {high:+.2%}]"])
    return table(["figure", "mean", f"rise over {sizes.frames:,} frames, part of the mean [95 %]"], rows)


def plot(record: Record, sizes: Sizes, absolute: bool, path: Path) -> None:
    """Latency, memory and right captions by frame."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    size = max(2, sizes.frames // (2 * sizes.blocks))
    places = [size * (index + 0.5) for index in range(sizes.frames // size)]

    def blocks(values: list[float]) -> list[list[float]]:
        return [values[size * index : size * (index + 1)] for index in range(len(places))]

    unit = 1.0 if absolute else statistics.median(record.latency_ms)
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    latency, memory, right = figure.subplots(1, 3)
    for share, name in ((50, "median"), (95, "95th percentile")):
        quantiles = [statistics.quantiles(block, n=100)[share - 1] / unit for block in blocks(record.latency_ms)]
        latency.plot(places, quantiles, label=name, linewidth=1.2)
    latency.set(title="latency", ylabel="ms" if absolute else "median = 1")
    memory.plot(places, [max(block) / 1e6 for block in blocks(record.memory)], linewidth=1.2)
    memory.set(title="memory of the process", ylabel="MB")
    right.plot(places, [100 * statistics.fmean(block) for block in blocks(record.right)], linewidth=1.2)
    right.set(title="right captions", ylabel="%", ylim=(0, 102))
    for panel in (latency, memory):
        panel.set_ylim(0, 1.25 * panel.get_ylim()[1])  # room above a line that is level
    for panel in (latency, memory, right):
        panel.set_xlabel("frame")
        panel.xaxis.set_major_locator(MaxNLocator(nbins=3))
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.grid(alpha=0.3)
    legend_below(figure)
    save_figure(figure, path)


def main() -> None:
    parser = start(__doc__)
    parser.add_argument("--frames", type=positive, help="frames of the clip (default: 100,000)")
    parser.add_argument("--max-text-tokens", type=positive, help="text tokens that the stream keeps (default: 64)")
    arguments = parser.parse_args()
    sizes = Sizes(frames=400) if arguments.tiny else Sizes()
    given = {"frames": arguments.frames, "max_text_tokens": arguments.max_text_tokens}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value})
    if sizes.frames < 2 * sizes.blocks:
        parser.error(f"--frames {sizes.frames} must be at least {2 * sizes.blocks}, for lines with intervals.")
    device = begin(parser, arguments)

    record = run(arguments.device, sizes)
    found = lines(record, sizes)
    absolute = arguments.device == "cuda"
    print(lines_table(found, sizes, absolute))
    tenth = sizes.frames // 10
    first, last = (statistics.fmean(part) for part in (record.right[:tenth], record.right[-tenth:]))
    print(f"right captions: {first:.1%} of the first tenth, {last:.1%} of the last")
    judged = judgements(found, sizes)
    print(table(["must hold", ""], [[what, "yes" if ok else "no"] for what, ok in judged.items()]))
    if arguments.plot:
        plot(record, sizes, absolute, arguments.plot)
    report(
        "captions",
        device,
        sizes,
        lines={name: asdict(own) for name, own in found.items()},
        right={"first tenth": first, "last tenth": last},
        judged=judged,
    )
    if not arguments.tiny and not all(judged.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
