# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Answers to many questions in one batch, each with its own images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .chat_text import message, render_chat
from .checks import check_asks
from .media_casa import images_of

if TYPE_CHECKING:
    from .modeling_casa import CasaForConditionalGeneration
    from .processing_casa import CasaProcessor


class Question(NamedTuple):
    """A message of a user.

    Attributes:
        text: message of the user.
        images: one image, in any form that the processor takes, or a list of such; they come before the text.
    """

    text: str
    images: Any = ()


def answer_batch(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    questions: Sequence[Question],
    *,
    sanitize_control_tokens: bool = True,
    **generate_kwargs: Any,
) -> list[str]:
    """What the model answers to each question, as `Conversation.ask` would give it.

    Args:
        model: model that answers.
        processor: processor of the model.
        questions: questions, any number of them, with any number of images each.
        sanitize_control_tokens: whether control tokens in the texts are text.
        **generate_kwargs: arguments for `generate`, such as `max_new_tokens`.

    Returns:
        The answers, in the order of the questions.

    Raises:
        ValueError: if a text is blank without an image, or the processor refuses a text or an image.
    """
    if not questions:
        return []
    images = [images_of(question.images) for question in questions]
    for question, own in zip(questions, images, strict=True):
        check_asks("a question", question.text, bool(own))
    texts: list[str] = [
        render_chat(
            processor,
            [message("user", question.text, len(own))],
            sanitize_control_tokens=sanitize_control_tokens,
        )
        for question, own in zip(questions, images, strict=True)
    ]
    return answer_prompts(model, processor, texts, list(chain(*images)), **generate_kwargs)


def answer_prompts(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    prompts: list[str],
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    video_metadata: Sequence[Any] = (),
    **generate_kwargs: Any,
) -> list[str]:
    """What the model says after each prompt.

    Args:
        model: model that answers.
        processor: processor of the model.
        prompts: texts as the chat template writes them.
        images, videos: images and videos of all prompts, in any form that the processor takes.
        video_metadata: what is known of each video's decoded frames; none, or one for each video.
        **generate_kwargs: arguments for `generate`.
    """
    inputs = processor(
        text=prompts,
        images=images or None,
        videos=videos or None,
        video_metadata=video_metadata or None,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    with torch.no_grad():
        output = model.generate(**inputs, **generate_kwargs)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


__all__ = ["Question", "answer_batch"]
