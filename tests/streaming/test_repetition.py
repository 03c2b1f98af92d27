# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The logits processors of streams against loops over Python numbers, by themselves and in `generate`."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from casa_hf import StreamSettings
from casa_hf.streaming.repetition import (
    DecayingRepetitionPenalty,
    RecentNoRepeatNGram,
    StopBias,
)
from tests.helpers_generation import Image, batch, one_shot, shared_model, token_ids, words
from tests.streaming.helpers import CONTROLS, naive_scores
from tests.tiny import PAD

VOCABULARY = 12
STOPS = (2, 7)


def rows(lengths: list[int], seed: int) -> tuple[list[list[int]], torch.Tensor]:
    """Texts of few different tokens, so that they repeat themselves; and scores of either sign."""
    numbers = random.Random(seed)
    texts = [[numbers.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
    scores = torch.randn(len(lengths), VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return texts, 3 * scores


def padded(texts: list[list[int]]) -> torch.Tensor:
    """Rows of ids with no tokens on the left."""
    longest = max(map(len, texts))
    return torch.tensor([[-1] * (longest - len(text)) + text for text in texts])


SETTINGS: list[tuple[dict[str, Any], Any]] = [
    ({"penalty": 1.15, "decay": 0.99, "clamp": 5.0}, DecayingRepetitionPenalty(1.15, 0.99, 5.0, STOPS)),
    ({"penalty": 2.0, "decay": 0.5, "clamp": 1.2}, DecayingRepetitionPenalty(2.0, 0.5, 1.2, STOPS)),
    ({"penalty": 0.7, "decay": 1.0, "clamp": 3.0}, DecayingRepetitionPenalty(0.7, 1.0, 3.0, list(STOPS))),
    ({"ngram": 1, "window": 5}, RecentNoRepeatNGram(1, 5, STOPS)),
    ({"ngram": 2, "window": 20}, RecentNoRepeatNGram(2, 20, STOPS)),
    ({"ngram": 2, "window": 4}, RecentNoRepeatNGram(2, 4, STOPS)),
    ({"ngram": 3, "window": 60}, RecentNoRepeatNGram(3, 60, STOPS)),
    ({"bias": 0.95}, StopBias(STOPS, 0.95)),
    ({"bias": 3.0}, StopBias(list(STOPS), 3.0)),
    (CONTROLS, StreamSettings().repetition_control(STOPS)),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("settings", "processor"), SETTINGS, ids=[str(settings) for settings, _ in SETTINGS])
def test_scores_are_those_of_a_loop(settings, processor, seed):
    """Rows of 0 to 90 tokens in one batch: each gets what it would get alone."""
    texts, scores = rows([0, 1, 2, 3, 17, 59, 60, 61, 90], seed)
    before = scores.clone()
    actual = processor(padded(texts), scores)
    assert torch.equal(scores, before), "the given scores aren't changed"
    assert actual.dtype == torch.float64
    for text, row, given in zip(texts, actual.tolist(), scores.tolist(), strict=True):
        assert row == pytest.approx(naive_scores(given, text, STOPS, **settings), rel=1e-12)
    assert not torch.equal(actual, scores)


def test_counts_that_are_kept_from_token_to_token_agree():
    """Over more tokens than are counted: what is left out weighs nothing."""
    processor = DecayingRepetitionPenalty(1.15, exempt_token_ids=STOPS)
    [text], scores = rows([3000], 0)
    counts = [0.0] * VOCABULARY
    for place, token in enumerate(text, start=1):
        counts = [0.99 * count for count in counts]
        counts[token] += 1
        if place % 500 == 0:
            factors = [1.0 if v in STOPS else 1.15 ** min(count, 5.0) for v, count in enumerate(counts)]
            expected = [s / f if s > 0 else s * f for s, f in zip(scores[0].tolist(), factors, strict=True)]
            assert processor(torch.tensor([text[:place]]), scores)[0].tolist() == pytest.approx(expected, rel=1e-8)
    assert processor.lookback < len(text)


def test_the_last_tokens_alone_are_counted_and_a_prompt_is_not():
    [text], scores = rows([40], 1)
    ids = torch.tensor([text])
    penalty = {"penalty": 1.5, "decay": 0.9, "clamp": 9.0}
    recent = DecayingRepetitionPenalty(1.5, 0.9, 9.0, STOPS, lookback=7)
    after_prompt = DecayingRepetitionPenalty(1.5, 0.9, 9.0, STOPS, prompt_ignore_length=31)
    for processor, counted in ((recent, text[-7:]), (after_prompt, text[31:])):
        expected = naive_scores(scores[0].tolist(), counted, STOPS, **penalty)
        assert processor(ids, scores)[0].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prompt", [0, 1, 9, 31, 40, 50])
def test_a_prompt_is_neither_counted_nor_searched(prompt):
    """Few words, so that n-grams of the prompt, and such as begin in it, recur."""
    generator = torch.Generator().manual_seed(prompt)
    text = torch.randint(5, 8, (40,), generator=generator).tolist()
    _, scores = rows([1], 3)
    settings = {**CONTROLS, "ngram": 3, "window": 20}
    controls = StreamSettings(no_repeat_ngram_size=3, no_repeat_ngram_lookback=20)
    processors = controls.repetition_control(STOPS, prompt_ignore_length=prompt)
    expected = naive_scores(scores[0].tolist(), text[prompt:], STOPS, **settings)
    assert processors(torch.tensor([text]), scores[:1])[0].tolist() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="prompt_ignore_length=-1"):
        RecentNoRepeatNGram(3, prompt_ignore_length=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_keep_their_precision(dtype):
    texts, scores = rows([50], 2)
    actual = StreamSettings().repetition_control(STOPS)(padded(texts), scores.to(dtype))
    assert actual.dtype == dtype
    expected = naive_scores(scores.to(dtype).tolist()[0], texts[0], STOPS, **CONTROLS)
    assert actual[0].tolist() == pytest.approx(expected, rel=2 * torch.finfo(dtype).eps)


def test_a_bias_moves_stop_tokens_one_way_whatever_their_sign():
    scores = torch.tensor([[1.0, 1.0, 2.0], [-1.0, -1.0, -2.0]])
    ids = torch.zeros(2, 0, dtype=torch.long)
    assert (StopBias([1, 2], 0.9)(ids, scores)[:, 1:] < scores[:, 1:]).all()
    assert (StopBias([1, 2], 1.1)(ids, scores)[:, 1:] > scores[:, 1:]).all()
    assert torch.equal(StopBias([1, 2], 0.9)(ids, scores)[:, 0], scores[:, 0])


def test_controls_can_be_switched_off():
    off = {"repetition_penalty": None, "no_repeat_ngram_size": None, "stop_bias": None}
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "stop_bias": 1.0}
    for settings in (off, neutral):
        assert StreamSettings(**settings).repetition_control(STOPS) == []
    kinds = [DecayingRepetitionPenalty, RecentNoRepeatNGram, StopBias]
    assert [type(processor) for processor in StreamSettings().repetition_control(STOPS)] == kinds


# ------------------------------------------------------------------------------------ in generate

PROMPTS = ([*words(3, 1), Image(2, 3, 1), *words(4, 2)], words(2, 3), [Image(1, 2, 2), *words(9, 4)])
# Strict enough to change what the small model says at almost every step.
STRICT = {"penalty": 3.0, "decay": 0.9, "clamp": 2.0, "ngram": 2, "window": 12, "bias": 1.2}
STEPS = 14
END_TOKENS = [PAD, *range(4, 50, 5)]  # as in Qwen checkpoints, padding is done with one of them


def strict_processors() -> LogitsProcessorList:
    return StreamSettings(
        repetition_penalty=3.0,
        repetition_decay=0.9,
        repetition_clamp=2.0,
        no_repeat_ngram_size=2,
        no_repeat_ngram_lookback=12,
        stop_bias=1.2,
    ).repetition_control(END_TOKENS)


def greedy(row: Any, settings: dict[str, Any]) -> list[int]:
    """Token by token without a cache, controlled by the naive loop."""
    row, said = list(row), list[int]()
    while len(said) < STEPS and not (said and said[-1] in END_TOKENS):
        logits = one_shot(shared_model("casa"), row)[-1].tolist()
        scores = naive_scores(logits, token_ids(row), END_TOKENS, **settings)
        said.append(max(range(len(scores)), key=scores.__getitem__))
        row.append(said[-1])
    return said


def up_to_end(tokens: list[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens, start=1) if token in END_TOKENS]
    return tokens[: ends[0]] if ends else tokens


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_a_batch_are_controlled_one_by_one(use_cache):
    model = shared_model("casa")
    with torch.no_grad():
        output = model.generate(
            **batch(*PROMPTS),
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=END_TOKENS,
            use_cache=use_cache,
            logits_processor=strict_processors(),
        )
    expected = [greedy(row, STRICT) for row in PROMPTS]
    start = max(len(token_ids(row)) for row in PROMPTS)
    assert [up_to_end(row[start:]) for row in output.tolist()] == expected
    assert expected != [greedy(row, {}) for row in PROMPTS]
    assert len({len(said) for said in expected}) > 1, "rows should end at different times"


def test_reordered_beams_keep_their_own_counts():
    """The cache-free search, which has no state to reorder, says the same; so does every row alone."""
    model = shared_model("casa")
    settings = {"max_new_tokens": STEPS, "num_beams": 4, "do_sample": False, "eos_token_id": END_TOKENS}

    def search(*rows: Any, **more: Any) -> list[list[int]]:
        with torch.no_grad():
            output = model.generate(**batch(*rows), **settings, **more, logits_processor=strict_processors())
        start = max(len(token_ids(row)) for row in rows)
        return [up_to_end(row[start:]) for row in output.tolist()]

    together = search(*PROMPTS)
    assert together == search(*PROMPTS, use_cache=False)
    assert together == [search(row)[0] for row in PROMPTS]
    assert together != [greedy(row, STRICT) for row in PROMPTS], "the search should find something else"


# ------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecayingRepetitionPenalty(0.0), "penalty=0.0"),
        (lambda: DecayingRepetitionPenalty(math.nan), "penalty=nan"),
        (lambda: DecayingRepetitionPenalty(1.1, decay=0.0), "decay=0.0"),
        (lambda: DecayingRepetitionPenalty(1.1, decay=1.01), "decay=1.01"),
        (lambda: DecayingRepetitionPenalty(1.1, clamp=-1.0), "clamp=-1.0"),
        (lambda: DecayingRepetitionPenalty(1.1, lookback=0), "lookback=0"),
        (lambda: DecayingRepetitionPenalty(1.1, prompt_ignore_length=-1), "prompt_ignore_length=-1"),
        (lambda: DecayingRepetitionPenalty("a"), "penalty='a' must be a positive number"),
        (lambda: DecayingRepetitionPenalty(math.inf), "penalty=inf"),
        (lambda: DecayingRepetitionPenalty(1.1, decay="a"), "decay='a'"),
        (lambda: DecayingRepetitionPenalty(1.1, clamp=None), "clamp=None"),
        (lambda: DecayingRepetitionPenalty(1.1, lookback=2.5), "lookback=2.5"),
        (lambda: RecentNoRepeatNGram(2.5), "ngram_size=2.5 must be a positive integer"),
        (lambda: RecentNoRepeatNGram(True), "ngram_size=True"),
        (lambda: RecentNoRepeatNGram("4"), "ngram_size='4'"),
        (lambda: RecentNoRepeatNGram(4, lookback=60.5), "lookback=60.5 must be an integer of at least ngram_size=4"),
        (lambda: StopBias(STOPS, "a"), "bias='a'"),
        (lambda: StopBias(STOPS, math.inf), "bias=inf"),
        (lambda: RecentNoRepeatNGram(0), "ngram_size=0"),
        (lambda: RecentNoRepeatNGram(4, lookback=3), "lookback=3"),
        (lambda: StopBias(STOPS, 0.0), "bias=0.0"),
    ],
    ids=range(21),
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
