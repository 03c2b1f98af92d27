# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Examples to batches, many hundred times a second: what `CasaDataCollator` makes of them, by a shorter way.

Texts are made of few different pieces between special tokens, whose ids are looked up instead of tokenised again;
images are of two sizes and already multiples of a tile, so that patches are cut without resizing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .world import Example

IGNORED = -100


class Batcher:
    """Makes batches for CASA models.

    Args:
        processor: the model's `CasaProcessor`, whose tokenizer and settings of images hold.
    """

    def __init__(self, processor: Any):
        self.tokenizer = processor.tokenizer
        settings = processor.image_processor
        self.patch, self.merge, self.frames = settings.patch_size, settings.merge_size, settings.temporal_patch_size
        # As the image processor rounds: pixels are scaled and normalised in one step.
        self.mean = torch.tensor(settings.image_mean) * 255
        self.std = torch.tensor(settings.image_std) * 255
        self._ids = lru_cache(maxsize=50_000)(self._tokenize)
        self._mark = (*self._tokenize(processor.image_placeholder), *processor.gist_token_ids)

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A batch padded on the right: `input_ids`, `attention_mask`, `labels`, and, where there are images,
        `pixel_values` and `image_grid_thw`."""
        encoded = [self.encode(example) for example in examples]
        width = max(len(ids) for ids, _ in encoded)
        batch = {
            "input_ids": torch.full((len(encoded), width), self.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(len(encoded), width, dtype=torch.long),
            "labels": torch.full((len(encoded), width), IGNORED),
        }
        for row, (ids, labels) in enumerate(encoded):
            batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][row, : len(ids)] = 1
            batch["labels"][row, : len(ids)] = torch.tensor(labels)
        images = [image for example in examples for image in example.images]
        return {**batch, **self.pixels(images)} if images else batch

    def encode(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation, as the chat template writes it."""
        ids: list[int] = []
        labels: list[int] = []
        for turn, (question, answer) in enumerate(example.turns):
            # Texts with no image between them are tokenised together.
            pieces = ["<|im_start|>user\n"]
            for part in (*example.before(turn), question):
                if part is None:
                    pieces.append("")
                else:
                    pieces[-1] += part
            prompt = list(self._ids(pieces[0]))
            for piece in pieces[1:]:
                prompt += [*self._mark, *self._ids(piece)]
            prompt += self._ids("<|im_end|>\n<|im_start|>assistant\n")
            said = self._ids(f"{answer}<|im_end|>")
            end = self._ids("\n")
            ids += [*prompt, *said, *end]
            labels += [*[IGNORED] * len(prompt), *said, *[IGNORED] * len(end)]
        return ids, labels

    def pixels(self, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        """`pixel_values` (patches, patch dim) and `image_grid_thw` of square images."""
        sides = [image.width for image in images]
        counts = torch.tensor([(side // self.patch) ** 2 for side in sides])
        starts = counts.cumsum(0) - counts
        values = torch.empty(int(counts.sum()), 3 * self.frames * self.patch**2)
        for side in set(sides):
            of_side = [index for index, other in enumerate(sides) if other == side]
            stacked = torch.from_numpy(np.stack([np.asarray(images[index]) for index in of_side]))
            places = (starts[of_side, None] + torch.arange(int(counts[of_side[0]]))).flatten()
            values[places] = self._patches(stacked)
        return {
            "pixel_values": values,
            "image_grid_thw": torch.tensor([[1, side // self.patch, side // self.patch] for side in sides]),
        }

    def _patches(self, images: torch.Tensor) -> torch.Tensor:
        """(images, side, side, 3) bytes to (patches, patch dim), patches of one image token together."""
        count, side = images.shape[:2]
        tiles = side // (self.patch * self.merge)
        normalised = (images - self.mean) / self.std
        patches = normalised.reshape(count, tiles, self.merge, self.patch, tiles, self.merge, self.patch, 3)
        patches = patches.permute(0, 1, 4, 2, 5, 7, 3, 6)[:, :, :, :, :, :, None]
        return patches.expand(-1, -1, -1, -1, -1, -1, self.frames, -1, -1).reshape(-1, 3 * self.frames * self.patch**2)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
