# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Two hours of live captions of a generated camera that does everything a camera can do wrong.

    python -m benchmarks.soak                 # two hours
    python -m benchmarks.soak --seconds 60    # a try

The camera gives 20 frames per second in real time, to a small model of random weights or the checkpoint named by
--model. At random times frames are missing, come in bursts, are corrupt, or have another size; now and then the stream
is forked, and the fork used and closed; or it is saved, closed, and a new one goes on from what was saved.

Progress goes to standard error. The last line on standard output is a verdict as JSON, and the exit code is 1 unless
it is good: no exception, and every frame that the camera gave accounted for by an event.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from casa_hf import CasaForConditionalGeneration, CasaProcessor, CasaStream, convert_checkpoint
from casa_hf.streaming import LiveCaptions
from casa_hf.video import FrameIterator
from examples.tiny_source import build_tiny_source

SIZES = ((64, 48), (48, 64), (112, 84), (65, 49))
# Chances per frame.
MISSING, BURST, CORRUPT, RESIZE, FORK, RESTORE = 0.02, 0.005, 0.01, 0.005, 0.01, 0.01
SAMPLE_SECONDS = 1.0
REPORT_SECONDS = 60.0


class Camera:
    """Frames in real time, with accidents; counts what it has given."""

    def __init__(self, seconds: float, fps: float, seed: int):
        self.seconds, self.fps = seconds, fps
        self.given: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._noise = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        begin = time.monotonic()
        size, burst = SIZES[0], 0
        for index in range(int(self.seconds * self.fps)):
            if self._random.random() < MISSING:
                self.given["missing"] += 1
                continue
            if self._random.random() < RESIZE:
                size = self._random.choice(SIZES)
                self.given["resized"] += 1
            if not burst and self._random.random() < BURST:
                burst = self._random.randint(5, 20)
                self.given["bursts"] += 1
            if burst:  # held back, and then all at once
                burst -= 1
            else:
                time.sleep(max(0.0, begin + index / self.fps - time.monotonic()))
            corrupt = self._random.random() < CORRUPT
            self.given["corrupt"] += corrupt
            self.given["frames"] += 1
            yield index / self.fps, np.full((2, 2), np.nan) if corrupt else self._picture(index, size)

    def _picture(self, index: int, size: tuple[int, int]) -> np.ndarray:
        width, height = size
        image = self._noise.integers(0, 64, (height, width, 3), np.uint8)
        image[:, : index % width] += 128
        return image


class Soak:
    """A run: the camera, the streams one after the other, and what was seen of them."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.model = CasaForConditionalGeneration.from_pretrained(folder, dtype="auto").to(arguments.device).eval()
        self.processor = CasaProcessor.from_pretrained(folder)
        self.settings: dict[str, Any] = {
            "fps": arguments.fps,
            "frame_budget": 1 / arguments.fps,
            "max_new_tokens_per_frame": arguments.max_new_tokens,
            "text_window": arguments.text_window,
            "do_sample": True,
            "seed": arguments.seed,
        }
        self.camera = Camera(arguments.seconds, arguments.fps, arguments.seed)
        self.late = arguments.late
        self.random = random.Random(arguments.seed + 1)
        self.events: Counter[str] = Counter()
        self.samples: list[tuple[float, int, int]] = []
        self.exceptions: list[str] = []

    def run(self) -> dict[str, Any]:
        begin = time.monotonic()
        stream = CasaStream(self.model, self.processor, **self.settings)
        source = FrameIterator(self.camera, live=True, name="camera")
        captions = LiveCaptions(stream, source, late=self.late)
        sampled = reported = begin
        try:
            for event in captions:
                self.events[event.kind] += 1
                now = time.monotonic()
                if now - sampled >= SAMPLE_SECONDS:
                    sampled = now
                    self.samples.append((now - begin, resident_bytes(), sum(captions.stream.nbytes.values())))
                if now - reported >= REPORT_SECONDS:
                    reported = now
                    print(f"{now - begin:.0f} s: {dict(self.events)}", file=sys.stderr)
                if event.kind == "end":
                    self._disturb(captions)
        except Exception as error:
            self.exceptions.append(f"{type(error).__name__}: {error}")
        captions.stream.close()
        return self._verdict(time.monotonic() - begin)

    def _disturb(self, captions: LiveCaptions) -> None:
        """Now and then fork the stream, or go on with one that was saved and restored."""
        stream = captions.stream
        if self.random.random() < FORK:
            with stream.fork() as aside:
                self.events["fork"] += 1
                answer = [event.kind for event in aside.ask("What is it?", max_new_tokens=4)]
                if answer[-1] != "end":
                    self.exceptions.append(f"a fork answered {answer}")
        if self.random.random() < RESTORE:
            saved = io.BytesIO()
            torch.save(stream.state_dict(), saved)
            stream.close()
            saved.seek(0)
            captions.stream = CasaStream(self.model, self.processor, **self.settings)
            captions.stream.load_state_dict(torch.load(saved, weights_only=True))
            self.events["restore"] += 1

    def _verdict(self, seconds: float) -> dict[str, Any]:
        accounted = sum(self.events[kind] for kind in ("end", "dropped", "merged", "error"))
        threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
        # The first quarter is warm-up: allocators and caches fill.
        steady = np.array(self.samples[len(self.samples) // 4 :], float).reshape(-1, 3)
        given = self.camera.given
        return {
            "seconds": round(seconds, 1),
            "camera": dict(given),
            "events": dict(self.events),
            "resident_bytes_per_hour": slope(steady[:, 0], steady[:, 1]),
            "cache_bytes_per_hour": slope(steady[:, 0], steady[:, 2]),
            "cache_bytes": int(steady[-1, 2]) if len(steady) else None,
            "threads_left": threads,
            "exceptions": self.exceptions,
            "ok": not self.exceptions and not threads and accounted == given["frames"] > 0,
        }


def resident_bytes() -> int:
    """Memory of this process; 0 where the system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def slope(seconds: np.ndarray, values: np.ndarray) -> dict[str, float] | None:
    """Least-squares slope per hour and its standard error, as if samples were independent; None for too few."""
    if len(seconds) < 3 or np.ptp(seconds) == 0:
        return None
    hours = (seconds - seconds.mean()) / 3600
    rate = float(hours @ (values - values.mean()) / (hours @ hours))
    residual = values - values.mean() - rate * hours
    error = float(np.sqrt(residual @ residual / (len(hours) - 2) / (hours @ hours)))
    return {"slope": round(rate, 1), "standard_error": round(error, 1)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, prog="soak", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=7200.0)
    parser.add_argument("--fps", type=float, default=20.0, help="of the camera and of the stream")
    parser.add_argument("--late", choices=("drop", "merge"), default="drop")
    parser.add_argument("--text-window", type=int, default=512, help="text tokens that the stream remembers")
    parser.add_argument("--max-new-tokens", type=int, default=4, help="per frame")
    parser.add_argument("--model", type=Path, help="folder of a CASA checkpoint; a small random one unless given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as made:
        folder = options.model
        if folder is None:
            source = build_tiny_source(Path(made) / "source")
            folder = convert_checkpoint(source, Path(made) / "casa").output
        return Soak(options, folder).run()


if __name__ == "__main__":
    verdict = main()
    print(json.dumps(verdict))
    sys.exit(not verdict["ok"])
