# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Cards of published checkpoints: whatever the folder says itself is kept, and nothing is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from casa_hf import CasaConfig, convert_checkpoint, push_checkpoint
from casa_hf.hub.card import published_card
from casa_hf.hub.card_parts import BEGIN, END, Card
from casa_hf.hub.origins import Origin, origin_records, recorded_origins
from examples.tiny_source import build_tiny_helium
from tests.hub.conftest import process_environment
from tests.hub.loopback import Hub

REPOSITORY = "me/tiny-casa"
APACHE = {"license": "apache-2.0"}
QWEN = {"license": "other", "license_name": "qwen-research", "license_link": "https://huggingface.co/Qwen/LICENSE"}
BY_TRAINER = """\
---
library_name: transformers
tags:
- generated_from_trainer
model-index:
- name: out
  results: []
---

<!-- Written by the Trainer. -->

# out

## Training procedure

### Training hyperparameters

- learning_rate: 0.0001
"""


@pytest.fixture
def config(casa_folder: Path) -> CasaConfig:
    """Of a model whose source is on the Hub."""
    config = CasaConfig.from_pretrained(casa_folder)
    config.source_origins = origin_records([(Origin("Qwen/Qwen2.5-VL-3B-Instruct", True, "0123abcd"), QWEN)])
    return config


def test_a_trained_model_without_a_card(config: CasaConfig) -> None:
    card = ModelCard(published_card(None, config, REPOSITORY, datasets=["someone/colours", "my own pictures"]))
    assert card.data.to_dict() == {
        "base_model": "Qwen/Qwen2.5-VL-3B-Instruct",
        "base_model_relation": "finetune",
        "datasets": ["someone/colours"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["casa"],
        **QWEN,
    }
    assert card.text.strip().startswith(f"# tiny-casa\n\n{BEGIN}\n\n[Qwen/Qwen2.5-VL-3B-Instruct](https://")
    assert "at commit `0123abcd`" in card.text and "Variant `casa`" in card.text
    assert "- [someone/colours](https://huggingface.co/datasets/someone/colours)\n- my own pictures\n" in card.text
    assert "qwen-research, see [https://huggingface.co/Qwen/LICENSE]" in card.text
    assert "eprint = {2512.19535}" in card.text
    assert "ntrained" not in card.text


def test_a_card_of_the_trainer_is_completed(config: CasaConfig) -> None:
    card = ModelCard(published_card(BY_TRAINER, config, REPOSITORY))
    assert card.data.tags == ["generated_from_trainer", "casa"]
    assert card.data.base_model == "Qwen/Qwen2.5-VL-3B-Instruct" and card.data.license_name == "qwen-research"
    assert card.data.pipeline_tag == "image-text-to-text"
    for part in ("<!-- Written by the Trainer. -->", "# out\n", "- learning_rate: 0.0001\n"):
        assert part in card.text
    titles = re.findall(r"^## (.*)$", card.text, re.MULTILINE)
    assert titles == ["Training procedure", "Architecture", "Usage", "Licence", "Citation"]


WRITTEN = """\
# My model

Made as arXiv:2512.19535 says.

## Usage

Ask it nicely.

```python
## Usage of casa_hf
```

## License

All mine.
"""
FIELDS = "license: mit\nbase_model: me/another\ndatasets: me/first\ntags: [own]\n"


@pytest.mark.parametrize("on_hub", [False, True], ids=["folder", "hub"])
def test_what_somebody_wrote_is_kept(config: CasaConfig, on_hub: bool) -> None:
    """Whatever its sections are called: what is ours comes behind it, between two comments."""
    written = f"---\n{FIELDS}---\n\n{WRITTEN}"

    def published(written: str, **options: Any) -> str:
        if not on_hub:
            return published_card(written, config, REPOSITORY, **options)
        folder = "---\nlicense: apache-2.0\nlicense_link: here\n---\n\n# Another\n\nOther words.\n"
        return published_card(folder, config, REPOSITORY, present=written, **options)

    card = ModelCard(published(written))
    kept, begin, ours = card.text.strip().partition(f"\n\n{BEGIN}\n\n")
    assert kept == WRITTEN.strip() and begin and ours.endswith(f"\n\n{END}")
    titles = re.findall(r"^## (.*)$", ours, re.MULTILINE)
    assert titles == ["Architecture", "Usage", "Licence", "Citation"]
    assert card.data.license == "mit" and card.data.base_model == "me/another" and card.data.tags == ["own", "casa"]
    assert card.data.get("license_link") is None and card.data.get("base_model_relation") is None
    again = ModelCard(published(written, datasets=["me/second"]))
    assert again.data.datasets == ["me/first", "me/second"]
    assert "nicely" in again.text and "All mine." in again.text


def test_what_stands_around_our_part_is_nobody_elses(config: CasaConfig) -> None:
    """Words inside it go, comments that have lost their other one take nothing with them."""
    once = published_card(None, config, REPOSITORY)
    again = published_card(None, config, REPOSITORY, present=once)
    assert again == once
    inside = once.replace("## Usage\n", "## Usage\n\nInside.\n")
    assert published_card(None, config, REPOSITORY, present=inside) == once
    for stray in (BEGIN, END):
        title, _, ours = once.partition(BEGIN)
        text = f"{title}{stray}\n\nFirst.\n\n{BEGIN}{ours}\nLast.\n\n{stray}\n"
        for _ in range(2):
            text = published_card(None, config, REPOSITORY, present=text)
            assert text.count("First.") == text.count("Last.") == text.count("eprint") == 1
            assert text.index("First.") < text.index("eprint") < text.index("Last.")
    unended = once.replace(END, "Mine.")
    text = published_card(None, config, REPOSITORY, present=unended)
    assert text.count("Mine.") == 1 and text.count(BEGIN) == 2 and text.count(END) == 1
    assert published_card(None, config, REPOSITORY, present=text) == text


def test_our_part_says_what_the_folder_and_the_push_tell(config: CasaConfig, casa_folder: Path) -> None:
    """What is untrained ends with training; nothing is taken over from our part of the repository's card."""
    converted = (casa_folder / "README.md").read_text()
    first = published_card(converted, config, REPOSITORY)
    made = {"What is untrained", "How it was made"}
    assert made <= Card.read(first, "").sections().keys()
    trained = published_card(converted, config, REPOSITORY, present=first, datasets=["me/one"])
    sections = Card.read(trained, "").sections()
    assert "How it was made" in sections and "What is untrained" not in sections
    later = published_card(trained, config, REPOSITORY, present=trained, procedure="At night.")
    sections = Card.read(later, "").sections()
    assert sections["Training data"].count("\n") == 0 and sections["Training procedure"] == "At night."
    last = published_card(None, config, REPOSITORY, present=later, datasets=["me/two"])
    sections = Card.read(last, "").sections()
    assert "me/two" in sections["Training data"] and "me/one" not in sections["Training data"]
    assert not {"Training procedure", *made} & sections.keys()
    assert Card.read(last, "").data.datasets == ["me/one", "me/two"]  # outside our part


def test_what_is_false_is_stated(config: CasaConfig) -> None:
    """`false` is an answer, and `no` is Norwegian."""
    written = "---\ninference: false\nlanguage:\n- en\n- no\n---\n\n# Mine\n"
    there = "---\ntags: [own]\n---\n\n# Mine\n"
    alone = ModelCard(published_card(written, config, REPOSITORY))
    both = ModelCard(published_card(written, config, REPOSITORY, present=there))
    back = ModelCard(published_card(there, config, REPOSITORY, present=written))
    for card in (alone, both, back):
        assert card.data.get("inference") is False and card.data.language == ["en", "no"]
    one = ModelCard(published_card("---\nlanguage: no\n---\n", config, REPOSITORY))
    assert one.data.language == "no"
    other = written.replace("inference: false", "inference: true")
    assert ModelCard(published_card(written, config, REPOSITORY, present=other)).data.get("inference") is True


def test_no_front_matter(config: CasaConfig, caplog: pytest.LogCaptureFixture) -> None:
    card = ModelCard(published_card("# Plain\n\nWords.\n", config, REPOSITORY))
    assert card.text.strip().startswith(f"# Plain\n\nWords.\n\n{BEGIN}\n\n## Architecture")
    assert card.data.license_name == "qwen-research"
    assert not caplog.records


def test_publishing_again_changes_nothing(config: CasaConfig) -> None:
    once = published_card(BY_TRAINER, config, REPOSITORY, with_code=True, datasets=["someone/colours"])
    assert published_card(once, config, REPOSITORY, with_code=True, datasets=["someone/colours"]) == once


def test_trained_on_something_is_no_longer_untrained(casa_folder: Path, config: CasaConfig) -> None:
    converted = (casa_folder / "README.md").read_text()
    assert "## What is untrained" in converted
    assert "## What is untrained" in published_card(converted, config, REPOSITORY)
    trained = published_card(converted, config, REPOSITORY, datasets=["my own pictures"])
    assert "ntrained" not in trained and "## Training data\n\n- my own pictures\n" in trained


def test_a_model_of_two_sources(source_folder: Path, tmp_path: Path) -> None:
    """Their licences differ: one field can't state both, the section does."""
    folders = {"kyutai/helium": build_tiny_helium, "Qwen/vl": lambda path: shutil.copytree(source_folder, path)}
    made = {}
    for (name, build), stated in zip(folders.items(), (APACHE, QWEN), strict=True):
        made[name] = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "0123"
        made[name].parent.mkdir(parents=True)
        build(made[name])
        front_matter = "\n".join(f"{key}: {value}" for key, value in stated.items())
        (made[name] / "README.md").write_text(f"---\n{front_matter}\n---\n")
    output = convert_checkpoint(made["kyutai/helium"], tmp_path / "casa", vision_from=made["Qwen/vl"]).output
    card = ModelCard(published_card(None, CasaConfig.from_pretrained(output), REPOSITORY))
    assert card.data.base_model == ["kyutai/helium", "Qwen/vl"] and card.data.license == "other"
    assert card.data.base_model_relation == "merge"
    assert "`kyutai/helium`: apache-2.0" in card.text and "`Qwen/vl`: qwen-research" in card.text
    assert "with the vision tower of `Qwen/vl`" in card.text
    # A further design keeps them, unless it was made from a published model.
    again = convert_checkpoint(output, tmp_path / "again", "casa").output
    assert [origin.name for origin, _ in recorded_origins(CasaConfig.from_pretrained(again))] == [*made]


@pytest.mark.parametrize("origins", [None, [], [{"name": "x"}], [{"name": "x", "on_hub": 1, "license": 3}]])
def test_an_unknown_origin(config: CasaConfig, origins: list | None) -> None:
    config.source_origins = origins
    with pytest.raises(ValueError, match=r"`base_model` and `license` to the front matter of README\.md"):
        published_card(None, config, REPOSITORY)
    card = ModelCard(published_card("---\nlicense: mit\n---\n", config, REPOSITORY))
    assert card.data.license == "mit" and card.data.get("base_model") is None


def test_usage_runs_as_it_is_written(hub: Hub, casa_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push_checkpoint(casa_folder, REPOSITORY, with_code=True, revision="v1")
    card = hub.files(REPOSITORY, "v1")["README.md"].decode()
    first, second = re.findall(r"^```python\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(first, "README.md", "exec"), names)
    expected = names["output"]
    assert capsys.readouterr().out.strip()
    names = {}
    exec(compile(second, "README.md", "exec"), names)
    assert names["output"].tolist() == expected.tolist()


@pytest.mark.integration
def test_usage_with_code_runs_where_casa_hf_is_not(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    """As it is written, in a process of its own that can't import casa_hf."""
    push_checkpoint(casa_folder, REPOSITORY, with_code=True)
    *_, usage = re.findall(
        r"^```python\n(.*?)^```", hub.files(REPOSITORY)["README.md"].decode(), re.MULTILINE | re.DOTALL
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.modules['casa_hf'] = None\n{usage}"],
        env={**os.environ, **process_environment(hub, tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
