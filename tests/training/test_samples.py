# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations to tensors: what is trained on, in which forms conversations may come, what is refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from casa_hf import CasaProcessor, convert_checkpoint
from casa_hf.training.samples import Dialogue, encode, logger, measure, unseen_image
from examples.tiny_source import build_tiny_helium
from tests.training.helpers import CONVERSATIONS, PHOTOGRAPHS, ask, load_processor


def trained_text(processor, example):
    sample = encode(processor, example)
    assert ((sample.labels == -100) | (sample.labels == sample.input_ids)).all()
    return processor.tokenizer.decode(sample.input_ids[sample.labels != -100])


def test_labels_are_the_answers_with_what_ends_them(processor):
    assert trained_text(processor, CONVERSATIONS[0]) == "A small cat with amber eyes.<|im_end|>"
    assert trained_text(processor, CONVERSATIONS[3]) == (
        "A rocket before its launch.<|im_end|>A glass of water.<|im_end|>"
    )


def test_words_of_an_answer_that_the_question_has_too_are_told_apart(processor):
    example = ask("Say: the cat.", "the cat.")
    sample = encode(processor, example)
    assert trained_text(processor, example) == "the cat.<|im_end|>"
    assert (sample.labels[-2:] == torch.tensor([sample.input_ids[-2], -100])).all()


def test_image_placeholders_in_an_answer_are_not_trained_on(converted):
    processor = load_processor(converted("casa", num_gist_tokens=2))
    example = ask("Show me a cat.", "")
    example["messages"][1]["content"] = [
        {"type": "text", "text": "Here:"},
        {"type": "image", "path": str(PHOTOGRAPHS / "cat.jpg")},
        {"type": "text", "text": "a cat."},
    ]
    sample = encode(processor, example)
    assert "<|vision_start|><|vision_end|><|gist_0|><|gist_1|>" in processor.tokenizer.decode(sample.input_ids)
    assert trained_text(processor, example) == "Here:a cat.<|im_end|>"


@pytest.mark.parametrize("delimiters", [("<|vision_start|>", "<|vision_end|>"), ("<|image|>",)])
def test_a_tokenizer_without_delimiters(source_folder, tmp_path, delimiters):
    helium = build_tiny_helium(tmp_path / "helium")
    vision = {"vision_from": source_folder, "image_delimiters": delimiters}
    folder = convert_checkpoint(helium, tmp_path / "casa", **vision).output
    processor = load_processor(folder)
    assert trained_text(processor, CONVERSATIONS[0]).strip() == "A small cat with amber eyes.</s>"
    assert measure(processor, CONVERSATIONS[3]) == size(encode(processor, CONVERSATIONS[3]))
    unseen = unseen_image(processor)
    assert processor.tokenizer.decode(unseen.input_ids) == "".join(delimiters)


def size(sample):
    return sample.num_tokens, sample.num_image_tokens


@pytest.mark.parametrize("index", range(len(CONVERSATIONS)))
def test_measured_without_pixels(processor, index):
    assert measure(processor, CONVERSATIONS[index]) == size(encode(processor, CONVERSATIONS[index]))


@pytest.mark.parametrize("shape", [(500, 40), (40, 500), (84, 84), (30, 29)])
def test_measured_for_images_of_any_form(processor, shape, tmp_path):
    Image.new("RGB", shape, "red").save(tmp_path / "image.png")
    for image in (Image.new("RGB", shape), str(tmp_path / "image.png")):
        example = {**ask("What?", "Red."), "images": [image]}
        sample = encode(processor, example)
        assert measure(processor, example) == size(sample) and sample.num_image_tokens > 0


def test_measured_for_the_frames_of_a_clip(processor):
    frames = [Image.new("RGB", (60 + 30 * i, 90), "blue") for i in range(3)]
    example = {"messages": ask("What changed?", "Nothing.")["messages"], "videos": [frames]}
    sample = encode(processor, example)
    assert len(sample.image_grid_thw) == 3 and (sample.mm_token_type_ids == 2).sum() == 3
    assert measure(processor, example) == size(sample)


def test_stored_images_are_turned_upright_like_files(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.open(PHOTOGRAPHS / "cat.jpg").resize((60, 200)).save(tmp_path / "cat.png", exif=exif)
    file = {**ask("What?", "A cat.", "cat"), "images": [str(tmp_path / "cat.png")]}
    stored = {**file, "images": [{"bytes": (tmp_path / "cat.png").read_bytes(), "path": None}]}
    expected, found = encode(processor, file), encode(processor, stored)
    height, width = expected.image_grid_thw[0, 1:]
    assert width > height and torch.equal(found.image_grid_thw, expected.image_grid_thw)
    assert torch.equal(found.pixel_values, expected.pixel_values)
    assert measure(processor, stored) == size(found)


def test_forms_of_one_conversation_give_the_same(processor):
    path = str(PHOTOGRAPHS / "cat.jpg")
    expected = encode(processor, ask("What is this?", "A cat.", "cat"))
    answer = {"role": "assistant", "content": "A cat."}
    with open(path, "rb") as file:
        stored = {"bytes": file.read(), "path": None}
    forms = [
        # No part is an image: the images come before the text of the first question.
        {"messages": [{"role": "user", "content": "What is this?"}, answer], "images": [path]},
        {"messages": [{"role": "user", "content": "What is this?"}, answer], "image": Image.open(path)},
        {"messages": [{"role": "user", "content": "What is this?"}, answer], "images": [stored]},
    ]
    for holder in ({"image": path}, {"path": path}, {"image_url": {"url": path}, "type": "image_url"}):
        parts = [{"type": "image", **holder}, {"type": "text", "text": "What is this?"}]
        forms.append({"messages": [{"role": "user", "content": parts}, answer]})
    # As a table stores them, each part with the fields of all others.
    parts = [{"type": "image", "text": None, "image": None}, {"type": "text", "text": "What is this?", "image": None}]
    forms.append({"messages": [{"role": "user", "content": parts}, answer], "images": [path], "videos": None})
    for form in forms:
        sample = encode(processor, form)
        assert torch.equal(sample.input_ids, expected.input_ids)
        assert torch.equal(sample.pixel_values, expected.pixel_values)


def with_images(text, *images):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "A cat."}]
    return {"messages": messages, "images": images}


def test_placeholders_in_texts_place_the_images(processor):
    """As LLaVA's data have them; the text is what is said, without placeholders and the breaks that set them off."""
    cat, coffee = str(PHOTOGRAPHS / "cat.jpg"), str(PHOTOGRAPHS / "coffee.jpg")
    image, said = {"type": "image"}, lambda text: {"type": "text", "text": text}
    for text, parts in (
        ("<image>\nWhat is this?", [image, said("What is this?")]),
        ("What is this?\n<image>", [said("What is this?"), image]),
        ("<image>", [image]),
        ("Is <image> one?", [said("Is "), image, said(" one?")]),
    ):
        dialogue = Dialogue.of(with_images(text, cat))
        assert dialogue.messages[0]["content"] == parts and dialogue.images == [cat]
    two = Dialogue.of(with_images("<image>\n<image>\nFirst\nand second?", cat, coffee))
    assert two.messages[0]["content"] == [image, image, said("First\nand second?")]
    sample = encode(processor, with_images("<image>\nWhat is this?", cat))
    assert torch.equal(sample.input_ids, encode(processor, ask("What is this?", "A cat.", "cat")).input_ids)

    later = {
        "messages": [
            {"role": "user", "content": [said("<image>\nAnd a clip:\n<video>")]},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "This one: <image>"},
            {"role": "assistant", "content": "No."},
        ],
        "images": [cat, coffee],
        "video": [Image.new("RGB", (56, 56))],
    }
    dialogue = Dialogue.of(later)
    assert dialogue.messages[0]["content"] == [image, said("And a clip:"), {"type": "video"}]
    assert dialogue.messages[2]["content"] == [said("This one: "), image]
    assert dialogue.images == [cat, coffee] and len(dialogue.videos) == 1
    assert later["messages"][2]["content"] == "This one: <image>"


def test_placeholders_are_text_where_parts_or_nothing_are_images(processor):
    assert Dialogue.of(with_images("What does <image> do in SVG?")).messages[0]["content"] == [
        {"type": "text", "text": "What does <image> do in SVG?"}
    ]
    shown = ask("What does <image> do?", "It shows this.", "cat")
    assert Dialogue.of(shown).messages[0]["content"] == shown["messages"][0]["content"]


def test_one_image_beside_an_empty_list_is_used():
    path = str(PHOTOGRAPHS / "cat.jpg")
    example = {**with_images("What?"), "images": [], "image": path, "videos": None}
    assert Dialogue.of(example).images == [path]


def test_reading_leaves_the_example_as_it_is(processor):
    example = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]}
    example["images"] = [str(PHOTOGRAPHS / "cat.jpg")]
    assert torch.equal(encode(processor, example).input_ids, encode(processor, example).input_ids)


def test_the_question_of_a_conversation():
    question, answer = Dialogue.of(CONVERSATIONS[3]).question()
    assert answer == "A glass of water."
    assert [turn["role"] for turn in question.messages] == ["user", "assistant", "user"]
    assert len(question.images) == 2


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ({"text": "x"}, ["text", "messages"]),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            ["has the roles ['user']; expected an assistant message", "Add the answer."],
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            ["['assistant']", "after another one. Add the question."],
        ),
        ({**ask("x", "y", "cat"), "images": []}, ["0 images beside", "without its own (1). Add the rest."]),
        (
            {**ask("x", "y", "cat"), "images": ["a.jpg", "b.jpg"]},
            ["2 images beside", "without its own (1). Remove the rest."],
        ),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, ["audio", "image or video"]),
        (with_images("<image>\n<image>\nx", "a.jpg"), ["1 image beside", "2 placeholders <image>", "parts"]),
        (with_images("<image> x", "a.jpg", "b.jpg"), ["2 images", "1 placeholder <image>"]),
        ({**with_images("x", "a.jpg"), "image": "b.jpg"}, ["both `images` and `image`"]),
        ({"messages": ["x"]}, ["'x'", "role"]),
        (
            {
                "messages": [
                    *ask("x", "y")["messages"],
                    {"role": "assistant", "content": "", "tool_calls": [{"id": 7}]},
                ]
            },
            ["`tool_calls` is [{'id': 7}]", "as text"],
        ),
        ({**ask("x", "y"), "tools": [{"name": "look"}]}, ["`tools` is [{'name': 'look'}]", "as text"]),
        ({"messages": [{"role": "user", "content": 3}]}, ["3", "parts"]),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, ["'hi'", "mapping"]),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, ["['text']", "image or video"]),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, ["None", "expected a string"]),
        (
            {**ask("x", "y", "cat"), "messages": [{"role": "user", "content": [{"text": 3}]}]},
            ["3", "expected a string"],
        ),
        ({**with_images("x"), "images": 3}, ["`images`", "3", "list"]),
        ({**with_images("x"), "images": "a.jpg"}, ["`images`", "'a.jpg'", "list"]),
        ({**with_images("x"), "videos": {"path": "a.mp4"}}, ["`videos`", "a.mp4", "list"]),
    ],
)
def test_unusable_conversations_are_refused(example, words):
    with pytest.raises(ValueError) as refused:
        Dialogue.of(example)
    assert all(word in str(refused.value) for word in words)


def test_a_template_that_rewrites_earlier_turns_is_refused(casa_folder):
    processor = CasaProcessor.from_pretrained(casa_folder)
    processor.chat_template = "{% for m in messages %}{{ m.role if loop.last else '-' }}{% endfor %}"
    with pytest.raises(ValueError, match="message 3"):
        encode(processor, CONVERSATIONS[3])


# As templates of models that reason: what led to an answer stands in the last one only, be it nothing.
REASONING = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {{- '<think>\\n\\n</think>\\n\\n' if message.role == 'assistant' and loop.last -}}
    {%- for part in message.content -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' + opening if add_generation_prompt -}}
"""


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_answers_that_are_written_otherwise_once_more_follows_have_no_labels(casa_folder, opening, caplog):
    processor = CasaProcessor.from_pretrained(casa_folder)
    processor.chat_template = f"{{%- set opening = {opening!r} -%}}" + REASONING
    logger.warning_once.cache_clear()
    with caplog.at_level("WARNING", "casa_hf.training.samples"):
        for _ in range(2):
            last = trained_text(processor, CONVERSATIONS[3])
    assert last == "<think>\n\n</think>\n\nA glass of water.<|im_end|>".removeprefix(opening)
    assert "A rocket before its launch." in processor.tokenizer.decode(encode(processor, CONVERSATIONS[3]).input_ids)
    assert [record.getMessage().split(" differently")[0] for record in caplog.records] == [
        "The chat template renders earlier answers"
    ]
    # A conversation up to the first answer trains that.
    first = {"messages": CONVERSATIONS[3]["messages"][:2], "images": CONVERSATIONS[3]["images"][:1]}
    assert trained_text(processor, first) == (
        "<think>\n\n</think>\n\nA rocket before its launch.<|im_end|>".removeprefix(opening)
    )
