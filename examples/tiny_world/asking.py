# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Asking the stock source model, as anybody would with Transformers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from casa_hf.training import Dialogue


class Source:
    """A Qwen2.5-VL checkpoint and what prepares its inputs.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, folder: str | os.PathLike):
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = AutoImageProcessor.from_pretrained(folder)

    def inputs(self, example: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """What the model takes for the question of a conversation: each image as many placeholders as it has tokens.

        Args:
            example: see `casa_hf.training.Dialogue.of`.
        """
        question, _ = Dialogue.of(example).question()
        text = self.tokenizer.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True)
        features = self.image_processor(question.images, return_tensors="pt") if question.images else {}
        placeholder = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        first, *rest = text.split(placeholder)
        text = first
        for part, grid in zip(rest, features.get("image_grid_thw", ()), strict=True):
            text += placeholder * (int(grid.prod()) // self.image_processor.merge_size**2) + part
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        types = (ids == self.model.config.image_token_id).int()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **features}

    @torch.no_grad()
    def answers(self, examples: Sequence[Mapping[str, Any]], max_new_tokens: int = 8) -> list[str]:
        """What the model says to the questions."""
        said = []
        for example in examples:
            inputs = self.inputs(example)
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :]
            said.append(self.tokenizer.decode(new, skip_special_tokens=True).strip())
        return said
