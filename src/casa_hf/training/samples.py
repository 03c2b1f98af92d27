# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""From a conversation to what a model is trained on: token ids, labels on the answers, pixels.

Answers are found by prefix difference: the chat template renders the conversation up to an answer, and with it, and
what the second text has more is the answer. That needs no marks in the template, so the templates that checkpoints
ship work as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..processing_casa import CasaProcessor

IGNORED = -100  # no loss at tokens with this label

Messages = list[dict[str, Any]]

_SOURCES = {"image": ("image", "path", "url", "base64", "image_url"), "video": ("video", "path", "url", "video_url")}


@dataclass(frozen=True)
class Sample:
    """One conversation as tensors.

    Attributes:
        input_ids: (tokens,).
        labels: (tokens,) the ids of the answers, `IGNORED` elsewhere and at image marks.
        mm_token_type_ids: (tokens,) as the processor gives them.
        pixel_values: (patches, patch dim); None without images.
        image_grid_thw: (num_images, 3); None without images.
        num_image_tokens: of all images, after merging.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    mm_token_type_ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    num_image_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of text tokens."""
        return len(self.input_ids)


@dataclass(frozen=True)
class Dialogue:
    """An example in one form, whatever form it came in.

    Attributes:
        messages: turns as the chat template takes them; a picture is `{"type": "image"}`, a clip `{"type": "video"}`.
        images, videos: what these stand for, in reading order.
    """

    messages: Messages
    images: list[Any]
    videos: list[Any]

    @classmethod
    def of(cls, example: Mapping[str, Any]) -> Dialogue:
        """Read an example.

        Args:
            example: `messages`, a list of `{"role", "content"}` whose content is a text or a list of parts, and
                optionally `images` and `videos` (or one `image`, one `video`). A part `{"type": "image"}` without a
                source of its own stands for the next of `images`. Where no part is an image, marks `<image>` in the
                texts do, with the line break that sets one off; without marks either, images come before the text of
                the first user message. Likewise for videos, each a file or the list of its frames. Where parts or
                nothing at all are images, `<image>` is text.

        Raises:
            ValueError: if the example has no such form, or images and parts or marks don't match.
        """
        messages = example.get("messages")
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise ValueError(
                f"An example has the fields {sorted(example)}; expected `messages`, a list of role and content, and "
                "`images` where its parts don't name their files."
            )
        for name, holder in (("tools", example), *(("tool_calls", message) for message in messages)):
            if isinstance(holder, Mapping) and holder.get(name):
                raise ValueError(
                    f"`{name}` is {holder[name]!r:.80}; calls of tools aren't trained on. Write them as text into the "
                    "messages, or leave the example out."
                )
        given = {kind: _given(example, kind) for kind in _SOURCES}
        turns: Messages = [{"role": _role(message), "content": _parts(message)} for message in messages]
        for kind in reversed(_SOURCES):
            if not given[kind] or any(part["type"] == kind for turn in turns for part in turn["content"]):
                continue
            if not _place_at_marks(turns, kind, len(given[kind])):
                first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
                first["content"] = [{"type": kind} for _ in given[kind]] + first["content"]
        found: dict[str, list[Any]] = {kind: [] for kind in _SOURCES}
        rest = {kind: list(items) for kind, items in given.items()}
        for part in (part for turn in turns for part in turn["content"]):
            kind = part["type"]
            if kind not in _SOURCES:
                continue
            source = next((part.pop(key) for key in _SOURCES[kind] if key in part), None)
            if source is None:
                if not rest[kind]:
                    raise ValueError(
                        f"An example has {len(given[kind])} {kind}s beside its messages, but more parts of type "
                        f"{kind!r} without a source of their own."
                    )
                source = rest[kind].pop(0)
            found[kind].append(_source(source))
        for kind, left in rest.items():
            if left:
                raise ValueError(
                    f"An example has {len(given[kind])} {kind}s beside its messages, but parts of type {kind!r} for "
                    f"only {len(given[kind]) - len(left)} of them."
                )
        if turns[0]["role"] == "assistant" or not any(turn["role"] == "assistant" for turn in turns):
            raise ValueError(
                f"A conversation has the roles {[turn['role'] for turn in turns]}; expected an assistant's answer, "
                "and something before it."
            )
        return cls(turns, found["image"], found["video"])

    def question(self) -> tuple[Dialogue, str]:
        """The conversation up to its last answer, and the text of that answer."""
        last = max(index for index, turn in enumerate(self.messages) if turn["role"] == "assistant")
        before = self.messages[:last]
        parts = [part["type"] for turn in before for part in turn["content"]]
        answer = "".join(part.get("text", "") for part in self.messages[last]["content"])
        return Dialogue(before, self.images[: parts.count("image")], self.videos[: parts.count("video")]), answer


def encode(processor: CasaProcessor, example: Mapping[str, Any]) -> Sample:
    """A conversation with its labels and pixels.

    Args:
        processor: the model's.
        example: see `Dialogue.of`.

    Raises:
        ValueError: if the example is unusable, or the chat template changes earlier turns when later ones follow.
    """
    conversation = Dialogue.of(example)
    text, answers = _render(processor, conversation.messages)
    inputs = processor(
        text=[text],
        images=conversation.images or None,
        videos=[conversation.videos] if conversation.videos else None,  # in a list of its own, files may be frames
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_tensors="pt",
        padding=False,
    )
    input_ids = inputs["input_ids"][0]
    starts, ends = inputs["offset_mapping"][0].unbind(-1)
    in_answer = torch.zeros_like(input_ids, dtype=torch.bool)
    for start, end in answers:
        in_answer |= (starts >= start) & (ends <= end) & (ends > starts)
    marks = processor.tokenizer(processor.image_placeholder, add_special_tokens=False)["input_ids"]
    marks = torch.tensor([*marks, *processor.gist_token_ids])
    grids = inputs["image_grid_thw"]
    merge = processor.image_processor.merge_size
    return Sample(
        input_ids=input_ids,
        labels=torch.where(in_answer & ~torch.isin(input_ids, marks), input_ids, IGNORED),
        mm_token_type_ids=inputs["mm_token_type_ids"][0],
        pixel_values=inputs["pixel_values"] if len(grids) else None,
        image_grid_thw=grids if len(grids) else None,
        num_image_tokens=int(grids.prod(-1).sum()) // merge**2,
    )


def measure(processor: CasaProcessor, example: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of text and image tokens that `encode` would give, without making pixels."""
    conversation = Dialogue.of(example)
    text = processor.apply_chat_template(conversation.messages, tokenize=False)
    videos = [conversation.videos] if conversation.videos else None
    return processor.measure(text, conversation.images or None, videos, add_special_tokens=False, padding=False)


def unseen_image(processor: CasaProcessor) -> Sample:
    """An image mark with the smallest picture and no labels, to stand after all text of a row.

    Nothing that is trained on sees it, so it changes neither loss nor gradients. But it takes the vision tower and the
    fusion layers through forward and backward, which gives each of their parameters a gradient (of zeros) where a
    batch has no image: what data-parallel training needs, since another rank's batch may have one.
    """
    from PIL import Image

    inputs = processor(
        text=[processor.image_placeholder],
        images=[Image.new("RGB", (1, 1))],
        add_special_tokens=False,
        return_tensors="pt",
        padding=False,
        min_pixels=1,
    )
    return Sample(
        input_ids=inputs["input_ids"][0],
        labels=torch.full_like(inputs["input_ids"][0], IGNORED),
        mm_token_type_ids=inputs["mm_token_type_ids"][0],
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
        num_image_tokens=int(inputs["image_grid_thw"].prod()) // processor.image_processor.merge_size**2,
    )


def _render(processor: CasaProcessor, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where in it the answers are, with the token that ends them."""

    def render(upto: int, prompt: bool = False) -> str:
        return processor.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=prompt)

    text = render(len(messages))
    answers = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answered = render(index, prompt=True), render(index + 1)
        if not (text.startswith(answered) and answered.startswith(prompt)):
            raise ValueError(
                f"The chat template writes turn {index} differently when it is the last one, so its answers can't be "
                "told from the rest. Set processor.chat_template to one that renders each turn the same whatever "
                "follows."
            )
        answers.append((len(prompt), len(answered.rstrip())))
    return text, answers


def _given(example: Mapping[str, Any], kind: str) -> list[Any]:
    several, one = example.get(f"{kind}s"), example.get(kind)
    if several is not None and (isinstance(several, str | bytes | Mapping) or not isinstance(several, Iterable)):
        raise ValueError(f"`{kind}s` of an example is {several!r:.80}; expected a list (one alone may be `{kind}`).")
    items = [] if several is None else list(several)
    if one is None:
        return items
    if items:
        raise ValueError(f"An example has both `{kind}s` and `{kind}`; put all of them into `{kind}s`.")
    return [one]


def _place_at_marks(turns: Messages, kind: str, number: int) -> bool:
    """Put this many images or videos where the texts have marks such as `<image>`; whether there are any.

    Raises:
        ValueError: if there are more or fewer marks.
    """
    texts = [part["text"] for turn in turns for part in turn["content"] if "text" in part]
    marks = sum(text.count(f"<{kind}>") for text in texts)
    if not marks:
        return False
    if marks != number:
        raise ValueError(
            f"An example has {number} {kind}s beside its messages, but {marks} marks <{kind}> in its texts. Write one "
            f"for each, or none, or parts of type {kind!r} in place of them (<{kind}> is text then)."
        )
    # Such data sets set a mark off by a line break, which is no part of what is said.
    mark = re.compile(rf"\n<{kind}>\Z|<{kind}>\n?")
    for turn in turns:
        content = []
        for part in turn["content"]:
            first, *others = mark.split(part["text"]) if "text" in part else [None]
            content += [part] if first is None else [{**part, "text": first}] if first or not others else []
            for text in others:
                content += [{"type": kind}, {"type": "text", "text": text}] if text else [{"type": kind}]
        turn["content"] = content
    return True


def _role(message: Any) -> str:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"A message is {message!r:.80}; expected a role and a content.")
    return message["role"]


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The content as parts; fields that a table fills with None in other rows' columns are left out."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise ValueError(f"The content of a message is {content!r:.80}; expected a text, or a list of parts.")
    for part in content:
        if not isinstance(part, Mapping):
            raise ValueError(
                f'A part of a message is {part!r:.80}; expected a mapping such as {{"type": "text", "text": ...}}.'
            )
    parts = [{key: value for key, value in part.items() if value is not None} for part in content]
    for part in parts:
        kind = part.setdefault("type", next((key for key in ("text", *_SOURCES) if key in part), "unknown"))
        if kind not in ("text", *_SOURCES, "image_url", "video_url"):
            raise ValueError(f"A part of a message has the type {kind!r}; expected text, image or video.")
        part["type"] = kind.removesuffix("_url")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"The text of a part of a message is {part.get('text')!r:.80}; expected a text.")
    return parts


def _source(source: Any) -> Any:
    """An image or video as the processor takes it; a table gives {"bytes", "path"}, an API {"url"}."""
    if isinstance(source, list | tuple):
        return [_source(frame) for frame in source]
    if not isinstance(source, Mapping):
        return source
    if source.get("bytes") is not None:
        return source["bytes"]
    return source.get("url") or source.get("path")
