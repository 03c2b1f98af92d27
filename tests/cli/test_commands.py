# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf`: every command on a real checkpoint, and every way in which one can fail."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import DynamicCache

from casa_hf import CasaForConditionalGeneration, CasaProcessor, convert_checkpoint
from casa_hf.chat import Conversation
from casa_hf.samples import CAT, COFFEE
from examples.tiny_source import build_tiny_helium, build_tiny_source
from tests.clips import write_clip
from tests.command_line import Cli

SHORT = ("--max-new-tokens", "6", "--device", "cpu")

# ---------------------------------------------------------------- usage


def test_help_names_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["casa-hf", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("casa_hf", run_name="__main__")
    assert not ended.value.code
    shown = capsys.readouterr()
    assert all(f"\n  {command} " in shown.out for command in ("convert", "inspect", "generate", "chat", "push"))
    assert shown.err == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate", "me/model"], "--prompt"),
        (["generate", "me/model", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["convert", "me/model"], "OUTPUT"),
        (["fly"], "fly"),
    ],
)
def test_wrong_usage_is_exit_code_2(cli: Cli, arguments: list[str], complaint: str) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert complaint.lower() in outcome.err.lower()
    assert outcome.out == ""


# ---------------------------------------------------------------- convert


def test_convert_does_what_the_function_does(cli: Cli, source_folder: Path, tmp_path: Path) -> None:
    options = ["--variant", "ca", "--dtype", "bfloat16", "--max-shard-size", "300KB"]
    outcome = cli("convert", source_folder, tmp_path / "cli", *options)
    assert outcome.code == 0
    assert outcome.err == "", "no progress bar without a terminal"
    expected = convert_checkpoint(source_folder, tmp_path / "function", "ca", dtype="bfloat16", max_shard_size="300KB")
    assert f"{expected.added_parameters:,}" in outcome.out and f"{expected.source_parameters:,}" in outcome.out
    assert "untrained" in outcome.out

    names = {file.name for file in (tmp_path / "cli").iterdir()}
    assert names == {file.name for file in (tmp_path / "function").iterdir()}
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    assert len(shards) > 1
    for name in (*shards, "config.json"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "function" / name).read_bytes()
    assert {tensor.dtype for name in shards for tensor in load_file(tmp_path / "cli" / name).values()} == {
        torch.bfloat16
    }


def test_convert_calls_nothing_untrained_that_needs_no_training(cli: Cli, source_folder: Path, tmp_path: Path) -> None:
    outcome = cli("convert", source_folder, tmp_path / "casa", "--variant", "exact")
    assert outcome.code == 0
    assert "exact" in outcome.out and "untrained" not in outcome.out


def test_convert_replaces_only_when_told_to(cli: Cli, source_folder: Path, tmp_path: Path) -> None:
    assert cli("convert", source_folder, tmp_path / "casa").code == 0
    outcome = cli("convert", source_folder, tmp_path / "casa", "--variant", "ca")
    assert outcome.refused("OUTPUT", str(tmp_path / "casa"), "--overwrite")
    assert variant_of(tmp_path / "casa") == "window"
    assert cli("convert", source_folder, tmp_path / "casa", "--variant", "ca", "--overwrite").code == 0
    assert variant_of(tmp_path / "casa") == "image"


def variant_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text("utf-8"))["casa_keys"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--variant", "nonsense"], ["'nonsense'", "'ca-shared'"]),
        (["--max-shard-size", "big"], ["--max-shard-size big", "'5GB'"]),
        (["--max-shard-size", "0GB"], ["--max-shard-size 0GB"]),
        (["--gist-tokens", "1000000000000"], ["--gist-tokens 1000000000000", "from 0 to 1024"]),
        (["--variant", "cassa"], ["did you mean 'casa'?"]),
        (["--revision", "main"], ["--revision main is only for Hub ids", "local folder"]),
        (["--dtype", "int8"], ["'int8'", "'bf16'"]),
        (["--keys", "imagge"], ["--keys", "did you mean 'image'?"]),
        (["--layers", "every:9"], ["--layers every:9 is out of range", "every:1 to every:3"]),
        (["--layers", "7"], ["--layers 7 names block 7", "0 to 2"]),
        (["--layers", "1,7"], ["--layers 1,7 names block 7"]),
        (["--keys", "context"], ["--keys context", "--share-projections"]),
        (["--variant", "ca", "--text-windows"], ["--text-windows", "--keys window", "--keys image"]),
        (["--variant", "ca-replace", "--gate", "tanh"], ["--placement replace", "--gate none"]),
        (["--variant", "ca-replace", "--share-projections"], ["--no-share-projections"]),
        (["--video-layout", "native"], ["--video-layout native", "--positions insertion", "--positions contiguous"]),
        (["--max-pixels", "1"], ["--max-pixels 1"]),
        (["--vision-from", "nowhere"], ["--vision-from", "'nowhere' is not a folder"]),
    ],
)
def test_wrong_values_of_convert_are_named_as_they_are_typed(
    cli: Cli, source_folder: Path, tmp_path: Path, options: list[str], parts: list[str]
) -> None:
    outcome = cli("convert", source_folder, tmp_path / "casa", *options)
    assert outcome.refused(*parts)
    assert "casa_" not in outcome.err
    assert list(tmp_path.iterdir()) == []


AXES = [
    *("--keys", "image", "--layers", "every:2", "--placement", "after", "--image-updates", "ffn"),
    *(
        "--image-history",
        "latest",
        "--video-history",
        "all",
        "--positions",
        "insertion",
        "--image-positions",
        "before",
    ),
    *("--share-projections", "--gate", "tanh", "--gist-tokens", "2", "--max-pixels", "12544"),
]


def test_convert_takes_every_axis(cli: Cli, source_folder: Path, tmp_path: Path) -> None:
    outcome = cli("convert", source_folder, tmp_path / "cli", *AXES)
    assert outcome.code == 0 and "gates are closed" in outcome.out
    assert "new: model.language_model.layers.1.casa_attn.gate (0)" in outcome.out
    convert_checkpoint(
        source_folder,
        tmp_path / "function",
        casa_keys="image",
        casa_layers=[1],
        casa_placement="after",
        casa_image_updates="ffn",
        casa_image_history="latest",
        casa_video_history="all",
        casa_positions="insertion",
        casa_image_positions="before",
        casa_share_projections=True,
        casa_gate="tanh",
        num_gist_tokens=2,
        max_pixels=12544,
    )
    for name in ("config.json", "processor_config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "function" / name).read_bytes()


def test_switches_of_convert_go_both_ways(cli: Cli, source_folder: Path, tmp_path: Path) -> None:
    assert cli("convert", source_folder, tmp_path / "casa", "--text-windows").code == 0
    casa = json.loads((tmp_path / "casa" / "config.json").read_text("utf-8"))
    assert casa["casa_text_windows"] is True and casa["casa_share_projections"] is False
    options = ["--variant", "casa-shared", "--no-share-projections", "--no-text-windows", "--gate", "none"]
    assert cli("convert", source_folder, tmp_path / "plain", *options).code == 0
    plain = json.loads((tmp_path / "plain" / "config.json").read_text("utf-8"))
    assert (plain["casa_text_windows"], plain["casa_share_projections"], plain["casa_gate"]) == (False, False, None)


def test_a_dry_run_tells_what_conversion_does(cli: Cli, source_folder: Path, tmp_path: Path) -> None:
    options = ["--layers", "last:1", "--gate", "tanh", "--max-shard-size", "300KB"]
    outcome = cli("convert", source_folder, tmp_path / "casa", *options, "--dry-run")
    assert outcome.code == 0 and list(tmp_path.iterdir()) == []
    plan = outcome.out
    assert cli("convert", source_folder, *options, "--dry-run").out == plan
    assert cli("convert", source_folder, tmp_path / "casa", *options).code == 0
    rows = dict(line.split(maxsplit=1) for line in plan.splitlines() if " <- " in line)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "casa").glob("*.safetensors")):
        stored = load_file(file)
        assert f"{file.name}: {len(stored)} tensors, {sum(t.nbytes for t in stored.values()):,} bytes" in plan
        tensors |= stored
    assert rows.keys() == tensors.keys()
    source = load_file(source_folder / "model.safetensors")
    for name, row in rows.items():
        facts, origin = row.split(" <- ")
        assert facts == f"F32 {list(tensors[name].shape)} {tensors[name].nbytes:,} bytes"
        assert origin.startswith("new, ") is (".casa_attn." in name)
        origin = origin.removeprefix("new, ").removeprefix("copy of ")
        expected = torch.zeros(1) if origin == "0" else source[origin]
        assert torch.equal(tensors[name], expected), name
    assert f"{sum(t.nbytes for t in tensors.values()):,} bytes in" in plan


def test_convert_goes_back_to_the_source(cli: Cli, casa_folder: Path, source_folder: Path, tmp_path: Path) -> None:
    plan = cli("convert", casa_folder, tmp_path / "back", "--to-source", "--dry-run")
    assert plan.code == 0 and list(tmp_path.iterdir()) == []
    left_out = "left out: 24 tensors (fusion layers, which the source doesn't have)"
    assert "visual.merger.mlp.0.weight F32" in plan.out and left_out in plan.out
    again = cli("convert", casa_folder, tmp_path / "again")
    assert re.search(r": casa, [\d,]+ parameters taken over and 0 new ones\.", again.out)
    outcome = cli("convert", casa_folder, tmp_path / "back", "--to-source")
    assert outcome.code == 0 and [line for line in outcome.out.splitlines() if "left out" in line] == [left_out]
    assert "blocks of the tower were trained there" in outcome.out and "trained for CASA" in outcome.out
    original, back = (load_file(folder / "model.safetensors") for folder in (source_folder, tmp_path / "back"))
    assert original.keys() == back.keys() and all(torch.equal(original[name], back[name]) for name in original)
    outcome = cli("convert", casa_folder, tmp_path / "other", "--to-source", "--variant", "ca")
    assert outcome.refused("--to-source", "--variant")


def test_convert_gives_a_text_only_source_a_tower(cli: Cli, source_folder: Path, tmp_path: Path) -> None:
    helium = build_tiny_helium(tmp_path / "helium")
    outcome = cli("convert", helium, tmp_path / "casa", "--vision-from", source_folder)
    assert outcome.code == 0 and "new rows 838 (<|vision_start|>), 839 (<|vision_end|>): the mean" in outcome.out
    assert cli("inspect", tmp_path / "casa").out.count("Helium") == 1
    assert cli("convert", helium, tmp_path / "blind").refused("--vision-from", "text-only")
    form = ("--image-delimiters", "<|image|>")
    outcome = cli("convert", helium, tmp_path / "single", "--vision-from", source_folder, *form)
    assert outcome.code == 0 and "new rows 838 (<|image|>): the mean of all" in outcome.out
    assert "--image-delimiters '<|image|>'" in (tmp_path / "single" / "README.md").read_text()
    assert cli("convert", source_folder, tmp_path / "other", *form).refused("--image-delimiters", "text-only")
    assert cli("convert", tmp_path / "single", tmp_path / "other", *form).refused("--image-delimiters", "delimiters.")
    refused = cli("convert", helium, tmp_path / "other", "--vision-from", source_folder, "--image-delimiters", "a,b,c")
    assert refused.refused("--image-delimiters", "a,b,c")
    refused = cli("convert", helium, tmp_path / "other", "--vision-from", source_folder, "--image-delimiters", "</s>")
    assert refused.refused("--image-delimiters </s> names </s>, which prompts without images have too")
    assert cli("convert", tmp_path / "single", tmp_path / "other", "--to-source", *form).refused(
        "--to-source", form[0]
    )


def test_convert_without_a_source_fails_in_one_line(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("convert", tmp_path / "nowhere", tmp_path / "casa")
    assert outcome.refused(str(tmp_path / "nowhere"), "Hub id")
    assert list(tmp_path.iterdir()) == []


def test_convert_shows_its_progress_on_a_terminal(cli: Cli, source_folder: Path, tmp_path: Path) -> None:
    outcome = cli("convert", source_folder, tmp_path / "casa", terminal=True)
    assert outcome.code == 0
    assert "Writing weights" in outcome.err
    # Its last state, in megabytes.
    assert "1.3/1.3 MB" in outcome.err


# ---------------------------------------------------------------- inspect


def test_inspect_agrees_with_the_loaded_model(cli: Cli, casa_folder: Path) -> None:
    outcome = cli("inspect", casa_folder)
    assert outcome.code == 0 and outcome.err == ""
    facts = {line[:15].strip(): line[15:] for line in outcome.out.splitlines()}

    model = CasaForConditionalGeneration.from_pretrained(casa_folder)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    added = sum(size for name, size in sizes.items() if ".casa_" in name)
    cache = model(torch.tensor([[5, 6, 7]]), cache=DynamicCache()).cache
    token_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 3
    assert facts["variant"] == "casa"
    assert facts["backbone"] == "Qwen2.5-VL"
    assert facts["fusion layers"] == "3 of 3 blocks"
    assert facts["parameters"] == f"{sum(sizes.values()) - added:,} of the source, {added:,} added"
    assert facts["weights"].endswith("float32")
    assert facts["text token"].startswith(f"{token_bytes} bytes, and {token_bytes} bytes more")
    # 952 x 952 pixels, 28 x 28 per token.
    assert "1,156 tokens" in facts["window"]


def test_other_folders_are_told_what_they_hold(cli: Cli, tmp_path: Path) -> None:
    """And what can be done with it."""
    contents = {
        "foreign": ("config.json", {"model_type": "gemma"}),
        "nameless": ("config.json", {"architectures": ["Other"]}),
        "text": ("config.json", {"model_type": "llama"}),
        "adapter": ("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "me/base"}),
        "empty": ("README.md", {}),
        "run/checkpoint-8": ("config.json", {"model_type": "casa"}),
    }
    for name, (file, content) in contents.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / file).write_text(json.dumps(content))
    said = {
        "foreign": ["model_type 'gemma'", "can't be converted", "Qwen2.5-VL (model_type 'qwen2_5_vl')"],
        "nameless": ["model_type None", "can't be converted"],
        "text": [f"casa-hf convert {tmp_path / 'text'} OUTPUT --vision-from VISION_LANGUAGE_MODEL"],
        "adapter": ["a PEFT adapter of 'me/base'", "merge_and_unload"],
        "empty": ["no config.json. Give the folder of a complete Transformers checkpoint"],
        "run": ["no config.json; there is one in: checkpoint-8."],
    }
    for name, parts in said.items():
        for command in (["inspect"], ["generate", "--prompt", "x"]):
            outcome = cli(*command, tmp_path / name)
            assert outcome.refused(*parts), (name, outcome.err)
            assert ("Convert it first" in outcome.err) == (name == "text")


def test_variables_of_the_chat_template(cli: Cli, casa_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(casa_folder, tmp_path / "casa")
    template = (folder / "chat_template.jinja").read_text() + "{% if not thinking | default(true) %}Well: {% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    option = ("--chat-template-kwargs", '{"thinking": false}')
    model, processor = (
        CasaForConditionalGeneration.from_pretrained(folder).eval(),
        CasaProcessor.from_pretrained(folder),
    )

    def answer(**options: Any) -> str:
        return Conversation(model, processor, **options).ask("What?", max_new_tokens=6)

    expected, other = answer(chat_template_kwargs={"thinking": False}), answer()
    assert expected != other
    asked = ("generate", folder, *SHORT, "--prompt", "What?")
    assert cli(*asked, *option).out == expected + "\n"
    rows = cli(*asked, "--prompt", "What?", *option).out.splitlines()
    assert [json.loads(row)["answer"] for row in rows] == [expected] * 2
    assert expected in cli("chat", folder, *SHORT, *option, stdin="What?\n").out
    for given, words in (
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"thinkin": 1}', "--chat-template-kwargs has 'thinkin', which the chat template"),
    ):
        for command in (("generate", "--prompt", "x"), ("chat",)):
            assert cli(*command, folder, "--device", "cpu", option[0], given).refused(words)


def test_inspect_lists_the_blocks_where_not_all_have_fusion_layers(
    cli: Cli, source_folder: Path, tmp_path: Path
) -> None:
    model = CasaForConditionalGeneration.from_pretrained(source_folder, casa_layers=[0, 2])
    model.save_pretrained(tmp_path)
    CasaProcessor.from_source(source_folder).save_pretrained(tmp_path)
    outcome = cli("inspect", tmp_path)
    assert "2 of 3 blocks: 0, 2" in outcome.out
    assert "none of the named ones" in outcome.out


def test_inspect_tells_which_images_are_never_freed(cli: Cli, source_folder: Path, tmp_path: Path) -> None:
    kept = {}
    for name, options in {
        "images": ["--image-history", "all"],
        "frames": ["--video-history", "all"],
        "both": ["--variant", "insertion"],
    }.items():
        assert cli("convert", source_folder, tmp_path / name, *options).code == 0
        rows = {line[:15].strip(): line for line in cli("inspect", tmp_path / name).out.splitlines()}
        kept[name] = {
            label: "never freed" in row
            for label, row in rows.items()
            if label in ("window", "per image", "video frame")
        }
    assert kept == {
        "images": {"per image": True, "video frame": False},
        "frames": {"window": False, "video frame": True},
        "both": {"per image": True},
    }


def test_inspect_tells_the_layout_of_videos(cli: Cli, tmp_path: Path) -> None:
    for family, told in (("qwen2_5_vl", "a whole video is one image"), ("qwen3_vl", "two frames share an image")):
        source = build_tiny_source(tmp_path / family, family=family)
        for layout, expected in (("native", f"{'video layout':<15}{told} (native)\n"), (None, "")):
            convert_checkpoint(source, tmp_path / "casa", "exact", casa_video_layout=layout, overwrite=True)
            out = cli("inspect", tmp_path / "casa").out
            assert expected in out and ("video layout" in out) == bool(layout)


def test_inspect_fails_in_one_line(cli: Cli, source_folder: Path, tmp_path: Path) -> None:
    assert cli("inspect", tmp_path / "nowhere").refused(str(tmp_path / "nowhere"))
    assert cli("inspect", source_folder).refused("qwen2_5_vl", "casa-hf convert")


# ---------------------------------------------------------------- generate


@pytest.fixture(scope="module")
def answers(casa_folder: Path) -> dict[str, str]:
    """What the Python interface answers to one question with different images."""
    model = CasaForConditionalGeneration.from_pretrained(casa_folder).eval()
    processor = CasaProcessor.from_pretrained(casa_folder)

    def answer(*images: str) -> str:
        content = [{"type": "image", "image": Image.open(file)} for file in images]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": "What is this?"}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=6)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]

    found = {"nothing": answer(), "cat": answer(CAT), "both": answer(CAT, COFFEE)}
    assert len(set(found.values())) == 3
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("images", "options"),
    [
        ([], []),
        ([CAT], ["--attn", "eager", "--dtype", "float32"]),
        ([CAT, COFFEE], ["--attn", "sdpa"]),
    ],
)
def test_generate_answers_as_in_python(
    cli: Cli, casa_folder: Path, answers: dict[str, str], images: list[str], options: list[str], stream: bool
) -> None:
    given = [argument for image in images for argument in ("--image", image)]
    flags = ["--stream"] if stream else []
    outcome = cli("generate", casa_folder, "--prompt", "What is this?", *given, *options, *flags, *SHORT)
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.out == answers[["nothing", "cat", "both"][len(images)]] + "\n"


def test_generate_runs_in_the_number_format_asked_for(cli: Cli, casa_folder: Path, answers: dict[str, str]) -> None:
    arguments = ["generate", casa_folder, "--prompt", "What is this?", "--image", CAT, *SHORT]
    outcome = cli(*arguments, "--dtype", "bfloat16")
    assert outcome.code == 0
    assert outcome.out.strip()
    # Three decimal digits are too few to follow the same path for long.
    longer = cli(*arguments[:-4], "--max-new-tokens", "40", "--device", "cpu")
    assert cli(*arguments[:-4], "--max-new-tokens", "40", "--device", "cpu", "--dtype", "bfloat16").out != longer.out


@pytest.mark.integration
def test_generate_as_a_process_prints_the_answer_and_nothing_else(casa_folder: Path, answers: dict[str, str]) -> None:
    command = [sys.executable, "-m", "casa_hf", "generate", casa_folder, "--prompt", "What is this?"]
    done = subprocess.run([*command, "--image", CAT, *SHORT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, answers["cat"] + "\n", "")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--image", "nowhere.jpg"], ["nowhere.jpg' doesn't exist", "path or URL"]),
        (["--image", "."], ["The image '.' is a folder; expected a file."]),
        (["--device", "nonsense"], ["'nonsense'", "cpu"]),
        (["--device", "cuda:99"], ["'cuda:99'", "cpu"]),
        (["--attn", "eagr"], ["did you mean 'eager'?"]),
        (["--attn", "paged|eager"], ["'paged|eager' is unknown"]),
        (["--attn", "flex_attention"], ["'flex_attention' is unknown"]),
        (["--attn", "torch_varlen_flash"], ["'torch_varlen_flash' is unknown", "did you mean 'torch_varlen'?"]),
        (["--attn", "torch_varlen", "--device", "cpu"], ["needs a CUDA device", "on cpu. Use sdpa"]),
        (["--dtype", "bf15"], ["did you mean 'bf16'?"]),
    ],
)
def test_wrong_values_of_generate_are_refused(
    cli: Cli, casa_folder: Path, options: list[str], parts: list[str]
) -> None:
    assert cli("generate", casa_folder, "--prompt", "x", *options).refused(*parts)


def test_exit_codes_follow_one_rule(cli: Cli, source_folder: Path, casa_folder: Path, tmp_path: Path) -> None:
    """2 for what is wrong with the command line, and for what it names if that is of another kind or can't be read; 1
    for a checkpoint that is damaged or incomplete."""
    other, damaged, bare = (tmp_path / name for name in ("other", "damaged", "bare"))
    for folder, content in ((other, '{"model_type": "gemma"}'), (damaged, "{")):
        shutil.copytree(casa_folder, folder)
        (folder / "config.json").write_text(content)
    shutil.copytree(casa_folder, bare)
    (bare / "model.safetensors").unlink()
    (tmp_path / "run.yaml").write_text("modl: x\n")
    (tmp_path / "x.jsonl").write_text("no\n")
    output, ask = tmp_path / "out", ("--prompt", "x")
    codes: dict[int, list[list[str | Path]]] = {
        2: [
            ["convert", other, output],
            ["convert", tmp_path, output],
            ["convert", "--to-source", source_folder, output],
            ["convert", source_folder, casa_folder],
            *(
                [command, source_folder, *rest]
                for command, *rest in (("inspect",), ("generate", *ask), ("push", "me/x"))
            ),
            ["inspect", casa_folder, "--names"],
            ["push", casa_folder, "not a name"],
            ["generate", casa_folder, *ask, "--image", __file__],
            ["generate", casa_folder, "--input", tmp_path / "x.jsonl"],
            ["train", tmp_path / "run.yaml"],
        ],
        1: [
            *(
                [*command, folder, *rest]
                for folder in (damaged, bare)
                for command, *rest in ((["inspect"],), (["convert"], output), (["generate"], *ask), (["push"], "me/x"))
            ),
        ],
    }
    for code, commands in codes.items():
        for command in commands:
            outcome = cli(*command)
            assert (outcome.code, outcome.out) == (code, ""), (command, outcome.err)
    assert not output.exists()


def test_a_model_that_cannot_be_had_fails_in_one_line(cli: Cli, tmp_path: Path) -> None:
    for command in (["generate", "--prompt", "x"], ["chat"]):
        outcome = cli(*command, tmp_path / "nowhere")
        assert outcome.refused(str(tmp_path / "nowhere"), "not a folder")


def test_damaged_weights_fail_in_one_line(cli: Cli, casa_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(casa_folder, tmp_path / "casa")
    weights = tmp_path / "casa" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    outcome = cli("generate", tmp_path / "casa", "--prompt", "x")
    assert outcome.failed_with_one_line(str(tmp_path / "casa"), "damaged")


def test_a_mistake_of_the_program_says_how_to_find_it(
    cli: Cli, casa_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> str:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(Conversation, "ask", broken)
    outcome = cli("generate", casa_folder, "--prompt", "x")
    assert outcome.failed_with_one_line("ZeroDivisionError: division by zero", "python -X dev")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["generate", "CASA", "--prompt"], "--prompt"),
        (["caption", CAT, "--model", "CASA", "--prompt"], "--prompt"),
        (["caption", CAT, "--model", "CASA", "--system"], "--system"),
        (["caption", CAT, "--model", "CASA", "--prefix"], "--prefix"),
        (["caption", CAT, "--model", "CASA", "--ask"], "--ask"),
        (["push", "CASA", "space/name", "--message"], "--message"),
    ],
)
def test_a_byte_that_is_not_utf_8_is_wrong_usage(cli: Cli, casa_folder: Path, command: list[str], option: str) -> None:
    given = [casa_folder if part == "CASA" else part for part in command]
    outcome = cli(*given, os.fsdecode(b"caf\xe9"))
    said = " ".join(outcome.err.replace("│", " ").split())
    assert outcome.code == 2 and option in said
    assert "'\\udce9' at index 3" in said and "half a character" in said


# ---------------------------------------------------------------- chat


@pytest.fixture(scope="module")
def chat_answers(casa_folder: Path) -> list[str]:
    conversation = Conversation(
        CasaForConditionalGeneration.from_pretrained(casa_folder).eval(), CasaProcessor.from_pretrained(casa_folder)
    )
    turns = [("Hello!", []), ("What is this?", [CAT]), ("And these?", [COFFEE, CAT]), ("Go on.", [])]
    return [conversation.ask(text, [Image.open(i) for i in images], max_new_tokens=6) for text, images in turns]


def test_chat_is_one_conversation(cli: Cli, casa_folder: Path, chat_answers: list[str]) -> None:
    script = f"Hello!\n\n/image {CAT}\nWhat is this?\n  /image {COFFEE}\n/image {CAT}\nAnd these?\nGo on.\n"
    outcome = cli("chat", casa_folder, *SHORT, stdin=script)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == "".join(answer + "\n" for answer in chat_answers)


def test_chat_with_videos(cli: Cli, casa_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    clip = write_clip(tmp_path / "clip.mp4", 20, 10)
    conversation = Conversation(
        CasaForConditionalGeneration.from_pretrained(casa_folder).eval(), CasaProcessor.from_pretrained(casa_folder)
    )
    turns = [("Hello!", [], []), ("What?", [CAT], [clip]), ("Go on.", [], [])]
    answers = [conversation.ask(*turn, num_frames=3, max_new_tokens=6) for turn in turns]
    script = f"Hello!\n/video {clip}\n/image {CAT}\nWhat?\nGo on.\n"
    outcome = cli("chat", casa_folder, "--num-frames", "3", *SHORT, stdin=script)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == "".join(answer + "\n" for answer in answers)


def test_chat_reset_and_quit(cli: Cli, casa_folder: Path, chat_answers: list[str]) -> None:
    script = f"Hello!\n/image {CAT}\n/reset\nHello!\n/quit\nHello!\n"
    outcome = cli("chat", casa_folder, *SHORT, stdin=script)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"{chat_answers[0]}\n" * 2


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("/image nowhere.jpg", ["nowhere.jpg"]),
        ("/image", ["''", "no such file"]),
        ("/image depth.png", ["depth.png", "'I;16'", "8 bits"]),
        ("/video nowhere.mp4", ["The video 'nowhere.mp4' can't be used"]),
        ("/video depth.png --fps 3", ["depth.png", "no such file"]),
        ("/fly", ["/fly", "/quit"]),
    ],
)
def test_a_scripted_chat_stops_at_its_first_error(
    cli: Cli, casa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("I;16", (56, 56), 4000).save("depth.png")
    outcome = cli("chat", casa_folder, *SHORT, stdin=f"{line}\nHello!\n")
    assert outcome.failed_with_one_line(*parts)


def test_a_person_can_go_on_after_an_error(cli: Cli, casa_folder: Path, chat_answers: list[str]) -> None:
    typed = f"/fly\n/image nowhere.jpg\nHello!\n/image {CAT}\nWhat \ud83d\nWhat is this?\n/quit\n"
    outcome = cli("chat", casa_folder, *SHORT, stdin=typed, terminal=True)
    assert outcome.code == 0
    assert (
        "error: '/fly' is not a command" in outcome.err
        and "error: The image 'nowhere.jpg' can't be used" in outcome.err
    )
    # The picture waits for a message that can be asked.
    assert "half a character" in outcome.err
    assert outcome.out == f"> > > {chat_answers[0]}\n> > > {chat_answers[1]}\n> "


@pytest.mark.integration
def test_a_line_with_a_byte_that_is_not_utf_8_is_refused_by_name(casa_folder: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "casa_hf", "chat", str(casa_folder), *SHORT],
        input=b"Hello!\nCaf\xe9?\n",
        capture_output=True,
        check=False,
    )
    assert process.returncode == 1 and process.stdout
    assert process.stderr.startswith(b"error: the user message has '\\udce9' at index 3, which is half a character")
    assert process.stderr.count(b"\n") == 1


def test_control_tokens_are_text_unless_asked_for(cli: Cli, casa_folder: Path) -> None:
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    for command, stdin in ((["generate", casa_folder, "--prompt", mark], ""), (["chat", casa_folder], f"{mark}\n")):
        assert cli(*command, *SHORT, stdin=stdin).code == 0
        outcome = cli(*command, *SHORT, "--no-sanitize-control-tokens", stdin=stdin)
        assert outcome.failed_with_one_line("number of image placeholders in the text (1)")
