# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""All that takes images takes them through one door: the same pixels, whatever the form and whoever asks."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from casa_hf import CasaProcessor, StreamSettings
from casa_hf.cli.talking import open_image
from casa_hf.media_casa import MediaPolicy
from casa_hf.streaming.turns import StreamTurns
from casa_hf.training.samples import encode, measure
from casa_hf.video import open_video
from tests.clips import write_clip
from tests.forms import forms_of, transparent_drawing, turned_photograph

IMAGE = "<|vision_start|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def same(found: Any, expected: Any) -> bool:
    return torch.equal(found["image_grid_thw"], expected["image_grid_thw"]) and torch.equal(
        found["pixel_values"], expected["pixel_values"]
    )


@pytest.mark.parametrize("make", [turned_photograph, transparent_drawing])
def test_whoever_takes_an_image_sees_the_same(processor, stock_pixels, tmp_path, serve, make):
    """`stock_pixels` is Transformers' own image processor, given what is to be seen."""
    file, seen = make(tmp_path)
    shown = Image.fromarray(np.ascontiguousarray(seen))
    image, frame = stock_pixels([shown]), stock_pixels([shown], 140**2 // 4)
    tokens = int(image["image_grid_thw"].prod()) // 4
    chat = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    turns = StreamTurns(processor, StreamSettings(prompt="Describe it."))
    forms = forms_of(file, serve(tmp_path))
    floating = torch.tensor(seen.copy()) / 255
    for name, form in (forms | {"array": seen, "tensor": floating.permute(2, 0, 1)}).items():
        assert same(processor(images=form, text=IMAGE, return_tensors="pt"), image), name
        nested = processor(images=[[form], [form, form]], text=[IMAGE, IMAGE * 2], return_tensors="pt")
        assert torch.equal(nested["pixel_values"], image["pixel_values"].repeat(3, 1)), name
        assert same(processor(videos=[[[form]]], text=VIDEO, return_tensors="pt"), frame), name
        messages = [{"role": "user", "content": [{"type": "image", "image": form}, {"type": "text", "text": "?"}]}]
        assert same(processor.apply_chat_template(messages, **chat), image), name
        messages[0]["content"][0] = {"type": "video", "video": [form]}
        assert same(processor.apply_chat_template(messages, **chat), frame), name
        assert processor.measure(IMAGE, images=form) == (2, tokens), name
        assert same(turns.pixels(form), frame), name
        example = {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A picture."}],
            "images": [form],
        }
        sample = encode(processor, example)
        assert torch.equal(sample.pixel_values, image["pixel_values"]), name
        assert measure(processor, example)[1] == sample.num_image_tokens == tokens, name
    for name in (str(file), forms["URL"]):
        assert np.array_equal(np.asarray(open_image(name)), seen)
    [folder_frame] = list(open_video(tmp_path))
    assert np.array_equal(np.asarray(folder_frame.image), seen)


def test_ranges_are_told_by_the_type_whatever_is_installed(processor, photos):
    """Floating values would be divided by 255 once more; so would those of a caller who switches that off, at last."""
    levels = np.asarray(photos["cat"])
    expected = processor(images=photos["cat"], text=IMAGE, return_tensors="pt")
    for given in (levels / 255, torch.tensor(levels / 255).float().permute(2, 0, 1), levels.astype(np.int64)):
        assert same(processor(images=given, text=IMAGE, return_tensors="pt"), expected)
    floating = [levels / 255, torch.tensor(levels / 255)]
    twice = processor(images=floating, text=IMAGE * 2, do_rescale=False, return_tensors="pt")
    assert torch.equal(twice["pixel_values"], expected["pixel_values"].repeat(2, 1))
    with pytest.raises(ValueError, match=r"do_rescale=False needs floating-point values .* type uint8; leave"):
        processor(images=[levels / 255, levels], text=IMAGE * 2, do_rescale=False)
    for wrong, message in (
        (levels.astype(np.uint16), "its values are uint16, which has no known range"),
        (levels.astype(np.float32), "float32 from 0 to 219; expected .* floating-point values from 0 to 1"),
        (np.full((40, 40, 3), np.nan), "float64 from nan to nan"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(images=wrong, text=IMAGE)


def test_the_layout_of_arrays_can_be_said(processor):
    narrow = np.random.RandomState(0).randint(0, 256, (3, 400, 3), np.uint8)
    for layout, seen in (("channels_last", narrow), ("channels_first", narrow.transpose(1, 2, 0))):
        shown = Image.fromarray(np.ascontiguousarray(seen))
        inputs = processor(images=narrow, text=IMAGE, return_tensors="pt", input_data_format=layout)
        assert same(inputs, processor(images=shown, text=IMAGE, return_tensors="pt"))
        assert processor.measure(IMAGE, images=narrow, input_data_format=layout)[1] * 4 == len(inputs["pixel_values"])


@dataclass
class Part:
    type: str
    path: str


@dataclass
class Message:
    role: str
    content: Any


@dataclass
class Chat:
    messages: Any


def test_a_server_reads_neither_urls_nor_paths(source, photos, tmp_path, serve):
    photos["cat"].save(tmp_path / "cat.png")
    url = f"{serve(tmp_path)}/cat.png"
    processor = CasaProcessor.from_pretrained(
        source, max_pixels=140**2, media_policy={"network": False, "local_files": False}
    )
    contents = base64.b64encode((tmp_path / "cat.png").read_bytes()).decode()
    chat = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}

    def ask(part: dict[str, Any], **options: Any) -> Any:
        return processor.apply_chat_template([{"role": "user", "content": [part]}], **chat, **options)

    for part in (
        {"type": "image", "path": str(tmp_path / "cat.png")},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "video", "path": str(tmp_path / "clip.mp4")},
        {"type": "video", "url": f"{url}.mp4"},
        {"type": "video", "video": [url]},
        {"type": "video", "video": [str(tmp_path / "cat.png")]},
    ):
        with pytest.raises(ValueError, match=r"aren't (fetched|read) \(MediaPolicy\.(network|local_files)=False\)"):
            ask(part)
    for part in (
        {"type": "audio", "url": url},
        {"type": "audio", "path": str(tmp_path / "cat.png")},
    ):  # which Transformers would read before it asks the processor
        for parts in ([part], (part,), [Part("audio", part["path"])] if "path" in part else [part]):
            for chat_of in (list, lambda messages: Chat(messages), lambda messages: [messages]):
                for message in ({"role": "user", "content": parts}, Message("user", parts)):
                    with pytest.raises(ValueError, match="a part with audio"):
                        processor.apply_chat_template(chat_of([message]), **chat)
    for kind, message in (("input_audio", "a part with audio"), ("video_url", r"'video_url'.*\"type\": \"video\"")):
        with pytest.raises(ValueError, match=message):  # which templates pass over in silence
            ask({"type": kind, kind: {"url": f"{url}.mp4"}})
    with pytest.raises(ValueError, match="load_audio_from_video"):
        ask({"type": "video", "url": f"{url}.mp4"}, load_audio_from_video=True)
    clip = write_clip(tmp_path / "clip.mp4", 3, 2)
    shown = ask({"type": "video", "url": f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"})
    assert len(shown["image_grid_thw"]) == 3
    inputs = ask({"type": "image", "base64": contents})
    opened = ask({"type": "image", "url": url}, processor_kwargs={"media_policy": MediaPolicy()})
    assert same(inputs, opened)
    with pytest.raises(ValueError, match="local_files=False"):
        processor.measure(IMAGE, images=str(tmp_path / "cat.png"))
    # A setting of the place, not of the checkpoint.
    processor.save_pretrained(tmp_path / "saved")
    assert CasaProcessor.from_pretrained(tmp_path / "saved").media_policy == MediaPolicy()


def test_large_images_are_refused_before_they_are_decoded(processor, tmp_path):
    Image.new("1", (13_000, 13_000)).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size < 40_000
    for read in (processor, processor.measure):
        with pytest.raises(ValueError, match=r"large\.png' can't be used: it has 13000 x 13000 pixels, more than"):
            read(images=str(tmp_path / "large.png"), text=IMAGE)


def test_shapes_that_the_image_processor_refuses_are_named(processor, tmp_path):
    Image.new("RGB", (600, 2)).save(tmp_path / "line.png")
    for read in (processor, processor.measure):
        with pytest.raises(ValueError, match=r"line\.png' can't be used: it has 600 x 2 pixels \(.*200"):
            read(images=[Image.new("RGB", (40, 40)), str(tmp_path / "line.png")], text=IMAGE * 2)
        with pytest.raises(ValueError, match=r"The image of 600 x 2 pixels can't be used"):
            read(videos=[[[Image.open(tmp_path / "line.png").convert("RGB")]]], text=VIDEO)
