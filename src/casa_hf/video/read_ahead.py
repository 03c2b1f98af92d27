# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""An iterator that runs in a thread of its own, a bounded number of items ahead of its consumer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

# A thread that waits for a silent device or network can't be interrupted; it ends by itself when that answers.
_JOIN_SECONDS = 2.0


class ReadAhead(Generic[T]):
    """Items of an iterator that is consumed by a thread, in order.

    An exception in the thread is raised where the consumer asks for the item that it stands for. `close` stops the
    thread; so does the end of the `with` block.

    Args:
        produce: function that makes the iterator; it is called in the thread, where the iterator is closed as well if
            it is a generator.
        size: largest number of items that wait.
        on_drop: function that gets the oldest item, in the thread, where more than `size` would wait. None: the thread
            waits instead.
        condition: condition that is notified of every change; None for a new one.

    Raises:
        ValueError: if `size` isn't positive.
    """

    def __init__(
        self,
        produce: Callable[[], Iterator[T]],
        size: int,
        *,
        on_drop: Callable[[T], None] | None = None,
        condition: threading.Condition | None = None,
    ):
        if size < 1:
            raise ValueError(f"size={size} must be a positive integer: the number of items that may wait.")
        self._produce, self._size, self._on_drop = produce, size, on_drop
        self._changed = condition or threading.Condition()
        self._items: deque[T] = deque()
        self._error: BaseException | None = None
        self._ended = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="casa-read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The oldest item; waits for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self.ended)
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
            raise self._take_error() or StopIteration

    def take(self, limit: int) -> list[T]:
        """The oldest items that wait, at most `limit`; doesn't wait for any."""
        with self._changed:
            items = [self._items.popleft() for _ in range(min(limit, len(self._items)))]
            self._changed.notify_all()
            error = None if items else self._take_error()
        if error is not None:
            raise error
        return items

    def clear(self) -> None:
        """Forget what waits."""
        with self._changed:
            self._items.clear()
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """Whether nothing more will come, apart from what waits."""
        return self._ended or self._stopped

    def __len__(self) -> int:
        """How many items wait."""
        return len(self._items)

    def close(self) -> None:
        """Stop the thread and forget what waits; harmless when repeated."""
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_SECONDS)

    def __enter__(self) -> ReadAhead[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _take_error(self) -> BaseException | None:
        error, self._error = self._error, None
        return error

    def _run(self) -> None:
        try:
            items = self._produce()
            try:
                for item in items:
                    if not self._put(item):
                        break
            finally:
                close = getattr(items, "close", None)
                if close is not None:
                    close()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, item: T) -> bool:
        """Add an item; whether more are wanted."""
        with self._changed:
            if self._on_drop is None:
                self._changed.wait_for(lambda: len(self._items) < self._size or self._stopped)
            elif len(self._items) >= self._size and not self._stopped:
                self._on_drop(self._items.popleft())
            if not self._stopped:
                self._items.append(item)
                self._changed.notify_all()
            return not self._stopped
