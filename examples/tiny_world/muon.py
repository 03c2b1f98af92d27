# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Muon for many small matrices on a CPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """What `torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")` computes, in float32 and many matrices at a time.

    PyTorch's orthogonalises one matrix after another in bfloat16. On processors without instructions for it that takes
    about as long as the rest of a step of a model of this size.

    Args:
        params: matrices.
        lr: rate; scaled by 0.2 times the root of the longer side, it fits AdamW too.
        weight_decay: decoupled, times the rate.
        momentum: of Nesterov's kind.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, *, weight_decay: float = 0.0, momentum: float = 0.95
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Change every matrix that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            alike: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[tuple(sorted(parameter.shape))].append(parameter)
            for (_, longer), parameters in alike.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                    mean = state["momentum_buffer"]
                    mean.lerp_(parameter.grad, 1 - momentum)
                    updates.append(_wide(parameter.grad.lerp(mean, momentum)))
                for parameter, update in zip(parameters, orthogonal(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - lr * group["weight_decay"])
                    _wide(parameter).add_(update, alpha=-lr * 0.2 * longer**0.5)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices of the same singular vectors, whose singular values lie near one: five steps of Newton and Schulz.

    Args:
        matrices: (count, rows, columns), no more rows than columns.
    """
    matrices = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = matrices @ matrices.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        matrices = torch.baddbmm(matrices, polynomial, matrices, beta=3.4445)
    return matrices


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
