# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Two processes of `accelerate launch` with the configurations that ship train as one process does.

Rows are packed, and in some steps one process has no image. DeepSpeed needs `make test-engines`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from casa_hf import CasaConfig, convert_checkpoint
from casa_hf.training import PackedDataset, load_mixture
from examples.tiny_source import build_tiny_source
from tests.conversion.helpers import load_weights
from tests.training.helpers import CONVERSATIONS, ask, load_model, load_processor

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = ROOT / "examples" / "accelerate"
STEPS = 4
EMBEDDINGS = "model.language_model.embed_tokens.weight"

needs_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="needs DeepSpeed")
ENGINES = ["fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)]

# What trains -> settings. ZeRO-3 leaves new tokens alone.
SCENARIOS = {
    "recipe": {"tied": True},
    "recipe without new tokens": {"tied": True, "trainable": ["casa_attn", r"visual\.blocks"]},
    "head": {"tied": False, "trainable": ["casa_attn", "lm_head"]},
    "adapters": {"tied": False, "lora": {"r": 2, "target_modules": "self-attention"}, "trainable": None},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints with a tied head and gist tokens and with an untied head, and conversations."""
    folder = tmp_path_factory.mktemp("engines")
    for tied in (True, False):
        source = build_tiny_source(folder / f"source-{tied}", tie_word_embeddings=tied)
        raw = convert_checkpoint(source, folder / f"raw-{tied}", num_gist_tokens=3 if tied else 0).output
        shutil.copytree(raw, folder / f"casa-{tied}", ignore=shutil.ignore_patterns("*.safetensors*"))
        load_model(raw, torch.float32).save_pretrained(folder / f"casa-{tied}")
    texts = [ask(f"What is {number}?", "It is a number.") for number in range(6)]
    rows = [*CONVERSATIONS, *texts, ask("How many people are there?", "There are three people: two of them sit.")]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def settings(folder, name, scenario, **others):
    """Write the settings of a run; their file."""
    given = {name: value for name, value in SCENARIOS[scenario].items() if value is not None}
    content = {
        "model": str(folder / f"casa-{given.pop('tied')}"),
        "data": str(folder / "data.jsonl"),
        "output": str(folder / name),
        "max_pixels": 84**2,
        "max_text_tokens": 110,
        "sequences_per_update": 2,
        "max_steps": STEPS,
        "save_steps": 2,
        "logging_steps": 1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "lr_new": 1e-2,
        "lr_existing": 1e-2,
        "report_to": "none",
        **given,
        **others,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / f"{name}.yaml"


def run(file, engine=None):
    """Train by one process, or by two of this engine; losses of the steps, and weights or adapters."""
    module, command = ["-m", "tests.training.engines", str(file)], [sys.executable]
    if engine is not None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["--num_processes", "2", "--main_process_port", str(port)]
        command += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / f"{engine}.yaml")]
        command += options
    environment = {
        **os.environ,
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
    }
    done = subprocess.run([*command, *module], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    output = Path(yaml.safe_load(file.read_text())["output"])
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry], load_weights(output)


@pytest.fixture(scope="module")
def alone(folder):
    """Scenario -> what one process makes of it, once."""
    made = {}

    def train(scenario):
        if scenario not in made:
            made[scenario] = run(settings(folder, f"{scenario}-alone", scenario))
        return made[scenario]

    return train


def compare(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert found[1].keys() - {"lm_head.weight"} == expected[1].keys() - {"lm_head.weight"}  # a tied one is saved once
    for name, tensor in expected[1].items():
        tolerance = 1e-5 * float(tensor.abs().max())
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=tolerance, msg=name)


def test_rows_are_packed_and_some_have_no_image(folder):
    """What these tests are about; in the order of the runs."""
    examples = load_mixture(str(folder / "data.jsonl"), seed=0)
    data = PackedDataset(examples, load_processor(folder / "casa-True"), max_text_tokens=110, max_image_tokens=20_480)
    rows = [[bool(example["images"]) for example in data[index]] for index in range(len(data))]
    assert len(rows) >= 2 * STEPS / 2 and any(len(row) > 1 for row in rows)
    assert any(not any(row) for row in rows) and any(any(row) for row in rows)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one_and_are_resumed(folder, alone, engine):
    """Also rows of new tokens, but for ZeRO-3; an interrupted run that is resumed ends where an unbroken one does."""
    scenario = "recipe without new tokens" if engine == "zero3" else "recipe"
    expected = alone(scenario)
    name = f"{scenario}-{engine}"
    compare(run(settings(folder, name, scenario), engine), expected)
    start = load_weights(folder / "casa-True")
    changed = (expected[1][EMBEDDINGS] != start[EMBEDDINGS]).any(-1).nonzero().flatten().tolist()
    assert changed == ([] if engine == "zero3" else CasaConfig.from_pretrained(folder / "casa-True").gist_token_ids)

    broken = folder / f"{name}-broken-checkpoints"
    shutil.copytree(folder / f"{name}-checkpoints", broken)
    shutil.rmtree(broken / f"checkpoint-{STEPS}")
    assert (broken / "checkpoint-2").is_dir()
    compare(run(settings(folder, f"{name}-broken", scenario, checkpoints=str(broken), resume=True), engine), expected)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("scenario", ["head", "adapters"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_a_head_and_adapters_as_one(folder, alone, engine, scenario):
    """The head is called once by each process, whatever number of labels it has: its weights are gathered for that."""
    compare(run(settings(folder, f"{scenario}-{engine}", scenario), engine), alone(scenario))


@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_configurations_that_ship(engine):
    configuration = load_config_from_file(str(CONFIGURATIONS / f"{engine}.yaml"))
    assert configuration.distributed_type == ("FSDP" if engine == "fsdp2" else "DEEPSPEED")
    if engine == "fsdp2":
        assert configuration.fsdp_config["fsdp_version"] == 2
    else:
        assert configuration.deepspeed_config["zero_stage"] == int(engine[-1])
