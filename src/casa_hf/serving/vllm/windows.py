# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The windows of a request, and the memory that their keys and values take in each step.

A request has a run of slots for fusion layers, its *store*, which grows in blocks and is freed with it. A window has
its keys there in reading order, images before the token that they precede, so that "all keys before the token's own"
is all that a token sees and any kernel with a causal mask computes it. With image keys alone there is no text between.

Between steps the store has the keys of one window, from its first slot on. A step that opens windows puts the last of
them there, where later steps find it, and the others behind, from a block's first slot each.

Only with the history "all" and text keys does a window begin with images whose own text isn't in it: there each step
begins with an image, whose tokens take the place of the text before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class FusionRules:
    """The part of a configuration that decides what windows hold.

    Attributes:
        with_text: whether fusion layers have text keys.
        image_history, video_history: "latest", "group" or "all"; both are "all" or neither is.
        delimiters: ids of tokens that don't close a group of images.
        gists: ids of gist tokens, which see images only.
    """

    with_text: bool
    image_history: str
    video_history: str
    delimiters: frozenset[int]
    gists: frozenset[int]

    @property
    def keeps_all(self) -> bool:
        """Whether every image stays visible."""
        return self.image_history == "all"

    @property
    def drops_text(self) -> bool:
        """Whether images stay where the text between them goes, so that a step can take in only one."""
        return self.keeps_all and self.with_text

    def history(self, is_frame: bool) -> str:
        """The history of images, or of video frames."""
        return self.video_history if is_frame else self.image_history

    def joins(self, is_frame: bool, is_open: bool) -> bool:
        """Whether an image joins the window before it, which is open while only delimiters follow its group."""
        history = self.history(is_frame)
        return history == "all" or (history == "group" and is_open)


@dataclass(frozen=True)
class PlacedImage:
    """An image or video frame of a request.

    Attributes:
        index: index of the text token that it precedes.
        num_tokens: number of its tokens.
        is_frame: whether it is a video frame.
    """

    index: int
    num_tokens: int
    is_frame: bool = False


@dataclass(frozen=True)
class Window:
    """Images that some text sees together, and that text.

    Attributes:
        images: images in reading order, at least one.
        end: index of the text token at which the next window begins; None for the last one.
    """

    images: tuple[PlacedImage, ...]
    end: int | None

    @property
    def start(self) -> int:
        """Index of the first text token that sees an image of the window."""
        return self.images[0].index


class RequestWindows:
    """The windows of a request, found once its images are known.

    Args:
        images: images in reading order.
        tokens: function that gives the token ids from one index to another.
        rules: rules of the model.

    Attributes:
        images: as given.
        windows: windows in reading order.
        most_image_tokens: number of image tokens of the window that has most of them.
    """

    def __init__(self, images: Sequence[PlacedImage], tokens: Callable[[int, int], Sequence[int]], rules: FusionRules):
        self.rules = rules
        self.images = tuple(images)
        found: list[list[PlacedImage]] = []
        for image in images:
            if found:
                last = found[-1][-1]
                is_open = rules.history(last.is_frame) == "group" and all(
                    token in rules.delimiters for token in tokens(last.index, image.index)
                )
                if rules.joins(image.is_frame, is_open):
                    found[-1].append(image)
                    continue
            found.append([image])
        ends = [window[0].index for window in found[1:]]
        self.windows = [
            Window(tuple(images), end) for images, end in zip(found, [*ends, None][: len(found)], strict=True)
        ]
        self.most_image_tokens = max((sum(image.num_tokens for image in each) for each in found), default=0)
        self._starts = [window.start for window in self.windows]
        self._indices = [image.index for image in self.images]
        self._sums = list(accumulate((image.num_tokens for image in self.images), initial=0))

    @property
    def first_image(self) -> int | None:
        """Index of the first token that sees an image; None without any."""
        return self._indices[0] if self._indices else None

    def num_keys(self, window: Window, end: int) -> int:
        """Number of keys of a window up to the text token before `end`."""
        end = end if window.end is None else min(end, window.end)
        first = bisect_left(self._indices, window.start)
        past = bisect_left(self._indices, end)
        number = self._sums[past] - self._sums[first]
        if self.rules.with_text:
            number += end - (self._indices[past - 1] if self.rules.keeps_all else window.start)
        return number

    def used(self, start: int, end: int) -> list[Window]:
        """The windows that the text tokens from `start` to `end` are in."""
        first = max(bisect_left(self._starts, start + 1) - 1, 0)
        return [w for w in self.windows[first : bisect_left(self._starts, end)] if w.end is None or w.end > start]

    def num_blocks(self, start: int, end: int, block_size: int) -> int:
        """Number of blocks that a step with the text tokens from `start` to `end` takes."""
        return sum(-(-self.num_keys(window, end) // block_size) for window in self.used(start, end))

    def largest(self, end: int, block_size: int) -> int:
        """Number of blocks of the largest window, with the text up to the token before `end`."""
        return max((-(-self.num_keys(w, end) // block_size) for w in self.windows if w.start < end), default=0)

    def end_of_step(self, start: int, end: int, capacity: int, block_size: int) -> int:
        """Where a step that was to end before the text token `end` ends at the latest; `start` if it can't be taken.

        Args:
            start: first text token of the step.
            end: text token after the last one.
            capacity: number of blocks of a store.
            block_size: tokens in a block.
        """
        if self.rules.drops_text:
            later = bisect_left(self._indices, start + 1)
            if later < len(self._indices):
                end = min(end, self._indices[later])
        windows = self.used(start, end)
        while len(windows) > 1 and self.num_blocks(start, end, block_size) > capacity:
            end = windows.pop().start
        if self.rules.gists:
            last = bisect_left(self._indices, end) - 1
            if last >= 0 and end <= self._indices[last] + len(self.rules.gists) and self._indices[last] > start:
                end = self._indices[last]  # gist tokens come with their image
        return end if self.num_blocks(start, end, block_size) <= capacity else start
