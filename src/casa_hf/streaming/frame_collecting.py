# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The collecting window: which streams wait for their frames, or for those of others, to share a forward with them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .frame_pool import PreparedFrame, wait_for_one


class FrameCollector:
    """Streams whose frames are being prepared.

    Args:
        collect_seconds: seconds for which streams whose frames are ready wait for those whose aren't.
    """

    def __init__(self, collect_seconds: float):
        self._collect_seconds = collect_seconds
        self._streams: dict[int, Sequence[PreparedFrame]] = {}
        self._own: dict[int, Sequence[PreparedFrame]] = {}
        self._first_ready: float | None = None  # when a stream that still waits was seen to be ready

    def __contains__(self, stream: int) -> bool:
        return stream in self._streams

    def add(self, stream: int, frames: Sequence[PreparedFrame], own: Sequence[PreparedFrame] = ()) -> None:
        """Let a stream wait for its frames.

        Args:
            stream: the stream.
            frames: its frames.
            own: those of them that nobody else waits for.
        """
        self._streams[stream], self._own[stream] = frames, own

    def remove(self, stream: int) -> None:
        """Let a stream wait no more. Its own frames that aren't begun yet are given up."""
        self._streams.pop(stream, None)
        for frame in self._own.pop(stream, ()):
            frame.cancel()

    def held_back(self, wait: bool) -> set[int]:
        """The streams whose frames aren't to be shown yet.

        Args:
            wait: whether there is nothing else to do than to wait until there are frames to show.
        """
        while True:
            preparing = {
                stream for stream, frames in self._streams.items() if not all(frame.done() for frame in frames)
            }
            if not preparing:
                self._first_ready = None
                return set()
            ready, now = self._streams.keys() - preparing, time.monotonic()
            if not ready:
                self._first_ready = None
            elif self._first_ready is None:
                self._first_ready = now
            left = None
            if self._first_ready is not None:
                left = self._first_ready + self._collect_seconds - now
                if left <= 0:
                    self._first_ready = None
                    return preparing
            if not wait:
                return set(self._streams)
            wait_for_one([frame for stream in preparing for frame in self._streams[stream]], left)
