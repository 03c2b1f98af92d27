# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What happened lately, for readers that come and go.

The thread of the model appends; every page follows at its own speed, from where it likes. Nobody waits for a reader,
and a reader that is too slow misses entries rather than making them pile up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One thing that happened.

    Attributes:
        number: 1 for the first entry, one more for each that follows.
        name: kind of the entry.
        data: the rest, as JSON.
    """

    number: int
    name: str
    data: str


class History:
    """The last entries of a log that may be appended to from any thread.

    Args:
        capacity: entries to keep; earlier ones are forgotten.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be 1 or more: the number of entries that a history holds.")
        self._entries: deque[Entry] = deque(maxlen=capacity)
        self._lock = threading.Lock()
        self._readers: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self._last = 0
        self._closed = False

    def append(self, name: str, data: dict[str, Any]) -> None:
        """Add an entry and wake the readers; nothing happens once the history is closed."""
        text = json.dumps(data)
        with self._lock:
            if self._closed:
                return
            self._last += 1
            self._entries.append(Entry(self._last, name, text))
        self._wake()

    def close(self) -> None:
        """End the log: readers get what they haven't read yet, then their iteration ends."""
        with self._lock:
            self._closed = True
        self._wake()

    def since(self, number: int) -> list[Entry]:
        """The entries that are kept of those after this number, in order."""
        with self._lock:
            count = min(self._last - number, len(self._entries))
            return [self._entries[-back] for back in range(count, 0, -1)]

    async def follow(self, after: int = 0, patience: float | None = None) -> AsyncIterator[list[Entry]]:
        """What follows an entry, now and as it happens.

        Args:
            after: number of the last entry that is known; 0 for none.
            patience: seconds without an entry after which an empty list is given; None never gives one.

        Yields:
            Entries in order. Where entries were forgotten before they were read, the numbers have a gap.
        """
        wake = asyncio.Event()
        with self._lock:
            self._readers[wake] = asyncio.get_running_loop()
        try:
            while True:
                wake.clear()
                closed = self._closed  # read first: what is appended before closing is still given
                if entries := self.since(after):
                    after = entries[-1].number
                    yield entries
                elif closed:
                    return
                else:
                    try:
                        await asyncio.wait_for(wake.wait(), patience)
                    except TimeoutError:
                        yield []
        finally:
            with self._lock:
                del self._readers[wake]

    def _wake(self) -> None:
        with self._lock:
            readers = list(self._readers.items())
        for wake, loop in readers:
            with contextlib.suppress(RuntimeError):  # a loop that was closed with its reader
                loop.call_soon_threadsafe(wake.set)
