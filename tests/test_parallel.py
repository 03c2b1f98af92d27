# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Two processes that share a model's attention and experts compute what one does.

Run as a program it is one of them: `python -m tests.test_parallel CHECKPOINT tp|ep`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from casa_hf import CasaForConditionalGeneration, convert_checkpoint
from casa_hf.transformers_versions import is_older_than
from examples.tiny_source import build_tiny_source
from tests.conversion.helpers import altered, older_layout

ROOT = Path(__file__).parents[1]

# In older versions stored experts can't be parted.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(is_older_than(5, 24), reason="processes share experts otherwise before Transformers 5.24"),
]


def logits(model: Any) -> torch.Tensor:
    """With an image, whose states pass the experts."""
    ids = torch.tensor([[5, 6, 7, model.config.vision_start_token_id, model.config.image_token_id, 8, 9]])
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, model.config.image_features_size, generator=generator)
    output = model(ids, image_embeds=features, image_grid_thw=torch.tensor([[1, 4, 6]])).logits
    return output.full_tensor() if hasattr(output, "full_tensor") else output


def in_two_processes(checkpoint: Path, kind: str) -> torch.Tensor:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "tests.test_parallel", str(checkpoint), kind]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            log = process.communicate(timeout=240)[0]
            assert process.returncode == 0, log[-4000:]
    finally:
        for process in started:
            process.kill()
    return torch.tensor(json.loads((checkpoint / "logits.json").read_text()))


@pytest.mark.parametrize(
    ("family", "kind", "stored"),
    [
        ("qwen3_vl_moe", "tp", "as in memory"),
        ("qwen3_vl_moe", "ep", "as in memory"),
        ("qwen3_vl_moe", "ep", "as on the Hub"),
        ("qwen3_5_moe", "tp", "as in memory"),
        ("qwen3_5_moe", "ep", "one by one"),
    ],
)
def test_experts_in_two_processes(family: str, kind: str, stored: str, tmp_path: Path) -> None:
    source = build_tiny_source(tmp_path / "source", family=family)
    if stored == "as on the Hub":
        source = altered(source, tmp_path / "hub", lambda w: dict(zip(w, older_layout(w).values(), strict=True)))
    folder = convert_checkpoint(source, tmp_path / "casa", "exact").output
    model = CasaForConditionalGeneration.from_pretrained(folder)
    if stored == "as in memory":
        model.save_pretrained(folder)
    with torch.no_grad():
        expected = logits(model)
    torch.testing.assert_close(in_two_processes(folder, kind), expected, rtol=1e-4, atol=1e-4)


def main(checkpoint: Path, kind: str) -> None:
    from transformers.distributed import DistributedConfig

    sizes = {"tp_size": 2, **({"ep_size": 2} if kind == "ep" else {})}
    model = CasaForConditionalGeneration.from_pretrained(checkpoint, distributed_config=DistributedConfig(**sizes))
    experts: Any = model.get_parameter("model.language_model.layers.0.mlp.experts.gate_up_proj")
    assert experts.to_local().shape[:2] == ((3, 80) if kind == "ep" else (6, 40))
    with torch.no_grad():
        output = logits(model)
    if not distributed.get_rank():
        (checkpoint / "logits.json").write_text(json.dumps(output.tolist()))
    distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
    # Not Python's own way out: threads of gloo that are still there now and then abort it.
    sys.stdout.flush()
    os._exit(0)
