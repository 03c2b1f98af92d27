# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The log between the thread of the model and the pages, without either."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from casa_hf.web.history import Entry, History

NUM_ENTRIES = 2000


def test_readers_get_every_entry_once_and_in_order() -> None:
    history = History(NUM_ENTRIES)

    def write() -> None:
        for number in range(1, NUM_ENTRIES + 1):
            history.append("count", {"number": number})
        history.close()
        history.append("count", {"number": 0})  # nobody hears what comes after the end

    async def read(after: int, slowly: bool) -> list[Entry]:
        heard = []
        async for entries in history.follow(after):
            assert entries
            heard += entries
            if slowly:
                await asyncio.sleep(0.001)
        return heard

    async def everything() -> list[list[Entry]]:
        writer = threading.Thread(target=write)
        readers = [asyncio.create_task(read(after, slowly)) for after in (0, 7) for slowly in (False, True)]
        await asyncio.sleep(0)  # all of them are waiting now
        writer.start()
        heard = await asyncio.gather(*readers)
        writer.join()
        return [*heard, await read(NUM_ENTRIES - 1, False)]

    *heard, late = asyncio.run(everything())
    expected = [Entry(number, "count", json.dumps({"number": number})) for number in range(1, NUM_ENTRIES + 1)]
    assert heard == [expected, expected, expected[7:], expected[7:]]
    assert late == expected[-1:]


def test_only_the_last_entries_are_kept() -> None:
    history = History(3)
    assert history.since(0) == []
    for number in range(1, 6):
        history.append("count", {"number": number})
    assert [entry.number for entry in history.since(0)] == [3, 4, 5]
    assert [entry.number for entry in history.since(4)] == [5]
    assert history.since(5) == history.since(99) == []
    with pytest.raises(ValueError, match="capacity=0 must be 1 or more"):
        History(0)


def test_a_reader_hears_that_nothing_happens() -> None:
    async def wait() -> list[Entry]:
        async for entries in History(1).follow(patience=0.001):
            return entries
        raise AssertionError("it has ended")

    assert asyncio.run(wait()) == []
