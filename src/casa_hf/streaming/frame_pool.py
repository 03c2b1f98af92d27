# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Pixels of frames, made by a pool of threads while the model works: decoded, resized, cut into patches, pinned."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch

from ..transfers import pinned

_MAX_WORKERS = 8


class PreparedFrame:
    """A frame whose pixels are being made; a stream's `push` takes it in the place of the frame.

    Args:
        future: what gives its `pixel_values` and `image_grid_thw`.
    """

    def __init__(self, future: Future[dict[str, torch.Tensor]]):
        self._future = future

    def done(self) -> bool:
        """Whether its pixels are there, or can't be made."""
        return self._future.done()

    def cancel(self) -> None:
        """Don't make its pixels, if that hasn't begun: the frame won't be shown."""
        self._future.cancel()

    def pixels(self) -> dict[str, torch.Tensor]:
        """Its `pixel_values` and `image_grid_thw`, which are waited for; or what was raised instead."""
        return self._future.result()


class FramePool:
    """A pool of threads for the frames of streams. They end when the pool is freed or closed."""

    def __init__(self) -> None:
        workers = min(_MAX_WORKERS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="casa-frames")

    def prepare(
        self, frame: Any, pixels: Callable[[Any], dict[str, torch.Tensor]], device: torch.device
    ) -> PreparedFrame:
        """Begin to make the pixels of a frame.

        Args:
            frame: frame as `push` takes it; one that is being prepared already stays as it is.
            pixels: function from a frame to its `pixel_values` and `image_grid_thw`.
            device: device that they will be copied to.
        """
        if isinstance(frame, PreparedFrame):
            return frame
        return PreparedFrame(self._threads.submit(partial(_pinned_pixels, frame, pixels, device)))

    def close(self) -> None:
        """Prepare no more: what hasn't begun is given up, and what has isn't waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def wait_for_one(frames: Iterable[PreparedFrame], seconds: float | None = None) -> None:
    """Wait until one more of these frames is ready, or can't be made; so many seconds at most."""
    wait([frame._future for frame in frames if not frame.done()], seconds, FIRST_COMPLETED)


def _pinned_pixels(
    frame: Any, pixels: Callable[[Any], dict[str, torch.Tensor]], device: torch.device
) -> dict[str, torch.Tensor]:
    made = pixels(frame)
    return {**made, "pixel_values": pinned(made["pixel_values"], device)}
