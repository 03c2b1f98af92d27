# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""PEFT's prompt learning, which changes the inputs and the cache of every forward: steps equal whole forwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from casa_hf import CasaForConditionalGeneration, CasaProcessor, Conversation
from tests.helpers_generation import words

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT

LENGTH = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
LEARNED: dict[str, Callable[[], Any]] = {
    "prompt": lambda: peft.PromptTuningConfig(**LENGTH),
    "encoder": lambda: peft.PromptEncoderConfig(**LENGTH, encoder_hidden_size=16),
    "prefix": lambda: peft.PrefixTuningConfig(**LENGTH),
}
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "alone": lambda: {},
    "without cache": lambda: {"use_cache": False},
    "cache": lambda: {"cache": DynamicCache()},
    "past_key_values": lambda: {"past_key_values": DynamicCache()},
}


def adapted(folder: Path, kind: str) -> Any:
    """A model with a random prompt, which no end of a sequence stops."""
    model = CasaForConditionalGeneration.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    adapted = peft.get_peft_model(model, LEARNED[kind]()).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapted


@torch.no_grad()
def step_by_step(model: Any, ids: torch.Tensor, **images: Any) -> list[int]:
    """Six tokens, each by a forward over everything before it."""
    given = ids.shape[1]
    for _ in range(6):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **images).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, given:].tolist()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", LEARNED)
def test_text(casa_folder: Path, kind: str, call: str) -> None:
    model, ids = adapted(casa_folder, kind), torch.tensor([words(6, 3)])
    produced = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, **CALLS[call]()
    )
    expected = step_by_step(model, ids)
    assert produced[0, -6:].tolist() == expected
    with model.disable_adapter():
        assert step_by_step(model, ids) != expected, "the prompt changes the answer"


@pytest.mark.parametrize("kind", LEARNED)
def test_text_of_the_processor(casa_folder: Path, kind: str) -> None:
    """Which comes with token types and without images, in empty tensors."""
    model, processor = adapted(casa_folder, kind), CasaProcessor.from_pretrained(casa_folder)
    inputs = processor(text=["hello", "good day"], padding=True, return_tensors="pt")
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert inputs.keys() > text.keys() and not len(inputs["pixel_values"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**text).logits)
    settings = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **settings), model.generate(**text, **settings))


def picture(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config, vision = model.config, model.config.vision_config
    ids = torch.tensor([[*words(3, 1), config.vision_start_token_id, config.image_token_id, *words(2, 2)]])
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(24, patch, generator=torch.Generator().manual_seed(1))
    return ids, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 6]])}


@pytest.mark.parametrize("call", CALLS)
def test_images_behind_a_prefix(casa_folder: Path, call: str) -> None:
    model = adapted(casa_folder, "prefix")
    ids, images = picture(model)
    settings = {"max_new_tokens": 6, "do_sample": False, **CALLS[call]()}
    produced = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **images, **settings)
    # Later marks would be text; the first forward has the image in its place.
    places = (ids == model.config.image_token_id).nonzero()
    assert produced[0, -6:].tolist() == step_by_step(model, ids, **images, image_positions=places)


@pytest.mark.parametrize("typed", [False, True], ids=["", "with types"])
@pytest.mark.parametrize("kind", ["prompt", "encoder"])
def test_images_behind_a_prompt_are_refused(casa_folder: Path, kind: str, typed: bool) -> None:
    """The prompt would move every image to another place in the text."""
    model = adapted(casa_folder, kind)
    ids, images = picture(model)
    if typed:
        images["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    with pytest.raises(
        ValueError, match=r"expected one each\. If PEFT has put a learned prompt .*: use prefix tuning or LoRA"
    ):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **images, max_new_tokens=2)


@pytest.mark.parametrize("kind", LEARNED)
def test_a_conversation_behind_a_prompt_is_refused(casa_folder: Path, kind: str) -> None:
    """Its second turn was answered as if the prompt stood between the turns, or as if there had been no first one."""
    with pytest.raises(NotImplementedError, match=r"learned prompt again before every turn.*Use LoRA"):
        Conversation(adapted(casa_folder, kind), CasaProcessor.from_pretrained(casa_folder))
