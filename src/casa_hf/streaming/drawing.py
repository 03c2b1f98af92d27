# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How streams choose tokens: for all rows of a batch at once, each by rules of its own, in a few operations.

A row gets the token that it would get alone. What it needs beside its logits is known before the forward: the text so
far and a random number, which the host draws from the row's own generator. They go to the device in one piece, and one
tensor of tokens comes back, which is all that the host waits for.

The rules are those of the logits processors in `repetition`, which `generate` takes: here a logit s is multiplied by
exp(-sign(s) x), where x is a token's count times the logarithm of the penalty, or the negative logarithm of the bias
of a stop token. Stop tokens are never part of the text that is counted and searched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .repetition import COUNTED_TOKENS

if TYPE_CHECKING:
    from ..modeling_casa import CasaForConditionalGeneration
    from .settings import StreamSettings

# How many sets of rows a stream or a batch keeps the numbers of: rows with captions, rows with answers, and so on.
_KEPT_DRAWS = 16


@dataclass(frozen=True)
class TokenRules:
    """By what the tokens of one text are chosen; what is off has a value that changes nothing.

    Attributes:
        penalty, decay, clamp: those of `DecayingRepetitionPenalty`.
        ngram_size, ngram_lookback: those of `RecentNoRepeatNGram`; a size of 0 forbids nothing.
        bias: factor of `StopBias`.
        temperature: divisor of the logits before a token is drawn at random; None to take the likeliest.
        top_k: number of likeliest tokens that are drawn from; 0 for all.
    """

    penalty: float
    decay: float
    clamp: float
    ngram_size: int
    ngram_lookback: int
    bias: float
    temperature: float | None
    top_k: int

    @classmethod
    def of(cls, settings: StreamSettings, biased: bool = True) -> TokenRules:
        """The rules for captions, or, without a bias of stop tokens, for answers."""
        return cls(
            penalty=settings.repetition_penalty or 1.0,
            decay=settings.repetition_decay,
            clamp=settings.repetition_clamp,
            ngram_size=settings.no_repeat_ngram_size or 0,
            ngram_lookback=settings.no_repeat_ngram_lookback,
            bias=(settings.stop_bias or 1.0) if biased else 1.0,
            temperature=(settings.temperature or 1.0) if settings.do_sample else None,
            top_k=(settings.top_k or 0) if settings.do_sample else 1,
        )

    @property
    def lookback(self) -> int:
        """Number of last tokens that they look at."""
        return max(COUNTED_TOKENS if self.penalty != 1.0 else 0, self.ngram_lookback if self.ngram_size else 0)


class History:
    """The last tokens of a text that rules look at; on the host.

    Attributes:
        ids: (at most `length`) tokens, int32; a new tensor for every change.
    """

    def __init__(self, length: int, ids: Sequence[int] = ()):
        self._length = length
        self.ids = torch.tensor(ids, dtype=torch.int32)[max(0, len(ids) - length) :]

    def add(self, token: int) -> None:
        """Append a token."""
        if self._length:
            kept = self.ids[max(0, len(self.ids) + 1 - self._length) :]
            self.ids = torch.cat([kept, torch.tensor([token], dtype=torch.int32)])


def uniform_number(generator: torch.Generator | None) -> float:
    """A random number in (0, 1], a multiple of 2^-24; 1 without a generator."""
    return 1.0 if generator is None else 1.0 - float(torch.rand((), generator=generator))


class TokenDraw:
    """Chooses the tokens of a set of rows.

    Args:
        rules: rules of each row.
        stop_token_ids: tokens that end texts.
        vocabulary: number of tokens that there are.
        device: device on which they are chosen.
    """

    def __init__(
        self, rules: Sequence[TokenRules], stop_token_ids: Sequence[int], vocabulary: int, device: torch.device
    ):
        self._device = device

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype)[:, None].to(device)

        sizes = [each.ngram_size for each in rules]
        self._penalises = any(each.penalty != 1.0 for each in rules)
        self._biases = bool(stop_token_ids) and any(each.bias != 1.0 for each in rules)
        self._ngram_size = max(sizes)
        self._recent = max((each.ngram_lookback for each in rules if each.ngram_size), default=0)
        if self._penalises:
            ages = torch.arange(COUNTED_TOKENS - 1, -1, -1, dtype=torch.float64)
            decays = torch.tensor([each.decay for each in rules], dtype=torch.float64)
            self._weights = (decays[:, None] ** ages).float().to(device)
            self._clamps = column([each.clamp for each in rules])
            self._strengths = column([-math.log(each.penalty) for each in rules])
        if self._biases:
            self._stops = torch.tensor(stop_token_ids).to(device)
            self._stop_strengths = column([math.log(each.bias) for each in rules]).repeat(1, len(stop_token_ids))
        if self._ngram_size:
            # Which of the tokens before an n-gram's last one belong to it, (rows, 1, largest size - 1), and where it
            # may end, (rows, largest lookback).
            before = torch.arange(self._ngram_size - 1, 0, -1)
            self._outside = (before >= torch.tensor(sizes)[:, None])[:, None].to(device)
            ages = torch.arange(self._recent - 1, -1, -1)
            oldest = [each.ngram_lookback - each.ngram_size if each.ngram_size else -1 for each in rules]
            self._in_lookback = (ages <= torch.tensor(oldest)[:, None]).to(device)
        sampled = [each.temperature is not None for each in rules]
        self._samples, self._takes_likeliest = any(sampled), not all(sampled)
        if self._samples:
            self._sampled = torch.tensor(sampled).to(device)
            self._temperatures = column([each.temperature or 1.0 for each in rules])
            numbers = [min(each.top_k, vocabulary) for each in rules]
            self._top_k = column([max(0, number - 1) for number in numbers], torch.long)
            self._largest_k = max(numbers)
            every = [each.top_k == 0 for each in rules]
            self._every_token = torch.tensor(every)[:, None].to(device) if any(every) else None

    def numbers(self, histories: Sequence[History | None], uniforms: Sequence[float]) -> torch.Tensor:
        """What `tokens` has to know, on the device; it doesn't wait for it. To be called before the forward.

        Args:
            histories: text so far of each row; None for a row that waits for no token.
            uniforms: result of `uniform_number` for each row.

        Returns:
            (rows, 1 + N - 1 + N - 1 + tokens) int32, for n-grams of at most N tokens: the uniform number by its bits,
            the last tokens, and the text. Ids are one too high there, so that 0 is none; in the last tokens -1 is.
        """
        before = max(0, self._ngram_size - 1)
        width = max(1, self._recent, *(0 if history is None else len(history.ids) for history in histories))
        numbers = torch.zeros(len(histories), 1 + before + before + width, dtype=torch.int32)
        for row, history in zip(numbers, histories, strict=True):
            if history is not None and len(history.ids):
                row[len(row) - len(history.ids) :] = history.ids + 1
        if before:
            last = numbers[:, -before:]
            numbers[:, 1 : 1 + before] = torch.where(last > 0, last, -1)
        numbers[:, 0] = torch.tensor(uniforms, dtype=torch.float32).view(torch.int32)
        return numbers.to(self._device, non_blocking=True)

    def tokens(self, logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """(rows,) the tokens, on the device.

        Args:
            logits: (rows, vocabulary).
            numbers: result of `numbers`.
        """
        scores = self._controlled(logits.to(self._device, torch.float32), numbers)
        likeliest = scores.argmax(-1) if self._takes_likeliest else None
        if not self._samples:
            assert likeliest is not None
            return likeliest
        drawn = self._drawn(scores, numbers[:, :1].view(torch.float32))
        return drawn if likeliest is None else torch.where(self._sampled, drawn, likeliest)

    def _controlled(self, scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """The scores after repetition control."""
        if not (self._penalises or self._biases or self._ngram_size):
            return scores
        before = max(0, self._ngram_size - 1)
        text = numbers[:, 1 + 2 * before :].long()
        # The first column is for what is no token.
        counts = scores.new_zeros(len(scores), scores.shape[1] + 1)
        if self._penalises:
            counted = text[:, -COUNTED_TOKENS:]
            counts.scatter_add_(1, counted, self._weights[:, COUNTED_TOKENS - counted.shape[1] :])
        forbidden = None
        if self._ngram_size:
            repeats = self._repeats(numbers, before)
            counts.scatter_add_(1, text[:, -self._recent :], torch.where(repeats, math.inf, 0.0))
            forbidden = counts[:, 1:] == math.inf
        counts = counts[:, 1:]
        if self._penalises:
            counts = counts.minimum(self._clamps) * self._strengths
        if self._biases:
            if not self._penalises:
                counts = torch.zeros_like(scores)
            counts.index_copy_(1, self._stops, self._stop_strengths)
        if self._penalises or self._biases:
            scores = scores * (scores.sign() * counts).exp()
        return scores if forbidden is None else scores.masked_fill(forbidden, -math.inf)

    def _repeats(self, numbers: torch.Tensor, before: int) -> torch.Tensor:
        """(rows, recent tokens) whether each, once more, would complete an n-gram that is there."""
        if not before:
            return self._in_lookback
        last = numbers[:, None, 1 : 1 + before]
        earlier = numbers[:, -(self._recent + before) : -1].unfold(1, before, 1)
        return ((earlier == last) | self._outside).all(-1) & self._in_lookback

    def _drawn(self, scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """(rows,) tokens by inversion of the distribution function, over the vocabulary in its order."""
        scores = scores / self._temperatures
        if self._largest_k:
            likeliest = scores.topk(self._largest_k).values
            least = likeliest.gather(1, self._top_k)
            if self._every_token is not None:
                least = least.masked_fill(self._every_token, -math.inf)
            scores = scores.masked_fill(scores < least, -math.inf)
        probabilities = scores.softmax(-1)
        # Rounding may let sums fall where they should stay: what is impossible is never reached.
        sums = torch.where(probabilities > 0, probabilities.cumsum(-1), -1.0)
        reached = sums >= uniforms * sums.amax(-1, keepdim=True)
        return reached.to(torch.uint8).argmax(-1)


class TokenDraws:
    """The `TokenDraw` of whichever rows come; those of the last few sets of rows are kept.

    Args:
        model: model whose tokens they are.
        stop_token_ids: tokens that end texts.
    """

    def __init__(self, model: CasaForConditionalGeneration, stop_token_ids: Sequence[int]):
        self._of_model = (stop_token_ids, model.config.get_text_config().vocab_size, model.device)
        self._draws: dict[tuple[TokenRules, ...], TokenDraw] = {}

    def of(self, rules: Sequence[TokenRules]) -> TokenDraw:
        """That of rows with these rules."""
        key = tuple(rules)
        draw = self._draws.pop(key, None) or TokenDraw(key, *self._of_model)
        self._draws[key] = draw  # the last one used is the last one to go
        if len(self._draws) > _KEPT_DRAWS:
            del self._draws[next(iter(self._draws))]
        return draw
