# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Answers, losses and gradients of one process, or of several that share each matrix of the language model.

Usage: torchrun --nproc-per-node 2 -m tests.tensor_parallel FOLDER OUTPUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from casa_hf import CasaForConditionalGeneration, loss_casa
from casa_hf.training import CasaDataCollator, freeze, generate_answers
from tests.training.helpers import CONVERSATIONS, load_processor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which this process may hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(folder: Path, output: Path) -> None:
    """Load, answer, compute a loss with logits and without; the first process writes what it found."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    options: dict[str, Any] = {}
    if processes > 1:
        dist.init_process_group("gloo")
        options["distributed_config"] = DistributedConfig(tp_size=processes, tp_plan="auto")
    model = CasaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options)
    sizes = {
        name: (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
        for name, parameter in model.named_parameters()
    }
    processor = load_processor(folder)
    found: dict[str, Any] = {"sizes": sizes}
    options = {"batch_size": 2, "max_new_tokens": 12, "do_sample": False}
    found["answers"] = generate_answers(model, processor, CONVERSATIONS, **options)
    found["fused"] = model.fuse_projections()
    assert generate_answers(model, processor, CONVERSATIONS, **options) == found["answers"]
    freeze(model, "paper-helium")
    batch = CasaDataCollator(processor)(CONVERSATIONS)
    loss_casa.chunk_tokens = lambda vocab_size: 5
    for skip_logits in (False, True):
        model.zero_grad()
        loss = model(**batch, skip_logits=skip_logits).loss
        loss.backward()
        gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
        found[skip_logits] = {"loss": whole(loss).item(), "gradients": gradients}
    if not int(os.environ.get("RANK", 0)):
        torch.save(found, output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    # Not Python's own way out: threads of gloo that are still there now and then abort it.
    sys.stdout.flush()
    os._exit(0)
