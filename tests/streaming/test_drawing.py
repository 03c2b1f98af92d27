# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Tokens of many rows at once: each the one that a loop over Python numbers gives for its row alone."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import accumulate
from typing import Any

import pytest
import torch

from casa_hf import StreamSettings
from casa_hf.streaming.drawing import History, TokenDraw, TokenRules, uniform_number
from tests.streaming.helpers import naive_scores

VOCABULARY = 23
STOPS = (2, 7)
WORDS = [0, 1, 3, 4]
CPU = torch.device("cpu")
# What rows of one batch may be set to, from nothing at all to everything.
OFF: dict[str, Any] = {"repetition_penalty": None, "no_repeat_ngram_size": None, "stop_bias": None}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"do_sample": True},
    {"repetition_penalty": 0.6, "repetition_decay": 0.5, "repetition_clamp": 1.2, "stop_bias": 3.0},
    {"repetition_penalty": 2.0, "repetition_decay": 1.0, "repetition_clamp": math.inf, "no_repeat_ngram_size": 0},
    {"no_repeat_ngram_size": 1, "no_repeat_ngram_lookback": 5, "do_sample": True, "top_k": 3},
    {"no_repeat_ngram_size": 2, "no_repeat_ngram_lookback": 11, "do_sample": True, "temperature": 2.0, "top_k": None},
    {"no_repeat_ngram_size": 6, "no_repeat_ngram_lookback": 6, "do_sample": True, "temperature": None, "top_k": 99},
    OFF,
    {**OFF, "do_sample": True, "temperature": 0.7, "top_k": 4},
]


def naive_token(logits: list[float], history: list[int], uniform: float, **settings: Any) -> int:
    """The likeliest token, or the first one at which the summed probabilities reach the number."""
    rules = StreamSettings(**settings)
    scores = naive_scores(
        logits,
        history,
        STOPS,
        penalty=rules.repetition_penalty or 1.0,
        decay=rules.repetition_decay,
        clamp=rules.repetition_clamp,
        ngram=rules.no_repeat_ngram_size or 0,
        window=rules.no_repeat_ngram_lookback,
        bias=rules.stop_bias or 1.0,
    )
    if not rules.do_sample:
        return max(range(len(scores)), key=scores.__getitem__)
    scores = [score / (rules.temperature or 1.0) for score in scores]
    least = sorted(scores, reverse=True)[: rules.top_k or len(scores)][-1]
    sums = list(accumulate(math.exp(score) if score >= least else 0.0 for score in scores))
    return next(token for token, reached in enumerate(sums) if reached >= uniform * sums[-1])


def texts_of(seed: int) -> list[list[int]]:
    """A text for each of the settings, of few different words, so that it repeats itself."""
    numbers = random.Random(seed)
    lengths = [0, 1, 2, 5, 6, 12, 60, 90, 40]
    numbers.shuffle(lengths)
    return [[numbers.choice(WORDS) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("seed", range(8))
def test_tokens_are_those_of_a_loop_in_a_batch_and_alone(seed):
    rules = [TokenRules.of(StreamSettings(**settings)) for settings in SETTINGS]
    texts, generator = texts_of(seed), torch.Generator().manual_seed(seed)
    histories = [History(each.lookback, text) for each, text in zip(rules, texts, strict=True)]
    logits = torch.randn(len(rules), VOCABULARY, generator=generator)
    logits[:, WORDS] += 2
    uniforms = [uniform_number(generator) for _ in rules]
    expected = [
        naive_token(row, text, uniform, **settings)
        for row, text, uniform, settings in zip(logits.tolist(), texts, uniforms, SETTINGS, strict=True)
    ]
    together = TokenDraw(rules, STOPS, VOCABULARY, CPU)
    assert together.tokens(logits, together.numbers(histories, uniforms)).tolist() == expected
    for row, (each, history, uniform) in enumerate(zip(rules, histories, uniforms, strict=True)):
        alone = TokenDraw([each], STOPS, VOCABULARY, CPU)
        assert alone.tokens(logits[row, None], alone.numbers([history], [uniform])).tolist() == expected[row : row + 1]
    plain = logits.argmax(-1).tolist()
    assert sum(a != b for a, b in zip(expected, plain, strict=True)) > 1, "the rules change hardly anything"


def test_a_row_that_waits_for_no_token_changes_no_other_one():
    rules = [TokenRules.of(StreamSettings(**settings)) for settings in SETTINGS]
    draw, logits = TokenDraw(rules, STOPS, VOCABULARY, CPU), torch.randn(len(rules), VOCABULARY)
    histories: list[History | None] = [
        History(each.lookback, text) for each, text in zip(rules, texts_of(1), strict=True)
    ]
    expected = draw.tokens(logits, draw.numbers(histories, [0.5] * len(rules)))
    for row in (0, 6):
        histories[row], logits[row] = None, math.nan
        others = [other for other in range(len(rules)) if histories[other] is not None]
        assert torch.equal(draw.tokens(logits, draw.numbers(histories, [0.5] * len(rules)))[others], expected[others])


def test_frequencies_are_the_probabilities():
    """20,000 tokens of one row: as often as their probability says, within five standard deviations."""
    number, rules = 20_000, TokenRules.of(StreamSettings(**OFF, do_sample=True, temperature=1.0, top_k=5))
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    draw = TokenDraw([rules] * number, STOPS, VOCABULARY, CPU)
    numbers = draw.numbers([None] * number, [uniform_number(generator) for _ in range(number)])
    counts = Counter(draw.tokens(logits.expand(number, -1), numbers).tolist())
    values, tokens = logits[0].topk(5)
    assert counts.keys() == set(tokens.tolist())
    for token, share in zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True):
        assert abs(counts[token] - number * share) < 5 * math.sqrt(number * share * (1 - share))


@pytest.mark.parametrize("uniform", [2.0**-24, 1.0])
def test_what_is_impossible_is_never_drawn(uniform):
    """The first and the last tokens of the vocabulary have no probability."""
    rules = TokenRules.of(StreamSettings(**OFF, do_sample=True, temperature=1.0, top_k=3))
    logits = torch.full((1, VOCABULARY), -5.0)
    logits[0, [4, 9, 11]] = torch.tensor([1.0, 2.0, 1.5])
    draw = TokenDraw([rules], STOPS, VOCABULARY, CPU)
    assert draw.tokens(logits, draw.numbers([None], [uniform])).tolist() == [4 if uniform < 1 else 11]


def test_random_numbers_come_from_the_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (torch.Generator().manual_seed(5) for _ in range(2))
    drawn = [uniform_number(first) for _ in range(1000)]
    assert drawn == [uniform_number(second) for _ in range(1000)] and len(set(drawn)) > 990
    assert all(0 < number <= 1 for number in drawn) and uniform_number(None) == 1.0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_history_holds_the_last_tokens():
    history = History(3, [1, 2, 3, 4])
    before = history.ids
    history.add(5)
    assert (before.tolist(), history.ids.tolist()) == ([2, 3, 4], [3, 4, 5])
    nothing = History(0, [1])
    nothing.add(2)
    assert nothing.ids.tolist() == []
    assert TokenRules.of(StreamSettings(**OFF)).lookback == 0
    assert (
        TokenRules.of(StreamSettings()).lookback > TokenRules.of(StreamSettings(repetition_penalty=1)).lookback == 60
    )
