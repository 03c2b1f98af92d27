# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the tests of the converter share: altered copies of a checkpoint, and what a conversion of it must hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from casa_hf import CheckpointError
from casa_hf.conversion import convert_checkpoint

INDEX = "model.safetensors.index.json"

Tensors = dict[str, torch.Tensor]


def load_weights(folder: Path) -> Tensors:
    """All tensors of a checkpoint by their stored names."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def altered(
    source: Path,
    folder: Path,
    weights: Callable[[Tensors], Tensors] | None = None,
    config: Callable[[dict[str, Any]], Any] | None = None,
) -> Path:
    """A copy of a single-file checkpoint with other weights or another configuration."""
    shutil.copytree(source, folder)
    if weights is not None:
        save_file(weights(load_weights(source)), folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        content = json.loads((folder / "config.json").read_text())
        config(content)
        (folder / "config.json").write_text(json.dumps(content))
    return folder


def in_memory_layout(tensors: Tensors) -> Tensors:
    """Tensors of either layout under the names that Transformers 5 has in memory."""
    renamed = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        prefix = {"visual": "model.visual.", "model": "model.language_model.", "lm_head": "lm_head."}[first]
        in_memory = rest.startswith(("visual.", "language_model."))
        renamed[name if in_memory else prefix + rest] = tensor
    return renamed


def older_layout(tensors: Tensors) -> Tensors:
    """Tensors of either layout as checkpoints had them before Transformers 5: under other names, and matrices of
    experts transposed, as in the Hub's Qwen3-VL-MoE."""
    return {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): (
            tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name and tensor.ndim == 3 else tensor
        )
        for name, tensor in tensors.items()
    }


def converted(tensors: Tensors, fusion_layers: list[int]) -> Tensors:
    """What a conversion with projections of its own makes of tensors in either layout."""
    result = in_memory_layout(tensors)
    for index in fusion_layers:
        block = f"model.language_model.layers.{index}."
        for name, tensor in in_memory_layout(tensors).items():
            if name.startswith(f"{block}self_attn."):
                result[name.replace("self_attn", "casa_attn")] = tensor
        result[f"{block}casa_attn.image_norm.weight"] = result[f"{block}input_layernorm.weight"]
    return result


def assert_same(actual: Tensors, expected: Tensors) -> None:
    """Same names, dtypes and values."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def stored_names(file: Path) -> list[str]:
    """Names of the tensors of a file, in the order in which they lie there."""
    with safe_open(file, framework="pt") as opened:
        return list(opened.offset_keys())


def assert_refused(source: str | Path, output: Path, *words: str, **options: Any) -> str:
    """The conversion stops with one line that holds `words`, and leaves nothing beside the output."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(CheckpointError) as refused:
        convert_checkpoint(source, output, **options)
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert sorted(output.parent.iterdir()) == before
    return message
