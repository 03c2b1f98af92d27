# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Two hours of live captions of a generated camera that does everything a camera can do wrong.

    python -m benchmarks.soak                 # two hours
    python -m benchmarks.soak --seconds 60    # a try

The camera gives 20 frames per second in real time, to a small model of random weights or the checkpoint named by
--model. At random times frames are missing, come in bursts, are corrupt (a JPEG that is cut off, opened but not
decoded, or as a file; an array that is no image), or have another size; now and then the stream is forked, and the
fork used and closed; or it is saved, closed, and a new one continues from what was saved.

Progress goes to standard error. The last line on standard output is a verdict as JSON, and the exit code is 1 unless
all its checks hold: no exception, no thread left, every frame that the camera gave accounted for by an event, the
corrupt ones and no others reported as errors, every restored stream continuing with the tokens of the saved one, and
the cache within the limit of its text. Of ten minutes or more also: every accident has happened, every kind of corrupt
frame is among the errors, and the memory of the process doesn't grow by more than 64 MiB per hour.
"""

from __future__ import annotations

import argparse
import io
import json
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
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import process_bytes
from casa_hf import (
    CaptionEvent,
    CasaForConditionalGeneration,
    CasaProcessor,
    CasaStream,
    StreamSettings,
    convert_checkpoint,
)
from casa_hf.streaming import LiveCaptions
from casa_hf.video import FrameIterator
from examples.tiny_source import build_tiny_source

SIZES = ((64, 48), (48, 64), (112, 84), (65, 49))
# Chances per frame.
MISSING, BURST, CORRUPT, RESIZE, FORK, RESTORE = 0.02, 0.005, 0.01, 0.005, 0.01, 0.01
SAMPLE_SECONDS = 1.0
REPORT_SECONDS = 60.0
# Shorter runs don't show whether memory grows, nor every accident.
LONG_SECONDS = 600.0
# An image that stays behind with every frame makes ten times as much, a cache with every restored stream five times.
MAX_GROWTH = 64 * 2**20
ACCIDENTS = ("missing", "bursts", "corrupt", "resized", "fork", "restore")
CORRUPT_KINDS = ("truncated image", "truncated file", "no image")

# Threads that have been told to end may take a moment.
_SECONDS_TO_END = 5.0


class Camera:
    """Frames in real time, with accidents.

    Args:
        folder: for the file of a frame that is given by path.

    Attributes:
        given: counts of what it has given.
    """

    def __init__(self, seconds: float, fps: float, seed: int, trouble: float, folder: Path):
        self.seconds, self.fps, self.trouble = seconds, fps, trouble
        self.given: Counter[str] = Counter()
        self._corrupt: dict[int, str] = {}
        self._random = random.Random(seed)
        self._noise = np.random.default_rng(seed)
        self._first = 0
        self._file = folder / "truncated.jpg"
        self._file.write_bytes(self._truncated(0, SIZES[0]))

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        begin = time.monotonic()
        size = SIZES[0]
        held_until = 0
        for index in range(int(self.seconds * self.fps)):
            if self._happens(MISSING):
                self.given["missing"] += 1
                continue
            if self._happens(RESIZE):
                size = self._random.choice(SIZES)
                self.given["resized"] += 1
            if index > held_until and self._happens(BURST):
                held_until = index + self._random.randint(5, 20)
                self.given["bursts"] += 1
            # The frames of a burst are held back until the last of them is there, and then come all at once.
            time.sleep(max(0.0, begin + max(index, held_until) / self.fps - time.monotonic()))
            if not self.given["frames"]:
                self._first = index
            self.given["frames"] += 1
            corrupt = self._happens(CORRUPT)
            self.given["corrupt"] += corrupt
            if corrupt:
                kind = self._corrupt[index] = self._random.choice(CORRUPT_KINDS)
                yield index / self.fps, self.corrupt_frame(kind, index, size)
            else:
                yield index / self.fps, self._image(index, size)

    def corrupt_frame(self, kind: str, index: int, size: tuple[int, int]) -> Any:
        """A frame that can't be used, of one of `CORRUPT_KINDS`."""
        if kind == "truncated image":
            return Image.open(io.BytesIO(self._truncated(index, size)))  # decoded by whoever looks at its pixels
        return self._file if kind == "truncated file" else np.full((2, 2), np.nan)

    def _truncated(self, index: int, size: tuple[int, int]) -> bytes:
        """The first half of a JPEG: its header is whole."""
        whole = io.BytesIO()
        Image.fromarray(self._image(index, size)).save(whole, "jpeg")
        return whole.getvalue()[: whole.tell() // 2]

    def corrupt_at(self, seconds: float) -> str:
        """The kind of corrupt frame that is given so many seconds after the first frame; nothing for a good one."""
        return self._corrupt.get(self._first + round(seconds * self.fps), "")

    def _happens(self, chance: float) -> bool:
        return self._random.random() < chance * self.trouble

    def _image(self, index: int, size: tuple[int, int]) -> np.ndarray:
        width, height = size
        image = self._noise.integers(0, 64, (height, width, 3), np.uint8)
        image[:, : index % width] += 128
        return image


class Soak:
    """A run: the camera, the streams one after the other, and what was seen of them.

    Args:
        arguments: of the command line.
        folder: of the checkpoint.
        made: for files of the run.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path, made: Path):
        self.model = CasaForConditionalGeneration.from_pretrained(folder, dtype="auto").to(arguments.device).eval()
        self.processor = CasaProcessor.from_pretrained(folder)
        self.max_text_tokens = arguments.max_text_tokens
        self.settings = StreamSettings(
            fps=arguments.fps,
            frame_budget=1 / arguments.fps,
            max_new_tokens_per_frame=arguments.max_new_tokens,
            max_text_tokens=arguments.max_text_tokens,
            do_sample=True,
            seed=arguments.seed,
        )
        self.camera = Camera(arguments.seconds, arguments.fps, arguments.seed, arguments.trouble, made)
        self.trouble = arguments.trouble
        self.late = arguments.late
        self.random = random.Random(arguments.seed + 1)
        self.threads_before = threading.enumerate()
        self.events: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.misjudged: list[str] = []
        self.samples: list[tuple[float, int, int]] = []
        self.exceptions: list[str] = []
        self.num_restored_alike = 0
        self.most_text_tokens = 0

    def run(self) -> dict[str, Any]:
        begin = time.monotonic()
        stream = CasaStream(self.model, self.processor, self.settings)
        source = FrameIterator(self.camera, live=True, name="camera")
        captions = LiveCaptions(stream, source, late=self.late)
        # A stream evicts before a forward, which then adds the last token and the frames of a turn.
        self.text_limit = self.max_text_tokens + 1 + captions.max_waiting * len(stream.turns.image([1e5])[0])
        sampled = reported = begin
        try:
            for event in captions:
                self.events[event.kind] += event.count  # of frames, not of reports
                self._judge(event)
                now = time.monotonic()
                if now - sampled >= SAMPLE_SECONDS:
                    sampled = now
                    self.samples.append((now - begin, process_bytes(), sum(captions.stream.nbytes.values())))
                if now - reported >= REPORT_SECONDS:
                    reported = now
                    print(f"{now - begin:.0f} s: {dict(self.events)}", file=sys.stderr)
                if event.kind == "end":
                    self.most_text_tokens = max(self.most_text_tokens, captions.stream.num_text_tokens)
                    self._disturb(captions)
        except Exception as error:
            self.exceptions.append(f"{type(error).__name__}: {error}")
        captions.stream.close()
        return self._verdict(time.monotonic() - begin)

    def _judge(self, event: CaptionEvent) -> None:
        """Whether it is the corrupt frames that are errors, by kind, and they alone."""
        if event.kind not in ("end", "merged", "error"):
            return
        kind = self.camera.corrupt_at(event.start)
        if (event.kind == "error") != bool(kind):
            self.misjudged.append(f"{kind or 'good'} frame at {event.start:.3f} s: {event.kind} {event.message}")
        elif kind:
            self.errors[kind] += 1

    def _disturb(self, captions: LiveCaptions) -> None:
        """Now and then fork the stream, or continue with one that was saved and restored."""
        stream = captions.stream
        if self.random.random() < FORK * self.trouble:
            with stream.fork() as aside:
                self.events["fork"] += 1
                self._answer(aside)
        if self.random.random() < RESTORE * self.trouble:
            saved = io.BytesIO()
            torch.save(stream.state_dict(), saved)
            with stream.fork() as aside:
                expected = self._answer(aside)
            stream.close()
            saved.seek(0)
            captions.stream = CasaStream(self.model, self.processor, self.settings)
            captions.stream.load_state_dict(torch.load(saved, weights_only=True))
            self.events["restore"] += 1
            with captions.stream.fork() as aside:
                self.num_restored_alike += self._answer(aside) == expected

    def _answer(self, stream: CasaStream) -> tuple[int, ...]:
        """The tokens of an answer."""
        *_, end = stream.ask("What is it?", max_new_tokens=4)
        if end.kind != "answered" or not end.token_ids:
            self.exceptions.append(f"a fork answered with {end}")
        return end.token_ids

    def _verdict(self, seconds: float) -> dict[str, Any]:
        accounted = sum(self.events[kind] for kind in ("end", "dropped", "merged", "error"))
        others = [thread for thread in threading.enumerate() if thread not in self.threads_before]
        for thread in others:
            thread.join(_SECONDS_TO_END / len(others))
        threads = [thread.name for thread in others if thread.is_alive()]
        # The first quarter is warm-up: allocators and caches fill.
        steady = np.array(self.samples[len(self.samples) // 4 :], float).reshape(-1, 3)
        given = self.camera.given
        seen = given + self.events
        checks = {
            "no_exception": not self.exceptions,
            "no_thread_left": not threads,
            "every_frame_accounted_for": accounted == given["frames"] > 0,
            "corrupt_frames_and_no_others_are_errors": not self.misjudged,
            "restored_streams_go_on_alike": self.num_restored_alike == self.events["restore"],
            "cache_within_max_text_tokens": self.most_text_tokens <= self.text_limit,
        }
        if seconds >= LONG_SECONDS:
            checks["every_accident_seen"] = all((seen + self.errors)[name] for name in (*ACCIDENTS, *CORRUPT_KINDS))
            checks["memory_level"] = is_level(steady[:, 0], steady[:, 1])
        return {
            "seconds": round(seconds, 1),
            "camera": dict(given),
            "events": dict(self.events),
            "errors": dict(self.errors),
            "resident_bytes_per_hour": slope(steady[:, 0], steady[:, 1]),
            "cache_bytes_per_hour": slope(steady[:, 0], steady[:, 2]),
            "cache_bytes": int(steady[-1, 2]) if len(steady) else None,
            "text_tokens_at_most": self.most_text_tokens,
            "threads_left": threads,
            "exceptions": self.exceptions,
            "misjudged": self.misjudged[:10],
            "checks": checks,
            "ok": all(checks.values()),
        }


def slope(seconds: np.ndarray, values: np.ndarray) -> dict[str, float] | None:
    """Least-squares slope per hour and its standard error, as if samples were independent; None for too few."""
    if len(seconds) < 3 or np.ptp(seconds) == 0:
        return None
    hours = (seconds - seconds.mean()) / 3600
    rate = float(hours @ (values - values.mean()) / (hours @ hours))
    residual = values - values.mean() - rate * hours
    error = float(np.sqrt(residual @ residual / (len(hours) - 2) / (hours @ hours)))
    return {"slope": round(rate, 1), "standard_error": round(error, 1)}


def is_level(seconds: np.ndarray, values: np.ndarray) -> bool:
    """Whether the slope, two standard errors included, is at most `MAX_GROWTH` per hour."""
    found = slope(seconds, values)
    return found is not None and found["slope"] + 2 * found["standard_error"] <= MAX_GROWTH


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, prog="soak", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=7200.0)
    parser.add_argument("--fps", type=float, default=20.0, help="of the camera and of the stream")
    parser.add_argument("--trouble", type=float, default=1.0, help="factor on the chances of all accidents")
    parser.add_argument("--late", choices=("drop", "merge"), default="drop")
    parser.add_argument("--max-text-tokens", type=int, default=512, help="text tokens that the stream remembers")
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
        return Soak(options, folder, Path(made)).run()


if __name__ == "__main__":
    verdict = main()
    print(json.dumps(verdict))
    sys.exit(not verdict["ok"])
