# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`CasaProcessor.__call__`: ids, placeholders and pixels, compared with the stock tokenizer and image processor."""

from __future__ import annotations

import copy
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from casa_hf import CasaProcessor

PAIR = "<|vision_start|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def equal(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_ids_are_the_stock_ids_without_placeholders_and_pixels_the_stock_pixels(
    processor, tokenizer, stock_pixels, photos
):
    text = f"Compare {IMAGE} with {IMAGE}: what's new?"
    images = [photos["cat"], photos["coffee"].rotate(90, expand=True)]
    inputs = processor(images=images, text=text, return_tensors="pt")

    placeholder = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    stock_ids = [token for token in tokenizer(text)["input_ids"] if token != placeholder]
    assert inputs["input_ids"].tolist() == [stock_ids]
    assert inputs["attention_mask"].tolist() == [[1] * len(stock_ids)]
    expected = stock_pixels(images)
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["image_grid_thw"], expected["image_grid_thw"])
    assert inputs["image_grid_thw"][0].tolist() != inputs["image_grid_thw"][1].tolist()


def test_types_mark_the_token_that_an_image_precedes(processor, tokenizer, photos):
    inputs = processor(
        images=photos["cat"], videos=[[photos["rocket"]] * 3], text=f"a{VIDEO}b{IMAGE}", return_tensors="pt"
    )
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    start, end = "<|vision_start|>", "<|vision_end|>"
    assert tokens == ["a", *[start, end] * 3, "b", start, end]
    assert inputs["mm_token_type_ids"].tolist() == [[0, 0, 2, 0, 2, 0, 2, 0, 0, 1]]


def test_a_mark_can_be_written_with_or_without_the_placeholder(processor, photos):
    with_placeholder = processor(images=photos["cat"], text=f"See {IMAGE}.", return_tensors="pt")
    assert equal(with_placeholder, processor(images=photos["cat"], text=f"See {PAIR}.", return_tensors="pt"))


def test_images_can_be_nested_per_prompt_or_flat(processor, photos):
    cat, coffee = (np.array(photos[name].resize((90, 60))) for name in ("cat", "coffee"))
    texts = [f"no image, then {PAIR}", "none", f"{PAIR}"]
    nested = processor(images=[[cat], [], [coffee]], text=texts, return_tensors="pt")
    assert equal(nested, processor(images=[cat, coffee], text=texts, return_tensors="pt"))
    assert equal(nested, processor(images=np.stack([cat, coffee]), text=texts, return_tensors="pt"))
    swapped = processor(images=[coffee, cat], text=texts, return_tensors="pt")
    assert not torch.equal(nested["pixel_values"], swapped["pixel_values"])


def test_arrays_and_tensors_in_either_layout_equal_the_image(processor, photos):
    expected = processor(images=photos["cat"], text=PAIR, return_tensors="pt")
    array = np.array(photos["cat"])
    for picture in (array, array.transpose(2, 0, 1), torch.tensor(array), torch.tensor(array).permute(2, 0, 1)):
        assert equal(expected, processor(images=picture, text=PAIR, return_tensors="pt"))


def test_a_batch_is_padded_on_the_left_and_equals_its_prompts_one_by_one(processor, tokenizer, photos):
    texts = [f"{PAIR}Short.", "A much longer prompt without any image at all.", f"{PAIR}{PAIR} Two."]
    images = [[photos["cat"]], [], [photos["coffee"], photos["rocket"]]]
    batch = processor(images=images, text=texts, return_tensors="pt")
    width = batch["input_ids"].shape[1]
    pixels = []
    for row, (text, own) in enumerate(zip(texts, images, strict=True)):
        single = processor(images=own or None, text=text, return_tensors="pt")
        length = single["input_ids"].shape[1]
        for key, padding in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0), ("mm_token_type_ids", 0)):
            assert batch[key][row].tolist() == [padding] * (width - length) + single[key][0].tolist()
        pixels += [single["pixel_values"]] if own else []
    assert len({len(tokenizer(text)["input_ids"]) for text in texts}) == 3
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))


def test_padding_follows_the_call_and_the_tokenizers_own_setting(processor, source, photos):
    texts = [f"{PAIR}Short.", f"{PAIR}Somewhat longer."]
    images = [photos["cat"], photos["coffee"]]
    right = processor(images=images, text=texts, padding_side="right", return_tensors="pt")
    assert right["attention_mask"][0, 0] == 1 and right["attention_mask"][0, -1] == 0
    configured = CasaProcessor.from_pretrained(source, padding_side="right", max_pixels=140**2)
    assert torch.equal(
        configured(images=images, text=texts, return_tensors="pt")["attention_mask"], right["attention_mask"]
    )
    assert len({len(row) for row in processor(images=images, text=texts, padding=False)["input_ids"]}) == 2
    wide = processor(text=texts, images=images, padding="max_length", max_length=64, return_tensors="pt")
    assert wide["input_ids"].shape == wide["mm_token_type_ids"].shape == (2, 64)


@pytest.mark.parametrize(
    "options",
    [
        {"max_pixels": 84 * 84},
        {"size": {"shortest_edge": 3136, "longest_edge": 84 * 84}},
        {"size": {"longest_edge": 84 * 84}},
        {"images_kwargs": {"max_pixels": 84 * 84}},
    ],
    ids=str,
)
def test_the_limit_of_a_call_takes_effect_and_is_forgotten(processor, stock_pixels, photos, options):
    small = processor(images=photos["cat"], text=PAIR, return_tensors="pt", **options)
    assert torch.equal(small["pixel_values"], stock_pixels([photos["cat"]], 84 * 84)["pixel_values"])
    assert 14 * 14 * len(small["pixel_values"]) <= 84 * 84
    usual = processor(images=photos["cat"], text=PAIR, return_tensors="pt")
    assert torch.equal(usual["pixel_values"], stock_pixels([photos["cat"]])["pixel_values"])
    assert len(usual["pixel_values"]) > len(small["pixel_values"])


def test_small_images_are_enlarged_to_the_minimum(processor):
    dot = Image.new("RGB", (30, 30))
    grid = processor(images=dot, text=PAIR, min_pixels=112 * 112, return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [[1, 8, 8]]
    assert processor(images=dot, text=PAIR, return_tensors="pt")["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_images_and_frames_stay_in_reading_order_over_the_batch(processor, stock_pixels, photos):
    cat, coffee, rocket = (photos[name] for name in ("cat", "coffee", "rocket"))
    inputs = processor(
        images=[[coffee, cat], [rocket]],
        videos=[[[rocket, cat]], [[coffee]]],
        text=[f"{IMAGE}{VIDEO}{IMAGE}", f"{VIDEO} and {IMAGE}"],
        return_tensors="pt",
    )
    frame = 140**2 // 4
    order = [(coffee, 140**2), (rocket, frame), (cat, frame), (cat, 140**2), (coffee, frame), (rocket, 140**2)]
    expected = [stock_pixels([picture], limit) for picture, limit in order]
    assert torch.equal(inputs["pixel_values"], torch.cat([each["pixel_values"] for each in expected]))
    assert torch.equal(inputs["image_grid_thw"], torch.cat([each["image_grid_thw"] for each in expected]))
    types = [[kind for kind in row if kind] for row in inputs["mm_token_type_ids"].tolist()]
    assert types == [[1, 2, 2, 1], [2, 1]]


def test_a_call_changes_neither_the_processor_nor_what_it_was_given(processor, photos):
    def state() -> tuple[Any, ...]:
        settings = processor.to_json_string(), processor.tokenizer.init_kwargs, processor.tokenizer.padding_side
        return copy.deepcopy((*settings, sorted(vars(processor)), sorted(vars(processor.image_processor))))

    before = state()
    texts, images = [f"{IMAGE}", f"{VIDEO}"], [[photos["cat"]], []]
    videos = [[], [[photos["coffee"]] * 4]]
    options = {
        "images_kwargs": {"max_pixels": 84 * 84},
        "text_kwargs": {"padding_side": "right"},
        "videos_kwargs": {"num_frames": 2, "frame_max_pixels": 56 * 56},
    }
    given = copy.deepcopy((texts, images, videos, options))
    inputs = processor(text=texts, images=images, videos=videos, return_tensors="pt", **options)
    assert len(inputs["image_grid_thw"]) == 3
    assert (texts, images, videos, options) == given
    assert state() == before


def test_tensors_arrays_and_lists_can_be_returned(processor, photos):
    as_tensors = processor(images=photos["cat"], text=PAIR, return_tensors="pt")
    as_arrays = processor(images=photos["cat"], text=PAIR, return_tensors="np")
    as_lists = processor(images=photos["cat"], text=PAIR)
    for key, tensor in as_tensors.items():
        assert isinstance(as_arrays[key], np.ndarray)
        assert np.array_equal(as_arrays[key], tensor.numpy())
    assert as_lists["input_ids"] == as_tensors["input_ids"].tolist()
    assert set(as_tensors) == set(processor.model_input_names)


def test_pixels_alone_and_text_alone(processor, stock_pixels, photos):
    pixels = processor(images=[photos["cat"], photos["coffee"]], return_tensors="pt")
    assert equal(dict(pixels), dict(stock_pixels([photos["cat"], photos["coffee"]])))
    text = processor(text="Nothing to see.", return_tensors="pt")
    assert not text["mm_token_type_ids"].any()
    assert "mm_token_type_ids" not in processor(text="x", return_mm_token_type_ids=False)
    # Tensors have the same keys as with images, lists those that say something.
    assert {key: len(text[key]) for key in pixels} == {"pixel_values": 0, "image_grid_thw": 0}
    assert all(torch.equal(torch.cat([text[key], pixels[key]]), pixels[key]) for key in pixels)
    assert set(processor(text="Nothing to see.")) == {"input_ids", "attention_mask", "mm_token_type_ids"}


def test_a_prompt_without_images_may_be_given_as_none(processor, photos):
    texts = [f"{PAIR}One.", "None.", f"{PAIR}{PAIR}Two."]
    cat, coffee, rocket = photos.values()
    expected = processor(text=texts, images=[[cat], [], [coffee, rocket]], return_tensors="pt")
    actual = processor(text=texts, images=[[cat], None, [coffee, rocket]], return_tensors="pt")
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    one_each = {"text": [texts[1], texts[0]], "return_tensors": "pt"}
    actual, expected = (processor(images=images, **one_each) for images in ([None, cat], [[], [cat]]))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    video = [cat, coffee]
    texts = ["None.", f"{VIDEO}One."]
    actual, expected = (processor(text=texts, videos=v, return_tensors="pt") for v in ([None, video], [[], [video]]))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match=r"number of images in prompt 0 \(0\) must be .* \(1\)"):
        processor(text=[f"{PAIR}One.", "None."], images=[None, cat])


def test_types_of_frames_are_always_given(processor, photos):
    """Without them the model would take frames for still images, which it sees otherwise."""
    inputs = processor(text=VIDEO, videos=[[photos["cat"]] * 3], return_mm_token_type_ids=False)
    assert inputs["mm_token_type_ids"][0].count(2) == 3
    assert "mm_token_type_ids" not in processor(text=PAIR, images=photos["cat"], return_mm_token_type_ids=False)


@pytest.mark.parametrize("options", [{}, {"max_pixels": 100**2}, {"images_kwargs": {"max_pixels": 100**2}}])
def test_numbers_of_tokens_by_size(processor, options):
    """As engines ask for them, which plan before there is an image."""
    sizes = [(100, 100), (300, 100), (500, 30), (213, 167)]
    pictures = [np.zeros((*size, 3), dtype=np.uint8) for size in sizes]
    numbers = processor._get_num_multimodal_tokens(
        image_sizes=sizes, video_sizes=[(4, *size) for size in sizes], **options
    )
    patches = processor(images=pictures, return_tensors="pt", **options)["image_grid_thw"].prod(-1)
    assert numbers["num_image_patches"] == patches.tolist()
    assert numbers["num_image_tokens"] == (patches // 4).tolist()
    of_frames = [
        int(processor(videos=[[picture] * 4], return_tensors="pt", **options)["image_grid_thw"].prod(-1).sum()) // 4
        for picture in pictures
    ]
    assert numbers["num_video_tokens"] == of_frames
    only = processor._get_num_multimodal_tokens(image_sizes=sizes[:1])
    assert only["num_video_tokens"] is None and len(only["num_image_tokens"]) == 1


def test_offsets_refer_to_the_text_as_it_was_given(processor, photos):
    text = f"One {IMAGE} two {VIDEO} three{PAIR}."
    inputs = processor(
        text=text,
        images=[photos["cat"], photos["coffee"]],
        videos=[[photos["rocket"]] * 5],
        return_offsets_mapping=True,
    )
    rewritten = []
    for token, (start, end) in zip(inputs["input_ids"][0], inputs["offset_mapping"][0], strict=True):
        if text[start:end] in (IMAGE, VIDEO):
            rewritten.append(text[start:end])
        else:
            assert text[start:end] == processor.tokenizer.decode([token])
    assert rewritten == [IMAGE] * 2 + [VIDEO] * 10


def test_truncation_may_not_cut_off_an_image(processor, photos):
    processor = copy.deepcopy(processor)  # tokenizers keep the truncation that they were asked for
    text = f"Before {PAIR} after and after."
    place = processor(images=photos["cat"], text=text)["mm_token_type_ids"][0].index(1)
    kept = processor(images=photos["cat"], text=text, truncation=True, max_length=place + 1)
    assert kept["mm_token_type_ids"] == [[0] * place + [1]]
    with pytest.raises(ValueError, match=r"leaves 0 of the 1 images and frames.*max_length"):
        processor(images=photos["cat"], text=text, truncation=True, max_length=place)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "at least one of text, images and videos"),
        ({"text": PAIR}, r"number of images \(0\) must be .* placeholders in the text \(1\)"),
        ({"text": "none", "images": 1}, r"number of images \(1\) must be .* placeholders in the text \(0\)"),
        ({"text": [PAIR, PAIR * 2], "images": 2}, r"number of images \(2\) must be .* placeholders in the text \(3\)"),
        ({"text": [PAIR, PAIR * 2], "images": [2, 1]}, r"number of images in prompt 0 \(2\) must be .* \(1\)"),
        ({"text": [PAIR], "images": [1, 0]}, r"images has 2 lists for 1 prompts"),
        ({"text": VIDEO}, r"number of videos \(0\) must be .* in the text \(1\); write .*<\|video_pad\|>"),
        ({"text": VIDEO, "images": 1}, r"number of images \(1\) must be .* placeholders in the text \(0\)"),
        ({"text": "<|image_pad|>", "images": 1}, r"has <\|image_pad\|>.*outside of a placeholder, 1 times"),
        (
            {"text": "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>", "images": 1},
            r"has <\|image_pad\|>.*2 times.*CASA repeats neither",
        ),
        ({"text": [3]}, "text must be a string or a list of strings; got an element of type int"),
        ({"text": 3}, "got an element of type int"),
        ({"text": [["pre", "tokenized"]]}, "got an element of type list"),
        ({"text": "x", "audio": np.zeros(8)}, "no audio"),
        (
            {"text": PAIR, "images": [[3.5]]},
            "images has an element of type float.* expected one, a list of images",
        ),
        (
            {"text": PAIR, "images": [[["cat.jpg"]]]},
            "images has an element of type list.* expected one, a list of images",
        ),
        (
            {"text": PAIR, "images": ["cat.jpg", ["cat.jpg"]]},
            "images has an element of type list.* expected one, a list of images",
        ),
        ({"text": PAIR, "images": [np.zeros(4)]}, r"images has an element .*type ndarray of shape \(4,\)"),
        ({"text": PAIR, "images": np.zeros((4, 0, 3))}, r"images has an element .*of shape \(0, 3\)"),
        ({"text": PAIR, "images": BytesIO(b"a file")}, "images has an element .*type BytesIO"),
        ({"text": PAIR, "images": {"url": "cat.jpg"}}, "images has an element .*type dict"),
        ({"text": VIDEO, "videos": bytearray(b"a file")}, "videos has an element .*type bytearray"),
        ({"text": VIDEO, "videos": [3.5]}, "videos has an element .*type float"),
        (
            {"text": PAIR, "images": 1, "max_pixels": 100},
            "max_pixels=100 is below min_pixels=3136; expected 3136",
        ),
        ({"text": PAIR, "images": 1, "min_pixels": -1}, "min_pixels=-1 is not positive"),
        (
            {"text": PAIR, "images": 1, "size": {"height": 28, "width": 28}},
            "size=.*'shortest_edge' and 'longest_edge'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said(processor, photos, arguments, message):
    def fill(images: Any) -> Any:
        return [photos["cat"]] * images if isinstance(images, int) else images

    if "images" in arguments:
        images = arguments["images"]
        nested = isinstance(images, list) and all(isinstance(row, int) for row in images)
        arguments = {**arguments, "images": [fill(row) for row in images] if nested else fill(images)}
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_nothing_is_loaded_before_the_counts_are_checked(processor):
    with pytest.raises(ValueError, match=r"number of images \(1\) must be .* placeholders in the text \(0\)"):
        processor(text="No mark.", images=["does-not-exist.jpg"])
