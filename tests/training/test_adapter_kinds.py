# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Every kind of adapter that PEFT has, as docs/clients.md lists them: what works does, and the rest says why not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.samples import PHOTOGRAPHS
from casa_hf.training import LORA_TARGETS

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]  # of PEFT, about settings and itself

FUSION = {"target_modules": LORA_TARGETS["fusion"]}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
PLACES = {"target_modules": ["embed_tokens"], "token_indices": [0, 1]}

# Of each kind the settings that a model of width 64 needs.
WORKS: dict[str, dict[str, Any]] = {
    "ADALORA": {**FUSION, "total_step": 10},
    "ADAMSS": {**FUSION, "r": 8, "num_subspaces": 2},
    "BOFT": {**FUSION, "boft_block_size": 4},
    "C3A": {**FUSION, "block_size": 8},
    "DEFT": FUSION,
    "DELORA": FUSION,
    "FOURIERFT": {**FUSION, "n_frequency": 16},
    "FROD": FUSION,
    "GLORA": FUSION,
    "GRALORA": {**FUSION, "r": 4, "gralora_k": 2},
    "HIRA": FUSION,
    "HRA": {**FUSION, "r": 4},
    "IA3": {**FUSION, "feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["norm"]},
    "LOHA": FUSION,
    "LOKR": FUSION,
    "LORA": FUSION,
    "MISS": FUSION,
    "OFT": {**FUSION, "oft_block_size": 4},
    "OSF": FUSION,
    "PEANUT": FUSION,
    "PSOFT": FUSION,
    "PVERA": FUSION,
    "RANDLORA": {**FUSION, "r": 4},
    "ROAD": {**FUSION, "group_size": 8},
    "SHIRA": {**FUSION, "r": 4},
    "SUPERTUNING": FUSION,
    "TINYLORA": FUSION,
    "TRAINABLE_TOKENS": PLACES,
    "UNILORA": FUSION,
    "VBLORA": {**FUSION, "vector_length": 8, "num_vectors": 8, "topk": 2, "r": 2},
    "VERA": FUSION,
    "WAVEFT": {**FUSION, "n_frequency": 16},
}
WITHOUT_MERGING: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "BEFT": (FUSION, ValueError, "no bias, cannot merge"),
    "CARTRIDGE": (PROMPT, AttributeError, "merge_and_unload"),
    "LILY": (FUSION, NotImplementedError, "not supported for Lily"),
    "POLY": (
        {**FUSION, "task_type": "CAUSAL_LM", "n_tasks": 2, "n_skills": 2, "r": 4},
        NotImplementedError,
        "",
    ),
    "PREFIX_TUNING": (PROMPT, AttributeError, "merge_and_unload"),
}
TEXT_ALONE: dict[str, dict[str, Any]] = {
    "CPT": {
        "task_type": "CAUSAL_LM",
        "cpt_token_ids": [5, 6, 7],
        "cpt_mask": [1, 1, 1],
        "cpt_tokens_type_mask": [1, 2, 4],  # a template, an input, and the label that they learn
    },
    "MULTITASK_PROMPT_TUNING": {**PROMPT, "num_tasks": 2},
    "PROMPT_TUNING": PROMPT,
    "P_TUNING": {**PROMPT, "encoder_hidden_size": 16},
}
IMPOSSIBLE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ADAPTION_PROMPT": (
        {"task_type": "CAUSAL_LM", "adapter_len": 3, "adapter_layers": 2},
        ValueError,
        "Unsupported model type .*'casa'",
    ),
    "SHADOW": (FUSION, AttributeError, "num_hidden_layers"),
    "XLORA": ({"task_type": "CAUSAL_LM", "hidden_size": 64}, RuntimeError, "must match the size of tensor"),
}
# Names of tasks, which kinds for several of them are told with each call.
TASKS = ("POLY", "MULTITASK_PROMPT_TUNING")


@pytest.fixture(scope="module")
def inputs(casa_folder: Path) -> Any:
    """A question about an image."""
    processor = CasaProcessor.from_pretrained(casa_folder, max_pixels=84 * 84)
    text = f"{processor.image_placeholder}What?"
    return processor(text=[text], images=[PHOTOGRAPHS / "cat.jpg"], return_tensors="pt")


@pytest.fixture(scope="module")
def fresh(casa_folder: Path) -> Callable[[], CasaForConditionalGeneration]:
    """Loads the model without adapters, which no end of a sequence stops."""

    def load() -> CasaForConditionalGeneration:
        model = CasaForConditionalGeneration.from_pretrained(casa_folder).eval()
        model.generation_config.eos_token_id = None
        return model

    return load


def wrapped(model: Any, kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]](**settings))


def trained(model: Any, inputs: Any, **tasks: Any) -> Any:
    """The model after two steps of training."""
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**inputs, labels=inputs["input_ids"], **tasks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model: Any, inputs: Any, **tasks: Any) -> torch.Tensor:
    return model(**inputs, **tasks).logits


def check(kind: str, settings: dict[str, Any], fresh: Any, inputs: Any, folder: Path) -> tuple[Any, torch.Tensor]:
    """Train, generate, save and load; returns the adapted model and its logits."""
    tasks = {"task_ids": torch.tensor([0])} if kind in TASKS else {}
    if kind == "TRAINABLE_TOKENS":
        settings = {**settings, "token_indices": inputs["input_ids"].unique().tolist()}
    model = trained(wrapped(fresh(), kind, settings), inputs, **tasks)
    found = logits(model, inputs, **tasks)
    assert (found - logits(fresh(), inputs)).abs().max() > 1e-3, "two steps change the answer"
    first = model.generate(**inputs, **tasks, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1]]
    assert first == found[0, -1].argmax()
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(fresh(), folder).eval()
    assert torch.equal(logits(loaded, inputs, **tasks), found)
    return model, found


def plain(name: str) -> str:
    """A name without what PEFT and the table write differently."""
    return re.sub(r"[\W_]", "", name).lower()


def test_every_kind_is_judged_and_listed() -> None:
    judged = [*WORKS, *WITHOUT_MERGING, *TEXT_ALONE, *IMPOSSIBLE]
    assert sorted(judged) == sorted(kind.name for kind in peft.PeftType)
    table = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
    *_, rows = table.partition("## Adapters")
    listed = [line.split("|")[1] for line in rows.partition("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert [{plain(name) for name in re.sub(r"\(.*?\)", "", row).split(",")} for row in listed] == [
        {plain(kind) for kind in kinds} for kinds in (WORKS, WITHOUT_MERGING, TEXT_ALONE, IMPOSSIBLE)
    ]


@pytest.mark.parametrize("kind", WORKS)
def test_what_works(kind: str, fresh: Any, inputs: Any, tmp_path: Path) -> None:
    if kind == "ADAMSS":
        pytest.importorskip("sklearn")
    model, found = check(kind, WORKS[kind], fresh, inputs, tmp_path)
    merged = logits(model.merge_and_unload().eval(), inputs)
    assert (merged - found).abs().max() <= 1e-5 * found.abs().max()


@pytest.mark.parametrize("kind", WITHOUT_MERGING)
def test_what_has_no_merged_form(kind: str, fresh: Any, inputs: Any, tmp_path: Path) -> None:
    settings, error, words = WITHOUT_MERGING[kind]
    model, _ = check(kind, settings, fresh, inputs, tmp_path)
    with pytest.raises(error, match=words):
        model.merge_and_unload()


@pytest.mark.parametrize("kind", TEXT_ALONE)
def test_what_takes_text_alone(kind: str, fresh: Any, inputs: Any, tmp_path: Path) -> None:
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    tasks = {"task_ids": torch.tensor([0])} if kind in TASKS else {}
    model = wrapped(fresh(), kind, TEXT_ALONE[kind])
    before = logits(model.eval(), text, **tasks)
    assert not torch.equal(logits(trained(model, text, **tasks), text, **tasks), before)
    with pytest.raises(ValueError, match="If PEFT has put a learned prompt before the text, images can't be placed"):
        model(**inputs, **tasks)


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_what_is_impossible(kind: str, fresh: Any, inputs: Any, tmp_path: Path) -> None:
    settings, error, words = IMPOSSIBLE[kind]
    model = fresh()
    if kind == "XLORA":
        wrapped(fresh(), "LORA", {**FUSION, "task_type": "CAUSAL_LM"}).save_pretrained(tmp_path)
        settings = {**settings, "adapters": {"0": str(tmp_path)}}
        model.config.use_cache = False
    with pytest.raises(error, match=words):
        wrapped(model, kind, settings)(**inputs)
