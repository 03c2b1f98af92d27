# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Text that is decoded token by token is the text that is decoded at once, in whole characters."""

from __future__ import annotations

import random

import pytest

from casa_hf.streaming.pieces import TextPieces
from examples.tiny_source import build_text_tokenizer, build_tokenizer

TEXT = "A cat — the 🐈‍⬛ cat — sits.  Zwei Bäume,\n\tdrei 木, مرحبا! \ufffd 🏳️‍🌈 end"


@pytest.fixture(scope="module", params=[build_tokenizer, build_text_tokenizer], ids=["byte-level", "byte fallback"])
def tokenizer(request):
    return request.param()


def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    pieces = TextPieces(tokenizer)
    given = [pieces.add(token) for token in ids]
    assert "".join(text for text, _ in given) == tokenizer.decode(ids) == TEXT
    assert [token for _, tokens in given for token in tokens] == ids
    assert all(bool(text) == bool(tokens) for text, tokens in given)
    assert any(len(tokens) > 1 for _, tokens in given), "no character was split over tokens"
    assert [text.strip() for text, _ in given if "\ufffd" in text] == ["\ufffd"]


@pytest.mark.parametrize("seed", range(5))
def test_tokens_in_any_order_join_to_the_same_text(seed):
    """Bytes that are no characters included; only what may still become one is held back."""
    tokenizer = build_tokenizer()
    numbers = random.Random(seed)
    ids = [numbers.randrange(len(tokenizer) + 40) for _ in range(300)]  # some ids have no token
    pieces = TextPieces(tokenizer)
    said = "".join(pieces.add(token)[0] for token in ids)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert whole.startswith(said) and len(whole) - len(said) <= 8
    assert len(said) > 300


def test_special_tokens_are_no_text(tokenizer):
    special = tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens[0])
    pieces = TextPieces(tokenizer)
    words = tokenizer("two words", add_special_tokens=False)["input_ids"]
    given = [pieces.add(token) for word in words for token in (special, word, special)]
    assert "".join(text for text, _ in given) == "two words"
    assert special not in [token for _, tokens in given for token in tokens]


def test_bytes_that_never_become_a_character_do_not_hold_the_text_back_for_ever(tokenizer):
    text = "0xE6 begins a character of three bytes"
    byte = next(i for i in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(i) in ("æ", "<0xE6>"))
    pieces = TextPieces(tokenizer)
    given = [pieces.add(byte)[0] for _ in range(50)]
    given += [pieces.add(token)[0] for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "\ufffd" in "".join(given[:50])
    assert "".join(given).endswith(text)


def test_a_state_is_gone_on_from():
    tokenizer = build_text_tokenizer()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    for place in range(len(ids)):
        first, second = TextPieces(tokenizer), TextPieces(tokenizer)
        said = "".join(first.add(token)[0] for token in ids[:place])
        second.load(first.state())
        assert said + "".join(second.add(token)[0] for token in ids[place:]) == TEXT
