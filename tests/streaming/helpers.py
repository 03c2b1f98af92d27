# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Truths that streams are compared with.

`Transcript` writes a stream down as one sequence, by hand, and asks the model for all of it in a single forward
without a cache. `naive_scores` are the logits processors as loops over Python numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image

from casa_hf import CaptionEvent, CasaProcessor, CasaStream

CONTROLS = {"penalty": 1.15, "decay": 0.99, "clamp": 5.0, "ngram": 4, "window": 60, "bias": 0.95}
OFF = {
    "repetition_penalty": None,
    "no_repeat_ngram_size": 0,
    "stop_bias": 1.0,
}


def naive_scores(
    logits: Sequence[float],
    history: Sequence[int],
    stops: Iterable[int],
    penalty: float = 1.0,
    decay: float = 1.0,
    clamp: float = math.inf,
    ngram: int = 0,
    window: int = 60,
    bias: float = 1.0,
) -> list[float]:
    """Logits after repetition penalty, n-gram block and stop bias, one number at a time.

    Counts are kept as in a loop over tokens that are emitted one by one, over all of them.
    """
    stops, scores, counts = set(stops), list(logits), dict[int, float]()
    for token in history:
        counts = {other: count * decay for other, count in counts.items()}
        counts[token] = counts.get(token, 0.0) + 1
    for token, count in counts.items():
        if token not in stops:
            factor = penalty ** min(count, clamp)
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    recent = list(history)[-window:]
    if ngram:
        for start in range(len(recent) - ngram + 1):
            *beginning, last = recent[start : start + ngram]
            if beginning == recent[len(recent) - ngram + 1 :] and last not in stops:
                scores[last] = -math.inf
    for token in stops:
        scores[token] = scores[token] * bias if scores[token] > 0 else scores[token] / bias
    return scores


def picture(seed: int, width: int = 84, height: int = 56) -> Image.Image:
    """Random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


class Transcript:
    """What a stream was told and what it said, in order.

    Args:
        model, processor: the stream's.
    """

    def __init__(self, model: Any, processor: CasaProcessor):
        self.model, self.processor = model, processor
        self.stops = model.generation_config.eos_token_id
        self.ids: list[int] = []
        self.pictures: list[Image.Image] = []
        self.places: list[int] = []
        self.times: list[int] = []  # places of the tokens that say when a frame was taken
        self.captions: list[int] = []
        self.said: list[tuple[int, int, list[int], bool]] = []  # place, token, history, whether it is an answer's

    def text(self, text: str) -> None:
        """Text that the stream is told; a stop token at its start takes the place of the one that was said."""
        if self.said and self.said[-1][0] == len(self.ids) - 1 and self.ids[-1] in self.stops:
            self.ids.pop()
        self.ids += self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def frame(self, shown: Image.Image, prefix: str = "", seconds: float | None = None) -> None:
        """A frame before the last token of its mark; without its time it is half a second after the last one."""
        tokenizer = self.processor.tokenizer
        mark = self.processor.image_placeholder
        ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
        if self.processor.video_timestamps is not None:
            opening, closing = {"native": "<>", "text": "[]"}[self.processor.video_timestamps]
            seconds = len(self.pictures) / 2 if seconds is None else seconds
            time = tokenizer(f"{opening}{seconds:.1f} seconds{closing}", add_special_tokens=False)["input_ids"]
            self.times += range(len(self.ids), len(self.ids) + len(time))
            self.ids += time
        self.places.append(len(self.ids) + len(ids) - 1)
        rest = tokenizer(mark + prefix, add_special_tokens=False)["input_ids"][len(ids) :]
        self.ids += [*ids, *self.processor.gist_token_ids, *rest]
        self.pictures.append(shown)

    def caption(self, token_ids: Sequence[int]) -> None:
        """Tokens that were emitted for the frame."""
        for token in token_ids:
            self.said.append((len(self.ids), token, list(self.captions), False))
            self.ids.append(token)
            self.captions += [] if token in self.stops else [token]

    def answer(self, token_ids: Sequence[int]) -> None:
        """Tokens that were emitted for a question."""
        for number, token in enumerate(token_ids):
            self.said.append((len(self.ids), token, list(token_ids[:number]), True))
            self.ids.append(token)

    def pixels(self) -> dict[str, torch.Tensor]:
        """The pictures by the image processor itself, at the size of frames."""
        if not self.pictures:
            return {}
        stock = self.processor.image_processor
        size = {"shortest_edge": stock.size["shortest_edge"], "longest_edge": self.processor.frame_max_pixels}
        return dict(stock(images=self.pictures, size=size, return_tensors="pt"))

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """(tokens, vocabulary) logits of the whole sequence in one forward without a cache."""
        images: dict[str, Any] = self.pixels()
        ids = torch.tensor([self.ids])
        if images:
            types = torch.zeros_like(ids)
            types[0, self.places] = 2
            types[0, self.times] = 3
            places = torch.tensor([[0, place] for place in self.places])
            images |= {"image_positions": places, "mm_token_type_ids": types}
        return self.model(input_ids=ids, use_cache=False, **images).logits[0]

    def check(self, **controls: Any) -> None:
        """Every token that was said is the likeliest, once the controls are applied."""
        logits = self.logits()
        assert self.said
        for place, token, history, is_answer in self.said:
            used = {**controls, "bias": 1.0} if is_answer and controls else controls
            scores = naive_scores(logits[place - 1].tolist(), history, self.stops, **used)
            assert token == max(range(len(scores)), key=scores.__getitem__), (place, token, history)


def emitted(events: Iterable[CaptionEvent]) -> tuple[int, ...]:
    """The tokens of the one end of a frame or an answer among these events."""
    [end] = [event for event in events if event.kind in ("end", "answered")]
    return end.token_ids


def say(stream: CasaStream, pictures: Iterable[Any]) -> list[tuple[int, ...]]:
    """The tokens that a stream says to pictures."""
    return [emitted(stream.push(shown)) for shown in pictures]
