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

from tests.conversion.helpers import load_weights

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
    return json.loads((output / "run.json").read_text()), load_weights(output / "trained")


@pytest.fixture(scope="module")
def alone(casa_folder, tmp_path_factory):
    """The run of one process, with the two processes' batches in one."""
    return run(casa_folder, tmp_path_factory.mktemp("alone"), "trainer", 1)


@pytest.mark.parametrize(("mode", "wrapped"), [("trainer", "DistributedDataParallel"), ("fsdp2", "FSDP")])
def test_two_processes_train_as_one(casa_folder, tmp_path, alone, mode, wrapped):
    expected, weights = alone
    before = load_weights(casa_folder)
    found, others = run(casa_folder, tmp_path, mode, 2)
    assert wrapped in found["wrapped"]
    assert not (tmp_path / "trained.incomplete").exists()
    assert found["answers"] == expected["answers"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert others.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max()), msg=name)
    fusion = [name for name in weights if "casa_attn" in name]
    assert fusion and not any(torch.equal(weights[name], before[name]) for name in fusion)
