# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Images and videos of a request, before it reaches Transformers' handlers."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from PIL import Image, ImageChops

from casa_hf import MediaPolicy
from casa_hf.samples import PHOTOGRAPHS
from casa_hf.serving.transformers_serve import _with_contents

CLOSED = MediaPolicy(network=False, local_files=False)
CONTENT = (PHOTOGRAPHS / "cat.jpg").read_bytes()
BASE64 = base64.b64encode(CONTENT).decode()
DATA_URL = f"data:image/jpeg;base64,{BASE64}"


def chat(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "Text."}]}


def test_images_come_in_through_the_one_door() -> None:
    """In every form that the protocol has, also in turns of before; the request itself stays."""
    expected = Image.open(PHOTOGRAPHS / "cat.jpg").convert("RGB")
    requests = (
        chat({"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}}, {"type": "text", "text": "?"}),
        chat({"type": "image_url", "image_url": BASE64}),
        {"input": [{"type": "input_image", "image_url": DATA_URL}, {"type": "input_text", "text": "What?"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": DATA_URL}]}]},
    )
    for request in requests:
        before = str(request)
        made = _with_contents(request, CLOSED)
        assert str(request) == before
        (first, *_) = made.get("messages") or made["input"]
        part = first["content"][0] if "content" in first else first
        assert ImageChops.difference(part["image_url"]["url"], expected).getbbox() is None


def test_videos_become_the_contents_of_their_files() -> None:
    made = _with_contents(chat({"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{BASE64}"}}), CLOSED)
    assert made["messages"][0]["content"] == [{"type": "video_url", "video_url": {"url": CONTENT}}]


def test_what_has_no_images_stays() -> None:
    for request in (
        {"input": "What?", "model": "casa"},
        {"prompt": "What?"},
        {"input": [{"type": "message", "role": "user", "content": "What?"}, {"type": "reasoning", "content": []}]},
        {"messages": [{"role": "assistant", "tool_calls": []}, {"role": "tool", "content": "4"}]},
    ):
        assert _with_contents(request, CLOSED) == request


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "http://host/cat.jpg"}}, "URLs aren't fetched"),
        ({"type": "image_url", "image_url": {"url": str(PHOTOGRAPHS / "cat.jpg")}}, "paths aren't read"),
        ({"type": "image_url", "image_url": {"url": f"file://{PHOTOGRAPHS}/cat.jpg"}}, "paths aren't read"),
        ({"type": "video_url", "video_url": {"url": "http://host/clip.mp4"}}, "clip.mp4' can't be used: URLs aren't"),
        ({"type": "image_url", "image_url": {}}, "'image_url' has image_url {}; expected a URL"),
        ({"type": "input_image", "file_id": "file-1"}, "'input_image' has image_url null; expected a URL"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "whose type is one of text, "),
        ("What?", 'A part of a message is "What\\?"; expected text'),
    ],
)
def test_what_is_refused(part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _with_contents(chat(part), CLOSED)


def test_what_is_not_a_message_is_refused() -> None:
    with pytest.raises(ValueError, match='A message is "What\\?"; expected an object with a role'):
        _with_contents({"messages": ["What?"]}, CLOSED)
