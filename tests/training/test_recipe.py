# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs from a configuration, by function and by command; reading data; settings that are refused."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file

from casa_hf import CasaForConditionalGeneration, CasaProcessor, cli, convert_checkpoint
from casa_hf.training import TrainingConfig, load_conversations, train
from casa_hf.training.adapters import lora_arguments
from casa_hf.training.arguments import training_arguments
from casa_hf.training.data import DatasetEntry
from casa_hf.training.samples import encode
from examples.tiny_source import build_tiny_helium
from tests.command_line import Cli
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
        "use_cpu": True,
        "logging_steps": 1,
    }


def test_a_run_trains_the_recipe_and_writes_a_model_that_loads(settings, casa_folder, tmp_path):
    logs = []
    schedule = {"max_steps": 8, "sequences_per_update": 1, "warmup_steps": 0.25, "decay_steps": 0.5}
    report = train(TrainingConfig.from_dict({**settings, **schedule, "eval_data": settings["data"]}), logs.append)
    assert (report.steps, report.dropped, report.output) == (8, 0, tmp_path / "trained")
    assert report.sequences > 1 and report.metrics["eval_loss"] > 0
    rates = [log["learning_rate"] for log in logs if "loss" in log]
    assert rates == pytest.approx([0, 5e-5, 1e-4, 1e-4, 1e-4, 7.5e-5, 5e-5, 2.5e-5])
    before, after = load_weights(casa_folder), load_weights(report.output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {name for name in before if "casa_attn" in name} <= changed
    assert all("casa_attn" in name or "visual.blocks" in name for name in changed)
    model = CasaForConditionalGeneration.from_pretrained(report.output)
    assert model.generation_config.eos_token_id is not None
    assert "use_cache" not in json.loads((report.output / "config.json").read_text())
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


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ({"max_steps": 1}, [1]),
        ({"max_steps": 1, "warmup_steps": 1, "decay_steps": 0}, [1]),
        ({"max_steps": 3, "warmup_steps": 0.5, "decay_steps": 0.5}, [0, 0.5, 1]),
        ({"max_steps": 4, "warmup_steps": 0, "decay_steps": 4}, [1, 0.75, 0.5, 0.25]),
        ({"max_steps": 4, "warmup_steps": 2, "decay_steps": 2}, [0, 0.5, 1, 0.5]),
        ({"max_steps": 4, "warmup_steps": 2, "lr_scheduler_type": "linear"}, [0, 0.5, 1, 0.5]),
        ({"max_steps": None, "num_train_epochs": 1.5, "warmup_steps": 0, "decay_steps": 0}, [1, 1, 1]),
    ],
)
def test_short_schedules_reach_the_full_rate(settings, casa_folder, schedule, shares):
    logs = []
    report = train(TrainingConfig.from_dict({**settings, "lr_new": 1e-3, **schedule}), logs.append)
    assert [log["learning_rate"] for log in logs if "loss" in log] == pytest.approx([1e-3 * share for share in shares])
    before, after = load_weights(casa_folder), load_weights(report.output)
    assert not any(torch.equal(before[name], after[name]) for name in before if "casa_attn" in name)


def test_how_long_a_run_is():
    given = {"model": "m", "data": "d", "output": "o"}
    assert TrainingConfig(**given).max_steps == 25_000
    assert TrainingConfig(**given, num_train_epochs=2).max_steps is None


def test_a_run_says_how_it_goes_and_what_it_lacks(settings, tmp_path, caplog):
    """Losses from the first step on; fewer sequences than a step asks for; evaluation data that is dropped."""
    answer = {"role": "assistant", "content": "yes"}
    rows = [{"messages": [{"role": "user", "content": "word " * length}, answer]} for length in (1, 200, 2)]
    (tmp_path / "eval.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    logs = []
    changes = {"sequences_per_update": 64, "over_long": "drop", "max_steps": 11}
    changes |= {"eval_data": str(tmp_path / "eval.jsonl"), "logging_steps": 10}
    report = train(TrainingConfig.from_dict({**settings, **changes}), logs.append)
    assert len([log for log in logs if "loss" in log]) == 2
    assert f"only {report.sequences} packed sequence" in caplog.text
    assert f"1 of {len(rows)} conversations of eval_data are dropped" in caplog.text


def pixels(folder):
    processor = CasaProcessor.from_pretrained(folder)
    return processor.image_processor.size["longest_edge"], processor.frame_max_pixels


@pytest.mark.parametrize("keep", [False, True])
def test_limits_are_those_of_the_run_unless_they_are_kept(settings, casa_folder, tmp_path, keep):
    limits = {"max_pixels": 84 * 84, "frame_max_pixels": 56 * 56}
    report = train(TrainingConfig.from_dict({**settings, **limits, "keep_limits": keep, "save_steps": 1}))
    published = tuple(limits.values()) if keep else pixels(casa_folder)
    assert pixels(casa_folder)[0] > 84 * 84 and pixels(casa_folder)[1] > 56 * 56
    assert pixels(report.output) == pixels(tmp_path / "trained-checkpoints" / "checkpoint-2") == published


@pytest.mark.parametrize("limits", [{}, {"frame_max_pixels": 56 * 56}])
def test_how_frames_share_images_is_kept(settings, casa_folder, limits):
    report = train(TrainingConfig.from_dict({**settings, **limits, "frames_per_image": 2}))
    published = CasaProcessor.from_pretrained(report.output)
    assert published.frames_per_image == 2 and pixels(report.output) == pixels(casa_folder)
    with pytest.raises(ValueError, match=r"frames_per_image=3 is none of 1, 2, 'all'"):
        train(TrainingConfig.from_dict({**settings, "output": f"{report.output}-2", "frames_per_image": 3}))


def test_a_run_reads_what_its_policy_allows(settings, tmp_path):
    for policy, message in (
        ({"max_decoded_pixels": 100}, r"^/.*, line \d+: .*\.jpg' can't be used: .* more than max_decoded_pixels=100"),
        ({"local_files": False}, r"^/.*, line \d+: .*\.jpg' can't be used: paths aren't read"),
        ({"files": False}, "media_policy=.*'files'"),
    ):
        with pytest.raises(ValueError, match=message):
            train(TrainingConfig.from_dict({**settings, "media_policy": policy}))
    assert not (tmp_path / "trained").exists()


def test_evaluation_that_fails_leaves_the_trained_model(settings, casa_folder, tmp_path, capsys):
    (tmp_path / "cut.jpg").write_bytes((PHOTOGRAPHS / "cat.jpg").read_bytes()[:4_000])  # has a size, but no pixels
    (tmp_path / "eval.jsonl").write_text(json.dumps({**CONVERSATIONS[0], "images": ["cut.jpg"]}))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, "eval_data": str(tmp_path / "eval.jsonl")}))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(tmp_path / "run.yaml")])
    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "truncated" in said and said.endswith(f" The model is trained and saved in {tmp_path / 'trained'}.")
    before, after = load_weights(casa_folder), load_weights(tmp_path / "trained")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.glob("*.incomplete"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_that_names_the_example(settings, tmp_path, capsys, workers):
    (tmp_path / "cut.jpg").write_bytes((PHOTOGRAPHS / "cat.jpg").read_bytes()[:4_000])  # has a size, but no pixels
    (tmp_path / "damaged.jsonl").write_text(json.dumps({**CONVERSATIONS[0], "images": ["cut.jpg"]}))
    changes = {
        "data": str(tmp_path / "damaged.jsonl"),
        "dataloader_num_workers": workers,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, **changes}))
    with pytest.raises(SystemExit):
        cli.main(["train", str(tmp_path / "run.yaml")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: /") and "Example" not in said
    assert "damaged.jsonl, line 1: " in said and "truncated" in said
    assert len(said) < 500 and "Traceback" not in said


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


def test_adapters_of_fusion_layers_that_have_no_projections(settings, converted):
    with pytest.raises(
        ValueError, match=r"target_modules='fusion' matches no layer.*variant casa-shared.*self-attention"
    ):
        train(TrainingConfig.from_dict({**settings, "model": str(converted("casa-shared")), "lora": {"r": 2}}))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
@pytest.mark.parametrize("variant", ["casa-replace", "casa-before"])
def test_adapters_of_other_variants_and_resuming(settings, converted, tmp_path, variant):
    """Adapters of a broken run end as those of an unbroken one; all of them have learned."""
    pytest.importorskip("peft")
    saving = {"save_steps": 2}
    run = {**settings, "model": str(converted(variant)), "lora": {"r": 2}, "max_steps": 4, **saving}
    run |= {"sequences_per_update": 1, "checkpoints": str(tmp_path / "c"), "lr_new": 1e-2}
    whole = train(TrainingConfig.from_dict({**run, "output": str(tmp_path / "whole")})).output
    shutil.rmtree(tmp_path / "c" / "checkpoint-4")
    resumed = train(TrainingConfig.from_dict({**run, "resume": True})).output
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    halfway = load_file(tmp_path / "c" / "checkpoint-2" / "adapter_model.safetensors")
    assert expected.keys() == found.keys() == halfway.keys() and any("casa_attn" in name for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and tensor.any()
    assert any(not torch.equal(halfway[name], tensor) for name, tensor in expected.items())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
def test_what_nobody_has_trained_trains_beside_adapters(settings, source_folder, tmp_path):
    """The projector and the delimiters of a text-only source; loaded and merged, both are the trained ones."""
    peft = pytest.importorskip("peft")
    wide = build_tiny_helium(tmp_path / "helium", hidden_size=32)
    casa = convert_checkpoint(wide, tmp_path / "casa", vision_from=source_folder).output
    before = CasaForConditionalGeneration.from_pretrained(casa)
    names = {name for name, _ in before.named_parameters() if "multi_modal_projector" in name}
    tokens = before.config.new_token_ids
    assert names
    report = train(TrainingConfig.from_dict({**settings, "model": str(casa), "lr_new": 1e-2, "lora": {"r": 2}}))
    trainable = {part.name: part.trainable for part in report.parts}
    assert trainable["self-attention"] == 0 and trainable["adapters"] > 0
    trained = peft.PeftModel.from_pretrained(CasaForConditionalGeneration.from_pretrained(casa), report.output)
    after, start = trained.merge_and_unload().state_dict(), before.state_dict()
    assert all(not torch.equal(after[name], start[name]) for name in names)
    table = next(name for name in start if name.endswith("embed_tokens.weight"))
    assert (after[table] != start[table]).any(-1).nonzero().flatten().tolist() == [*tokens]


def test_a_broken_run_is_resumed_and_ends_as_an_unbroken_one(settings, tmp_path):
    saving = {"save_steps": 2}
    run = {
        **settings,
        "max_steps": 4,
        "sequences_per_update": 1,
        **saving,
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


def test_a_finished_run_is_written_again(settings, tmp_path, caplog):
    """Its two steps end within a pass over the data; the output is lost, or wanted elsewhere."""
    run = {**settings, "sequences_per_update": 1, "checkpoints": str(tmp_path / "c")}
    whole = train(TrainingConfig.from_dict(run))
    assert whole.sequences > whole.steps
    logs = []
    again = train(TrainingConfig.from_dict({**run, "output": str(tmp_path / "again"), "resume": True}), logs.append)
    assert again.steps == 2 and not any("loss" in log for log in logs)
    assert "has 2 of 2 steps, so this run is finished" in caplog.text
    expected, found = load_weights(whole.output), load_weights(again.output)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("schedule", "longer", "rates"),
    [
        ({"lr_scheduler_type": "constant"}, {"max_steps": 4}, [1, 1]),
        ({"warmup_steps": 0, "decay_steps": 0.5}, {"max_steps": 4}, [1, 0.5]),  # not the 0 at which it ended
        ({"warmup_steps": 0, "decay_steps": 0}, {"max_steps": None, "num_train_epochs": 2.0}, None),
    ],
)
def test_a_finished_run_can_be_made_longer(settings, tmp_path, schedule, longer, rates):
    run = {**settings, **schedule, "sequences_per_update": 1, "checkpoints": str(tmp_path / "c"), "lr_new": 1e-3}
    first = train(TrainingConfig.from_dict(run))
    with pytest.raises(ValueError, match=rf"exists; .*longer, with checkpoints={tmp_path / 'c'}\), or remove it"):
        train(TrainingConfig.from_dict({**run, **longer, "resume": True}))
    logs = []
    again = {**run, **longer, "output": str(tmp_path / "longer"), "resume": True}
    second = train(TrainingConfig.from_dict(again), logs.append)
    whole = {**run, **longer, "output": str(tmp_path / "whole"), "checkpoints": str(tmp_path / "others")}
    expected = train(TrainingConfig.from_dict(whole))
    assert first.steps == 2 < second.steps == expected.steps
    if rates:
        found = [log["learning_rate"] for log in logs if "loss" in log]
        assert found == pytest.approx([1e-3 * share for share in rates])
    if rates != [1, 0.5]:  # without the decay of the first run, it is the longer one
        weights, others = load_weights(expected.output), load_weights(second.output)
        assert all(torch.equal(others[name], tensor) for name, tensor in weights.items())
    with pytest.raises(ValueError, match=r"max_steps=2 \(was "):
        train(TrainingConfig.from_dict({**run, "output": str(tmp_path / "shorter"), "resume": True}))


def test_metrics_are_in_files_of_the_output(settings, tmp_path):
    report = train(TrainingConfig.from_dict({**settings, "eval_data": settings["data"]}))
    results = json.loads((report.output / "all_results.json").read_text())
    assert results == report.metrics and results["eval_loss"] > 0 and results["train_loss"] > 0
    logs = json.loads((report.output / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in logs if "loss" in log] == [1, 2]
    assert logs[-1]["eval_loss"] == results["eval_loss"]
    assert not list(report.output.glob("*.incomplete"))


def test_a_terminal_has_a_bar_with_steps_and_time_left(settings, tmp_path, monkeypatch, capsys):
    command_line = Cli(monkeypatch, capsys)
    settings = {**settings, "sequences_per_update": 1, "save_steps": 1, "checkpoints": str(tmp_path / "c")}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    outcome = command_line("train", file, terminal=True)
    assert outcome.code == 0
    assert re.search(r"2/2 \[\d\d:\d\d<00:00, ", outcome.err), outcome.err
    assert outcome.err.count("loss ") >= 2 and "{" not in outcome.out + outcome.err
    # From where it was, with the time that is left; its line ends before an error.
    file.write_text(yaml.safe_dump({**settings, "max_steps": 4, "output": str(tmp_path / "longer")}))
    outcome = command_line("train", file, "--resume", terminal=True)
    assert outcome.code == 0 and "2/4 [" in outcome.err and "4/4 [" in outcome.err and "1/4 [" not in outcome.err
    file.write_text(yaml.safe_dump({**settings, "lr_new": 1e30, "max_steps": 3, "checkpoints": str(tmp_path / "d")}))
    shutil.rmtree(settings["output"])
    outcome = command_line("train", file, terminal=True)
    assert outcome.code == 1 and "/3 [" in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith("error: The loss is not finite (nan or inf) after 2 of 3 steps")
    assert f"The last finite checkpoint is {tmp_path / 'd' / 'checkpoint-2'};" in last
    assert not Path(settings["output"]).exists()
    file.write_text(yaml.safe_dump(settings))
    shutil.rmtree(tmp_path / "c")
    outcome = command_line("train", file)
    assert outcome.code == 0 and "\r" not in outcome.err and "2/2" not in outcome.err


def test_a_run_is_resumed_with_the_settings_it_began_with(settings, casa_folder, tmp_path):
    saving = {"save_steps": 1}
    run = {**settings, "checkpoints": str(tmp_path / "c"), **saving}
    train(TrainingConfig.from_dict(run))
    shutil.rmtree(tmp_path / "c" / "checkpoint-2")
    shutil.rmtree(tmp_path / "trained")
    other = shutil.copytree(casa_folder, tmp_path / "other")
    changes = {
        "lr_new": 1e-9,
        "weight_decay": 0.5,
        "warmup_steps": 0,
        "seed": 7,
        "sequences_per_update": 1,
        "max_steps": 1,
        "max_grad_norm": 2,
        "trainable": "fusion-only",
        "model": str(other),
        "max_text_tokens": 90,
    }
    for name, value in changes.items():
        with pytest.raises(
            ValueError, match=rf"began with, but now there are .*{name}=.* \(was .*model=.*checkpoint-1"
        ):
            train(TrainingConfig.from_dict({**run, "resume": True, name: value}))
    rows = [json.loads(line) for line in Path(settings["data"], "train.jsonl").read_text().splitlines() if line]
    for row in rows:
        row["images"] = [str(Path(settings["data"], image)) for image in row.get("images", [])]
    rows[0]["messages"][0]["content"] = "Some other words"
    (tmp_path / "edited.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(ValueError, match="rows of data="):
        train(TrainingConfig.from_dict({**run, "resume": True, "data": str(tmp_path / "edited.jsonl")}))
    kept = tmp_path / "c" / "_settings.json"
    content = kept.read_text()
    kept.write_text(content[:-20])
    with pytest.raises(ValueError, match=r"_settings\.json.* Remove the file to resume"):
        train(TrainingConfig.from_dict({**run, "resume": True}))
    kept.write_text(content)
    # What leaves the training as it is may change.
    free = {
        "report_to": None,
        "output": str(tmp_path / "elsewhere"),
        "eval_data": settings["data"],
        "gradient_checkpointing": False,
    }
    assert train(TrainingConfig.from_dict({**run, "resume": True, **free})).steps == 2


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
        ({"max_grad_nrom": 1}, ["'max_grad_nrom'", "'max_grad_norm'"]),
        ({"warmup": 0.1}, ["'warmup'", "'warmup_steps'"]),
        ({"trainer": {"save_steps": 1}}, ["'trainer' is not a setting", "at the top level"]),
        ({"model": None}, ["The setting model is missing; expected model, data, output."]),
        ({"model": None, "output": None}, ["The settings model and output are missing"]),
        ({"max_steps": 0}, ["max_steps=0", "positive"]),
        ({"lr_new": "fast"}, ["lr_new='fast' must be a number."]),
        ({"lr_new": True}, ["lr_new=True must be a number."]),
        ({"lr_new": "-1e-4"}, ["lr_new=-0.0001 must be a positive number."]),
        ({"num_train_epochs": 1}, ["max_steps=2 and num_train_epochs=1 contradict"]),
        ({"warmup_steps": 0.6, "decay_steps": 0.6}, ["warmup_steps=0.6 and decay_steps=0.6", "2 steps"]),
        ({"warmup_steps": 2, "decay_steps": 1}, ["warmup_steps=2 and decay_steps=1"]),
        ({"warmup_steps": -1}, ["warmup_steps=-1", "share"]),
        ({"decay_steps": 1, "lr_scheduler_type": "cosine"}, ["decay_steps=1", "'cosine'"]),
        ({"dtype": "int8"}, ["dtype='int8'", "bfloat16"]),
        ({"dtype": "float16"}, ["dtype='float16'", "bfloat16"]),
        ({"bf16": "yes", "use_cpu": False}, ["bf16=True", "set use_cpu"]),
        ({"fp16": True}, ["fp16=True needs a GPU"]),
        ({"lora": {"r": 2}, "trainable": "fusion-only"}, ["trainable"]),
        ({"lora": {"rank": 2}}, ["lora.rank"]),
        ({"lora": {"target_modules": "fuson"}}, ["lora.target_modules='fuson'", "fusion or self-attention"]),
        ({"lora": {"target_modules": ["k_prj"]}}, ["lora.target_modules=['k_prj']", "list of the last parts"]),
        (
            {"lora": {"target_modules": ".*(q_proj"}},
            ["lora.target_modules='.*(q_proj'", "not a valid regular expression"],
        ),
        ({"lora": {"r": "two"}}, ["lora.r='two'", "an integer"]),
        ({"save_steps": "abc"}, ["save_steps='abc' must be a number."]),
        ({"save_total_limit": 2.5}, ["save_total_limit=2.5 must be an integer."]),
        ({"save_total_limit": "2.5"}, ["save_total_limit='2.5' must be an integer."]),
        ({"use_cpu": "maybe"}, ["use_cpu='maybe' must be true or false."]),
        ({"use_cpu": 1}, ["use_cpu=1 must be true or false."]),
        ({"weight_decay": 10**400}, ["weight_decay=1000", "... must be a number."]),
        ({"label_names": ["labels", 3]}, ["label_names=['labels', 3] must be a list of strings."]),
        ({"lora": {"bias": "some"}}, ["lora.bias='some' must be one of 'none', 'all', 'lora_only'."]),
        ({"optim": "adamx"}, ["adamx is not a valid", "adamw_torch"]),
        ({"logging_steps": 0}, ["non-zero --logging_steps"]),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, ["load_best_model_at_end requires"]),
        ({"report_to": "tensorbord"}, ["report_to='tensorbord' is unknown", "'tensorboard'"]),
        ({"output": ""}, ["output=''", "not the path of a folder"]),
        ({"output": "."}, ["output='.'", "not the path of a folder"]),
        ({"output": "a/.."}, ["output='a/..'", "not the path of a folder"]),
        ({"output": 7}, ["output=7 must be a string."]),
        ({"learning_rate": 1e-2}, ["learning_rate can't be set; expected lr_new and lr_existing, ", "Set those."]),
        ({"output_dir": "elsewhere"}, ["output_dir can't be set; expected output and checkpoints", "Set those."]),
        ({"gradient_accumulation_steps": 4}, ["expected sequences_per_update, which it follows from. Set that."]),
        ({"resume_from_checkpoint": "c"}, ["resume_from_checkpoint can't be set; expected resume,"]),
        ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size=0"]),
        ({"train_sampling_strategy": "group_by_length"}, ["train_sampling_strategy", "packed"]),
        ({"generate": {"num_return_sequences": 2, "num_beams": 2}}, ["more than one answer", "num_return_sequences"]),
        ({"generate": {"return_dict_in_generate": True}}, ["more than one answer", "return_dict_in_generate"]),
        ({"generate": {"max_new_token": 3}}, ["generate.max_new_token ", "'max_new_tokens'"]),
        ({"generate": {"max_new_tokens": "three"}}, ["generate.max_new_tokens='three'", "an integer"]),
        ({"generate": {"max_new_tokens": 0}}, ["generate.max_new_tokens=0", "positive integer"]),
        ({"generate": {"cache_implementation": "sttaic"}}, ["generate={'cache_implementation': 'sttaic'}"]),
        ({"generate": ["max_new_tokens"]}, ["generate=['max_new_tokens']", "mapping"]),
        ({"max_steps": 4.5}, ["max_steps=4.5 must be an integer."]),
        ({"max_text_tokens": "2k"}, ["max_text_tokens='2k' must be an integer."]),
        ({"max_pixels": True}, ["max_pixels=True must be an integer."]),
        ({"weight_decay": "none"}, ["weight_decay='none'"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"seed": 2**32}, ["seed=4294967296", "4294967295"]),
        ({"data": 3}, ["data=3", "a string"]),
        ({"data": [{"path": "a", "weight": "much"}]}, ["weight of a='much'", "a number"]),
        ({"resume": True, "save_only_model": True}, ["resume", "save_only_model"]),
        ({"resume": "perhaps"}, ["resume='perhaps'", "true or false"]),
        ({"per_device_train_batch_size": 3}, ["sequences_per_update=2", "multiple of 3", "3 sequences"]),
        ({"data": "nowhere.jsonl"}, ["'nowhere.jsonl'"]),
        (
            {"max_image_tokens": 1},
            ["train.jsonl, line 1: A conversation has ", "expected at most 1 (max_image_tokens)"],
        ),
        ({"over_long": "cut"}, ["over_long='cut'"]),
        ({"trainable": "paper-qwne"}, ["'paper-qwne'", "paper-qwen"]),
        ({"trainable": 3}, ["trainable=3", "a string or a list"]),
        ({"trainable": ["casa_attn", 3]}, ["trainable=['casa_attn', 3]", "a list of strings"]),
        ({"trainable": []}, ["trainable=[]"]),
        ({"push_to_hub": True}, ["push_to_hub needs a token", "hf auth login"]),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    settings, changes, words, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError) as refused:
        train(TrainingConfig.from_dict({**settings, **changes}))
    assert all(word in str(refused.value) for word in words)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_converted_is_refused_before_its_weights_are_looked_for(settings, source_folder, tmp_path):
    small = shutil.copytree(source_folder, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match=rf"'qwen2_5_vl'.*`casa-hf convert {small} OUTPUT`"):
        train(TrainingConfig.from_dict({**settings, "model": str(small)}))
    (small / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        train(TrainingConfig.from_dict({**settings, "model": str(small)}))
    assert list(tmp_path.iterdir()) == [small]


@pytest.mark.parametrize(
    ("output", "checkpoints"),
    [
        ("trained", "trained"),
        ("trained", "trained/checkpoints"),
        ("run/final", "run"),
        ("trained", "trained.incomplete/checkpoints"),
        ("trained", "link/checkpoints"),
    ],
)
def test_output_and_checkpoints_in_each_other_are_refused(settings, tmp_path, output, checkpoints):
    (tmp_path / "link").symlink_to(tmp_path / "trained")
    folders = {"output": f"{tmp_path}/{output}", "checkpoints": f"{tmp_path}/{checkpoints}"}
    with pytest.raises(ValueError, match="must not be one folder or lie in each other") as refused:
        train(TrainingConfig.from_dict({**settings, **folders}))
    assert all(f"{name}={folder} " in str(refused.value) for name, folder in folders.items())
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("output", ["trained", "trained/", "trained//"])
def test_checkpoints_are_beside_the_output(settings, tmp_path, output):
    config = TrainingConfig.from_dict({**settings, "output": f"{tmp_path}/{output}"})
    assert config.checkpoint_folder == tmp_path / "trained-checkpoints"


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_reporter_that_is_not_installed_is_named_before_anything_is_read(settings, tmp_path, package):
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ImportError, match=f"report_to='{package}' needs the package {package}: pip install {package}"):
        train(TrainingConfig.from_dict({**settings, "data": "nowhere", "report_to": ["none", package]}))


def test_arguments_of_transformers_stand_beside_the_settings(settings, tmp_path):
    """Numbers and truth values in quotes too."""
    file = tmp_path / "run.yaml"
    given = {name: value for name, value in settings.items() if name not in ("max_steps", "use_cpu", "max_pixels")}
    file.write_text(
        yaml.safe_dump(given)
        + """
max_steps: "2"
max_pixels: '7056'
lr_new: "1e-3"
keep_limits: "no"
bf16: "False"
use_cpu: "yes"
save_steps: "0.5"
adam_beta2: '0.9'
weight_decay: "1e-2"
save_total_limit: null
report_to: none
lora: {r: "2", lora_alpha: "4", lora_dropout: "0.5", use_rslora: "true"}
generate: {max_new_tokens: "3", temperature: "0.5", do_sample: "yes"}
"""
    )
    config = TrainingConfig.from_yaml(file)
    assert (config.max_steps, config.max_pixels, config.lr_new) == (2, 7056, 1e-3)
    assert (config.keep_limits, config.bf16) == (False, False)
    assert config.trainer == {
        "use_cpu": True,
        "logging_steps": 1,
        "save_steps": 0.5,
        "adam_beta2": 0.9,
        "weight_decay": 0.01,
        "save_total_limit": None,
        "report_to": "none",
    }
    assert config.generate == {"max_new_tokens": 3, "temperature": 0.5, "do_sample": True}
    arguments = training_arguments(config, 2)
    assert (arguments.save_steps, arguments.adam_beta2, arguments.use_cpu) == (0.5, 0.9, True)
    assert lora_arguments(config.lora) == {"r": 2, "lora_alpha": 4, "lora_dropout": 0.5, "use_rslora": True}
    lists = {"layers_to_transform": ["1", 2], "layer_replication": [[0, 2]], "modules_to_save": ["a"]}
    assert lora_arguments(lists) == {**lists, "layers_to_transform": [1, 2], "layer_replication": [(0, 2)]}
    data = [{"path": "a", "weight": "3"}, {"path": "b", "weight": "1e-1"}]
    assert [DatasetEntry.of(each).weight for each in data] == [3, 0.1]


def test_numbers_in_yaml(tmp_path, settings):
    file = tmp_path / "run.yaml"
    whole = "max_text_tokens: 2.0e3\nmax_image_tokens: 2e4\nmax_pixels: null\n"
    without = {name: value for name, value in settings.items() if name not in ("max_text_tokens", "max_pixels")}
    file.write_text(yaml.safe_dump(without) + f"lr_new: 2e-4\nlr_existing: 1E-6\n{whole}")
    config = TrainingConfig.from_yaml(file)
    assert (config.lr_new, config.lr_existing) == (2e-4, 1e-6)
    counts = (config.max_text_tokens, config.max_image_tokens, config.max_pixels)
    assert counts == (2_000, 20_000, None) and isinstance(config.max_text_tokens, int)
    assert TrainingConfig.from_dict({**settings, "max_steps": 4e0}).max_steps == 4
    file.write_text(yaml.safe_dump({**settings, "data": None}) + "data: [{path: a, weight: 1e-1}, {path: b}]")
    file.write_text(file.read_text().replace("data: null\n", ""))
    assert TrainingConfig.from_yaml(file).data == [{"path": "a", "weight": 0.1}, {"path": "b"}]
    for broken, message in (
        (
            "a: 1\nmodel: [",
            ", line 2, column 9 isn't valid YAML: expected a value, but found the end of the file. Correct",
        ),
        ("output: 2026-02-30", " isn't valid YAML: day"),  # a date that isn't one
        ("- model", " holds a list; expected lines such as 'model: my-casa-model'"),
        ("model", " holds text; expected lines such as"),
        ("", " holds nothing; expected lines such as"),
        ("3", " holds 3; expected lines such as"),
    ):
        file.write_text(broken)
        with pytest.raises(ValueError, match=f"{file.name}{message}") as refused:
            TrainingConfig.from_yaml(file)
        assert "\n" not in str(refused.value)


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
    for path in (data / "train.jsonl", tmp_path / "paths.parquet", tmp_path, tmp_path / "embedded"):
        conversations = load_conversations(path)
        for index, example in enumerate(CONVERSATIONS):
            expected, found = encode(processor, example), encode(processor, conversations[index])
            assert torch.equal(found.labels, expected.labels)
            assert (found.pixel_values is None) == (expected.pixel_values is None)
            assert found.pixel_values is None or torch.equal(found.pixel_values, expected.pixel_values)


def test_a_text_that_names_a_file_stays_a_text(tmp_path):
    (tmp_path / "cat").write_text("")
    (tmp_path / "data.jsonl").write_text(json.dumps(ask("cat", "cat")))
    assert load_conversations(tmp_path)[0] == ask("cat", "cat")


@pytest.mark.parametrize("text", ["a" * 300, "b/" * 3_000, "c\0d"])
def test_a_text_that_can_be_no_file_stays_a_text(tmp_path, text):
    """In a column of its own too; file systems have limits for a name and for a path."""
    row = {**ask("cat", "cat"), "caption": text}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    assert load_conversations(tmp_path)[0] == row


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
