# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Answers to many questions in one batch, each with its own images and videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .chat_text import message, render_chat
from .checks import check_asks
from .media_casa import images_of, videos_of
from .videos_casa import take_video_options

if TYPE_CHECKING:
    from .modeling_casa import CasaForConditionalGeneration
    from .processing_casa import CasaProcessor


class Question(NamedTuple):
    """A message of a user.

    Attributes:
        text: message of the user.
        images: one image, in any form that the processor takes, or a list of such; they come before the text.
        videos: videos likewise, as `Conversation.ask` takes them; they come after the images.
    """

    text: str
    images: Any = ()
    videos: Any = ()


def answer_batch(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    questions: Sequence[Question],
    *,
    sanitize_control_tokens: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[str]:
    """What the model answers to each question, as `Conversation.ask` would give it.

    Args:
        model: model that answers.
        processor: processor of the model.
        questions: questions, any number of them, with any number of images and videos each.
        sanitize_control_tokens: whether control tokens in the texts are text.
        chat_template_kwargs: variables of the chat template, as in `Conversation`.
        **options: arguments for `generate`, such as `max_new_tokens`, and for the processor, of all videos, such as
            `fps`; see `Conversation.ask`.

    Returns:
        The answers, in the order of the questions.

    Raises:
        ValueError: if a text is blank without an image or a video, or the processor refuses a text, an image or a
            video.
    """
    if not questions:
        return []
    images = [images_of(question.images) for question in questions]
    videos = [videos_of(question.videos) for question in questions]
    visuals = list(zip(questions, images, videos, strict=True))
    for question, stills, clips in visuals:
        check_asks("a question", question.text, bool(stills or clips))
    texts: list[str] = [
        render_chat(
            processor,
            [message("user", question.text, len(stills), len(clips))],
            sanitize_control_tokens=sanitize_control_tokens,
            chat_template_kwargs=chat_template_kwargs,
        )
        for question, stills, clips in visuals
    ]
    return answer_prompts(model, processor, texts, list(chain(*images)), videos if any(videos) else (), **options)


def answer_prompts(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    prompts: list[str],
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    video_metadata: Sequence[Any] = (),
    **options: Any,
) -> list[str]:
    """What the model says after each prompt.

    Args:
        model: model that answers.
        processor: processor of the model.
        prompts: texts as the chat template writes them.
        images, videos: images and videos of all prompts, in any form that the processor takes.
        video_metadata: what is known of each video's decoded frames; none, or one for each video.
        **options: arguments for `generate`, and for the processor, of the videos.
    """
    of_videos = take_video_options(options)
    inputs = processor(
        text=prompts,
        images=images or None,
        videos=videos or None,
        video_metadata=video_metadata or None,
        **of_videos,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    with torch.no_grad():
        output = model.generate(**inputs, **options)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


__all__ = ["Question", "answer_batch"]
