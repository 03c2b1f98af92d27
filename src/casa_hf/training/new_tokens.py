# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of new tokens that learn while all others stay as they are.

Conversion adds rows to the embedding matrix. Where the matrix is frozen, these rows train as a small parameter of
their own, which takes their place in the forward pass. So every other row stays bit for bit, whatever the optimizer
does with what it is given (weight decay, updates without a gradient), and gradients and optimizer states are those of
a few rows instead of the whole vocabulary. Checkpoints know nothing of it: they hold the matrix, with the trained rows
in it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import embedding as look_up
from torch.nn.functional import linear

from ..configuration_casa import CasaConfig

logger = logging.getLogger(__name__)

_MODULE = "new_tokens"
# What their parameter's name ends with; before it stands the embedding's.
NEW_TOKENS = f".{_MODULE}.weight"


class NewTokens(nn.Module):
    """The rows of an embedding matrix that train, as a submodule of the frozen embedding.

    Args:
        matrix: (vocabulary, hidden size) the embedding's weight, from which the rows start.
        token_ids: numbers of the rows.

    Attributes:
        weight: (number of tokens, hidden size).
        token_ids: numbers of the rows.
    """

    def __init__(self, matrix: torch.Tensor, token_ids: Sequence[int]):
        super().__init__()
        self.token_ids = tuple(token_ids)
        self.weight = nn.Parameter(matrix.detach()[list(token_ids)])
        self._hooks: list[Any] = []
        self._is_loaded = False

    def attach(self, embedding: nn.Embedding, head: nn.Module | None) -> None:
        """Replace the rows of an embedding and, where one is given, those of the output head tied to it."""
        embedding.add_module(_MODULE, self)
        self._hooks = [
            embedding.register_forward_pre_hook(self._write_back),
            embedding.register_forward_hook(self._embed),
        ]
        if head is not None:
            self._hooks.append(head.register_forward_hook(partial(self._predict, embedding)))
        for module in (embedding,) if head is None else (embedding, head):  # a state dict may name either's matrix
            self._hooks += [
                module.register_state_dict_pre_hook(partial(self._write_back, embedding)),
                module.register_load_state_dict_pre_hook(self._look_for_matrix),
                module.register_load_state_dict_post_hook(partial(self._read, embedding)),
            ]

    def detach(self, embedding: nn.Embedding) -> None:
        """Write the rows into the matrix, and remove the hooks."""
        self._write_back(embedding)
        for hook in self._hooks:
            hook.remove()
        delattr(embedding, _MODULE)

    def _embed(self, embedding: nn.Embedding, args: tuple[torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
        is_token = args[0][..., None] == self._indices(args[0].device)  # (..., number of tokens)
        rows = look_up(is_token.int().argmax(-1), self.weight)
        return torch.where(is_token.any(-1, keepdim=True), rows.to(embedded.device, embedded.dtype), embedded)

    def _predict(
        self, embedding: nn.Embedding, head: Any, args: tuple[torch.Tensor], logits: torch.Tensor
    ) -> torch.Tensor:
        if head.weight is not embedding.weight:  # tied to other embeddings since
            return logits
        # In place: a copy of all logits would be large, and nothing needs what was there for its gradient.
        rows = self.weight.to(args[0].device)
        return logits.index_copy_(-1, self._indices(logits.device), linear(args[0], rows).to(logits))

    def _indices(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.token_ids, device=device)

    def _write_back(self, embedding: nn.Embedding, *_: Any) -> None:
        """Update the matrix for whoever reads it."""
        if self.weight.is_meta or embedding.weight.is_meta:  # on its way to where a model is sharded
            return
        # `data`: what the backward pass keeps of the matrix has not changed for it.
        matrix, rows = embedding.weight.data, _whole(self.weight.data)
        first = 0
        if isinstance(matrix, DTensor):
            first, matrix = _first_local_row(matrix), matrix.to_local()
        indices = self._indices(matrix.device) - first
        here = (indices >= 0) & (indices < len(matrix))
        matrix.index_copy_(0, indices[here], rows.to(matrix)[here])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: the rows are in the matrix."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing: see `_read`."""

    def _look_for_matrix(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        # The matrix itself stays as it is: sharded checkpoints are read into it before it is loaded from there.
        self._is_loaded = f"{prefix}weight" in state_dict

    def _read(self, embedding: nn.Embedding, *_: Any) -> None:
        """Copy the rows from a matrix, if that was loaded."""
        if not self._is_loaded:
            return
        with torch.no_grad():
            rows = _whole(embedding.weight)[list(self.token_ids)]
            if isinstance(self.weight, DTensor):
                rows = distribute_tensor(rows, self.weight.device_mesh, self.weight.placements)
            if self.weight.is_meta:
                self.weight = nn.Parameter(rows)
            else:
                self.weight.copy_(rows)


def train_new_tokens(model: Any, train: bool) -> None:
    """Let the rows of new tokens train apart from their frozen matrix, or make them ordinary rows again.

    Args:
        model: CASA model.
        train: whether the rows train.
    """
    embedding = _embedding(model)
    if embedding is None:
        return
    earlier = getattr(embedding, _MODULE, None)
    if earlier is not None:
        earlier.detach(embedding)
    if train:
        if hasattr(embedding.weight, "ds_id"):
            logger.warning(
                "ZeRO-3 has split the embeddings, so new tokens don't train. Use ZeRO-2 or FSDP2, or train "
                'the whole matrix (the pattern "embed_tokens").'
            )
            return
        head = getattr(model, "lm_head", None)
        tied = head is not None and head.weight is embedding.weight
        NewTokens(embedding.weight, model.config.new_token_ids).attach(embedding, head if tied else None)


def new_tokens_name(model: nn.Module) -> str | None:
    """Name that the parameter of the new tokens has or would have; None if the model has no such tokens."""
    embedding = _embedding(model)
    if embedding is None:
        return None
    return next(name for name, module in model.named_modules() if module is embedding) + NEW_TOKENS


def _embedding(model: Any) -> Any:
    """The embedding that has rows of new tokens."""
    config = getattr(model, "config", None)
    if not isinstance(config, CasaConfig) or not config.new_token_ids:
        return None
    return model.get_input_embeddings()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _first_local_row(matrix: DTensor) -> int:
    """The index of the first row of a matrix that this process holds."""
    # The only public way to this number is to distribute one: the index of each row.
    indices = torch.arange(len(matrix), device=matrix.to_local().device)
    local = distribute_tensor(indices, matrix.device_mesh, matrix.placements, src_data_rank=None).to_local()
    return int(local[0]) if len(local) else len(matrix)
