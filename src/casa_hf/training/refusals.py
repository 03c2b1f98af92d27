# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What neither `CasaTrainer` nor the recipe around it can do, in one place."""

from __future__ import annotations

# Why no argument of a run is a token.
TOKEN_IS_SAVED = (
    "the token would be saved and published with the other arguments (training_args.bin). Leave it out, and log in "
    "with `hf auth login` or set HF_TOKEN."
)


def refuse_several_gpus(count: int) -> None:
    """Refuse to train in one process on more than one GPU.

    Transformers' Trainer would cut batches between them by rows, and pixels, whose rows are patches, likewise.

    Args:
        count: number of GPUs that the process would use.

    Raises:
        ValueError: if it is more than one.
    """
    if count > 1:
        raise ValueError(
            f"There are {count} GPUs and one process. Start one for each GPU (`accelerate launch --num_processes "
            f"{count} ...`, with `-m casa_hf train ...` or your own script), or choose a GPU with "
            "CUDA_VISIBLE_DEVICES=0."
        )
