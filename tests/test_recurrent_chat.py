# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations with a model that has linear attention: every way to generate continues from the very state of its
answer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image

from casa_hf import CasaForConditionalGeneration, CasaProcessor, cache_nbytes, convert_checkpoint
from casa_hf.cache_casa import cache_state
from casa_hf.chat import Conversation
from casa_hf.samples import PHOTOGRAPHS
from examples.tiny_source import build_tiny_source
from tests.test_chat import NEW_TOKENS, TURNS, Failing, Rereader

Pair = tuple[Any, CasaProcessor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("qwen3_5")
    build_tiny_source(folder / "source", family="qwen3_5", num_hidden_layers=4)
    convert_checkpoint(folder / "source", folder / "casa")
    model = CasaForConditionalGeneration.from_pretrained(folder / "casa", dtype=torch.float64).eval()
    return model, CasaProcessor.from_pretrained(folder / "casa", min_pixels=1, max_pixels=128 * 128)


def pictures(names: list[str]) -> list[Image.Image]:
    return [Image.open(PHOTOGRAPHS / f"{name}.jpg") for name in names]


def rereader_of(model: Any, processor: CasaProcessor) -> Rereader:
    made = Rereader(model, processor)
    made.ids = []  # this family's template has no system message of its own
    return made


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_every_turn_answers_as_if_all_were_read_anew(pair: Pair, settings: dict[str, Any]) -> None:
    conversation, rereader = Conversation(*pair), rereader_of(*pair)
    answers = []
    for text, names in TURNS:
        answers.append(conversation.ask(text, pictures(names), max_new_tokens=NEW_TOKENS, **settings))
        assert answers[-1] == rereader.ask(text, pictures(names), None, **settings)
    assert len(set(answers)) > 3


@pytest.mark.parametrize("settings", [{"do_sample": True, "top_k": 5}, {"num_beams": 2, "do_sample": True}], ids=str)
def test_a_drawn_answer_is_continued(pair: Pair, settings: dict[str, Any]) -> None:
    """A second conversation that reads what the first one has said, from scratch, answers the same to what comes."""
    conversation = Conversation(*pair)
    torch.manual_seed(0)
    conversation.ask(TURNS[1][0], pictures(["cat"]), max_new_tokens=NEW_TOKENS, **settings)
    other = Conversation(*pair)
    inputs = pair[1](
        text=[
            other._new_text({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TURNS[1][0]}]})
        ],
        images=pictures(["cat"]),
        return_tensors="pt",
        add_special_tokens=False,
    )
    other._cache = other._read(conversation._ids, other._image_inputs(inputs), None)
    other._ids = conversation._ids
    for text, names in TURNS[2:]:
        expected = other.ask(text, pictures(names), max_new_tokens=NEW_TOKENS)
        assert conversation.ask(text, pictures(names), max_new_tokens=NEW_TOKENS) == expected


@pytest.mark.parametrize("after", [0, 2])
def test_whatever_fails_leaves_the_state_as_it_was(pair: Pair, after: int) -> None:
    conversation = Conversation(*pair)
    for turn, (text, names) in enumerate(TURNS[:3]):
        if turn:
            before, nbytes = copy.deepcopy(cache_state(conversation._cache)), cache_nbytes(conversation._cache)
            with pytest.raises(OSError, match="the reader has gone"):
                conversation.ask(
                    "Stop!",
                    pictures(["rocket"]),
                    max_new_tokens=NEW_TOKENS,
                    streamer=Failing(after, OSError("the reader has gone")),
                )
            assert cache_nbytes(conversation._cache) == nbytes
            held = cache_state(conversation._cache)["layers"]
            for layer, other in zip(before["layers"], held, strict=True):
                assert all(map(torch.equal, layer.get("recurrent", []), other.get("recurrent", [])))
        conversation.ask(text, pictures(names), max_new_tokens=NEW_TOKENS)
    with pytest.raises(NotImplementedError, match="this model has blocks of linear attention"):
        conversation.ask("And now?", max_new_tokens=NEW_TOKENS, prompt_lookup_num_tokens=3)
    undisturbed = Conversation(*pair)
    for text, names in TURNS[:3]:
        undisturbed.ask(text, pictures(names), max_new_tokens=NEW_TOKENS)
    expected = undisturbed.ask("And now?", max_new_tokens=NEW_TOKENS)
    assert conversation.ask("And now?", max_new_tokens=NEW_TOKENS) == expected
