# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`CasaProcessor.apply_chat_template`: stock chat templates, images from everywhere, batches."""

from __future__ import annotations

import base64
import inspect
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from casa_hf.samples import CAT, PHOTOGRAPHS

ALL = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


def user(*parts: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def image(picture: Any) -> dict[str, Any]:
    return {"type": "image", "image": picture}


def stock_ids(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    placeholder = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return [token for token in tokenizer(text)["input_ids"] if token != placeholder]


def test_several_images_in_several_turns(processor, tokenizer, stock_pixels, photos):
    cat, coffee, rocket = (photos[name] for name in ("cat", "coffee", "rocket"))
    messages = [
        {"role": "system", "content": "Be brief."},
        user("Look:", image(cat), "and", image(coffee), "What do they share?"),
        assistant("Nothing."),
        user(image(rocket), "And this?"),
    ]
    inputs = processor.apply_chat_template(messages, **ALL)
    assert inputs["input_ids"].tolist() == [stock_ids(tokenizer, messages, add_generation_prompt=True)]
    assert torch.equal(inputs["pixel_values"], stock_pixels([cat, coffee, rocket])["pixel_values"])
    assert inputs["mm_token_type_ids"].sum() == 3
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == processor.image_token_id)


def test_the_prompt_is_what_qwen_writes(processor):
    messages = [user({"type": "image"}, "Hm?"), assistant("Yes."), user({"type": "video"}, "So?")]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, add_vision_id=True)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nPicture 1: <|vision_start|><|image_pad|><|vision_end|>Hm?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nVideo 1: <|vision_start|><|video_pad|><|vision_end|>So?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def encoded_photo() -> str:
    return base64.b64encode((PHOTOGRAPHS / "cat.jpg").read_bytes()).decode()


@pytest.mark.parametrize(
    "part",
    [
        lambda cat: {"type": "image", "path": str(PHOTOGRAPHS / "cat.jpg")},
        lambda cat: image(str(PHOTOGRAPHS / "cat.jpg")),
        lambda cat: image(PHOTOGRAPHS / "cat.jpg"),
        lambda cat: {"type": "image", "base64": encoded_photo()},
        lambda cat: {"type": "image", "url": f"data:image/jpeg;base64,{encoded_photo()}"},
        lambda cat: image(np.array(cat)),
        lambda cat: image(torch.tensor(np.array(cat)).permute(2, 0, 1)),
    ],
    ids=["path", "image=str", "image=Path", "base64", "data url", "array", "tensor"],
)
def test_an_image_can_come_from_anywhere(processor, photos, part):
    expected = processor.apply_chat_template([user(image(photos["cat"]), "What?")], **ALL)
    inputs = processor.apply_chat_template([user(part(photos["cat"]), "What?")], **ALL)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


@pytest.mark.parametrize("form", ["url", "image_url"])
def test_an_image_can_come_from_the_web(processor, photos, serve, form):
    url = f"{serve(PHOTOGRAPHS)}/cat.jpg"
    part = {"type": "image", "url": url} if form == "url" else {"type": "image_url", "image_url": {"url": url}}
    expected = processor.apply_chat_template([user(image(photos["cat"]), "What?")], **ALL)
    inputs = processor.apply_chat_template([user(part, "What?")], **ALL)
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


def test_a_batch_of_conversations_equals_each_of_them(processor, photos):
    conversations = [
        [user(image(photos["cat"]), "What is it?")],
        [user("No image here, but quite some more text than elsewhere.")],
        [user(image(photos["coffee"]), image(photos["rocket"]), "Which one?"), assistant("The first."), user("Why?")],
    ]
    batch = processor.apply_chat_template(conversations, **ALL)
    width = batch["input_ids"].shape[1]
    patches = []
    for row, messages in enumerate(conversations):
        single = processor.apply_chat_template(messages, **ALL)
        length = single["input_ids"].shape[1]
        assert batch["attention_mask"][row].tolist() == [0] * (width - length) + [1] * length
        for key in ("input_ids", "mm_token_type_ids"):
            assert batch[key][row, width - length :].tolist() == single[key][0].tolist()
        patches += [single["pixel_values"]] if "pixel_values" in single else []
    assert torch.equal(batch["pixel_values"], torch.cat(patches))


def test_options_reach_the_processor(processor, stock_pixels, photos):
    messages = [user(image(photos["cat"]), "What?")]
    inputs = processor.apply_chat_template(messages, **ALL, processor_kwargs={"max_pixels": 84 * 84})
    assert torch.equal(inputs["pixel_values"], stock_pixels([photos["cat"]], 84 * 84)["pixel_values"])
    conversations = [messages, [user("A longer one, without an image.")]]
    right = processor.apply_chat_template(conversations, **ALL, processor_kwargs={"padding_side": "right"})
    assert right["attention_mask"][:, 0].all() and not right["attention_mask"][:, -1].all()
    ids = processor.apply_chat_template(messages, tokenize=True)
    assert ids == processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


def test_a_video_becomes_its_frames(processor, tokenizer, photos):
    frames = [photos["cat"], photos["coffee"], photos["rocket"], photos["cat"]]
    part = {"type": "video", "video": frames}
    inputs = processor.apply_chat_template([user(part, "What happens?")], **ALL)
    images = processor.apply_chat_template([user(*map(image, frames), "What happens?")], **ALL)
    assert torch.equal(inputs["input_ids"], images["input_ids"])
    assert torch.equal(inputs["mm_token_type_ids"], 2 * images["mm_token_type_ids"])
    half = processor.apply_chat_template([user(part, "What happens?")], **ALL, processor_kwargs={"num_frames": 2})
    first_and_third = processor.apply_chat_template([user({**part, "video": frames[::2]}, "What happens?")], **ALL)
    assert torch.equal(half["pixel_values"], first_and_third["pixel_values"])
    assert torch.equal(half["input_ids"], first_and_third["input_ids"])


def test_the_mask_of_assistant_tokens_falls_on_the_answers(processor, photos):
    template = (
        "{% for message in messages %}{{ message.role }}:"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content[0].text }}{% endgeneration %}"
        "{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}"
        "\n{% endfor %}"
    )
    messages = [
        user(image(photos["cat"]), "What?"),
        assistant("A small cat."),
        user({"type": "video", "video": [photos["rocket"]] * 4}, image(photos["coffee"]), "And?"),
        assistant("A cup of coffee, and smoke."),
    ]
    inputs = processor.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = np.array(inputs["assistant_masks"])[0].astype(bool)
    answers = processor.tokenizer.decode(np.array(inputs["input_ids"])[0][mask].tolist())
    assert answers == "A small cat.A cup of coffee, and smoke."


@pytest.mark.skipif(
    "sanitize_control_tokens" not in inspect.signature(ProcessorMixin.apply_chat_template).parameters,
    reason="this version of Transformers doesn't have the option",
)
def test_marks_that_a_user_typed_can_be_kept_as_text(processor, photos):
    typed = "Is <|vision_start|><|image_pad|><|vision_end|> an image?"
    inputs = processor.apply_chat_template([user(image(photos["cat"]), typed)], **ALL, sanitize_control_tokens=True)
    assert len(inputs["image_grid_thw"]) == inputs["mm_token_type_ids"].sum() == 1
    assert typed in processor.decode(inputs["input_ids"][0])
    with pytest.raises(ValueError, match=r"number of images \(1\) must be .* placeholders in the text \(2\)"):
        processor.apply_chat_template([user(image(photos["cat"]), typed)], **ALL)


@pytest.mark.parametrize("given", ["missing.jpg", str(PHOTOGRAPHS / "README.md"), "aGVsbG8="])
def test_an_image_that_cannot_be_loaded_is_named(processor, given):
    with pytest.raises(ValueError, match=f"The image '.*{given[-9:]}' can't be used: "):
        processor.apply_chat_template([user(image(given), "What?")], **ALL)


def test_an_image_that_the_server_does_not_have_is_named(processor, serve):
    url = f"{serve(PHOTOGRAPHS)}/missing.jpg"
    with pytest.raises(ValueError, match=f"The image '{url}' can't be used: "):
        processor.apply_chat_template([user(image(url), "What?")], **ALL)


@pytest.mark.parametrize("kind", ["image", "path"])
def test_an_image_of_more_than_8_bits_is_refused(processor, tmp_path, kind):
    """Pillow would clip its depths at 255 without a word."""
    depth = Image.fromarray(np.linspace(0, 65535, 56 * 56).astype(np.uint16).reshape(56, 56))
    depth.save(tmp_path / "depth.png")
    picture = depth if kind == "image" else str(tmp_path / "depth.png")
    name = r"The image of 56 x 56 pixels" if kind == "image" else r"The image '.*depth\.png'"
    with pytest.raises(ValueError, match=f"^{name} can't be used: its mode is 'I;16', .*convert it to 8 bits"):
        processor.apply_chat_template([user(image(picture), "What?")], **ALL)


def test_the_error_for_bad_base64_stays_short(processor):
    noise = base64.b64encode(io.BytesIO(b"not an image " * 1000).getvalue()).decode()
    with pytest.raises(ValueError, match="can't be used") as caught:
        processor.apply_chat_template([user(image(noise), "What?")], **ALL)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ({}, "no image"),
        ({"file": CAT}, "no image"),
        ({"image": None}, "no image"),
        ({"path": CAT, "url": CAT}, "url, path"),
    ],
)
def test_an_image_block_without_one_image(processor, part, fault):
    messages = [user({"type": "image"} | part, "What?")]
    refusal = rf"A message part of type 'image' has {fault}; expected exactly one of image, url, path, base64\."
    with pytest.raises(ValueError, match=refusal):
        processor.apply_chat_template(messages, **ALL)
    assert "<|image_pad|>" in processor.apply_chat_template(messages)


def test_decoding(processor, tokenizer):
    ids = processor(text=["Describe the image.", "Why?"], return_tensors="pt")["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["Describe the image.", "Why?"]
    assert processor.decode(ids[0]) == tokenizer.decode(ids[0])
    assert processor.post_process_image_text_to_text(ids) == ["Describe the image.", "Why?"]
