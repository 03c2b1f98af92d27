# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of a training step, the example, and the code in docs/training.md."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import train_step
from casa_hf import CasaForConditionalGeneration
from casa_hf.training import TrainingConfig
from examples import finetune
from tests.training.helpers import CONVERSATIONS, PHOTOGRAPHS

pytestmark = pytest.mark.integration

DOCUMENT = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
CPU = torch.device("cpu")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(casa_folder, tmp_path, monkeypatch):
    """A folder with what the document's paths name."""
    shutil.copytree(casa_folder, tmp_path / "my-casa-model")
    (tmp_path / "conversations").mkdir()
    shutil.copytree(PHOTOGRAPHS, tmp_path / "conversations" / "photos")
    rows = []
    for example in CONVERSATIONS[:3]:
        files = [f"photos/{path.rpartition('/')[2]}" for path in example["images"]]
        rows.append(json.dumps({**example, "images": files}))
    (tmp_path / "conversations" / "train.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*` is deprecated:FutureWarning")  # in PEFT, in TRL
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # of the plain Trainers
def test_python_blocks_of_the_document(workplace):
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    shutil.copytree(PHOTOGRAPHS, "photos")
    found = blocks("python")
    assert len(found) == 5
    names: dict = {}
    for block in found:
        exec(compile(block, "training.md", "exec"), names)
    assert CasaForConditionalGeneration.from_pretrained("trained").config.variant == "casa"
    assert CasaForConditionalGeneration.from_pretrained("merged").config.variant == "casa"


def test_configurations_of_the_document():
    for block in blocks("yaml"):
        TrainingConfig.from_dict(yaml.safe_load(block))
    settings = set(re.findall(r"^\| `(\w+)`", DOCUMENT, flags=re.MULTILINE))
    assert settings == set(TrainingConfig.__dataclass_fields__) - {"trainer"}


def test_the_example_trains_a_stage(workplace, capsys):
    settings = ["max_steps=1", "sequences_per_update=1", "max_pixels=7056", "use_cpu=true"]
    data = "[{path: conversations, weight: 3}, {path: conversations/train.jsonl, weight: 1}]"
    finetune.main(["video", "my-casa-model", data, "out", *settings])
    assert CasaForConditionalGeneration.from_pretrained("out").config.variant == "casa"
    assert "Wrote out after 1 steps." in capsys.readouterr().out
    config = finetune.configuration("video", "m", "d", "o", ["lr_new=3e-4"])
    assert (config.trainable, config.max_image_tokens, config.lr_new) == ("fusion-only", 46_080, 3e-4)
    assert (config.max_steps, config.num_train_epochs) == (15_000, None)
    config = finetune.configuration("video", "m", "d", "o", ["num_train_epochs=2"])
    assert (config.max_steps, config.num_train_epochs) == (None, 2)
    with pytest.raises(ValueError, match=r"max_steps=3 and num_train_epochs=2"):
        finetune.configuration("video", "m", "d", "o", ["num_train_epochs=2", "max_steps=3"])


@pytest.mark.parametrize(("setting", "words"), [("max_steps", "NAME=VALUE"), ("maxsteps=1", "'max_steps'")])
def test_the_example_refuses_what_is_no_setting(setting, words):
    with pytest.raises(SystemExit, match=words):
        finetune.main(["image", "model", "data", "output", setting])


def test_the_benchmark_measures_equal_models_only(monkeypatch, capsys):
    batch = train_step.Batch.make(train_step.SIZES["tiny"], 2, CPU)
    swapped = replace(batch, casa={**batch.casa, "pixel_values": batch.casa["pixel_values"].flip(0)})
    with pytest.raises(SystemExit, match="nothing was measured"):
        train_step.check(swapped, CPU)
    monkeypatch.setattr(sys, "argv", ["train_step", "--rounds", "1", "--steps", "1", "--variants", "casa"])
    train_step.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert results.keys() == {"casa"}
    assert all(value > 0 for figures in results.values() for value in figures.values())


def test_the_benchmark_trains_the_same_parameters_of_the_source(monkeypatch):
    size = train_step.SIZES["tiny"]
    trained = {
        name: {n for n, p in train_step.build(size, name, CPU).named_parameters() if p.requires_grad}
        for name in ("source", "casa")
    }
    assert trained["source"] == {name for name in trained["casa"] if "casa_attn" not in name}
    assert any("visual.blocks.4." in name for name in trained["source"])
    assert not any("visual.blocks.0." in name for name in trained["source"])
