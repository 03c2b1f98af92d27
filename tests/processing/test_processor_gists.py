# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Gist tokens: the processor adds them to the tokenizer and writes them after every image token."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

from casa_hf import CasaProcessor
from examples.tiny_source import build_tiny_helium

SIDE = 140
START, END, GISTS = "<|vision_start|>", "<|vision_end|>", "<|gist_0|><|gist_1|>"
QWEN = {"image": f"{START}<|image_pad|>{END}", "video": f"{START}<|video_pad|>{END}", "written": f"{START}{END}"}
PLAIN = {"image": "<|image|>", "video": "<|video|>", "written": "<|image|>"}
BOX = ["<|box_start|>", "<|box_end|>"]
OWN = {"image": "".join(BOX), "video": "<|video_pad|>".join(BOX), "written": "".join(BOX)}
FORMS = {"qwen": QWEN, "added": QWEN, "single": PLAIN, "own": OWN}


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[CasaProcessor, CasaProcessor]]:
    """By notation, a processor without gist tokens and one with two."""
    helium = build_tiny_helium(tmp_path_factory.mktemp("helium"))
    boxes = tmp_path_factory.mktemp("boxes")
    tokenizer = AutoTokenizer.from_pretrained(helium)
    tokenizer.add_special_tokens({"extra_special_tokens": BOX})
    tokenizer.save_pretrained(boxes)
    limits = {"max_pixels": SIDE**2, "frame_max_pixels": SIDE**2 // 4}
    makers = {
        "qwen": partial(CasaProcessor.from_source, source, **limits),
        "added": partial(CasaProcessor.from_text_source, helium, source, **limits),
        "single": partial(CasaProcessor.from_text_source, helium, source, image_delimiters="<|image|>", **limits),
        "own": partial(CasaProcessor.from_text_source, boxes, source, image_delimiters=BOX, **limits),
    }
    return {name: (make(num_gist_tokens=0), make(num_gist_tokens=2)) for name, make in makers.items()}


@pytest.fixture(params=FORMS)
def pair(request: pytest.FixtureRequest, made: Any) -> tuple[CasaProcessor, CasaProcessor, dict[str, str]]:
    """Both processors of a notation, and how it writes an image, a video, and either in the prompt."""
    return (*made[request.param], FORMS[request.param])


def visuals(photos: dict[str, Any]) -> dict[str, Any]:
    return {"images": photos["cat"], "videos": [[photos["rocket"], photos["coffee"], photos["rocket"]]]}


def test_they_are_special_tokens_after_all_others(pair):
    without, processor, _ = pair
    assert without.gist_token_ids == []
    assert processor.gist_token_ids == [len(without.tokenizer), len(without.tokenizer) + 1]
    assert len(processor.tokenizer) == len(without.tokenizer) + 2
    assert processor.tokenizer.convert_ids_to_tokens(processor.gist_token_ids) == ["<|gist_0|>", "<|gist_1|>"]
    assert processor.decode(processor.gist_token_ids, skip_special_tokens=True) == ""
    assert processor.image_token_id == without.image_token_id
    assert processor.tokenizer.all_special_ids == [*without.tokenizer.all_special_ids, *processor.gist_token_ids]


def test_they_follow_every_image_and_every_frame(pair, photos):
    without, processor, form = pair
    text = f"See {form['image']}, then {form['video']}."
    inputs, plain = (each(text=text, **visuals(photos), return_tensors="pt") for each in (processor, without))
    written = form["written"] + GISTS
    expected = processor.tokenizer(f"See {written}, then {written * 3}.")["input_ids"]
    assert inputs["input_ids"].tolist() == [expected]
    kept = [index for index, token in enumerate(expected) if token not in processor.gist_token_ids]
    assert len(expected) - len(kept) == 8
    for key in ("input_ids", "mm_token_type_ids"):
        assert torch.equal(inputs[key][:, kept], plain[key])
    assert torch.equal(inputs["mm_token_type_ids"] != 0, inputs["input_ids"] == processor.image_token_id)
    assert torch.equal(inputs["pixel_values"], plain["pixel_values"])


def test_a_decoded_prompt_gives_the_same_ids(pair, photos):
    _, processor, form = pair
    images = [photos["cat"], photos["coffee"]]
    ids = processor(text=f"See {form['image']} and {form['image']}", images=images)["input_ids"]
    again = processor(text=processor.decode(ids[0]), images=images, add_special_tokens=False)["input_ids"]
    assert again == ids


def test_offsets_and_assistant_masks_refer_to_the_text_as_it_was_given(pair, photos):
    _, processor, form = pair
    text = f"See {form['image']}, then {form['video']}."
    inputs = processor(text=text, **visuals(photos), return_offsets_mapping=True)
    tokens, spans = inputs["input_ids"][0], inputs["offset_mapping"][0]
    for token, (start, end) in zip(tokens, spans, strict=True):
        if token in processor.gist_token_ids:
            assert text[start:end] in (form["image"], form["video"])
    assert text[slice(*spans[-1])] == "."

    template = (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}{form['image']}{{% else %}}"
        "{% generation %}{{ m.content[0].text }}{% endgeneration %}{% endif %}\n{% endfor %}"
    )
    messages = [
        {"role": "user", "content": [{"type": "image", "image": photos["cat"]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a small cat."}]},
    ]
    inputs = processor.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    answered = np.array(inputs["input_ids"])[0][np.array(inputs["assistant_masks"])[0].astype(bool)]
    assert processor.decode(answered.tolist()) == "a small cat."


def test_saving_and_loading(pair, photos, tmp_path):
    _, processor, form = pair
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.gist_token_ids == processor.gist_token_ids and loaded.num_gist_tokens == 2
    text = f"{form['image']}{form['video']}What?"
    assert loaded(text=text, **visuals(photos))["input_ids"] == processor(text=text, **visuals(photos))["input_ids"]


def test_more_of_them_than_the_tokenizer_has(pair):
    _, processor, _ = pair
    delimiters = {"image_token": processor.image_token, "vision_start_token": processor.vision_start_token}
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer, **delimiters}
    assert CasaProcessor(**parts, num_gist_tokens=1).gist_token_ids == (processor.gist_token_ids[:1])
    with pytest.raises(ValueError, match=r"num_gist_tokens=3, but the tokenizer has no <\|gist_2\|>; "):
        CasaProcessor(**parts, num_gist_tokens=3)


@pytest.mark.parametrize("number", [-1, 1025, 10**12, 2.0, True, None])
def test_numbers_out_of_range(pair, source, number):
    """None of these makes a list of tokens first."""
    _, processor, _ = pair
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    refusal = rf"num_gist_tokens={number} is out of range; expected an integer from 0 to 1024\."
    for make in (partial(CasaProcessor, **parts), partial(CasaProcessor.from_source, source)):
        with pytest.raises(ValueError, match=refusal):
            make(num_gist_tokens=number)


def test_truncation_may_not_cut_off_a_gist_token(pair, photos):
    _, processor, form = copy.deepcopy(pair)  # tokenizers keep the truncation that they were asked for
    text = f"Before {form['image']} after and after."
    last = processor(images=photos["cat"], text=text)["input_ids"][0].index(processor.gist_token_ids[-1])
    kept = processor(images=photos["cat"], text=text, truncation=True, max_length=last + 1)
    assert kept["input_ids"][0][-2:] == processor.gist_token_ids
    with pytest.raises(ValueError, match=r"leaves 0 of the 1 images and frames"):
        processor(images=photos["cat"], text=text, truncation=True, max_length=last)
