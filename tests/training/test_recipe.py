# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs from a configuration, by function and by command; reading data; settings that are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from casa_hf import CasaForConditionalGeneration, CasaProcessor, cli, convert_checkpoint
from casa_hf.training import TrainingConfig, load_conversations, train
from casa_hf.training.samples import encode
from examples.tiny_source import build_tiny_helium
from tests.conversion.helpers import load_weights
from tests.training.helpers import CONVERSATIONS, PHOTOGRAPHS, ask


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of conversations in JSON lines, with paths relative to it, beside their images."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(PHOTOGRAPHS, folder / "photos")
    rows = []
    for example in CONVERSATIONS:
        files = [f"photos/{path.rpartition('/')[2]}" for path in example["images"]]
        rows.append({**example, "images": files})
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))
    return folder


@pytest.fixture
def settings(casa_folder, data, tmp_path):
    return {
        "model": str(casa_folder),
        "data": str(data),
        "output": str(tmp_path / "trained"),
        "max_pixels": 84 * 84,
        "max_text_tokens": 70,
        "sequences_per_update": 2,
        "max_steps": 2,
        "trainer": {"use_cpu": True, "logging_steps": 1},
    }


def test_a_run_trains_the_recipe_and_writes_a_model_that_loads(settings, casa_folder, tmp_path):
    logs = []
    schedule = {"max_steps": 5, "sequences_per_update": 1, "warmup": 0.4, "decay": 0.4}
    report = train(TrainingConfig.from_dict({**settings, **schedule, "eval_data": settings["data"]}), logs.append)
    assert (report.steps, report.dropped, report.output) == (5, 0, tmp_path / "trained")
    assert report.sequences > 1 and report.metrics["eval_loss"] > 0
    rates = [log["learning_rate"] for log in logs if "loss" in log]
    assert len(rates) == 5 and 0 == rates[0] < rates[1] < rates[2] == 1e-4 > rates[4] > 0
    before, after = load_weights(casa_folder), load_weights(report.output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {name for name in before if "casa_attn" in name} <= changed
    assert all("casa_attn" in name or "visual.blocks" in name for name in changed)
    model = CasaForConditionalGeneration.from_pretrained(report.output)
    assert model.generation_config.eos_token_id is not None
    assert CasaProcessor.from_pretrained(report.output).chat_template
    assert not list(tmp_path.glob("*.incomplete"))


def test_a_text_only_source_trains_its_language_model_and_keeps_what_the_way_back_needs(
    settings, source_folder, tmp_path
):
    helium = build_tiny_helium(tmp_path / "helium")
    casa = convert_checkpoint(helium, tmp_path / "casa", vision_from=source_folder).output
    kept = {file.name: file.read_bytes() for file in casa.glob("source_*")}
    assert kept
    report = train(TrainingConfig.from_dict({**settings, "model": str(casa)}))
    assert {file.name: file.read_bytes() for file in report.output.glob("source_*")} == kept
    trainable = {part.name: part.trainable for part in report.parts}
    assert trainable["self-attention"] > 0 and trainable["vision tower, rest"] == 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
def test_adapters(settings, casa_folder):
    peft = pytest.importorskip("peft")
    report = train(TrainingConfig.from_dict({**settings, "lora": {"r": 2, "lora_alpha": 4}}))
    model = peft.PeftModel.from_pretrained(CasaForConditionalGeneration.from_pretrained(casa_folder), report.output)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora" in name} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


def test_a_broken_run_goes_on_and_ends_as_an_unbroken_one(settings, tmp_path):
    saving = {**settings["trainer"], "save_strategy": "steps", "save_steps": 2}
    run = {
        **settings,
        "max_steps": 4,
        "sequences_per_update": 1,
        "trainer": saving,
        "checkpoints": str(tmp_path / "c"),
    }
    whole = train(TrainingConfig.from_dict({**run, "output": str(tmp_path / "whole")}))
    shutil.rmtree(tmp_path / "c" / "checkpoint-4")
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run; set resume"):
        train(TrainingConfig.from_dict(run))
    resumed = train(TrainingConfig.from_dict({**run, "resume": True}))
    expected, found = load_weights(whole.output), load_weights(resumed.output)
    halfway = load_weights(tmp_path / "c" / "checkpoint-2")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not all(torch.equal(found[name], tensor) for name, tensor in halfway.items())


def test_the_command(settings, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(file)])
    captured = capsys.readouterr()
    assert ended.value.code == 0
    assert "fusion layers" in captured.out and "4 conversations in" in captured.out
    assert captured.out.splitlines()[-1] == f"Wrote {settings['output']}."
    assert captured.err.count("loss ") >= 2
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(file)])
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: The output {settings['output']} exists; choose another folder, or " + (
        "remove it.\n"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr_nwe": 1.0}, ["'lr_nwe'", "'lr_new'"]),
        ({"model": None}, ["doesn't say model"]),
        ({"max_steps": 0}, ["max_steps=0", "positive"]),
        ({"lr_new": "fast"}, ["lr_new='fast'"]),
        ({"epochs": 1}, ["max_steps=2 and epochs=1"]),
        ({"warmup": 0.6, "decay": 0.6}, ["warmup=0.6 and decay=0.6"]),
        ({"decay": 2}, ["decay=2", "0 to 1"]),
        ({"dtype": "int8"}, ["dtype='int8'", "bfloat16"]),
        ({"lora": {"r": 2}, "trainable": "fusion-only"}, ["trainable"]),
        ({"lora": {"rank": 2}}, ["lora.rank"]),
        ({"trainer": {"max_grad_nrom": 1}}, ["trainer.max_grad_nrom", "'max_grad_norm'"]),
        ({"trainer": {"per_device_train_batch_size": 3, "use_cpu": True}}, ["sequences_per_update=2", "3 sequences"]),
        ({"data": "nowhere.jsonl"}, ["'nowhere.jsonl'"]),
        ({"max_image_tokens": 1}, ["Example", "train.jsonl, line", "max_image_tokens"]),
        ({"over_long": "cut"}, ["over_long='cut'"]),
        ({"trainable": "paper-qwne"}, ["'paper-qwne'", "paper-qwen"]),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(settings, changes, words, tmp_path):
    with pytest.raises(ValueError) as refused:
        train(TrainingConfig.from_dict({**settings, **changes}))
    assert all(word in str(refused.value) for word in words)
    assert not list(tmp_path.iterdir())


def test_numbers_in_yaml(tmp_path, settings):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings) + "lr_new: 2e-4\nlr_existing: 1E-6\n")
    config = TrainingConfig.from_yaml(file)
    assert (config.lr_new, config.lr_existing) == (2e-4, 1e-6)
    file.write_text("model: [")
    with pytest.raises(ValueError, match="isn't valid YAML"):
        TrainingConfig.from_yaml(file)
    file.write_text("- model")
    with pytest.raises(ValueError, match="list; expected a mapping"):
        TrainingConfig.from_yaml(file)


# ---------------------------------------------------------------- data


def test_every_kind_of_file_gives_the_same(data, processor, tmp_path):
    datasets = pytest.importorskip("datasets")
    lines = load_conversations(data)
    assert len(lines) == len(CONVERSATIONS)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines() if line]
    for row in rows:  # a column of a table has one type
        for message in row["messages"]:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    shutil.copytree(data / "photos", tmp_path / "photos")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "paths.parquet")
    embedded = datasets.Dataset.from_list([dict(lines[i], messages=rows[i]["messages"]) for i in range(len(rows))])
    embedded = embedded.cast_column("images", datasets.List(datasets.Image()))
    (tmp_path / "embedded").mkdir()
    embedded.to_parquet(tmp_path / "embedded" / "images.parquet")
    for source in (data / "train.jsonl", tmp_path / "paths.parquet", tmp_path, tmp_path / "embedded"):
        conversations = load_conversations(source)
        for index, example in enumerate(CONVERSATIONS):
            expected, found = encode(processor, example), encode(processor, conversations[index])
            assert torch.equal(found.labels, expected.labels)
            assert (found.pixel_values is None) == (expected.pixel_values is None)
            assert found.pixel_values is None or torch.equal(found.pixel_values, expected.pixel_values)


def test_a_text_that_names_a_file_stays_a_text(tmp_path):
    (tmp_path / "cat").write_text("")
    (tmp_path / "data.jsonl").write_text(json.dumps(ask("cat", "cat")))
    assert load_conversations(tmp_path)[0] == ask("cat", "cat")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.jsonl", '{"messages": []}\n{', ["line 2", "JSON"]),
        ("data.jsonl", "[1]", ["line 1", "list"]),
        ("data.csv", "a,b", ["data.csv", ".parquet"]),
    ],
)
def test_unreadable_data_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as refused:
        load_conversations(tmp_path / name)
    assert all(word in str(refused.value) for word in words)


def test_a_folder_without_conversations_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \.jsonl or \.parquet"):
        load_conversations(tmp_path)
