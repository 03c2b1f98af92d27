# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Two processes that share each matrix of a language model (`tp_plan="auto"`) are one model."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from casa_hf import CasaConfig, convert_checkpoint
from examples.tiny_source import build_tiny_source
from tests.training.helpers import load_model

pytestmark = [pytest.mark.slow, pytest.mark.integration]

ROOT = Path(__file__).parents[1]


def run(folder, output, processes):
    """What `tests.tensor_parallel` finds in this many processes."""
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    command += ["-m", "tests.tensor_parallel", str(folder), str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return torch.load(output)


@pytest.mark.parametrize(
    ("family", "variant", "tied"),
    [
        ("qwen2_5_vl", "casa", True),
        ("qwen2_5_vl", "casa", False),
        ("qwen2_5_vl", "casa-shared", False),
        ("qwen2_5_vl", "exact", True),
        ("qwen3_vl_moe", "casa", False),
        ("qwen3_5", "casa", False),
    ],
)
def test_two_processes_answer_and_learn_as_one(tmp_path, family, variant, tied):
    """Answers token by token, losses with and without logits, and gradients."""
    source = build_tiny_source(tmp_path / "source", family=family, tie_word_embeddings=tied)
    raw = convert_checkpoint(source, tmp_path / "raw", variant)
    shutil.copytree(raw.output, tmp_path / "casa", ignore=shutil.ignore_patterns("*.safetensors*"))
    load_model(raw.output, torch.float32).save_pretrained(tmp_path / "casa")
    alone, both = (run(tmp_path / "casa", tmp_path / f"{processes}.pt", processes) for processes in (1, 2))
    shared = {name for name, size in alone["sizes"].items() if both["sizes"][name] < size}
    attentions = ["self_attn"] if variant != "casa" else ["self_attn", "casa_attn"]
    block = CasaConfig.from_pretrained(raw.output).fusion_layers[0]
    matrices = {f"layers.{block}.{attention}.{name}_proj.weight" for attention in attentions for name in "qkvo"}
    assert {f"model.language_model.{name}" for name in matrices} <= shared
    assert alone["fused"] > both["fused"] == 0  # a process has parts of the matrices only
    assert both["answers"] == alone["answers"] and len(set(alone["answers"])) > 1
    for skip_logits in (False, True):
        expected, found = alone[skip_logits], both[skip_logits]
        assert found["loss"] == pytest.approx(alone[False]["loss"], rel=1e-5)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            scale = gradient.abs().max()
            assert (found["gradients"][name] - gradient).abs().max() <= 1e-4 * scale + 1e-6, name
