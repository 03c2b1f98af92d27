# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""From a conversation to what a model is trained on: token ids, labels on the answers, pixels.

Answers are found by prefix difference: the chat template renders the conversation up to an answer, and with it, and
what the second text has more is the answer. That needs nothing special in the template, so the templates that
checkpoints ship work as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from ..checks import counted
from ..image_inputs import DELIMITER_TYPE

if TYPE_CHECKING:
    from ..processing_casa import CasaProcessor

logger = logging.get_logger(__name__)

IGNORED = -100  # no loss at tokens with this label

Messages = list[dict[str, Any]]

# Kinds of media -> the fields of a part that can hold one.
_MEDIA = {"image": ("image", "path", "url", "base64", "image_url"), "video": ("video", "path", "url", "video_url")}


@dataclass(frozen=True)
class Sample:
    """One conversation as tensors.

    Attributes:
        input_ids: (tokens,).
        labels: (tokens,) the ids of the answers, `IGNORED` elsewhere, at image placeholders and the times of frames.
        mm_token_type_ids: (tokens,) as the processor gives them.
        pixel_values: (patches, patch dim); None without images.
        image_grid_thw: (num_images, 3); None without images.
        second_per_grid_ts: (num_images,) as the processor gives them; None without images, or without whole videos.
        num_image_tokens: number of tokens of all images, after merging.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    mm_token_type_ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    second_per_grid_ts: torch.Tensor | None = None
    num_image_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of text tokens."""
        return len(self.input_ids)


@dataclass(frozen=True)
class Dialogue:
    """An example in one form, whatever form it came in.

    Attributes:
        messages: messages as the chat template takes them; an image is `{"type": "image"}`, a video
            `{"type": "video"}`.
        images, videos: images and videos that these stand for, in reading order.
        video_metadata: what is known of each video that is the list of its frames; None for nothing.
    """

    messages: Messages
    images: list[Any]
    videos: list[Any]
    video_metadata: list[Any]

    @classmethod
    def of(cls, example: Mapping[str, Any]) -> Dialogue:
        """Read an example.

        Args:
            example: mapping with `messages`, a list of `{"role", "content"}` whose content is a string or a list of
                parts, and optionally `images` and `videos` (or one `image`, one `video`). A part `{"type": "image"}`
                that holds no image itself stands for the next of `images`. Where no part is an image, placeholders
                `<image>` in the texts do, with the line break that sets one off; without placeholders either, images
                come before the text of the first user message. Likewise for videos, each a file or the list of its
                frames. Where parts or nothing at all are images, `<image>` is text. `video_metadata` has, for each
                video in reading order, the `fps` and the `frames_indices` of its frames, or None.

        Raises:
            ValueError: if the example has another form, or images and parts, placeholders or metadata don't match.
        """
        _refuse_other_forms(example)
        given = {kind: _given(example, kind) for kind in _MEDIA}
        messages: Messages = [{"role": _role(message), "content": _parts(message)} for message in example["messages"]]
        for kind in reversed(_MEDIA):
            if given[kind] and not any(part["type"] == kind for part in _all_parts(messages)):
                _place(messages, kind, len(given[kind]))
        media = {kind: _taken_from_parts(messages, kind, given[kind]) for kind in _MEDIA}
        roles = [message["role"] for message in messages]
        if roles[0] == "assistant" or "assistant" not in roles:
            lacking = "question" if roles[0] == "assistant" else "answer"
            raise ValueError(
                f"A conversation has the roles {roles}; expected an assistant message after another one. Add the "
                f"{lacking}."
            )
        return cls(messages, media["image"], media["video"], _metadata(example, len(media["video"])))

    def question(self) -> tuple[Dialogue, str]:
        """The conversation up to its last answer, and the text of that answer."""
        last = max(index for index, message in enumerate(self.messages) if message["role"] == "assistant")
        before = self.messages[:last]
        parts = [part["type"] for part in _all_parts(before)]
        answer = "".join(part.get("text", "") for part in self.messages[last]["content"])
        images, videos = parts.count("image"), parts.count("video")
        asked = Dialogue(before, self.images[:images], self.videos[:videos], self.video_metadata[:videos])
        return asked, answer

    def media(self) -> dict[str, Any]:
        """Images and videos as arguments of a call of the processor for this conversation alone."""
        return {
            "images": self.images or None,
            "videos": [self.videos] if self.videos else None,  # in a list of its own, files may be frames
            "video_metadata": self.video_metadata or None,
        }


def encode(processor: CasaProcessor, example: Mapping[str, Any]) -> Sample:
    """Tokenize a conversation, label its answers and make the pixels of its images.

    Args:
        processor: processor of the model.
        example: conversation; see `Dialogue.of`.

    Raises:
        ValueError: if the example is unusable, or the chat template renders its last answer differently than behind
            its prompt. Earlier answers of which this is so have no labels; a warning says so once.
    """
    conversation = Dialogue.of(example)
    text, answers = _render(processor, conversation.messages)
    inputs = processor(
        text=[text],
        **conversation.media(),
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
    placeholder = processor.tokenizer(processor.image_placeholder, add_special_tokens=False)["input_ids"]
    types = inputs["mm_token_type_ids"][0]
    of_images = torch.isin(input_ids, torch.tensor([*placeholder, *processor.gist_token_ids]))
    of_images |= types == DELIMITER_TYPE
    grids = inputs["image_grid_thw"]
    merge = processor.image_processor.merge_size
    return Sample(
        input_ids=input_ids,
        labels=torch.where(in_answer & ~of_images, input_ids, IGNORED),
        mm_token_type_ids=types,
        pixel_values=inputs["pixel_values"] if len(grids) else None,
        image_grid_thw=grids if len(grids) else None,
        second_per_grid_ts=inputs.get("second_per_grid_ts") if len(grids) else None,
        num_image_tokens=int(grids.prod(-1).sum()) // merge**2,
    )


def measure(processor: CasaProcessor, example: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of text and image tokens that `encode` would give, without making pixels."""
    conversation = Dialogue.of(example)
    text = processor.apply_chat_template(conversation.messages, tokenize=False)
    return processor.measure(text, **conversation.media(), add_special_tokens=False, padding=False)


def unseen_image(processor: CasaProcessor) -> Sample:
    """The smallest image at a placeholder without labels, to be put after all text of a row.

    Nothing that is trained on sees it, so it changes neither loss nor gradients. But it takes the vision tower and the
    fusion layers through forward and backward, which gives each of their parameters a gradient (of zeros) where a
    batch has no image: what data-parallel training needs, since another process's batch may have one.
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
        second_per_grid_ts=inputs.get("second_per_grid_ts"),
        num_image_tokens=int(inputs["image_grid_thw"].prod()) // processor.image_processor.merge_size**2,
    )


def _render(processor: CasaProcessor, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where in it the answers are, with the token that ends them."""

    def render(upto: int, prompt: bool = False) -> str:
        return processor.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=prompt)

    text = render(len(messages))
    said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    answers = []
    for index in said:
        prompt, answered = render(index, prompt=True), render(index + 1)
        if text.startswith(answered) and answered.startswith(prompt):
            answers.append((len(prompt), len(answered.rstrip())))
        elif index == said[-1]:
            raise ValueError(
                f"The chat template renders the answer of message {index} differently behind its prompt, or when more "
                "follows, so its tokens can't be found. Set processor.chat_template to one that renders each message "
                "the same whatever follows."
            )
    if len(answers) < len(said):  # as templates of models that reason do, which take out what led to an answer
        logger.warning_once(
            "The chat template renders earlier answers differently than the last one of a conversation, as the model "
            "will read them but never write them: they aren't trained on. Make a conversation up to each answer, or "
            "set processor.chat_template to one that renders each message the same whatever follows."
        )
    return text, answers


def _refuse_other_forms(example: Mapping[str, Any]) -> None:
    messages = example.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(
            f"An example has the fields {sorted(example)}; expected `messages`, a list of mappings with role and "
            "content, and `images` where the parts of contents don't name their files."
        )
    for name, holder in (("tools", example), *(("tool_calls", message) for message in messages)):
        if isinstance(holder, Mapping) and holder.get(name):
            raise ValueError(
                f"`{name}` is {holder[name]!r:.80}, but tool calls can't be trained on. Write them as text into the "
                "messages, or leave the example out."
            )


def _given(example: Mapping[str, Any], kind: str) -> list[Any]:
    """The images or videos beside the messages."""
    several, one = example.get(f"{kind}s"), example.get(kind)
    if several is not None and (isinstance(several, str | bytes | Mapping) or not isinstance(several, Iterable)):
        raise ValueError(
            f"`{kind}s` of an example is {several!r:.80}; expected a list. For a single one, use `{kind}`."
        )
    items = [] if several is None else list(several)
    if one is None:
        return items
    if items:
        raise ValueError(f"An example has both `{kind}s` and `{kind}`; put all of them into `{kind}s`.")
    return [one]


def _metadata(example: Mapping[str, Any], num_videos: int) -> list[Any]:
    """What is known of each video of an example."""
    given = example.get("video_metadata")
    metadata = [None] * num_videos if given is None else [given] if isinstance(given, Mapping) else list(given)
    if len(metadata) != num_videos:
        raise ValueError(
            f"An example has `video_metadata` of {counted(len(metadata), 'element')} for "
            f"{counted(num_videos, 'video')}; give one for each, or None for a video that is a file."
        )
    return metadata


def _all_parts(messages: Messages) -> list[dict[str, Any]]:
    return [part for message in messages for part in message["content"]]


def _place(messages: Messages, kind: str, number: int) -> None:
    """Add parts for this many images or videos: at placeholders such as `<image>`, or before the first question."""
    placeholder = f"<{kind}>"
    found = sum(part["text"].count(placeholder) for part in _all_parts(messages) if "text" in part)
    if not found:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = [{"type": kind} for _ in range(number)] + first["content"]
        return
    if found != number:
        raise ValueError(
            f"An example has {counted(number, kind)} beside its messages, but {counted(found, 'placeholder')} "
            f"{placeholder} in its texts. Write one for each, or none, or parts of type {kind!r} instead "
            f"({placeholder} is text then)."
        )
    for message in messages:
        message["content"] = [new for part in message["content"] for new in _split_at(placeholder, kind, part)]


def _split_at(placeholder: str, kind: str, part: dict[str, Any]) -> list[dict[str, Any]]:
    """A part, with parts for images or videos in place of the placeholders in its text."""
    # Such datasets set a placeholder off by a line break, which is not part of what is said.
    first, *others = re.split(rf"\n{placeholder}\Z|{placeholder}\n?", part.get("text", ""))
    if not others:
        return [part]
    split = [{**part, "text": first}] if first else []
    for text in others:
        split += [{"type": kind}, {"type": "text", "text": text}] if text else [{"type": kind}]
    return split


def _taken_from_parts(messages: Messages, kind: str, given: list[Any]) -> list[Any]:
    """The images or videos of the parts, in reading order; parts that hold none stand for those given beside them."""
    parts = [part for part in _all_parts(messages) if part["type"] == kind]
    own = [next((part.pop(key) for key in _MEDIA[kind] if key in part), None) for part in parts]
    wanted = own.count(None)
    if len(given) != wanted:
        raise ValueError(
            f"An example has {counted(len(given), kind)} beside its messages; expected one for each part of type "
            f"{kind!r} without its own ({wanted}). {'Add' if len(given) < wanted else 'Remove'} the rest."
        )
    rest = iter(given)
    return [_medium(next(rest) if medium is None else medium) for medium in own]


def _role(message: Any) -> str:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"A message is {message!r:.80}; expected a mapping with role and content.")
    return message["role"]


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The content as parts; fields that a table fills with None in other rows' columns are left out."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise ValueError(f"The content of a message is {content!r:.80}; expected a string, or a list of parts.")
    return [_part(given) for given in content]


def _part(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(
            f'A part of a message is {given!r:.80}; expected a mapping such as {{"type": "text", "text": ...}}.'
        )
    part = {key: value for key, value in given.items() if value is not None}
    kind = part.setdefault("type", next((key for key in ("text", *_MEDIA) if key in part), "unknown"))
    if kind not in ("text", *_MEDIA, "image_url", "video_url"):
        raise ValueError(f"A part of a message has the type {kind!r}; expected text, image or video.")
    part["type"] = kind.removesuffix("_url")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"The text of a part of a message is {part.get('text')!r:.80}; expected a string.")
    return part


def _medium(given: Any) -> Any:
    """An image or video as the processor takes it; a table gives {"bytes", "path"}, an API {"url"}."""
    if isinstance(given, list | tuple):
        return [_medium(frame) for frame in given]
    if not isinstance(given, Mapping):
        return given
    if given.get("bytes") is not None:
        return given["bytes"]
    return given.get("url") or given.get("path")
