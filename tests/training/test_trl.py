# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""TRL's trainers, given the folder of a checkpoint: model, processor and reference are of their own making."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from casa_hf import CasaForConditionalGeneration, add_code, convert_checkpoint
from casa_hf.training import LORA_TARGETS
from examples.tiny_source import build_tiny_source

pytest.importorskip("datasets")
pytest.importorskip("trl")
runs = pytest.importorskip("tests.training.trl_runs")

# PEFT and TRL still use names that Transformers has replaced.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*` is deprecated:FutureWarning"),
]

LEARNED = "model.language_model.layers.0.casa_attn.q_proj.weight"


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("with_images", [True, False], ids=["images", "text"])
@pytest.mark.parametrize("kind", runs.KINDS)
def test_a_folder_is_enough(casa_folder: Path, tmp_path: Path, kind: str, with_images: bool) -> None:
    """Model and reference are of the folder, images reach both, the model learns, and the reference stays."""
    stored = parameters(CasaForConditionalGeneration.from_pretrained(casa_folder, dtype=torch.float32))
    trainer = runs.trainer_of(kind, str(casa_folder), tmp_path, with_images)
    model, reference = trainer.model, getattr(trainer, "ref_model", None)
    assert type(model) is CasaForConditionalGeneration
    assert (type(reference) is CasaForConditionalGeneration) == runs.KINDS[kind][3]
    seen: dict[str, int] = {}
    for name, each in {"model": model, "reference": reference}.items():
        if each is not None:
            seen[name] = 0
            each.model.visual.register_forward_hook(lambda *_, name=name: seen.update({name: seen[name] + 1}))
    before = parameters(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in stored.items())
    trainer.train()
    after = parameters(model)
    assert all(tensor.isfinite().all() for tensor in after.values())
    # A teacher that is the student has nothing to teach.
    assert torch.equal(after[LEARNED], before[LEARNED]) == (kind == "Distillation" or not with_images)
    if kind != "Distillation":
        assert any(not torch.equal(after[name], before[name]) for name in after)
    if reference is not None:
        assert all(torch.equal(stored[name], tensor) for name, tensor in parameters(reference).items())
    assert all((count > 0) == with_images for count in seen.values())


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_policy_that_writes_marks_is_scored(casa_folder: Path, tmp_path: Path, kind: str) -> None:
    """What it writes is text, though it looks like an image's token: the token types say where the images stand."""
    placeholder = CasaForConditionalGeneration.config_class.from_pretrained(casa_folder).image_token_id
    # Newer versions of TRL forbid it unless told otherwise.
    trainer = runs.trainer_of(kind, str(casa_folder), tmp_path, generation_kwargs={"suppress_tokens": None})
    written: list[int] = []
    likely = 20 * torch.nn.functional.one_hot(torch.tensor(placeholder), trainer.model.lm_head.out_features)
    trainer.model.lm_head.register_forward_hook(lambda module, args, logits: logits + likely)

    def watch(_: Any, args: Any, arguments: dict[str, Any]) -> None:
        if arguments.get("pixel_values") is not None:
            written.append(int((arguments["input_ids"] == placeholder).sum()) - len(arguments["image_grid_thw"]))

    trainer.model.register_forward_pre_hook(watch, with_kwargs=True)
    trainer.train()
    assert max(written) > 0, "more placeholders than images were scored"


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_adapters_are_their_own_reference(casa_folder: Path, tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=LORA_TARGETS["fusion"])
    trainer = runs.trainer_of(kind, str(casa_folder), tmp_path, peft_config=adapters)
    assert getattr(trainer, "ref_model", None) is None
    assert type(trainer.model.get_base_model()) is CasaForConditionalGeneration
    trainer.train()
    trained = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert any(tensor.any() for name, tensor in trained.items() if ".lora_B" in name)


def test_what_a_trainer_saves_is_a_folder_for_the_next(casa_folder: Path, tmp_path: Path) -> None:
    """Supervised first, preferences then, with the first result as the reference."""
    first = runs.trainer_of("SFT", str(casa_folder), tmp_path / "run")
    first.train()
    first.save_model(str(tmp_path / "first"))
    second = runs.trainer_of("DPO", str(tmp_path / "first"), tmp_path / "run")
    expected = parameters(first.model)
    assert all(torch.equal(expected[name], tensor) for name, tensor in parameters(second.ref_model).items())
    second.train()


STRANGER = """
import json, sys

from tests.training import trl_runs as runs

found = {}
for kind in runs.KINDS:
    trainer = runs.trainer_of(kind, sys.argv[1], sys.argv[2], trust_remote_code=True)
    trainer.train()
    reference = getattr(trainer, "ref_model", None)
    found[kind] = [type(model).__module__ for model in (trainer.model, reference) if model is not None]
assert "casa_hf" not in sys.modules
print(json.dumps(found))
"""


@pytest.mark.slow
def test_code_that_a_checkpoint_carries(casa_folder: Path, tmp_path: Path) -> None:
    """In a process that doesn't import casa_hf, all kinds one after the other."""
    folder = Path(shutil.copytree(casa_folder, tmp_path / "with-code"))
    add_code(folder)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), str(tmp_path / "out")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == runs.KINDS.keys()
    for kind, modules in found.items():
        assert len(modules) == 1 + runs.KINDS[kind][3]
        assert all(re.fullmatch(r"transformers_modules\..*\.modeling_casa", module) for module in modules)


def test_experts_are_balanced(tmp_path: Path) -> None:
    """TRL asks a model with experts for their loss, or computes it from the routers' logits of text, and logs it."""
    source = build_tiny_source(tmp_path / "source", family="qwen3_vl_moe")
    folder = convert_checkpoint(source, tmp_path / "casa", "casa-ffn", max_pixels=65_536).output
    trainer = runs.trainer_of("SFT", str(folder), tmp_path, True)
    trainer.train()
    logged = [entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry]
    assert logged and all(1 < loss < 6 for loss in logged)  # 2 of 6 experts: 2 if all are used evenly
