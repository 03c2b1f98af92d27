# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Positions of text and images, whatever padding stands between them, in every way a text can be fed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers_generation import Image, image_inputs, new_model, one_shot, relative_error, token_ids, words
from tests.tiny import PAD

A, B = Image(2, 3, 1), Image(1, 2, 2)
ROW: list[Any] = [*words(2, 1), A, *words(3, 2), B, *words(3, 3)]


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("place", [1, 3, 4, 6, 8, 9])
@pytest.mark.parametrize("variant", ["casa", "exact", "insertion"])
def test_padding_inside_a_call_takes_no_position(variant, place, steps):
    """Wherever it stands, before or after an image that advances positions or between its delimiters."""
    model, ids = new_model(variant, casa_positions="insertion"), token_ids(ROW)
    padded = torch.tensor([[*ids[:place], PAD, PAD, *ids[place:]]])
    mask = torch.ones_like(padded)
    mask[0, place : place + 2] = 0
    with torch.no_grad():
        output = model(padded, attention_mask=mask, **image_inputs([A, B]))
        assert relative_error(output.logits[0, mask[0].bool()], one_shot(model, ROW)) < 1e-9
        if steps:  # and what follows goes on from there
            later = model(torch.tensor([[7, 8]]), cache=output.cache).logits[0]
            assert relative_error(later, one_shot(model, [*ROW, 7, 8])[-2:]) < 1e-9
