# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention of vision towers by PyTorch's ordinary kernels, many sequences at once.

Stock towers go through images, and through the windows within them, one by one, and read their bounds off a tensor:
hundreds of launches per block, and graphs that break there. Here sequences of one length go into one call. How many
there are of which length is known on the host, and comes as numbers, so that a tower can be compiled for a size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask
from transformers.vision_utils import get_vision_window_index

# The name of "sdpa" for towers: stock ones hand all sequences to one call if a name says that it is flash attention.
SDPA_TOWER = "sdpa_flash"


class Sequences(NamedTuple):
    """Sequences, one behind the other: `repeats` times, for each of `runs`, so many of such a length.

    It takes the place of the length of the longest, which towers hand on as it is.
    """

    repeats: int
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, lengths: Sequence[int], repeats: int = 1) -> Sequences:
        """Sequences of these lengths, and that so many times."""
        runs = tuple((len(list(group)), length) for length, group in groupby(lengths))
        return cls(1, ((runs[0][0] * repeats, runs[0][1]),)) if len(runs) == 1 else cls(repeats, runs)


def sdpa_tower_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: Sequences | Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in the form of Transformers' attention interface, of each sequence by itself.

    Args:
        module: attention of a tower.
        query, key, value: (1, heads, total length, head_dim).
        attention_mask: must be None; padding isn't attended to by being no sequence's.
        dropout: share of weights that are dropped.
        scaling: factor of the scores.
        cu_seq_lens_q: (sequences + 1,) where sequences begin; read if `max_length_q` doesn't say.
        max_length_q: the `Sequences`.

    Returns:
        (1, total length, heads, head_dim), and None for the weights.
    """
    sequences = max_length_q
    if not isinstance(sequences, tuple):
        assert cu_seq_lens_q is not None
        sequences = Sequences.of(cu_seq_lens_q.diff().tolist())
    repeats, runs = sequences
    outputs = []
    # (heads, repeats, length of all runs, head_dim)
    states = [tensor[0].unflatten(1, (repeats, -1)) for tensor in (query, key, value)]
    start = 0
    for count, length in runs:
        end = start + count * length
        own = [state[:, :, start:end].unflatten(2, (count, length)).flatten(1, 2).transpose(0, 1) for state in states]
        output, _ = sdpa_attention_forward(module, *own, None, dropout=dropout, scaling=scaling, is_causal=False)
        outputs.append(output.unflatten(0, (repeats, count)).flatten(1, 2))  # (repeats, length of the run, heads, ...)
        start = end
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return joined.flatten(0, 1)[None], None


class TowerWindows(NamedTuple):
    """Windows of images, those of one length in a row.

    Attributes:
        order: (merged patches,) where each of them was before.
        sequences: the windows, in patches.
    """

    order: torch.Tensor
    sequences: Sequences


def tower_windows(grids: torch.Tensor, merge: int, window_size: int, patch_size: int) -> TowerWindows:
    """The windows that stock towers make, within each temporal patch of an image in the order of their lengths.

    Args:
        grids: (num_images, 3) patches in time, height and width; on the CPU.
        merge: number of patches that are merged, along either side.
        window_size: side of a window, in pixels.
        patch_size: side of a patch, in pixels.
    """
    # Temporal patches one by one: attention that knows no windows works on each of them.
    sizes = [(height, width) for time, height, width in grids.tolist() for _ in range(time)]
    of_patches = [_windows_of(size, merge, window_size, patch_size) for size in sizes]
    starts = accumulate((len(windows.order) for windows in of_patches), initial=0)
    index = torch.cat([windows.order + start for windows, start in zip(of_patches, starts, strict=False)])
    if len(set(sizes)) == 1:
        return TowerWindows(index, Sequences.of(list(_lengths(of_patches[0])), len(sizes)))
    return TowerWindows(index, Sequences.of([length for windows in of_patches for length in _lengths(windows)]))


@lru_cache(maxsize=256)
def _windows_of(size: tuple[int, int], merge: int, window_size: int, patch_size: int) -> TowerWindows:
    index, bounds = get_vision_window_index(torch.tensor([[1, *size]]), merge, window_size, patch_size)
    windows = index.split((bounds.diff() // merge**2).tolist())
    ordered = sorted(windows, key=len)
    return TowerWindows(torch.cat(ordered), Sequences.of([len(window) * merge**2 for window in ordered]))


def _lengths(windows: TowerWindows) -> Iterator[int]:
    for count, length in windows.sequences.runs:
        yield from [length] * count


def tower_images(grids: torch.Tensor) -> Sequences:
    """The images, or the temporal patches of whole videos, as sequences of patches.

    Args:
        grids: (num_images, 3) patches in time, height and width; on the CPU.
    """
    return Sequences.of([height * width for time, height, width in grids.tolist() for _ in range(time)])


AttentionInterface.register(SDPA_TOWER, sdpa_tower_forward)
AttentionMaskInterface.register(SDPA_TOWER, flash_attention_mask)
