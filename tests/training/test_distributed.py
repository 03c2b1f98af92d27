# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Two processes train as one does, though one of them never sees an image."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from casa_hf import CasaConfig, convert_checkpoint
from examples.tiny_source import build_tiny_source
from tests.conversion.helpers import load_weights
from tests.training.helpers import load_model

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def run(checkpoint, output, mode, processes):
    """Train in this many processes; what the run wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
        if processes > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        command = [sys.executable, "-m", "tests.training.distributed", str(checkpoint), str(output), mode]
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        for process in started:
            log = process.communicate(timeout=240)[0]
            assert process.returncode == 0, log[-4000:]
    finally:
        for process in started:
            process.kill()
    assert not (output / "trained.incomplete").exists()
    return json.loads((output / "run.json").read_text()), load_weights(output / "trained")


@pytest.fixture(scope="module")
def alone(casa_folder, tmp_path_factory):
    """The run of one process, with the two processes' batches in one."""
    return run(casa_folder, tmp_path_factory.mktemp("alone"), "trainer", 1)


MODES = pytest.mark.parametrize(("mode", "wrapped"), [("trainer", "DistributedDataParallel"), ("fsdp2", "FSDP")])


@MODES
def test_two_processes_train_as_one(casa_folder, tmp_path, alone, mode, wrapped):
    compare(casa_folder, run(casa_folder, tmp_path, mode, 2), alone, wrapped)


@pytest.mark.slow
def test_two_processes_train_on_an_iterable_as_one_on_its_list(casa_folder, tmp_path, alone):
    """Each takes its own conversations, of which one has two images; answers are for all of them."""
    compare(casa_folder, run(casa_folder, tmp_path, "stream", 2), alone, "DistributedDataParallel")


@pytest.mark.slow
@MODES
def test_two_processes_train_new_tokens_as_one(tmp_path, mode, wrapped):
    """A frozen matrix, tied to the head, three rows of which train; sharded, they lie in the second process."""
    source = build_tiny_source(tmp_path / "source", tie_word_embeddings=True)
    folder = convert_checkpoint(source, tmp_path / "casa", num_gist_tokens=3).output
    (tmp_path / "alone").mkdir()
    (tmp_path / "both").mkdir()
    alone, both = run(folder, tmp_path / "alone", "trainer", 1), run(folder, tmp_path / "both", mode, 2)
    compare(folder, both, alone, wrapped)
    name = "model.language_model.embed_tokens.weight"
    start = load_model(folder, torch.float32).state_dict()[name]
    changed = (both[1][name] != start).any(-1).nonzero().flatten().tolist()
    assert changed == CasaConfig.from_pretrained(folder).gist_token_ids


def compare(folder, both, alone, wrapped):
    """That the runs of two processes and of one have the same losses, answers and weights."""
    expected, weights = alone
    before = load_weights(folder)
    found, others = both
    assert wrapped in found["wrapped"]
    assert found["answers"] == expected["answers"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert others.keys() - {"lm_head.weight"} == weights.keys() - {"lm_head.weight"}  # a tied head is saved once
    others = {name: others[name] for name in weights}
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max()), msg=name)
    fusion = [name for name in weights if "casa_attn" in name]
    assert fusion and not any(torch.equal(weights[name], before[name]) for name in fusion)
