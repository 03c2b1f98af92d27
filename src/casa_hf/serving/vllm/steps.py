# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where the tokens of a step find the keys of their windows, and where they put their own.

What a token sees follows from the token before it, so it is remembered where that one's own keys lie: at the slot of
the text's cache. Requests are never named, and whatever vLLM does with them (prefix caching, chunks, preemption,
streaming sessions) needs nothing here. Steps without images, decoding above all, are planned on the device by a fixed
number of operations; a step with images is planned on the host, by window, after one copy of what it needs to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from .windows import FusionRules

# Columns of what is remembered of a token.
_KEYS, _IMAGES, _CLOSED = range(3)


@dataclass(frozen=True)
class TextPlaces:
    """The text of a step in the cache of self-attention; `num_requests` may include padding.

    Attributes:
        block_table: (num_requests, blocks) blocks of each request.
        slots: (num_tokens,) slot of each token; -1 for padding.
        query_start: (num_requests + 1,) first token of each request.
        query_start_host: the same on the CPU.
        lengths: (num_requests,) number of text tokens of each request, the new ones included.
        block_size: tokens in a block.
    """

    block_table: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    query_start_host: torch.Tensor
    lengths: torch.Tensor
    block_size: int


class NewImage(NamedTuple):
    """An image of a step.

    Attributes:
        token: token that it precedes, by its place in the step.
        grid: height and width in tokens.
        is_frame: whether it is a video frame.
    """

    token: int
    grid: tuple[int, int]
    is_frame: bool

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Step:
    """What fusion layers do in a step.

    Attributes:
        block_table: (sequences, blocks) blocks of the keys of each run of tokens with the same images.
        query_start: (sequences + 1,) first query of each run.
        query_start_host: the same on the CPU.
        lengths: (sequences,) number of keys of each run, up to its last token.
        max_queries, max_keys: largest numbers of queries and keys of a run; the latter may be larger.
        queries: (num_queries,) tokens that attend to anything, in order; None if `sees` tells.
        sees: (num_tokens,) whether a token attends to anything; None if `queries` does.
        text_slots: (num_tokens,) slot of each token's own keys, -1 for none; None if fusion layers have no text keys.
        image_slots: (num_image_tokens,) slots of new image tokens.
        moved_from, moved_to: (num_blocks,) blocks that are moved before anything is written.
    """

    block_table: torch.Tensor
    query_start: torch.Tensor
    query_start_host: torch.Tensor
    lengths: torch.Tensor
    max_queries: int
    max_keys: int
    queries: torch.Tensor | None
    sees: torch.Tensor | None
    text_slots: torch.Tensor | None
    image_slots: torch.Tensor | None = None
    moved_from: torch.Tensor | None = None
    moved_to: torch.Tensor | None = None


@dataclass
class _Region:
    """The keys of a window in a store, while a step is planned.

    Attributes:
        keys: number of keys so far.
        images: number of image tokens among them.
        kept: number of keys that were there before the step.
        used: whether a token of the step is in the window.
        runs: (first token, past the last token, keys before the first) of runs of text.
        new: (image of the step, first key) of new images.
    """

    keys: int = 0
    images: int = 0
    kept: int = 0
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    new: list[tuple[int, int]] = field(default_factory=list)


class WindowMemory:
    """What is remembered of every token in the cache of self-attention, and the plans that are made of it.

    Args:
        rules: rules of the model.
        num_slots: number of slots of that cache.
        device: device of the model.
    """

    def __init__(self, rules: FusionRules, num_slots: int, device: torch.device):
        self.rules = rules
        self.num_slots = num_slots
        # A last row that nothing reads takes what padding would write.
        self.table = torch.zeros(num_slots + 1, 3, dtype=torch.int32, device=device)
        self._delimiters = torch.tensor(sorted(rules.delimiters), device=device)

    def plan(
        self,
        text: TextPlaces,
        store: torch.Tensor,
        block_size: int,
        input_ids: torch.Tensor,
        images: Sequence[NewImage],
    ) -> Step:
        """Plan a step, and remember what its tokens see.

        Args:
            text: places of the text.
            store: (num_requests, blocks) blocks of each request for fusion layers.
            block_size: tokens in a block of these.
            input_ids: (num_tokens,) ids.
            images: images of the step, in the order of their tokens.
        """
        before = self._before(text)
        if images:
            return self._plan_on_host(text, store, block_size, input_ids, images, before)
        return self._plan_on_device(text, store, block_size, input_ids, before)

    def _before(self, text: TextPlaces) -> torch.Tensor:
        """(num_requests, 3) what is remembered of the token before those of the step."""
        number = text.query_start[1:] - text.query_start[:-1]
        start = (text.lengths - number).long()
        place = (start - 1).clamp(min=0)
        block = text.block_table.gather(1, (place // text.block_size)[:, None])[:, 0].long()
        slot = (block * text.block_size + place % text.block_size).clamp(0, self.num_slots)
        return self.table[slot] * (start > 0)[:, None]

    def _plan_on_device(
        self, text: TextPlaces, store: torch.Tensor, block_size: int, input_ids: torch.Tensor, before: torch.Tensor
    ) -> Step:
        num_tokens, device = len(text.slots), store.device
        tokens = torch.arange(num_tokens, device=device)
        last = len(text.lengths) - 1
        request = torch.searchsorted(text.query_start[1:].long(), tokens, right=True).clamp(max=last)
        number = text.query_start[1:] - text.query_start[:-1]
        is_open = before[:, _KEYS] > 0
        keys = before[:, _KEYS][request]
        sees = is_open[request]
        closes = (input_ids[:num_tokens, None] != self._delimiters).all(-1).long()
        so_far = closes.cumsum(0)
        starts = text.query_start[:-1].long().clamp(max=num_tokens - 1)
        since = so_far - (so_far[starts] - closes[starts])[request]
        text_slots = None
        if self.rules.with_text:
            keys = torch.where(sees, keys + 1 + tokens - text.query_start[request], 0)
            place = (keys - 1).clamp(min=0).long()
            column = (place // block_size).clamp(max=store.shape[1] - 1)
            text_slots = store[request, column].long() * block_size + place % block_size
            text_slots = torch.where(sees & (text.slots >= 0), text_slots, -1)
            lengths = torch.where(is_open, before[:, _KEYS] + number, number)
        else:
            lengths = before[:, _KEYS].clamp(min=1)
        closed = ((before[:, _CLOSED][request] > 0) | (since > 0)).int()
        self._remember(text, torch.stack([keys.int(), before[:, _IMAGES][request], closed], dim=1))
        return Step(
            block_table=store,
            query_start=text.query_start,
            query_start_host=text.query_start_host,
            lengths=lengths.to(text.lengths.dtype),
            max_queries=int((text.query_start_host[1:] - text.query_start_host[:-1]).max()),
            max_keys=store.shape[1] * block_size,
            queries=None,
            sees=sees,
            text_slots=text_slots,
        )

    def _remember(self, text: TextPlaces, rows: torch.Tensor) -> None:
        self.table[torch.where(text.slots >= 0, text.slots, self.num_slots)] = rows

    # ---------------------------------------------------------------- steps with images

    def _plan_on_host(
        self,
        text: TextPlaces,
        store: torch.Tensor,
        block_size: int,
        input_ids: torch.Tensor,
        images: Sequence[NewImage],
        before: torch.Tensor,
    ) -> Step:
        device, num_tokens = store.device, len(text.slots)
        ids, blocks, known = input_ids[:num_tokens].cpu().numpy(), store.cpu().numpy(), before.cpu().numpy()
        query_start = text.query_start_host.numpy()
        planned = _HostPlan(self.rules, ids, block_size, blocks.shape[1], num_tokens)
        for request in range(len(blocks)):
            own = [
                number
                for number, image in enumerate(images)
                if query_start[request] <= image.token < query_start[request + 1]
            ]
            planned.add(
                blocks[request], int(query_start[request]), int(query_start[request + 1]), known[request], images, own
            )
        self._remember(text, torch.from_numpy(planned.rows).to(device))
        return planned.step(device, text.lengths.dtype, images)


class _HostPlan:
    """A step with images, while it is planned request by request."""

    def __init__(self, rules: FusionRules, ids: np.ndarray, block_size: int, num_blocks: int, num_tokens: int):
        self.rules, self.block_size, self.num_blocks = rules, block_size, num_blocks
        closes = ~np.isin(ids, list(rules.delimiters))
        self.closed_before = np.concatenate([[0], closes.cumsum()])  # closing tokens before each token
        self.is_gist = np.isin(ids, list(rules.gists))
        self.rows = np.zeros((num_tokens, 3), dtype=np.int32)
        self.text_slots = np.full(num_tokens, -1, dtype=np.int64)
        self.image_slots: dict[int, tuple[np.ndarray, int]] = {}  # blocks and first key of each image
        self.moved: list[tuple[int, int]] = []
        # Runs of queries: first token, past the last token, number of keys, blocks.
        self.runs: list[tuple[int, int, int, np.ndarray]] = []

    def add(
        self,
        blocks: np.ndarray,
        first: int,
        past: int,
        known: np.ndarray,
        images: Sequence[NewImage],
        own: Sequence[int],
    ) -> None:
        """Plan the tokens of one request; `own` are its images."""
        if first == past:
            return
        keys, num_images, closed = (int(number) for number in known)
        region = _Region(keys=keys, images=num_images, kept=keys)
        regions, place, since = [region], first, first
        for number in own:
            image = images[number]
            self._run(region, place, image.token, closed, since)
            is_closed = bool(closed) or self.closed_before[image.token] > self.closed_before[since]
            if not (region.images and self.rules.joins(image.is_frame, not is_closed)):
                region = _Region()
                regions.append(region)
            elif self.rules.drops_text:
                region.keys = region.images
            region.new.append((number, region.keys))
            region.keys += image.num_tokens
            region.images += image.num_tokens
            place = since = image.token
            closed = int(self.rules.history(image.is_frame) != "group")  # what no other image ever joins is closed
        self._run(region, place, past, closed, since)
        self._lay_out(blocks, [part for part in regions if part.runs])

    def _run(self, region: _Region, first: int, past: int, closed: int, since: int) -> None:
        """Tokens that come next in a window."""
        if first == past:
            return
        number = past - first
        is_open = region.images > 0
        keys = region.keys
        rows = self.rows[first:past]
        rows[:, _IMAGES] = region.images
        rows[:, _CLOSED] = (self.closed_before[first + 1 : past + 1] - self.closed_before[since] > 0) | bool(closed)
        if not is_open:
            return
        region.runs.append((first, past, keys))
        if self.rules.with_text:
            region.keys += number
            rows[:, _KEYS] = keys + 1 + np.arange(number)
        else:
            rows[:, _KEYS] = keys

    def _lay_out(self, blocks: np.ndarray, regions: Sequence[_Region]) -> None:
        """Give the windows of a request their blocks: the last one the first of them."""
        if not regions:
            return
        size = self.block_size
        first_block = -(-regions[-1].keys // size)
        for region in [regions[-1], *regions[:-1]]:
            base = 0
            if region is not regions[-1]:
                base = first_block
                first_block += -(-region.keys // size)
                kept = -(-region.kept // size)
                if first_block > self.num_blocks:
                    continue  # the scheduler sees to it that there is room
                self.moved += [(int(blocks[i]), int(blocks[base + i])) for i in range(kept)]
            own = blocks[base : base + -(-region.keys // size)]
            for first, past, keys in region.runs:
                self._attend(region, own, first, past, keys)
            for number, key in region.new:
                self.image_slots[number] = (own, key)

    def _attend(self, region: _Region, blocks: np.ndarray, first: int, past: int, keys: int) -> None:
        if not self.rules.with_text:
            self.runs.append((first, past, keys, blocks))
            return
        places = keys + np.arange(past - first)
        within = places < len(blocks) * self.block_size
        slots = blocks[np.minimum(places // self.block_size, len(blocks) - 1)].astype(np.int64) * self.block_size
        self.text_slots[first:past] = np.where(within, slots + places % self.block_size, -1)
        start = first
        for gist in [*(first + self.is_gist[first:past].nonzero()[0]), past]:
            if gist > start:
                self.runs.append((start, int(gist), keys + int(gist) - first, blocks))
            if gist < past:  # a window with gist tokens has its images before its text
                self.runs.append((int(gist), int(gist) + 1, int(self.rows[gist, _IMAGES]), blocks))
            start = int(gist) + 1

    def step(self, device: torch.device, dtype: torch.dtype, images: Sequence[NewImage]) -> Step:
        """The plan, once all requests are in it."""
        runs = sorted(self.runs, key=lambda run: run[0]) or [(0, 1, 1, np.zeros(1, dtype=np.int32))]
        sees_any = bool(self.runs)
        table = np.zeros((len(runs), max(len(blocks) for *_, blocks in runs)), dtype=np.int32)
        for row, (*_, blocks) in zip(table, runs, strict=True):
            row[: len(blocks)] = blocks
        numbers = np.array([past - first for first, past, *_ in runs])
        query_start = torch.from_numpy(np.concatenate([[0], numbers.cumsum()]).astype(np.int32))
        lengths = np.array([keys for _, _, keys, _ in runs])
        queries = np.concatenate([np.arange(first, past) for first, past, *_ in runs])
        slots = [self._slots_of(number, image.num_tokens) for number, image in enumerate(images)]
        moved = np.array(self.moved, dtype=np.int64).reshape(-1, 2)
        return Step(
            block_table=torch.from_numpy(table).to(device),
            query_start=query_start.to(device),
            query_start_host=query_start,
            lengths=torch.from_numpy(lengths).to(device, dtype),
            max_queries=int(numbers.max()),
            max_keys=int(lengths.max()),
            queries=torch.from_numpy(queries if sees_any else queries[:0]).to(device),
            sees=None,
            text_slots=torch.from_numpy(self.text_slots).to(device) if self.rules.with_text else None,
            image_slots=torch.from_numpy(np.concatenate(slots)).to(device) if slots else None,
            moved_from=torch.from_numpy(moved[:, 0]).to(device) if len(moved) else None,
            moved_to=torch.from_numpy(moved[:, 1]).to(device) if len(moved) else None,
        )

    def _slots_of(self, number: int, num_tokens: int) -> np.ndarray:
        """Slots of the tokens of an image; -1 for those that have no room."""
        if number not in self.image_slots:
            return np.full(num_tokens, -1, dtype=np.int64)
        blocks, key = self.image_slots[number]
        places = key + np.arange(num_tokens)
        within = places < len(blocks) * self.block_size
        column = np.minimum(places // self.block_size, len(blocks) - 1)
        return np.where(within, blocks[column].astype(np.int64) * self.block_size + places % self.block_size, -1)
