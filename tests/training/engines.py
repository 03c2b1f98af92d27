# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`casa-hf train` in a process that `accelerate launch` has started, on a CPU.

Accelerate leaves FSDP2 and DeepSpeed to accelerators. Here it is told that there are some, which talk by gloo; what
wraps, shards, trains, saves and resumes is its own code, PyTorch's and DeepSpeed's. Losses are of several chunks.

Usage: accelerate launch --config_file FILE -m tests.training.engines RUN.yaml
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from casa_hf import loss_casa
from casa_hf.training import TrainingConfig, train

CHUNK = 3


def _on_gloo(state: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    torch.set_num_threads(1)
    loss_casa.chunk_tokens = lambda vocab_size: CHUNK
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        PartialState._prepare_backend = _on_gloo
    train(TrainingConfig.from_yaml(sys.argv[1]))
    # Not Python's own way out: threads of gloo that are still there now and then abort it.
    sys.stdout.flush()
    os._exit(0)
