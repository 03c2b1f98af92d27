# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Streams on a CUDA device; the bodies also run on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from casa_hf import CasaForConditionalGeneration, CasaProcessor, CasaStream
from casa_hf.streaming import StreamSettings
from tests.streaming.conftest import FRAME_PIXELS, randomised
from tests.streaming.helpers import emitted, picture, say

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, cuda])]
PICTURES = [picture(seed) for seed in range(4)]


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Whatever waits for the device raises."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
def test_logits_processors_do_not_wait_for_the_device(device: str) -> None:
    processors = StreamSettings().repetition_control([3, 5])
    ids = torch.randint(0, 50, (2, 80), device=device)
    scores = torch.randn(2, 50, device=device)
    expected = processors(ids.cpu(), scores.cpu())
    processors(ids, scores)  # brings the stop tokens to the device, once
    with no_waiting(device):
        actual = processors(ids, scores)
    torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampled", [False, True])
def test_a_stream_and_its_saved_state(device: str, sampled: bool, source_folder: Path, tmp_path: Path) -> None:
    """In float64 a device says what a CPU says; drawn tokens, whose random numbers differ, follow the saved state."""
    processor = CasaProcessor.from_source(source_folder, frame_max_pixels=FRAME_PIXELS)
    model = randomised(CasaForConditionalGeneration.from_pretrained(source_folder, casa_variant="casa"))

    def stream(**settings: Any) -> CasaStream:
        return CasaStream(model, processor, max_new_tokens_per_frame=8, do_sample=sampled, **settings)

    expected = say(stream(), PICTURES[:2])
    model.to(device)
    own = stream(seed=1)
    said = say(own, PICTURES[:2])
    assert sampled or said == expected
    emitted(own.ask("What is this?", max_new_tokens=4))
    torch.save(own.state_dict(), tmp_path / "session.pt")
    later = stream(seed=2)
    later.load_state_dict(torch.load(tmp_path / "session.pt", weights_only=True, map_location=device))
    assert say(later, PICTURES[2:]) == say(own.fork(), PICTURES[2:]) == say(own, PICTURES[2:])
