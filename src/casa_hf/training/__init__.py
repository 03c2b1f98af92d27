# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Training: conversations to batches, what trains at which rate, and a Trainer (docs/training.md)."""

from typing import TYPE_CHECKING, Any

from .collator import CasaDataCollator, PackedDataset
from .config import TrainingConfig
from .data import load_conversations, load_mixture
from .evaluation import exact_match, generate_answers
from .parameters import (
    EXPERT_PARAMETERS,
    LORA_TARGETS,
    checkpoint_activations,
    freeze,
    parameter_groups,
    parts_table,
    trainable_parts,
)
from .recipe import TrainingReport, train
from .samples import Dialogue

if TYPE_CHECKING:
    from .trainer import CasaTrainer

__all__ = [
    "EXPERT_PARAMETERS",
    "LORA_TARGETS",
    "CasaDataCollator",
    "CasaTrainer",
    "Dialogue",
    "PackedDataset",
    "TrainingConfig",
    "TrainingReport",
    "checkpoint_activations",
    "exact_match",
    "freeze",
    "generate_answers",
    "load_conversations",
    "load_mixture",
    "parameter_groups",
    "parts_table",
    "train",
    "trainable_parts",
]


def __getattr__(name: str) -> Any:
    # Transformers' Trainer imports Accelerate, which is an optional dependency.
    if name == "CasaTrainer":
        from .trainer import CasaTrainer

        return CasaTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
