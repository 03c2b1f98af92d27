# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What frames cost before the model sees them: CPU time from a decoded frame, and from JPEG, to patches.

A turn makes the patches of the frames of 32 streams, as streams make them: 8-bit patches in a pool of threads
(`uint8`), and, as the rival, by the stock image processor, normalised and in float32 (`stock`), one after the other.
Both take turns in one process. The time is that of the CPU in all threads of the process, so that other programs on
the machine change it little; figures are medians over turns. "Of real time" is what 32 streams at 2 frames per second
take of two cores. Nothing is measured before both have given the same patches, within two steps of 255 (Pillow resizes
a little differently). The exit code is 1 if a bar isn't met. The last line is JSON.

    python -m benchmarks.preprocessing
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import begin, positive, random_processor, report, start, table
from casa_hf import CasaProcessor
from casa_hf.media_casa import rgb_image
from casa_hf.processing_casa import FRAME_MAX_PIXELS
from casa_hf.samples import CAT, COFFEE, ROCKET
from casa_hf.streaming.frame_pool import FramePool

STREAMS, FPS, CORES = 32, 2, 2
# Percent of real time that the uint8 path may take, by size and by what a frame is given as.
BARS = {
    ((448, 448), "decoded"): 10,
    ((448, 448), "JPEG"): 15,
    ((1280, 720), "decoded"): 25,
    ((1280, 720), "JPEG"): 60,
}
QUALITY = 90


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        streams: number of frames of a turn.
        turns: number of turns of each contender.
        max_pixels: largest number of pixels of a frame, to which it is resized.
    """

    streams: int = STREAMS
    turns: int = 9
    max_pixels: int = FRAME_MAX_PIXELS


def frames_of(size: tuple[int, int], kind: str, number: int) -> list[Any]:
    """Different frames of this size, of three photographs: arrays, or the bytes of JPEG files."""
    photographs = [Image.open(path).convert("RGB").resize(size) for path in (CAT, COFFEE, ROCKET)]
    frames: list[Any] = []
    for index in range(number):
        frame = np.roll(np.array(photographs[index % 3]), 8 * index, axis=1)
        if kind == "JPEG":
            content = io.BytesIO()
            Image.fromarray(frame).save(content, "JPEG", quality=QUALITY)
            frames.append(content.getvalue())
        else:
            frames.append(frame)
    return frames


def uint8(processor: CasaProcessor, pool: FramePool, frames: list[Any]) -> list[torch.Tensor]:
    device = torch.device("cpu")
    prepared = [pool.prepare(frame, processor.frame_pixels, device) for frame in frames]
    return [frame.pixels()["pixel_values"] for frame in prepared]


def stock(processor: CasaProcessor, pool: FramePool, frames: list[Any]) -> list[torch.Tensor]:
    size = {
        "shortest_edge": processor.image_processor.size["shortest_edge"],
        "longest_edge": processor.frame_max_pixels,
    }
    images = [rgb_image(frame) for frame in frames]
    return [processor.image_processor(images=[image], size=size, return_tensors="pt").pixel_values for image in images]


CONTENDERS: dict[str, Callable[..., list[torch.Tensor]]] = {"uint8": uint8, "stock": stock}


def largest_difference(processor: CasaProcessor, levels: torch.Tensor, normalised: torch.Tensor) -> float:
    """Steps of 255 by which 8-bit patches differ from normalised ones."""
    images = processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    values = 255 * (normalised.unflatten(1, (3, images.temporal_patch_size, -1)) * std + mean)
    return float((values - levels.unflatten(1, (3, 1, -1))).abs().max())


def measure(size: tuple[int, int], kind: str, sizes: Sizes, processor: CasaProcessor) -> dict[str, Any]:
    """CPU milliseconds per frame of each contender, and bytes of a frame's patches.

    Raises:
        RuntimeError: if they make different patches.
    """
    pool = FramePool()
    frames = frames_of(size, kind, sizes.streams)
    made = {name: contender(processor, pool, frames[:3]) for name, contender in CONTENDERS.items()}
    steps = max(largest_difference(processor, *pair) for pair in zip(*made.values(), strict=True))
    if steps > 2.01:
        raise RuntimeError(f"the patches of {size} from {kind} differ by {steps:.2f} steps of 255")
    spent: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(sizes.turns):
        for name, contender in CONTENDERS.items():
            begun = time.process_time()
            contender(processor, pool, frames)
            spent[name].append(1e3 * (time.process_time() - begun) / sizes.streams)
    return {
        "size": size,
        "from": kind,
        "ms": {name: statistics.median(values) for name, values in spent.items()},
        "bytes": {name: values[0].nbytes for name, values in made.items()},
        "steps": steps,
    }


def share_of_real_time(milliseconds: float) -> float:
    """Percent of two cores that the frames of 32 streams at 2 frames per second take."""
    return 100 * STREAMS * FPS * milliseconds / 1e3 / CORES


def main() -> None:
    parser = start(__doc__, threads=1)
    parser.add_argument("--turns", type=positive, help=f"turns of each contender (default: {Sizes().turns})")
    arguments = parser.parse_args()
    device = begin(parser, arguments)
    sizes = Sizes(streams=2, turns=1) if arguments.tiny else Sizes()
    if arguments.turns:
        sizes = Sizes(sizes.streams, arguments.turns, sizes.max_pixels)
    processor = random_processor(320, 14, sizes.max_pixels)
    results = [measure(size, kind, sizes, processor) for size, kind in BARS]
    rows, missed = [], []
    for result, bar in zip(results, BARS.values(), strict=True):
        share = share_of_real_time(result["ms"]["uint8"])
        met = share <= bar
        if not met:
            missed.append(f"{result['size']} from {result['from']}")
        rows.append(
            [
                f"{result['size'][0]} x {result['size'][1]}, {result['from']}",
                *(f"{result['ms'][name]:.2f}" for name in CONTENDERS),
                f"{share:.1f} %",
                f"{share_of_real_time(result['ms']['stock']):.0f} %",
                f"{bar} %: {'met' if met else 'missed'}",
                *(f"{result['bytes'][name] / 1e6:.2f}" for name in CONTENDERS),
            ]
        )
    header = ["frame", "uint8, CPU ms", "stock, CPU ms", "of real time", "stock", "bar", "uint8, MB", "stock, MB"]
    print(table(header, rows))
    report("preprocessing", device, sizes, frames=results, missed=missed)
    if missed and not arguments.tiny:
        sys.exit(1)


if __name__ == "__main__":
    main()
