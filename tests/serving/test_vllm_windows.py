# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What vLLM's fusion layers find in their cache, step by step, against the definition of windows.

A cache of names stands in for keys: each slot holds the name of the image token or the text token that was written
there last. What a query would attend to are the names in its run's blocks, up to where a causal mask lets it see.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from casa_hf.serving.vllm.steps import NewImage, Step, TextPlaces, WindowMemory
from casa_hf.serving.vllm.windows import FusionRules, PlacedImage, RequestWindows

DELIMITERS = frozenset({7, 8, 9})
GISTS = frozenset({9})
TEXT_BLOCK, BLOCK, NUM_BLOCKS = 4, 8, 40


@dataclass
class Request:
    """A request, and what it has been given."""

    ids: list[int]
    images: list[PlacedImage]
    windows: RequestWindows
    done: int = 0
    text_blocks: list[int] = None  # type: ignore[assignment]
    store: list[int] = None  # type: ignore[assignment]


def visible(rules: FusionRules, request: Request, token: int) -> set[str]:
    """Names of all that a text token sees in fusion layers, by the definition alone."""
    images, ids = request.images, request.ids
    before = [number for number, image in enumerate(images) if image.index <= token]
    if not before:
        return set()
    last = before[-1]
    history = rules.video_history if images[last].is_frame else rules.image_history
    first = last
    if history == "group":
        while first > 0:
            earlier = images[first - 1]
            kind = rules.video_history if earlier.is_frame else rules.image_history
            if kind != "group" or not set(ids[earlier.index : images[first].index]) <= rules.delimiters:
                break
            first -= 1
    start = images[first].index
    seen = before if history == "all" else range(first, last + 1)
    names = {f"image {number}.{place}" for number in seen for place in range(images[number].num_tokens)}
    if rules.with_text and ids[token] not in rules.gists:
        names |= {f"text {place}" for place in range(start, token + 1)}
    return names


def attended(step: Step, cache: list[str], causal: bool) -> dict[int, set[str]]:
    """Names of what each query of a step attends to."""
    starts = step.query_start_host.tolist()
    if step.queries is None:
        assert step.sees is not None
        queries, sees = list(range(starts[-1])), step.sees.tolist()
    else:
        queries, sees = step.queries.tolist(), [True] * len(step.queries)
    found: dict[int, set[str]] = {}
    for run in range(len(starts) - 1):
        number, keys = starts[run + 1] - starts[run], int(step.lengths[run])
        assert keys <= step.max_keys and number <= step.max_queries
        blocks = step.block_table[run].tolist()
        names = [cache[blocks[place // BLOCK] * BLOCK + place % BLOCK] for place in range(keys)]
        for place in range(number):
            query = starts[run] + place
            if query >= len(sees) or not sees[query]:
                continue
            seen = keys - number + 1 + place if causal else keys
            found[queries[query]] = set(names[:seen])
            assert len(found[queries[query]]) == seen, "a key lies in two slots"
    return found


RULES = {
    f"{'window' if with_text else 'image'}-{images}-{videos}{'-gists' if gists else ''}": FusionRules(
        with_text, images, videos, DELIMITERS, GISTS if gists else frozenset()
    )
    for with_text in (True, False)
    for images, videos in (("latest", "latest"), ("group", "latest"), ("group", "group"), ("all", "all"))
    for gists in (False, True)
    if not (gists and with_text and "group" in (images, videos))
}


def make_request(rules: FusionRules, chance: random.Random) -> Request:
    """A request of 10 to 60 tokens with up to six images."""
    ids: list[int] = []
    images: list[PlacedImage] = []
    while len(ids) < 10:
        for _ in range(chance.randrange(1, 7)):
            ids += [chance.randrange(6) for _ in range(chance.choice([0, 0, 1, 3, 12]))]
            if chance.random() < 0.7 and len(images) < 6:
                images.append(PlacedImage(len(ids) + 1, chance.randrange(1, 12), chance.random() < 0.5))
                ids += [7, 8, *rules.gists]
    windows = RequestWindows(images, lambda start, end: ids[start:end], rules)
    return Request(ids, images, windows, text_blocks=[], store=[])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_tokens_see_their_windows_whatever_the_steps(name: str, seed: int) -> None:
    """Several requests at once, in chunks of random sizes, with blocks that others have used before; one is preempted
    and starts again."""
    rules, chance = RULES[name], random.Random(seed)
    memory = WindowMemory(rules, 64 * TEXT_BLOCK, torch.device("cpu"))
    memory.table.random_(0, 5)  # what other requests have left
    cache = ["nothing"] * (NUM_BLOCKS * BLOCK * 3)
    free_text = chance.sample(range(64), 64)
    free = chance.sample(range(1, NUM_BLOCKS * 3), NUM_BLOCKS * 3 - 1)
    requests = [make_request(rules, chance) for _ in range(3)]
    preempted, seen_on_device, largest = False, 0, 0
    while any(request.done < len(request.ids) for request in requests):
        if not preempted and requests[0].done > 8:
            preempted, requests[0].done = True, 0
            free_text += requests[0].text_blocks
            free += requests[0].store
            requests[0].text_blocks, requests[0].store = [], []
        batch: list[tuple[Request, int]] = []
        for request in requests:
            if request.done == len(request.ids) or chance.random() < 0.2:
                continue
            end = min(request.done + chance.choice([1, 2, 5, 20]), len(request.ids))
            if rules.gists:
                end = min(request.done + chance.choice([2, 5, 20]), len(request.ids))
            end = request.windows.end_of_step(request.done, end, NUM_BLOCKS, BLOCK)
            assert end > request.done
            batch.append((request, end))
        if not batch:
            continue
        seen_on_device += _run(memory, rules, cache, batch, free_text, free)
        largest = max(largest, *(len(request.store) for request in requests))
    assert seen_on_device or rules.gists
    assert largest < NUM_BLOCKS


def _run(
    memory: WindowMemory,
    rules: FusionRules,
    cache: list[str],
    batch: list[tuple[Request, int]],
    free_text: list[int],
    free: list[int],
) -> int:
    """Run a step, and compare what its tokens see; returns how many were planned without images."""
    ids: list[int] = []
    slots: list[int] = []
    images: list[NewImage] = []
    names: list[tuple[int, int]] = []
    starts, texts = [0], []
    for number, (request, end) in enumerate(batch):
        while len(request.text_blocks) * TEXT_BLOCK < end:
            request.text_blocks.append(free_text.pop())
        while len(request.store) < request.windows.num_blocks(request.done, end, BLOCK):
            request.store.append(free.pop())
        for image_number, image in enumerate(request.images):
            if request.done <= image.index < end:
                images.append(NewImage(len(ids) + image.index - request.done, (1, image.num_tokens), image.is_frame))
                names.append((number, image_number))
        for token in range(request.done, end):
            slots.append(request.text_blocks[token // TEXT_BLOCK] * TEXT_BLOCK + token % TEXT_BLOCK)
            texts.append((number, token))
        ids += request.ids[request.done : end]
        starts.append(len(ids))
    width = max(len(request.text_blocks) for request, _ in batch)
    text = TextPlaces(
        torch.tensor([r.text_blocks + [0] * (width - len(r.text_blocks)) for r, _ in batch], dtype=torch.int32),
        torch.tensor(slots),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([end for _, end in batch], dtype=torch.int32),
        TEXT_BLOCK,
    )
    store = torch.tensor([r.store + [0] * (NUM_BLOCKS - len(r.store)) for r, _ in batch], dtype=torch.int32)
    step = memory.plan(text, store, BLOCK, torch.tensor(ids), images)
    if step.moved_from is not None:
        assert step.moved_to is not None
        moved = [cache[block * BLOCK : (block + 1) * BLOCK] for block in step.moved_from.tolist()]
        for block, content in zip(step.moved_to.tolist(), moved, strict=True):
            cache[block * BLOCK : (block + 1) * BLOCK] = content
    if images:
        assert step.image_slots is not None
        wanted = [
            (batch_number, f"image {image_number}.{place}")
            for batch_number, image_number in names
            for place in range(batch[batch_number][0].images[image_number].num_tokens)
        ]
        for slot, (batch_number, name) in zip(step.image_slots.tolist(), wanted, strict=True):
            assert slot // BLOCK in batch[batch_number][0].store
            cache[slot] = name
    if step.text_slots is not None:
        for slot, (batch_number, token) in zip(step.text_slots.tolist(), texts, strict=True):
            if slot >= 0:
                assert slot // BLOCK in batch[batch_number][0].store
                cache[slot] = f"text {token}"
    found = attended(step, cache, causal=rules.with_text)
    for place, (number, token) in enumerate(texts):
        request = batch[number][0]
        assert found.get(place, set()) == visible(rules, request, token), (number, token, request)
    for request, end in batch:
        request.done = end
    return len(texts) if not images else 0


def test_a_window_without_room_is_not_seen() -> None:
    """Blocks that the scheduler should have given aren't there: its tokens see nothing of it, and nobody else's slots
    are written to."""
    rules = replace(RULES["window-latest-latest"])
    memory = WindowMemory(rules, 64, torch.device("cpu"))
    start = torch.tensor([0, 4], dtype=torch.int32)
    text = TextPlaces(
        torch.tensor([[1]], dtype=torch.int32), torch.arange(4, 8), start, start, torch.tensor([4]), TEXT_BLOCK
    )
    step = memory.plan(
        text, torch.tensor([[3]], dtype=torch.int32), BLOCK, torch.tensor([7, 8, 1, 1]), [NewImage(1, (4, 4), False)]
    )
    assert step.image_slots is not None and step.text_slots is not None
    assert set(step.image_slots.tolist()) == {-1, *range(24, 32)}
    assert step.text_slots.tolist() == [-1] * 4


def test_steps_end_where_the_store_is_full() -> None:
    """Frames of a clip that a step could take together, were there room for them."""
    rules = RULES["window-latest-latest"]
    images = [PlacedImage(2 * number + 1, 16) for number in range(5)]
    windows = RequestWindows(images, lambda start, end: [7, 8] * 5, rules)
    assert windows.num_blocks(0, 10, BLOCK) == 15
    assert windows.end_of_step(0, 10, 6, BLOCK) == 5
    assert windows.end_of_step(5, 10, 6, BLOCK) == 9
    assert windows.end_of_step(1, 3, 2, BLOCK) == 1  # one alone has no room
    assert windows.largest(10, BLOCK) == 3
    assert windows.most_image_tokens == 16


def test_the_history_all_takes_in_one_image_per_step() -> None:
    rules = RULES["window-all-all"]
    images = [PlacedImage(2, 5), PlacedImage(4, 5), PlacedImage(9, 5)]
    windows = RequestWindows(images, lambda start, end: [1] * 12, rules)
    ends = [0]
    while ends[-1] < 12:
        ends.append(windows.end_of_step(ends[-1], 12, NUM_BLOCKS, BLOCK))
    assert ends == [0, 2, 4, 9, 12]
    assert [windows.num_keys(windows.windows[0], end) for end in (3, 5, 12)] == [5 + 1, 10 + 1, 15 + 3]


def test_places_of_keys_are_whole_numbers_of_64_bits() -> None:
    """A cache of 100 GB has more slots than 32 bits count."""
    rules = RULES["window-group-latest"]
    memory = WindowMemory(rules, 64, torch.device("cpu"))
    start = torch.tensor([0, 2], dtype=torch.int32)
    text = TextPlaces(
        torch.tensor([[1]], dtype=torch.int32), torch.arange(4, 6), start, start, torch.tensor([2]), TEXT_BLOCK
    )
    store = torch.tensor([[2**29]], dtype=torch.int32)
    step = memory.plan(text, store, BLOCK, torch.tensor([7, 8]), [NewImage(1, (1, 2), False)])
    assert step.image_slots is not None
    assert step.image_slots.tolist() == [2**29 * BLOCK, 2**29 * BLOCK + 1]
    assert np.iinfo(np.int32).max < step.image_slots[0]
