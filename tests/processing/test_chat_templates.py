# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Chat templates of text models with images and videos: the source's own turns, placeholders in their texts."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor, AutoTokenizer

from casa_hf import CasaProcessor
from casa_hf.chat_templates import wrap_chat_template
from casa_hf.chat_text import SAID, message, render_chat
from casa_hf.training.samples import encode
from examples.tiny_source import build_tiny_helium

IMAGE, VIDEO = "<|vision_start|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"

# What such templates do, each in its own way.
TEMPLATES = {
    "trims": "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] | trim }}<|end|>\n{% endfor %}",
    "concatenates": "{%- if messages[0]['role'] == 'system' %}{%- set first = messages[0]['content'] %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set first = 'None.' %}{%- endif %}{{- '[' + first + ']' }}"
    "{%- for message in messages %}{{- '(' + message.role + ':' + message['content'] + ')' }}{%- endfor %}",
    "drops what isn't a string": "{%- for message in messages -%}{%- set content = message.content if message.content "
    "is string else '' -%}{% generation %}{{ message.role ~ '=' ~ content.lstrip('\n') }}{% endgeneration %}"
    "{%- endfor -%}",
    "looks back": "{%- set ns = namespace(last=0) %}{%- for message in messages[::-1] %}{%- if message.role == 'user' "
    "and message.content is string and not message.content.startswith('<tool>') %}{%- set ns.last = loop.revindex0 %}"
    "{%- endif %}{%- endfor %}{%- for message in messages %}{{- ns.last ~ message.content.split('</think>')[-1] }}"
    "{%- endfor %}",
    "has a macro": "{% macro turn(message) %}{{ messages | length }}:{{ message.content.strip() }}{% endmacro %}"
    "{% for message in messages %}{{ turn(message) }};{% endfor %}",
    "begins with space": "\n \n  {% for message in messages %}\n  {{ message.content }}\n  {% endfor %}\n",
    "begins with a comment": "{# c #}\n{%- for message in messages %}{{ message.content }}{% endfor %}",
}
_TRL = find_spec("trl")
if _TRL is not None:  # it has the templates of many models
    folder = Path(next(iter(_TRL.submodule_search_locations or []))) / "chat_templates"
    families = ("llama3", "qwen2_5", "qwen3", "deepseek_r1", "phi3", "gemma3")
    files = [file for file in sorted(folder.glob("*.jinja")) if file.name.startswith(families)]
    TEMPLATES |= {file.stem: file.read_text() for file in files}

TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}]
CALL = [{"type": "function", "function": {"name": "look", "arguments": {"where": "left"}}}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(build_tiny_helium(tmp_path_factory.mktemp("helium")))


def with_images(text: str) -> list[dict[str, Any]]:
    """The parts of a message whose text has placeholders."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.replace(VIDEO, f"{IMAGE}\0").split(IMAGE)):
        if number:
            kind = "video" if piece.startswith("\0") else "image"
            parts.append({"type": kind, kind: "none.jpg"})
        parts.append({"type": "text", "text": piece.removeprefix("\0")})
    return parts


def conversations(images: bool) -> list[list[dict[str, Any]]]:
    """Conversations with placeholders in their texts, or the same with parts."""

    def said(role: str, text: str, **others: Any) -> dict[str, Any]:
        return {"role": role, "content": with_images(text) if images else text, **others}

    talk = [
        said("user", f" {IMAGE}{IMAGE}\nWhat's in these?  "),
        said("assistant", "<think>\nHm.\n</think>\n\nA cat."),
        said("user", f"And in {VIDEO}?"),
    ]
    # What has no images stays as it is: no content, strings, fields of its own.
    calls = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "<tool>It is dark.</tool>"},
        said("assistant", f"See {IMAGE}.", reasoning_content="I looked."),
    ]
    return [talk[:1], talk, [said("system", "Be brief. "), *talk, said("assistant", "A dog.")], calls]


@pytest.mark.parametrize("name", TEMPLATES)
def test_images_and_videos_are_placeholders_and_all_else_is_the_templates(tokenizer, name):
    def render(template: str, messages: list, **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)

    source = TEMPLATES[name]
    wrapped = wrap_chat_template(source, IMAGE, VIDEO, render)
    rendered = 0
    for plain, parts in zip(conversations(images=False), conversations(images=True), strict=True):
        for options in ({}, {"add_generation_prompt": True}, {"tools": TOOLS}, {"enable_thinking": False}):
            try:
                expected = render(source, plain, **options)
            except Exception as error:  # a template may refuse a conversation; then so does the wrapped one
                with pytest.raises(type(error)):
                    render(wrapped, parts, **options)
                continue
            assert render(wrapped, plain, **options) == expected
            assert render(wrapped, parts, **options) == expected
            rendered += IMAGE in expected
    assert rendered >= 4


@pytest.mark.parametrize("messages", conversations(images=True)[:3])
def test_a_template_that_reads_parts_gets_them(tokenizer, messages):
    source = "{% for m in messages %}<{% for part in m.content %}{{ part.text | trim }}{% endfor %}>{% endfor %}"

    def render(template: str, messages: list) -> str:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)

    wrapped = wrap_chat_template({"default": source, "other": TEMPLATES["trims"]}, IMAGE, VIDEO, render)
    texts = [
        "".join(part.get("text", IMAGE if part["type"] == "image" else VIDEO) for part in each["content"])
        for each in messages
    ]
    assert render(wrapped["default"], messages) == "".join(f"<{text.strip()}>" for text in texts)
    assert texts[-1].strip() in render(wrapped["other"], messages)


def test_what_else_messages_may_hold(tokenizer):
    def render(template: str, messages: list) -> str:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)

    wrapped = wrap_chat_template("{% for m in messages %}[{{ m.content }}]{% endfor %}", IMAGE, VIDEO, render)
    urls = [{"type": "image_url", "image_url": {"url": "a.jpg"}}, {"text": "so"}, {"image": "b"}, {"video": "c"}]
    others = [{"role": "tool", "content": None}, {"role": "assistant"}, {"role": "user", "content": "?"}]
    told = render(wrapped, [{"role": "user", "content": urls}, *others])
    assert told == f"[{IMAGE}so{IMAGE}{VIDEO}]" + render(
        "{% for m in messages %}[{{ m.content }}]{% endfor %}", others
    )


# -------------------------------------------------------------------- with a processor

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@pytest.fixture(scope="module", params=["<|vision_start|>,<|vision_end|>", "<|image|>"])
def processor(request: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> CasaProcessor:
    """An instruct model's, with further templates by name."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = AutoTokenizer.from_pretrained(build_tiny_helium(folder))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = {"default": CHATML, "trims": TEMPLATES["trims"]}
    tokenizer.save_pretrained(folder)
    return CasaProcessor.from_text_source(folder, source, max_pixels=140**2, image_delimiters=request.param)


def conversation(photos: dict[str, Any]) -> list[dict[str, Any]]:
    image = {"type": "image", "image": photos["cat"]}
    return [
        {"role": "user", "content": [image, image, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A small cat."}]},
        {"role": "user", "content": [{"type": "video", "video": [photos["rocket"]] * 2}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A rocket"}]},
    ]


def test_a_conversation_and_what_the_assistant_says_in_it(processor, photos):
    image = processor.image_placeholder
    expected = (
        f"<|im_start|>user\n{image * 2}What?<|im_end|>\n<|im_start|>assistant\nA small cat.<|im_end|>\n"
        f"<|im_start|>user\n{image * 2}<|im_end|>\n<|im_start|>assistant\nA rocket<|im_end|>\n"
    )
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    inputs = processor.apply_chat_template(conversation(photos), **options)
    ids, mask = np.array(inputs["input_ids"][0]), np.array(inputs["assistant_masks"][0]).astype(bool)
    # The template has written all control tokens; this tokenizer would put one more before them.
    assert processor.tokenizer(expected, add_special_tokens=False)["input_ids"] == ids.tolist()
    assert processor.decode(ids[mask].tolist()) == "A small cat.<|im_end|>A rocket<|im_end|>"
    going_on = processor.apply_chat_template(conversation(photos), continue_final_message=True)
    assert going_on.endswith("<|im_start|>assistant\nA rocket")
    other = processor.apply_chat_template(conversation(photos)[:2], chat_template=processor.chat_template["trims"])
    assert other.endswith(f"<|user|>\n{image * 2}What?<|end|>\n<|assistant|>\nA small cat.<|end|>\n")


def test_its_training_samples_and_streams_have_its_turns(processor, photos):
    processor = copy.deepcopy(processor)
    processor.chat_template = processor.chat_template["default"]
    sample = encode(processor, {"messages": conversation(photos)})
    trained = processor.decode(sample.labels[sample.labels >= 0])
    assert trained == "A small cat.<|im_end|>A rocket<|im_end|>"
    rendered = render_chat(
        processor, [message("user", "Hm?", 1), message("assistant", SAID), message("user", "Go on.")]
    )
    [key] = [key for key, text in rendered.typed.items() if text == "Go on."]
    assert rendered == f"<|im_end|>\n<|im_start|>user\n{key}<|im_end|>\n<|im_start|>assistant\n"


def test_saving_and_loading_all_templates(processor, photos, tmp_path):
    processor.save_pretrained(tmp_path)
    for loaded in (AutoProcessor.from_pretrained(tmp_path), CasaProcessor.from_pretrained(tmp_path)):
        assert loaded.chat_template == processor.chat_template and set(loaded.chat_template) == {"default", "trims"}
        options = {"tokenize": True, "return_dict": True}
        ids = [each.apply_chat_template(conversation(photos), **options)["input_ids"] for each in (loaded, processor)]
        assert ids[0] == ids[1]
