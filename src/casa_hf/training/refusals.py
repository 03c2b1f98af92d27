# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What both `CasaTrainer` and the recipe around it refuse."""

from __future__ import annotations

# Follows the name of the argument.
TOKEN_IS_SAVED = (
    "was given; expected none, because it would be saved in training_args.bin. Use `hf auth login` or HF_TOKEN."
)


def refuse_several_gpus(count: int) -> None:
    """Refuse to train in one process on more than one GPU.

    Transformers' Trainer would split batches between them by rows, also the pixels, whose rows are patches.

    Args:
        count: number of GPUs that the process would use.

    Raises:
        ValueError: if it is more than one.
    """
    if count > 1:
        raise ValueError(
            f"There are {count} GPUs but only one process; CASA trains with one process for each GPU. Start them with "
            f"`accelerate launch --num_processes {count} ...` (`-m casa_hf train ...`, or your own script), or choose "
            "one GPU with CUDA_VISIBLE_DEVICES=0."
        )
