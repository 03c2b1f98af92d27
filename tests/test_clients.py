# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The programs of examples/clients, and what docs/clients.md says of the libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.samples import PHOTOGRAPHS

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # where there is no GPU
]

LEARNED = "model.language_model.layers.0.casa_attn.q_proj.weight"


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "rloo"])
def test_trl(casa_folder: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("trl")
    from examples.clients import trl_rewards

    before = CasaForConditionalGeneration.from_pretrained(casa_folder, dtype=torch.float32).state_dict()
    trl_rewards.main([kind, str(casa_folder), str(tmp_path), "--steps", "2"])
    after = CasaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not torch.equal(before[LEARNED], after[LEARNED])


def test_a_reward_looks_at_the_image() -> None:
    pytest.importorskip("trl")
    from examples.clients.trl_rewards import names_the_colour

    images = [[Image.new("RGB", (8, 8), colour)] for colour in ("red", "blue", "blue")]
    said: list[Any] = [[{"content": text}] for text in ("Red.", "Red.", "Blue.")]
    first, second, third = names_the_colour(said, images=images)
    assert first == third == 1.0 and second < 0.5


def test_peft(casa_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from examples.clients import peft_adapters

    losses = peft_adapters.main([str(casa_folder), str(tmp_path), "--steps", "5"])
    assert losses[-1] < losses[0]
    merged = CasaForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    source = CasaForConditionalGeneration.from_pretrained(casa_folder, dtype=torch.float32)
    assert not torch.equal(merged.state_dict()[LEARNED], source.state_dict()[LEARNED])
    adapted = peft.PeftModel.from_pretrained(source, tmp_path / "adapter").eval()
    inputs = CasaProcessor.from_pretrained(tmp_path / "merged")(
        text="<|vision_start|><|vision_end|>What?", images=PHOTOGRAPHS / "cat.jpg", return_tensors="pt"
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_accelerate(casa_folder: Path, tmp_path: Path) -> None:
    """Parts on the disk, and the answer that the whole model gives."""
    pytest.importorskip("accelerate")
    from examples.clients import accelerate_maps

    options = [str(casa_folder), str(tmp_path), "--max-new-tokens", "6", "--cpu"]
    whole, everything = accelerate_maps.main([*options, "1GiB"])
    assert set(map(str, everything.values())) == {"cpu"}
    answer, places = accelerate_maps.main([*options, "400KiB"])
    assert set(map(str, places.values())) == {"cpu", "disk"}
    assert answer == whole
