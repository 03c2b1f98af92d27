# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Processor and model together: `pipeline("image-text-to-text")` answers what `generate` answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, pipeline
from transformers.pipelines import any_to_any
from transformers.utils import is_torchvision_available

from casa_hf import CasaForConditionalGeneration, CasaProcessor

MARK = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def folder(source: Path, processor: CasaProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("casa")
    CasaForConditionalGeneration.from_pretrained(source).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return pipeline("image-text-to-text", model=str(folder))


def generated(folder: Path, inputs: Any) -> list[str]:
    model = CasaForConditionalGeneration.from_pretrained(folder)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return AutoProcessor.from_pretrained(folder).batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def test_a_conversation(folder, pipe, processor, photos):
    answers = []
    for name in ("cat", "coffee"):
        content = [{"type": "image", "image": photos[name]}, {"type": "text", "text": "What is in this picture?"}]
        messages = [{"role": "user", "content": content}]
        (record,) = pipe(text=messages, max_new_tokens=8, return_full_text=False)
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        assert [record["generated_text"]] == generated(folder, inputs)
        answers.append(record["generated_text"])
    assert answers[0] != answers[1]


def test_a_batch_of_prompts(folder, pipe, processor, photos):
    texts, images = [f"{MARK}What?", f"Describe {MARK} in one sentence."], [photos["cat"], photos["coffee"]]
    records = pipe(images=images, text=texts, max_new_tokens=8, return_full_text=False)
    inputs = processor(images=images, text=texts, return_tensors="pt")
    assert [record["generated_text"] for record in records] == generated(folder, inputs)


def test_a_batch_with_and_without_images(pipe, photos):
    """The pipeline puts only inputs with the same keys into one batch."""
    asked = [(photos["cat"], "What?"), (None, "And what else?"), (photos["coffee"], "Hm?"), (None, "Say it.")]
    chats = []
    for picture, text in asked:
        content = [{"type": "image", "image": picture}] if picture else []
        chats.append([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    alone = [pipe(text=chat, **options)[0]["generated_text"] for chat in chats]
    assert len(set(alone)) == len(chats)
    together = pipe(text=chats, batch_size=4, **options)
    assert [records[0]["generated_text"] for records in together] == alone


def test_lists_of_images_by_prompt(pipe, photos):
    texts = [f"{MARK}What?", "And what else?", f"{MARK}{MARK}Hm?"]
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    images = [[photos["cat"]], [], [photos["coffee"], photos["cat"]]]
    alone = [pipe(text=text, images=own or None, **options)[0] for text, own in zip(texts, images, strict=True)]
    together = pipe(text=texts, images=images, **options)
    assert [record["generated_text"] for record in together] == [record["generated_text"] for record in alone]


def test_text_alone(folder, pipe, processor):
    (record,) = pipe(text="What is the answer?", max_new_tokens=8, return_full_text=False)
    assert [record["generated_text"]] == generated(folder, processor(text="What is the answer?", return_tensors="pt"))


def test_any_to_any(folder, pipe, photos, monkeypatch):
    """The pipeline of models that may also write or hear: the same answers to images and text."""
    if not is_torchvision_available():  # which it asks for wherever there are images; CASA's processor doesn't need it
        monkeypatch.setattr(any_to_any, "requires_backends", lambda *_: None)
    other = pipeline("any-to-any", model=str(folder))
    assert type(other.model) is CasaForConditionalGeneration
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    for name in ("cat", "coffee"):
        content = [{"type": "image", "image": photos[name]}, {"type": "text", "text": "What is in this picture?"}]
        messages = [{"role": "user", "content": content}]
        assert other(text=messages, **options) == pipe(text=messages, **options)
    texts, images = [f"{MARK}What?", f"Describe {MARK} in one sentence."], [photos["cat"], photos["coffee"]]
    together = other(text=texts, images=images, batch_size=2, **options)
    alone = pipe(text=texts, images=images, **options)
    assert [each["generated_text"] for each in together] == [each["generated_text"] for each in alone]
    with pytest.raises(ValueError, match="no audio"):
        other(text="What?", audio="speech.wav", **options)
