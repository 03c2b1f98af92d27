# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A conversation on one cache answers as if all of it were read anew for every turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache, GenerationConfig

from casa_hf import CasaForConditionalGeneration, CasaProcessor, cache_nbytes
from casa_hf.answers import Question, answer_batch
from casa_hf.cache_casa import cache_snapshot
from casa_hf.chat import Conversation
from casa_hf.samples import PHOTOGRAPHS

OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
MARK = "<|vision_start|><|vision_end|>"
NEW_TOKENS = 7

# (message, its images): none at first, one, several, none, one that was there before.
TURNS = [
    ("Hello!", []),
    ("What is this?", ["cat"]),
    ("And these?", ["coffee", "rocket"]),
    ("Say it again.", []),
    ("This one?", ["cat"]),
]


@pytest.fixture(scope="module")
def model(casa_folder: Path) -> CasaForConditionalGeneration:
    return CasaForConditionalGeneration.from_pretrained(casa_folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def processor(casa_folder: Path) -> CasaProcessor:
    return CasaProcessor.from_pretrained(casa_folder, max_pixels=112 * 112)


@pytest.fixture(scope="module")
def photographs() -> dict[str, Image.Image]:
    return {name: Image.open(PHOTOGRAPHS / f"{name}.jpg") for name in ("cat", "coffee", "rocket")}


class Rereader:
    """Answers by reading everything anew, without a cache; the chat format is written out by hand."""

    def __init__(self, model: CasaForConditionalGeneration, processor: CasaProcessor):
        self.model, self.processor = model, processor
        self.ids: list[int] = processor.tokenizer(OPENING)["input_ids"]
        self.images: list[Image.Image] = []
        self.positions: list[tuple[int, int]] = []

    def ask(self, text: str, images: list[Image.Image], last_token: int | None, **settings: Any) -> str:
        tokenizer = self.processor.tokenizer
        for token in tokenizer(USER.format(MARK * len(images) + text))["input_ids"]:
            if token == self.model.config.image_token_id:
                self.positions.append((0, len(self.ids)))
            self.ids.append(token)
        self.images += images
        pixels = {}
        if self.images:
            pixels = self.processor.image_processor(self.images, return_tensors="pt")
            pixels["image_positions"] = torch.tensor(self.positions)
        output = self.model.generate(
            torch.tensor([self.ids]),
            max_new_tokens=NEW_TOKENS,
            forced_eos_token_id=last_token,
            use_cache=False,
            **pixels,
            **settings,
        )
        answer = output[0, len(self.ids) :].tolist()
        self.ids += answer[:-1] if answer[-1] in self.model.generation_config.eos_token_id else answer
        self.ids += tokenizer("<|im_end|>\n")["input_ids"]
        return tokenizer.decode(answer, skip_special_tokens=True)


@contextmanager
def images_seen(model: CasaForConditionalGeneration) -> Iterator[list[int]]:
    """Number of images in every call of the vision tower."""
    seen: list[int] = []
    handle = model.model.visual.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


# An answer may stop at its greatest length, at either end token, or at a token that means an image in a prompt.
@pytest.mark.parametrize("last_token", [None, "<|im_end|>", "<|endoftext|>", "<|vision_end|>", "<|image_pad|>"])
def test_every_turn_answers_as_if_all_were_read_anew(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    photographs: dict[str, Image.Image],
    last_token: str | None,
) -> None:
    last_id = None if last_token is None else processor.tokenizer.convert_tokens_to_ids(last_token)
    conversation, rereader = Conversation(model, processor), Rereader(model, processor)
    answers = []
    for text, names in TURNS:
        images = [photographs[name] for name in names]
        with images_seen(model) as seen:
            answer = conversation.ask(text, images, max_new_tokens=NEW_TOKENS, forced_eos_token_id=last_id)
        assert seen == ([len(images)] if images else []), "only the new images are encoded"
        assert answer == rereader.ask(text, images, last_id)
        answers.append(answer)
    assert len(set(answers)) == len(answers), "a model that always says the same would prove nothing"


def test_a_new_image_changes_the_answer(
    model: CasaForConditionalGeneration, processor: CasaProcessor, photographs: dict[str, Image.Image]
) -> None:
    answers = set()
    for name in photographs:
        conversation = Conversation(model, processor)
        conversation.ask("Hello!", max_new_tokens=NEW_TOKENS)
        answers.add(conversation.ask("What is this?", [photographs[name]], max_new_tokens=NEW_TOKENS))
    assert len(answers) == len(photographs)


def test_one_picture_of_any_form_needs_no_list(
    model: CasaForConditionalGeneration, processor: CasaProcessor, photographs: dict[str, Image.Image]
) -> None:
    def answers(*images: Any) -> str:
        return Conversation(model, processor).ask("What is this?", *images, max_new_tokens=NEW_TOKENS)

    cat = photographs["cat"]
    expected = answers([cat])
    file = PHOTOGRAPHS / "cat.jpg"
    for form in (cat, str(file), file, file.read_bytes(), np.asarray(cat), torch.tensor(np.asarray(cat)), (cat,)):
        assert answers(form) == expected
    assert answers(None) == answers() == answers([]) != expected
    with pytest.raises(ValueError, match=r"The image 'cat\.jpg' can't be used: there is no such file"):
        answers("cat.jpg")


def test_pictures_of_one_message_are_stills_without_a_warning(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    photographs: dict[str, Image.Image],
    said: list[str],
) -> None:
    """After text, and where the turn is read once more."""
    conversation = Conversation(model, processor)
    for beams in (1, 2, 2):
        conversation.ask("And these?", [*photographs.values()], max_new_tokens=2, num_beams=beams)
    assert not said


def test_strings_that_end_an_answer(model: CasaForConditionalGeneration, processor: CasaProcessor) -> None:
    """Their tokenizer isn't named as an argument that nobody reads, though `generate` hands it to the model."""
    conversation = Conversation(model, processor)
    whole = conversation.ask("Hello!", max_new_tokens=NEW_TOKENS)
    conversation.reset()
    settings = {"stop_strings": [whole[:3]], "tokenizer": processor.tokenizer}
    assert whole.startswith(conversation.ask("Hello!", max_new_tokens=NEW_TOKENS, **settings))


def test_reset_forgets(
    model: CasaForConditionalGeneration, processor: CasaProcessor, photographs: dict[str, Image.Image]
) -> None:
    conversation = Conversation(model, processor)
    first = conversation.ask("What is this?", [photographs["cat"]], max_new_tokens=NEW_TOKENS)
    conversation.ask("And this?", [photographs["coffee"]], max_new_tokens=NEW_TOKENS)
    conversation.reset()
    assert conversation.ask("What is this?", [photographs["cat"]], max_new_tokens=NEW_TOKENS) == first


def test_a_refused_message_leaves_the_conversation_as_it_was(
    model: CasaForConditionalGeneration, processor: CasaProcessor, photographs: dict[str, Image.Image]
) -> None:
    undisturbed, disturbed = Conversation(model, processor), Conversation(model, processor)
    for conversation in (undisturbed, disturbed):
        conversation.ask("What is this?", [photographs["cat"]], max_new_tokens=NEW_TOKENS)
    with pytest.raises(ValueError, match="half a character"):
        disturbed.ask("A broken \ud83d", max_new_tokens=NEW_TOKENS)
    expected = undisturbed.ask("And now?", max_new_tokens=NEW_TOKENS)
    assert disturbed.ask("And now?", max_new_tokens=NEW_TOKENS) == expected


def test_a_message_that_asks_nothing_is_refused(
    model: CasaForConditionalGeneration, processor: CasaProcessor, photographs: dict[str, Image.Image]
) -> None:
    conversation = Conversation(model, processor)
    with pytest.raises(ValueError, match=r"text is ' ', which asks nothing; expected a question"):
        conversation.ask(" ")
    with pytest.raises(ValueError, match="a question is '', which asks nothing"):
        answer_batch(model, processor, [Question("What?"), Question("")])
    cat = photographs["cat"]
    answer = conversation.ask("", [cat], max_new_tokens=NEW_TOKENS)  # the image is a message
    assert answer_batch(model, processor, [Question("", [cat])], max_new_tokens=NEW_TOKENS) == [answer]


class Failing:
    """A reader of answers that goes away before, or after, the first token."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.left, self.error = after, error

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error

    def end(self) -> None: ...


@pytest.mark.parametrize("error", [OSError("the reader has gone"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("turn", range(len(TURNS)))
def test_whatever_fails_leaves_the_conversation_as_it_was(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    photographs: dict[str, Image.Image],
    turn: int,
    error: BaseException,
) -> None:
    undisturbed, disturbed = Conversation(model, processor), Conversation(model, processor)
    for number, (text, names) in enumerate(TURNS):
        images = [photographs[name] for name in names]
        if number == turn:  # another message with another picture, which opens a window and frees the one before
            for after in (0, 2):
                with pytest.raises(type(error)):
                    disturbed.ask(
                        "Stop!", [photographs["rocket"]], max_new_tokens=NEW_TOKENS, streamer=Failing(after, error)
                    )
        expected = undisturbed.ask(text, images, max_new_tokens=NEW_TOKENS)
        assert disturbed.ask(text, images, max_new_tokens=NEW_TOKENS) == expected
    assert disturbed._ids.equal(undisturbed._ids)
    assert cache_nbytes(disturbed._cache) == cache_nbytes(undisturbed._cache)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "length_penalty": 2.0},
        {"do_sample": True, "top_k": 5},
        {"prompt_lookup_num_tokens": 3},
        {"generation_config": GenerationConfig(num_beams=3, eos_token_id=None)},
    ],
    ids=str,
)
def test_every_way_to_generate_goes_on_from_its_answer(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    photographs: dict[str, Image.Image],
    settings: dict[str, Any],
) -> None:
    """What the conversation then holds gives the logits of one call on everything that was said."""
    conversation = Conversation(model, processor)
    grids, patches, places = [], [], []
    for text, names in TURNS:
        torch.manual_seed(0)
        images, before = [photographs[name] for name in names], conversation._ids.shape[1]
        conversation.ask(text, images, max_new_tokens=NEW_TOKENS, **settings)
        ids = conversation._ids
        if images:
            own = processor.image_processor(images, return_tensors="pt")
            grids.append(own["image_grid_thw"])
            patches.append(own["pixel_values"])
            marks = (ids[0, before:] == model.config.image_token_id).nonzero()[: len(images), 0] + before
            places += [[0, mark] for mark in marks.tolist()]
        shown = {}
        if grids:
            shown = {"image_grid_thw": torch.cat(grids), "pixel_values": torch.cat(patches)}
            shown["image_positions"] = torch.tensor(places)
        following = torch.cat([ids, torch.tensor([[5]])], dim=1)
        with torch.no_grad():
            expected = model(input_ids=following, use_cache=False, **shown).logits[0, -1]
            cache = cache_snapshot(conversation._cache)
            new = following[:, cache.get_seq_length() :]
            logits = model(input_ids=new, cache=cache).logits[0, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-9)


def test_beams_find_what_they_find_when_all_is_read_anew(
    model: CasaForConditionalGeneration, processor: CasaProcessor, photographs: dict[str, Image.Image]
) -> None:
    conversation, rereader = Conversation(model, processor), Rereader(model, processor)
    for text, names in TURNS:
        images = [photographs[name] for name in names]
        answer = conversation.ask(text, images, max_new_tokens=NEW_TOKENS, num_beams=3)
        assert answer == rereader.ask(text, images, None, num_beams=3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"use_cache": False}, ValueError, "use_cache=False isn't possible in a conversation"),
        ({"generation_config": GenerationConfig(use_cache=False)}, ValueError, "use_cache=False"),
        ({"cache_implementation": "static"}, ValueError, "cache_implementation='static'"),
        ({"cache_implementation": "quantized"}, ValueError, "cache_implementation='quantized'"),
        ({"num_return_sequences": 2, "do_sample": True}, ValueError, "num_return_sequences=2"),
        ({"num_return_sequences": 2, "num_beams": 2}, ValueError, "num_return_sequences=2"),
        ({"cache": DynamicCache()}, TypeError, "cache"),
        ({"past_key_values": DynamicCache()}, TypeError, "past_key_values"),
        ({"pixel_values": torch.zeros(1)}, TypeError, "pixel_values"),
        ({"attention_mask": torch.zeros(1)}, TypeError, "attention_mask"),
        ({"return_dict_in_generate": False}, TypeError, "return_dict_in_generate"),
        ({"num_beams": 2, "streamer": Failing(9, OSError())}, ValueError, "streamer"),
        ({"no_such_setting": 2}, ValueError, "no_such_setting"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_a_conversation_cannot_have_are_refused_before_anything_is_lost(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    photographs: dict[str, Image.Image],
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    conversation, undisturbed = Conversation(model, processor), Conversation(model, processor)
    for each in (conversation, undisturbed):
        each.ask("What is this?", [photographs["cat"]], max_new_tokens=NEW_TOKENS)
    with pytest.raises(error, match=message):
        conversation.ask("And now?", max_new_tokens=NEW_TOKENS, **settings)
    expected = undisturbed.ask("And now?", max_new_tokens=NEW_TOKENS)
    assert conversation.ask("And now?", max_new_tokens=NEW_TOKENS) == expected


def test_a_model_whose_settings_ask_for_a_static_cache_is_refused_by_name(
    model: CasaForConditionalGeneration, processor: CasaProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
    with pytest.raises(ValueError, match=r"model\.generation_config"):
        Conversation(model, processor).ask("Hello!")
