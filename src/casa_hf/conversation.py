# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A conversation of several turns on one cache.

Every turn feeds the model what it hasn't seen yet: the new message and the pixels of its images. What was said before
stays in the cache, token for token as it was generated; it is never decoded and tokenised again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .media_casa import pictures_of
from .transformers_versions import CACHE_NAMES

if TYPE_CHECKING:
    from .modeling_casa import CasaForConditionalGeneration
    from .processing_casa import CasaProcessor

# Stands for the last answer while the chat template is rendered; no message contains it.
_ANSWER = "\0answer\0"


class Conversation:
    """Turns of a user and a model.

    Args:
        model: answers.
        processor: the model's.
    """

    def __init__(self, model: CasaForConditionalGeneration, processor: CasaProcessor):
        self.model = model
        self.processor = processor
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said and free the cache."""
        self._ids = torch.empty((1, 0), dtype=torch.long, device=self.model.device)
        self._cache: Any = None

    def ask(self, text: str, images: Any = (), **generate_kwargs: Any) -> str:
        """Send one message and return the answer.

        Args:
            text: the message; its images come before it.
            images: the new images only: one, in any form that the processor takes (a PIL image, a path, a URL, base64,
                bytes, an array), or a list of such.
            **generate_kwargs: for `generate`, such as `max_new_tokens` or `streamer`.

        Raises:
            TypeError: for a cache; the conversation has its own.
            ValueError: if the processor refuses the message; the conversation stays as it was. If generation fails,
                the conversation is reset.
        """
        if given := [name for name in CACHE_NAMES if name in generate_kwargs]:
            raise TypeError(f"A conversation has a cache of its own; leave {given[0]} out, or call model.generate.")
        images = pictures_of(images)
        message = {"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]}
        inputs = self.processor(
            text=[self._new_text(message)],
            images=images or None,
            add_special_tokens=False,
            return_tensors="pt",
        ).to(self.model.device)
        ids = torch.cat([self._ids, inputs["input_ids"]], dim=1)
        try:
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                cache=self._cache,
                return_dict_in_generate=True,
                **self._image_inputs(inputs),
                **generate_kwargs,
            )
        except BaseException:
            # The cache may hold a part of this turn by now.
            self.reset()
            raise
        answer_ids = self._without_end(output.sequences[0, ids.shape[1] :])
        answer = self.processor.decode(answer_ids, skip_special_tokens=True)
        self._cache = output.cache
        self._ids = torch.cat([ids, answer_ids[None]], dim=1)
        return answer

    def _image_inputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The new images, and where they stand; a mark that the model has written itself is text."""
        if not len(inputs["image_grid_thw"]):
            return {}
        places = (inputs["input_ids"] == self.model.config.image_token_id).nonzero()
        places[:, 1] += self._ids.shape[1]
        return {
            "pixel_values": inputs["pixel_values"],
            "image_grid_thw": inputs["image_grid_thw"],
            "image_positions": places,
        }

    def _new_text(self, message: dict[str, Any]) -> str:
        """What the chat template puts after the last answer, up to where the next one begins."""
        if not self._ids.shape[1]:
            return self._render([message])
        answer = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
        return self._render([message, answer, message]).rpartition(_ANSWER)[2]

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _without_end(self, ids: torch.Tensor) -> torch.Tensor:
        # The template repeats the token that ended the answer. It is the last one, so the cache doesn't hold it yet.
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        return ids[:-1] if ids[-1].item() in ends else ids
