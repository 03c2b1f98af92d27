# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluation by generated answers, compared with those of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..answers import answer_prompts
from .samples import Dialogue

if TYPE_CHECKING:
    from ..modeling_casa import CasaForConditionalGeneration
    from ..processing_casa import CasaProcessor


def generate_answers(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    **generate_kwargs: Any,
) -> list[str]:
    """Generate the last answer of each conversation.

    Args:
        model: CASA model; its mode (training or evaluation) is restored.
        processor: processor of the model.
        examples: conversations; see `Dialogue.of`.
        batch_size: number of conversations that are answered together.
        **generate_kwargs: arguments of `generate`, such as `max_new_tokens`.

    Returns:
        The answers, without surrounding whitespace.
    """
    answers = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(examples), batch_size):
            questions = [Dialogue.of(example).question()[0] for example in examples[start : start + batch_size]]
            images = [image for question in questions for image in question.images]
            videos = [question.videos for question in questions]
            prompts = [
                processor.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True)
                for question in questions
            ]
            metadata = [known for question in questions for known in question.video_metadata]
            answers += answer_prompts(
                model, processor, prompts, images, videos if any(videos) else (), metadata, **generate_kwargs
            )
    finally:
        model.train(was_training)
    return [answer.strip() for answer in answers]


def exact_match(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Share of the answers that equal their reference, apart from surrounding whitespace."""
    equal = [answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True)]
    return {"exact_match": sum(equal) / len(equal)}
