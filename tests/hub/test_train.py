# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Training runs that start from a Hub id, or end on the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from casa_hf import CasaConfig, CasaForConditionalGeneration
from casa_hf.hub.origins import Origin, origin_records
from casa_hf.training import TrainingConfig, train
from tests.conversion.helpers import load_weights
from tests.hub.loopback import WRITER, Hub, Refused
from tests.training.helpers import CONVERSATIONS

pytest.importorskip("accelerate")

KEPT = {"LICENSE": b"terms", "NOTICE.txt": b"notice", "source_tokenizer_config.json": b"{}"}


@pytest.fixture
def settings(hub: Hub, casa_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A run from a repository that holds a checkpoint, its licence, and what the way back to its source needs."""
    hub.create("me/casa", files={file.name: file.read_bytes() for file in casa_folder.iterdir()} | KEPT)
    (tmp_path / "data.jsonl").write_text(json.dumps(CONVERSATIONS[0]))
    return {
        "model": "me/casa",
        "data": str(tmp_path / "data.jsonl"),
        "output": str(tmp_path / "trained"),
        "max_pixels": 84 * 84,
        "sequences_per_update": 1,
        "max_steps": 1,
        "use_cpu": True,
    }


def kept(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in KEPT if (folder / name).is_file()}


def test_a_run_from_a_hub_id_keeps_what_one_from_a_folder_keeps(
    settings: dict[str, Any], casa_folder: Path, tmp_path: Path
) -> None:
    report = train(TrainingConfig.from_dict(settings))
    assert kept(report.output) == KEPT
    local = train(TrainingConfig.from_dict({**settings, "model": str(casa_folder), "output": str(tmp_path / "local")}))
    expected, found = load_weights(local.output), load_weights(report.output)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_are_downloaded_when_the_rest_is_known_to_be_right(settings: dict[str, Any], hub: Hub) -> None:
    with pytest.raises(ValueError, match="max_image_tokens"):
        train(TrainingConfig.from_dict({**settings, "max_image_tokens": 1}))
    assert "GET /me/casa/resolve" in " ".join(hub.requests)
    assert not any(request.endswith(".safetensors") for request in hub.requests if request.startswith("GET"))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
def test_an_adapter_names_the_repository_of_its_model(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read by PEFT here, which would ask the real Hub about the model
    report = train(TrainingConfig.from_dict({**settings, "lora": {"r": 2}}))
    assert json.loads((report.output / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/casa"
    model = CasaForConditionalGeneration.from_pretrained("me/casa")
    peft.PeftModel.from_pretrained(model, report.output)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
@pytest.mark.parametrize("is_absolute", [True, False])
def test_the_card_of_an_adapter_names_no_folder(
    settings: dict[str, Any],
    hub: Hub,
    casa_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_absolute: bool,
) -> None:
    """But the source of the model that it adapts; PEFT would name the folder, whose name may be one of the Hub's."""
    pytest.importorskip("peft")
    folder = shutil.copytree(casa_folder, tmp_path / "local-casa")
    config = CasaConfig.from_pretrained(folder)
    config.source_origins = origin_records([(Origin("Qwen/source", True), {"license": "apache-2.0"})])
    config.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    pushing = {"push_to_hub": True, "hub_model_id": "me/adapter", "hub_strategy": "end"}
    model = str(folder) if is_absolute else folder.name
    train(TrainingConfig.from_dict({**settings, "model": model, "lora": {"r": 2}, **pushing}))
    published = hub.files("me/adapter")
    assert "adapter_model.safetensors" in published
    card = ModelCard(published["README.md"].decode())
    assert card.data.base_model == "Qwen/source" and card.data.license == "apache-2.0"
    assert card.data.library_name == "peft" and {"lora", "casa", "generated_from_trainer"} <= set(card.data.tags)
    assert "local-casa" not in published["README.md"].decode()


def test_an_id_that_does_not_exist_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'me/other' is not a local folder"):
        train(TrainingConfig.from_dict({**settings, "model": "me/other"}))
    assert not (tmp_path / "trained").exists()


def test_the_trainer_publishes_what_was_saved(settings: dict[str, Any], hub: Hub) -> None:
    pushing = {"push_to_hub": True, "hub_model_id": "me/trained", "hub_strategy": "end"}
    report = train(TrainingConfig.from_dict({**settings, **pushing}))
    published = hub.files("me/trained")
    assert published["model.safetensors"] == (report.output / "model.safetensors").read_bytes()
    assert {name: published.get(name) for name in KEPT} == KEPT
    assert not any(name.startswith("_") for name in published)
    assert b"me/casa" in published["README.md"]


def test_a_repository_has_the_name_of_the_output(settings: dict[str, Any], hub: Hub) -> None:
    pushing = {"push_to_hub": True, "hub_strategy": "end"}
    train(TrainingConfig.from_dict({**settings, **pushing}))
    assert "model.safetensors" in hub.files("me/trained")


def test_a_token_among_the_settings_is_refused(settings: dict[str, Any], hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hub_token was given; expected none.*training_args\.bin.*HF_TOKEN"):
        train(TrainingConfig.from_dict({**settings, "hub_token": WRITER}))
    assert not (tmp_path / "trained").exists()


def test_publishing_that_fails_leaves_the_trained_model(settings: dict[str, Any], hub: Hub, casa_folder: Path) -> None:
    def refuse() -> None:
        raise Refused(403, "No more commits today")

    hub.before_commit = refuse
    pushing = {"push_to_hub": True, "hub_model_id": "me/trained", "hub_strategy": "end"}
    run = TrainingConfig.from_dict({**settings, **pushing})
    with pytest.raises(OSError, match="No more commits today") as failed:
        train(run)
    assert failed.value.__notes__[-1] == f"The model is trained and saved in {settings['output']}."
    before, after = load_weights(casa_folder), load_weights(Path(settings["output"]))
    assert kept(Path(settings["output"])) == KEPT
    assert any(not torch.equal(before[name], after[name]) for name in before)
