# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Chat templates of text models, wrapped so that messages may have images and videos.

Whatever turns a source has stay its own: what stands before its template makes one text of the parts of a message, in
which images and videos are placeholders. So a template that trims, splits or compares texts, counts messages or knows
tools and reasoning reads what it was written for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

# For a source without a template: a line per turn, answers closed by the end-of-text token.
MINIMAL_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- message.role | capitalize + ': ' + message.content -}}
    {{- eos_token if message.role == 'assistant' -}}
    {{- '\\n' -}}
{%- endfor -%}
{{- 'Assistant:' if add_generation_prompt -}}
"""

# The line break at its end is none of the output: environments of chat templates take it with the block before it.
_WRAPPER = """\
{#- Images and videos become placeholders in the text of their message; below stands the source's own template. -#}
{%- set casa = namespace(messages=[], text='') -%}
{%- for message in messages -%}
    {%- if message.content is iterable and message.content is not string and message.content is not mapping -%}
        {%- set casa.text = '' -%}
        {%- for part in message.content -%}
            {%- if part is string -%}
                {%- set casa.text = casa.text + part -%}
            {%- elif part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {%- set casa.text = casa.text + 'IMAGE' -%}
            {%- elif part.type == 'video' or 'video' in part -%}
                {%- set casa.text = casa.text + 'VIDEO' -%}
            {%- elif 'text' in part -%}
                {%- set casa.text = casa.text + part.text -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set casa.messages = casa.messages + [dict(message, content=CONTENT)] -%}
    {%- else -%}
        {%- set casa.messages = casa.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = casa.messages %}
"""
_TEXT = "casa.text"
_PARTS = "[{'type': 'text', 'text': casa.text}]"


def wrap_chat_template(
    template: str | dict[str, str] | None, image: str, video: str, render: Callable[[str, list[dict[str, Any]]], str]
) -> str | dict[str, str]:
    """A chat template that writes placeholders for images and videos, and all else as the given one.

    Args:
        template: Jinja template of a text model, or several by name; None for a minimal one.
        image, video: placeholders.
        render: function that renders messages with a template. It tells templates that read the text of a message as
            a string from those that read it as a list of parts.
    """
    if isinstance(template, dict):
        return {name: _wrapped(each, image, video, render) for name, each in template.items()}
    return _wrapped(MINIMAL_CHAT_TEMPLATE if template is None else template, image, video, render)


def plain_turns(template: str | dict[str, str], render: Callable[[str, list[dict[str, Any]]], str]) -> str:
    """What chat templates write around messages without images.

    Args:
        template: chat template, or several by name.
        render: function that renders messages with a template.
    """
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    written = []
    for each in template.values() if isinstance(template, dict) else [template]:
        with contextlib.suppress(Exception):  # of Jinja: some need tools, or documents
            written.append(render(each, messages))
    return "".join(written)


def _wrapped(template: str, image: str, video: str, render: Callable[[str, list[dict[str, Any]]], str]) -> str:
    def reads(content: Any) -> bool:
        try:
            return "casa" in render(template, [{"role": "user", "content": content}])
        except Exception:  # of Jinja, or whatever the template runs into
            return False

    parts = not reads("casa") and reads([{"type": "text", "text": "casa"}])
    wrapper = _WRAPPER.replace("IMAGE", image).replace("VIDEO", video)
    return wrapper.replace("CONTENT", _PARTS if parts else _TEXT) + template
