# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The model card: metadata, licence, the exact command, and code that runs as it is written."""

from __future__ import annotations

import filecmp
import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import metadata_load

from casa_hf import cli
from casa_hf.conversion import convert_checkpoint
from examples.tiny_source import build_tiny_helium
from tests.conversion.helpers import altered

QWEN_LICENSE = {
    "license": "other",
    "license_name": "qwen-research",
    "license_link": "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE",
}


def code(card: str, language: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def convert(source: Path, output: Path, variant: str = "casa", **options) -> str:
    return (convert_checkpoint(source, output, variant, **options).output / "README.md").read_text()


def test_metadata_without_what_isnt_known(casa_folder):
    assert metadata_load(casa_folder / "README.md") == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["casa"],
    }
    card = (casa_folder / "README.md").read_text()
    assert "state no licence" in card
    assert "the local folder `source`" in card


def test_base_model_of_a_downloaded_source(source_folder, tmp_path):
    """The Hub's cache tells repository and commit."""
    source = altered(source_folder, tmp_path / "models--Qwen--Qwen2.5-VL-3B-Instruct" / "snapshots" / "0123abcd")
    card = convert(source, tmp_path / "casa")
    metadata = metadata_load(tmp_path / "casa" / "README.md")
    assert metadata["base_model"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert metadata["base_model_relation"] == "finetune"
    assert "at commit `0123abcd`" in card


@pytest.mark.parametrize(
    ("stated", "expected", "text"),
    [
        (QWEN_LICENSE, QWEN_LICENSE, "qwen-research, see [https://"),
        ({"license": "apache-2.0", "language": "en"}, {"license": "apache-2.0"}, "`source`: apache-2.0."),
        ({"license": "other"}, {"license": "other"}, "`source`: other."),
        ({"language": "en"}, {"license": "other", "license_link": "LICENSE"}, "see [LICENSE](LICENSE)"),
        (None, {"license": "other", "license_link": "LICENSE"}, "see [LICENSE](LICENSE)"),
    ],
)
def test_inherited_license(source_folder, tmp_path, stated, expected, text):
    source = altered(source_folder, tmp_path / "source")
    (source / "LICENSE").write_text("Do as you are told.\n")
    front_matter = "[broken: {" if stated is None else "\n".join(f"{key}: {value}" for key, value in stated.items())
    (source / "README.md").write_text(f"---\n{front_matter}\n---\n# A model\n")
    card = convert(source, tmp_path / "casa")
    metadata = metadata_load(tmp_path / "casa" / "README.md")
    assert {key: value for key, value in metadata.items() if key.startswith("license")} == expected
    assert text in card
    assert (tmp_path / "casa" / "LICENSE").read_text() == "Do as you are told.\n"
    assert "# A model" not in card


@pytest.mark.parametrize(
    ("variant", "words", "others"),
    [
        (
            "casa",
            ["293,344 parameters", "unchanged", "37,440 are new", "norms of their own", "never been trained"],
            ["any "],
        ),
        ("ca-shared", ["no new ones", "never been trained for this use", "text-only prompts"], ["of their own"]),
        ("casa-replace", ["of 1 blocks", "replace self-attention", "any prompt"], ["text-only"]),
        ("exact", ["Nothing:", "text and one group of still images"], ["poor", "every"]),
        ("insertion", ["Nothing:", "text and still images"], ["poor", "every", "group"]),
    ],
)
def test_says_what_is_untrained(source_folder, tmp_path, variant, words, others):
    card = convert(source_folder, tmp_path / "casa", variant)
    section = card.partition("## What is untrained")[2].partition("##")[0]
    assert f"`{variant}`" in card
    for word in words:
        assert word in section
    for word in others:
        assert word not in section


def test_promises_nothing_of_videos_or_untrained_towers(source_folder, tmp_path):
    for number, history in enumerate(("latest", "group", "all")):
        report = convert_checkpoint(source_folder, tmp_path / str(number), "insertion", casa_video_history=history)
        assert "for prompts of text and still images it computes what the source does" in report.note
    report = convert_checkpoint(source_folder, tmp_path / "latest", "insertion", casa_image_history="latest")
    assert "for prompts of text and one still image it" in report.note
    helium = build_tiny_helium(tmp_path / "helium")
    for variant in ("exact", "insertion"):
        card = convert(helium, tmp_path / variant, variant, vision_from=source_folder)
        assert "text-only prompts are answered as by the source, answers about images are poor" in card
        assert "equal to the source" not in card and "Nothing:" not in card and "no training" not in card


def test_command_makes_the_same_checkpoint(source_folder, tmp_path, monkeypatch):
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "my model").symlink_to(source_folder)
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    card = convert(
        Path("../sources/my model"), Path("casa"), "ca", dtype="bfloat16", max_shard_size="200KB", overwrite=True
    )
    assert "taken over and cast to bfloat16" in card
    program, *arguments = shlex.split(code(card, "bash"))
    assert program == "casa-hf"
    monkeypatch.chdir(tmp_path / "second")
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    files = sorted(file.name for file in (tmp_path / "first" / "casa").iterdir())
    assert "model-00003-of-00004.safetensors" in files
    same, different, failed = filecmp.cmpfiles(
        tmp_path / "first" / "casa", tmp_path / "second" / "casa", files, shallow=False
    )
    assert (sorted(same), different, failed) == (files, [], [])


def test_usage_runs_as_it_is_written(source_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    card = convert(source_folder, Path('a "folder"'))
    names: dict = {}
    exec(compile(code(card, "python"), "README.md", "exec"), names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert names["inputs"]["image_grid_thw"].shape == (1, 3)
    assert capsys.readouterr().out.strip()
