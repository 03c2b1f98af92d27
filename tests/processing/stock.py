# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the stock processor of Qwen3-VL makes of a prompt with videos, without torchvision, which its pixels need."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

VIDEO_PAD = "<|video_pad|>"


def stock_text(
    tokenizer: Any,
    prompt: str,
    videos: Sequence[tuple[float | None, Sequence[int]]],
    grid: tuple[int, int] = (4, 6),
    pads: bool = False,
) -> str:
    """The prompt as the stock processor writes it.

    Args:
        tokenizer: of the checkpoint.
        prompt: with a pad for each video.
        videos: of each video, the frames per second (None if unknown) and the numbers of the frames taken.
        grid: height and width of all frames, in patches.
        pads: whether to keep the pads that stand for the tokens of videos.
    """
    stock: Any = object.__new__(Qwen3VLProcessor)
    stock.image_token, stock.video_token = "<|image_pad|>", VIDEO_PAD
    stock.vision_start_token, stock.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    stock.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    stock.tokenizer = tokenizer
    replacements = []
    for fps, indices in videos:
        made = {
            "video_grid_thw": torch.tensor([[-(-len(indices) // 2), *grid]]),
            "video_metadata": [VideoMetadata(1 + max(indices), fps=fps, frames_indices=list(indices))],
        }
        replacements.append(stock.replace_video_token(made, 0))
    [text], _ = stock.get_text_with_replacements([prompt], [], replacements, [])
    assert text.count(VIDEO_PAD) == grid[0] * grid[1] // 4 * sum(-(-len(indices) // 2) for _, indices in videos)
    return text if pads else text.replace(VIDEO_PAD, "")
