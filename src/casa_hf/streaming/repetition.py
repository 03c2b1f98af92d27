# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Repetition control for text without an end: logits processors for streams, and for `generate` as well.

Captions of a stream run on for hours, so that what was said must be allowed again after a while: counts decay, and
n-grams are blocked among the last tokens only. The processors keep nothing between calls. All that they need is in the
last tokens of `input_ids`, so that beams may be reordered and streams copied, saved or batched, and the cost of a step
doesn't depend on what was said before. Everything happens on the device of the scores, row by row; nothing waits for
it. A negative id in `input_ids` is no token: rows of different lengths can be filled with them from the left. Any
other id counts, that of padding too; give it among the exempt ones where a prompt is padded with it.

Stop tokens are exempt: silence must stay possible however often there was silence before.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from transformers import LogitsProcessor

from ..checks import check_count, check_number, check_positive

# With a decay of 0.99 a token counts 1e-9 after this many others.
COUNTED_TOKENS = 2048


def check_factor(name: str, value: Any) -> None:
    """Refuse what can't be a factor on logits, by this name."""
    check_positive(name, value, "a positive number (1.0 changes nothing)")


def check_decay(name: str, value: Any) -> None:
    """Refuse what can't be the share of an occurrence that every further token leaves of it."""
    check_number(name, value, Real, lambda share: 0 < share <= 1, "a number in (0, 1] (1.0 counts without fading)")


def check_clamp(name: str, value: Any) -> None:
    """Refuse what can't bound a count."""
    check_number(name, value, Real, lambda count: count > 0, "a positive number (infinity for no bound)")


def check_lookback(name: str, value: Any, size_name: str, size: int) -> None:
    """Refuse what can't be the number of last tokens that are searched for n-grams of this size."""
    check_number(name, value, Integral, lambda number: number >= size, f"an integer of at least {size_name}={size}")


class _TokenSet:
    """Token ids as a tensor that goes where it is needed."""

    def __init__(self, token_ids: Sequence[int] | int | None):
        ids = [] if token_ids is None else [token_ids] if isinstance(token_ids, int) else list(token_ids)
        self.ids = torch.tensor(ids, dtype=torch.long)

    def on(self, device: torch.device) -> torch.Tensor:
        """(tokens,) the ids; copied once per device."""
        if self.ids.device != device:
            self.ids = self.ids.to(device)
        return self.ids


class _LookingBack(LogitsProcessor):
    """What processors share that look at the last `lookback` tokens behind a prompt."""

    def __init__(self, lookback: int, exempt_token_ids: Sequence[int] | int | None, prompt_ignore_length: int):
        check_number(
            "prompt_ignore_length",
            prompt_ignore_length,
            Integral,
            lambda number: number >= 0,
            "an integer of 0 or more",
        )
        self.lookback = int(lookback)
        self.prompt_ignore_length = prompt_ignore_length
        self._exempt = _TokenSet(exempt_token_ids)

    def _last(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, at most `lookback`) the tokens to look at."""
        return input_ids[:, self.prompt_ignore_length :][:, -self.lookback :]


class DecayingRepetitionPenalty(_LookingBack):
    """Penalise tokens by how often they occurred, where occurrences fade.

    With x_0 the last token, x_1 the one before it, and so on over the last `lookback` tokens,

        n_v = sum over i of decay^i [x_i = v]        f_v = penalty^min(n_v, clamp)

    and a logit s of token v becomes s / f_v if it is positive, s * f_v if not: for penalty > 1 it falls either way.

    Args:
        penalty: factor on logits; above 1 discourages repetition, below 1 encourages it.
        decay: share of an occurrence that every further token leaves of it, in (0, 1]; 1 for plain counts.
        clamp: count beyond which the penalty grows no more.
        exempt_token_ids: tokens that are never penalised, such as stop tokens.
        lookback: number of last tokens that are counted.
        prompt_ignore_length: number of first tokens of `input_ids` that aren't counted, such as those of a prompt.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        penalty: float,
        decay: float = 0.99,
        clamp: float = 5.0,
        exempt_token_ids: Sequence[int] | int | None = None,
        lookback: int = COUNTED_TOKENS,
        prompt_ignore_length: int = 0,
    ):
        check_factor("penalty", penalty)
        check_decay("decay", decay)
        check_clamp("clamp", clamp)
        check_count("lookback", lookback)
        super().__init__(lookback, exempt_token_ids, prompt_ignore_length)
        self.penalty = float(penalty)
        self.decay = float(decay)
        self.clamp = float(clamp)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Penalised scores.

        Args:
            input_ids: (batch, tokens) the text so far; negative ids are no tokens.
            scores: (batch, vocabulary).
        """
        ids = self._last(input_ids)
        precise = scores.to(torch.promote_types(scores.dtype, torch.float32))
        ages = torch.arange(ids.shape[1] - 1, -1, -1, device=ids.device, dtype=precise.dtype)
        weights = self.decay**ages * (ids >= 0)
        counts = torch.zeros_like(precise).scatter_add(1, ids.clamp(min=0), weights)
        counts = counts.index_fill(1, self._exempt.on(scores.device), 0.0)
        factors = self.penalty ** counts.clamp(max=self.clamp)
        return torch.where(precise > 0, precise / factors, precise * factors).to(scores.dtype)


class RecentNoRepeatNGram(_LookingBack):
    """Forbid tokens that would complete an n-gram which occurs among the last tokens.

    Token v gets the score -inf where the last `lookback` tokens x hold x_j ... x_(j+n-1) with x_(j+n-1) = v and
    x_j ... x_(j+n-2) equal to the last n - 1 tokens.

    Args:
        ngram_size: length n of the n-grams; 1 forbids all of the last tokens.
        lookback: number of last tokens that are searched; at least n.
        exempt_token_ids: tokens that are never forbidden, such as stop tokens.
        prompt_ignore_length: number of first tokens of `input_ids` that aren't searched, such as those of a prompt;
            n-grams that begin among them don't count.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        ngram_size: int,
        lookback: int = 60,
        exempt_token_ids: Sequence[int] | int | None = None,
        prompt_ignore_length: int = 0,
    ):
        check_count("ngram_size", ngram_size)
        check_lookback("lookback", lookback, "ngram_size", ngram_size)
        super().__init__(lookback, exempt_token_ids, prompt_ignore_length)
        self.ngram_size = int(ngram_size)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores with -inf for what is forbidden.

        Args:
            input_ids: (batch, tokens) the text so far; negative ids are no tokens.
            scores: (batch, vocabulary).
        """
        ids = self._last(input_ids)
        if ids.shape[1] < self.ngram_size:
            return scores
        ngrams = ids.unfold(1, self.ngram_size, 1)  # (batch, n-grams, n)
        last = ids[:, ids.shape[1] - self.ngram_size + 1 :]
        repeats = (ngrams[..., :-1] == last[:, None]).all(-1) & (ngrams >= 0).all(-1)
        # What isn't forbidden goes to a column of its own, behind the vocabulary.
        vocabulary = scores.shape[1]
        forbidden = torch.zeros(len(scores), vocabulary + 1, dtype=torch.bool, device=scores.device)
        forbidden = forbidden.scatter(1, torch.where(repeats, ngrams[..., -1], vocabulary), True)[:, :vocabulary]
        forbidden = forbidden.index_fill(1, self._exempt.on(scores.device), False)
        return scores.masked_fill(forbidden, -torch.inf)


class StopBias(LogitsProcessor):
    """Make stop tokens likelier or less likely by a factor on their logits.

    A positive logit is multiplied by `bias`, a negative one divided: bias < 1 lowers it either way, so that a stream
    says more, and bias > 1 raises it.

    Args:
        stop_token_ids: tokens whose logits are changed.
        bias: factor on their logits.

    Raises:
        ValueError: if `bias` isn't positive.
    """

    def __init__(self, stop_token_ids: Sequence[int] | int, bias: float):
        check_factor("bias", bias)
        self.bias = float(bias)
        self._stops = _TokenSet(stop_token_ids)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores with biased stop tokens.

        Args:
            input_ids: ids so far; not used.
            scores: (batch, vocabulary).
        """
        stops = self._stops.on(scores.device)
        logits = scores[:, stops]
        return scores.index_copy(1, stops, torch.where(logits > 0, logits * self.bias, logits / self.bias))
