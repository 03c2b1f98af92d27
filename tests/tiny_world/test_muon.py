# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Muon in batches against PyTorch's, and against singular value decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from examples.tiny_world.muon import Muon, orthogonal

SHAPES = [(16, 16), (8, 16), (16, 8), (8, 16), (16, 16), (24, 8)]


def test_orthogonal_changes_only_singular_values():
    matrices = torch.randn(3, 8, 12, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    expected = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        expected = 3.4445 * expected - 4.775 * expected**3 + 2.0315 * expected**5
    torch.testing.assert_close(orthogonal(matrices), left @ torch.diag_embed(expected) @ right)
    assert (expected > 0.3).all() and (expected < 1.3).all()


def test_steps_are_pytorchs():
    """Shapes that stand in batches with others, tall and wide, and one without a gradient, over several steps."""
    ours, theirs = ([nn.Parameter(torch.randn(shape)) for shape in SHAPES] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        other.data.copy_(mine.data)
    start = [matrix.detach().clone() for matrix in ours]
    optimizer = Muon(ours, 0.02, weight_decay=0.5)
    # PyTorch's is in bfloat16.
    reference = torch.optim.Muon(theirs, 0.02, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            gradient = None if index == 1 and step == 2 else torch.randn(mine.shape)
            mine.grad, other.grad = gradient, gradient
        optimizer.step()
        reference.step()
        for mine, other, before in zip(ours, theirs, start, strict=True):
            assert (mine - other).norm() < 0.02 * (mine - before).norm()


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_the_rate_is_that_of_the_group(lr):
    """Schedulers set it."""
    matrix = nn.Parameter(torch.randn(4, 6))
    before = matrix.detach().clone()
    optimizer = Muon([matrix], 1.0)
    optimizer.param_groups[0]["lr"] = lr
    matrix.grad = torch.randn(4, 6)
    optimizer.step()
    update = orthogonal((matrix.grad * (1 - 0.95**2))[None])[0]
    torch.testing.assert_close(matrix.detach(), before - lr * 0.2 * 6**0.5 * update)
