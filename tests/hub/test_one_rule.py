# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What holds for all ways to publish: what is left alone, tokens, branches, time-outs."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import _http
from transformers import Trainer, TrainingArguments

from casa_hf import CasaForConditionalGeneration, CasaProcessor, CheckpointError, push_checkpoint
from casa_hf.checkpoint_files import hub_client
from casa_hf.conversion import convert_checkpoint
from casa_hf.training import CasaTrainer, TrainingConfig, train
from tests.hub.loopback import Hub, Refused
from tests.training.helpers import CONVERSATIONS

pytest.importorskip("accelerate")

NAME = "me/tiny-casa"

# (checkpoint, folder to write to, branch, token) -> publishes
Way = Callable[[Path, Path, str | None, str | None], Any]


def model_of(checkpoint: Path) -> Any:
    return CasaForConditionalGeneration.from_pretrained(checkpoint)


def trainer_of(checkpoint: Path, folder: Path, **options: Any) -> CasaTrainer:
    defaults = {"max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return CasaTrainer(
        model=model_of(checkpoint),
        args=TrainingArguments(str(folder), hub_model_id=NAME, remove_unused_columns=False, **{**defaults, **options}),
        train_dataset=CONVERSATIONS[:1],
        processing_class=CasaProcessor.from_pretrained(checkpoint),
    )


def by_command(checkpoint: Path, folder: Path, revision: str | None, token: str | None) -> Any:
    push_checkpoint(checkpoint, NAME, revision=revision, token=token)


def by_model(checkpoint: Path, folder: Path, revision: str | None, token: str | None) -> Any:
    model_of(checkpoint).push_to_hub(NAME, revision=revision, token=token)


def by_processor(checkpoint: Path, folder: Path, revision: str | None, token: str | None) -> Any:
    CasaProcessor.from_pretrained(checkpoint).push_to_hub(NAME, revision=revision, token=token)


def by_saving(checkpoint: Path, folder: Path, revision: str | None, token: str | None) -> Any:
    """Which has no branches."""
    model_of(checkpoint).save_pretrained(folder, push_to_hub=True, repo_id=NAME, token=token)


def by_saving_the_processor(checkpoint: Path, folder: Path, revision: str | None, token: str | None) -> Any:
    CasaProcessor.from_pretrained(checkpoint).save_pretrained(str(folder), push_to_hub=True, repo_id=NAME, token=token)


def by_trainer(checkpoint: Path, folder: Path, revision: str | None, token: str | None) -> Any:
    trainer_of(checkpoint, folder).push_to_hub(revision=revision, token=token)


WAYS: dict[str, Way] = {
    "push": by_command,
    "model": by_model,
    "processor": by_processor,
    "save model": by_saving,
    "save processor": by_saving_the_processor,
    "trainer": by_trainer,
}


def every_way(cases: Iterable[Any], branches: bool = False) -> list[tuple[str, Any]]:
    """Every case by the command, and every other way with the first of them: they share what looks at it."""
    first, *rest = cases
    others = [name for name in WAYS if name != "push" and not (branches and name.startswith("save"))]
    return [("push", case) for case in (first, *rest)] + [(name, first) for name in others]


with_branches = pytest.mark.parametrize("way", [name for name in WAYS if not name.startswith("save")])


def states(hub: Hub) -> dict[str, list[str]]:
    return {branch: [commit.sha for commit in history] for branch, history in hub.repositories[NAME].branches.items()}


# ---------------------------------------------------------------- what a repository holds

FOREIGN: dict[str, tuple[dict[str, bytes], str]] = {
    "weights": ({"model.safetensors": b"x"}, "weights without a config.json (model.safetensors)"),
    "model": ({"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"}, "a model of type 'llama'"),
    "broken": ({"config.json": b"[broken"}, "a config.json of something else"),
    "parts": ({"unet/model.bin": b"x", "model_index.json": b"{}"}, "weights without a config.json (unet/model.bin)"),
    "adapters": ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "adapters"),
    "tokenizer": ({"tokenizer.json": b"{}"}, "a processor or tokenizer of another model (tokenizer.json)"),
    "processor": ({"processor_config.json": b'{"processor_class": "X"}'}, "a processor or tokenizer of another"),
}


@pytest.mark.parametrize(("way", "files"), [*every_way(FOREIGN), ("processor", "adapters")])
def test_what_somebody_else_has_there_stays(hub: Hub, casa_folder: Path, tmp_path: Path, way: str, files: str) -> None:
    """Refused in the same words, before anything is saved; deleting it there is the way to insist."""
    content, held = FOREIGN[files]
    if files == "adapters" and "processor" in way:
        content, held = {**content, "tokenizer.json": b"{}"}, "a processor or tokenizer of another model"
    hub.create(NAME, files=content)
    before = states(hub)
    for revision in (None, "v2"):
        with pytest.raises(CheckpointError, match="or delete these files there first") as caught:
            WAYS[way](casa_folder, tmp_path / "out", revision, None)
        assert f"{NAME} is taken: it holds {held}" in str(caught.value) and "\n" not in str(caught.value)
        assert states(hub) == before and not hub.uploaded
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    hub.create(NAME)
    WAYS[way](casa_folder, tmp_path / "out", None, None)
    assert states(hub) != before


def test_training_does_not_begin(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    """Whatever would end the push after it."""
    options = {"push_to_hub": True, "hub_strategy": "end"}
    for files, message in [
        (FOREIGN["weights"][0], "is taken"),
        ({"README.md": b"# Ma\xe7on\n"}, "is not UTF-8 text"),
        ({"README.md": b"---\nlicense: [\n---\n"}, "front matter of the README.md of me/tiny-casa can't be read"),
    ]:
        hub.create(NAME, files=files)
        with pytest.raises(CheckpointError, match=message):
            trainer_of(casa_folder, tmp_path / "out", **options)
    del hub.repositories[NAME]
    for content, message in [
        (b"# Ma\xe7on\n", r"README\.md is not UTF-8 text"),
        (b"---\nlicense: [\n---\n", r"front matter of .*README\.md can't be read"),
    ]:
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / "README.md").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            trainer_of(casa_folder, tmp_path / "own", **options)
    assert NAME not in hub.repositories


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
def test_adapters_follow_adapters(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    """Of an earlier run, which hold weights without a config.json too."""
    peft = pytest.importorskip("peft")
    hub.create(NAME, files=FOREIGN["adapters"][0])
    trainer = trainer_of(casa_folder, tmp_path / "out")
    trainer.model = peft.get_peft_model(trainer.model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    hub.repositories[NAME].at("main").files["last-checkpoint/optimizer.pt"] = b"x"
    for learned in (0.0, 1.0):
        torch.nn.init.constant_(next(p for name, p in trainer.model.named_parameters() if "lora_B" in name), learned)
        trainer.push_to_hub()
    assert len(hub.files(NAME)["adapter_model.safetensors"]) > 100 and len(hub.commits(NAME)) == 2
    assert "training_args.bin" in hub.files(NAME)
    by_processor(casa_folder, tmp_path, None, None)
    with pytest.raises(CheckpointError, match="it holds adapters"):
        by_model(casa_folder, tmp_path, None, None)


def test_model_and_processor_come_in_any_order(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    for first, second in ((by_model, by_processor), (by_processor, by_model), (by_processor, by_command)):
        hub.repositories.clear()
        for way in (first, second, first):
            way(casa_folder, tmp_path, None, None)
        assert {"model.safetensors", "processor_config.json"} <= hub.files(NAME).keys()


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("way", "case"),
    every_way(
        [
            ("hf_sec\nret", "line break"),
            ("hf_sec ret", "space"),
            ("hf_secret\r\n", "line break"),
            ("hf_sec\x00ret", "char"),
        ]
    ),
)
def test_a_token_that_cannot_be_sent_is_not_shown(
    hub: Hub,
    casa_folder: Path,
    tmp_path: Path,
    way: str,
    case: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither in the error nor in one that it came from; the Hub isn't asked."""
    token, kind = case
    with pytest.raises(CheckpointError, match=rf"The token for the Hub has an invalid character: a {kind}") as caught:
        WAYS[way](casa_folder, tmp_path / "out", None, token)
    shown = "".join(traceback.format_exception(caught.value)) + "".join(capsys.readouterr()) + caplog.text
    assert "sec" not in shown.replace("casa_folder", "").replace("second", "")
    assert hub.requests == []


def test_a_token_of_the_environment(
    hub: Hub, casa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before data or a source are read."""
    monkeypatch.setenv("HF_TOKEN", "hf_sec ret")
    with pytest.raises(CheckpointError, match="invalid character: a space"):
        trainer_of(casa_folder, tmp_path / "out", push_to_hub=True)
    settings = {"model": str(casa_folder), "data": "nowhere", "output": str(tmp_path / "trained")}
    with pytest.raises(CheckpointError, match="invalid character: a space"):
        train(TrainingConfig.from_dict({**settings, "push_to_hub": True, "use_cpu": True}))
    with pytest.raises(CheckpointError, match="invalid character: a space") as caught:
        convert_checkpoint("me/source", tmp_path / "casa")
    assert "sec ret" not in "".join(traceback.format_exception(caught.value))
    assert hub.requests == []


# ---------------------------------------------------------------- branches


@pytest.mark.parametrize(("way", "revision"), every_way(["tag", "commit", "a b", "../main", ""], branches=True))
def test_what_nothing_can_be_added_to(hub: Hub, casa_folder: Path, tmp_path: Path, way: str, revision: str) -> None:
    """Before anything is saved, and before a training."""
    hub.create(NAME)
    repository = hub.repositories[NAME]
    repository.tags["tag"] = repository.branches["main"][0]
    revision = repository.branches["main"][0].sha if revision == "commit" else revision
    before = states(hub)
    words = "a tag or a commit|is not a valid branch name"
    with pytest.raises(CheckpointError, match=words):
        WAYS[way](casa_folder, tmp_path / "out", revision, None)
    if way == "trainer":
        with pytest.raises(CheckpointError, match=words):
            trainer_of(casa_folder, tmp_path / "out", push_to_hub=True, hub_revision=revision)
    assert states(hub) == before and not hub.uploaded


def refuse() -> None:
    raise Refused(403, "No more commits today")


def lose() -> None:
    raise Refused(504, "upstream request timeout")


@with_branches
def test_a_refused_push_leaves_no_branch(hub: Hub, casa_folder: Path, tmp_path: Path, way: str) -> None:
    hub.create(NAME)
    before = states(hub)
    hub.before_commit = refuse
    with pytest.raises((CheckpointError, OSError), match="No more commits today"):
        WAYS[way](casa_folder, tmp_path / "out", "v2", None)
    assert states(hub) == before
    hub.before_commit = None
    WAYS[way](casa_folder, tmp_path / "out", "v2", None)
    assert states(hub)["main"] == before["main"] and len(hub.commits(NAME, "v2")) == 1
    # A branch that was there stays where it is.
    hub.repositories[NAME].branches["v2"] = hub.repositories[NAME].branches["main"][:]
    after, hub.before_commit = states(hub), refuse
    with pytest.raises((CheckpointError, OSError), match="No more commits today"):
        WAYS[way](casa_folder, tmp_path / "out", "v2", None)
    assert states(hub) == after


@with_branches
def test_a_commit_that_may_have_arrived_keeps_its_branch(
    hub: Hub, casa_folder: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    hub.create(NAME)
    hub.after_commit = lose
    if way == "push":  # which looks
        WAYS[way](casa_folder, tmp_path / "out", "v2", None)
    else:
        with pytest.raises(OSError, match="upstream request timeout"):
            WAYS[way](casa_folder, tmp_path / "out", "v2", None)
    assert len(hub.commits(NAME, "v2")) == 1
    hub.after_commit, hub.before_commit = None, lose  # it may arrive later
    with pytest.raises((CheckpointError, OSError), match="upstream request timeout"):
        WAYS[way](casa_folder, tmp_path / "out", "v3", None)
    assert states(hub)["v3"] == states(hub)["main"]


@with_branches
def test_a_branch_that_somebody_else_uses_stays(hub: Hub, casa_folder: Path, tmp_path: Path, way: str) -> None:
    hub.create(NAME)

    def use_and_refuse() -> None:
        hub.edit(NAME, "v2", NOTES="Mine.")
        refuse()

    hub.before_commit = use_and_refuse
    with pytest.raises((CheckpointError, OSError), match="No more commits today"):
        WAYS[way](casa_folder, tmp_path / "out", "v2", None)
    assert hub.files(NAME, "v2")["NOTES.md"] == b"Mine."


def test_saves_of_a_run_go_to_a_branch_that_is_new(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    """Transformers' Trainer would fail at the first of them."""
    options = {"push_to_hub": True, "hub_revision": "run", "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(casa_folder, tmp_path / "out", **options)
    assert list(hub.repositories[NAME].branches) == ["main"]
    trainer.train()
    trainer._finish_current_push()
    assert len(hub.commits(NAME, "run")) == 1 and not hub.commits(NAME)
    trainer.push_to_hub()
    assert "README.md" in hub.files(NAME, "run") and not hub.commits(NAME)


@pytest.mark.skipif("private" not in signature(Trainer.push_to_hub).parameters, reason="new in Transformers")
@pytest.mark.parametrize("by_name", [True, False])
def test_a_trainer_makes_a_private_repository(hub: Hub, casa_folder: Path, tmp_path: Path, by_name: bool) -> None:
    arguments = {"private": True} if by_name else {}
    positional = () if by_name else ("Mine", True, None, None, True)
    trainer_of(casa_folder, tmp_path / "out").push_to_hub(*positional, **arguments)
    assert hub.repositories[NAME].private and "README.md" in hub.files(NAME)


# ---------------------------------------------------------------- time-outs


@pytest.fixture
def silent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Part of "METHOD path" -> the Hub doesn't answer such requests."""
    ended = threading.Event()
    monkeypatch.setattr(hub_client, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)

    def start(part: str) -> None:
        hub.on_request = lambda request: part in request and ended.wait(60) and None

    yield start
    ended.set()


@pytest.mark.parametrize(
    "request_",
    ["whoami", f"GET /api/models/{NAME}", "repos/create", "validate-yaml", "preupload", "PUT /storage", "commit"],
)
def test_no_request_of_a_push_waits_for_ever(
    hub: Hub, casa_folder: Path, silent: Callable[[str], None], request_: str
) -> None:
    silent(request_)
    with pytest.raises(CheckpointError, match="timed out"):
        push_checkpoint(casa_folder, NAME)
    assert any(request_ in request for request in hub.requests)


@pytest.mark.parametrize(("way", "request_"), [("model", "commit"), ("processor", "preupload"), ("trainer", "create")])
def test_nor_one_of_the_other_ways(
    hub: Hub, casa_folder: Path, tmp_path: Path, silent: Callable[[str], None], way: str, request_: str
) -> None:
    silent(request_)
    with pytest.raises(Exception, match="timed out"):
        WAYS[way](casa_folder, tmp_path / "out", None, None)


def test_a_time_out_that_somebody_has_set_counts(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a client of their own, and of a call."""
    seen: list[dict[str, float]] = []
    limit = hub_client._limit

    def recorded(request: Any) -> None:
        limit(request)
        seen.append(request.extensions["timeout"])

    def client() -> Any:
        made = _http.default_client_factory()
        made.timeout = 7.0
        return made

    monkeypatch.setattr(hub_client, "_limit", recorded)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", client)
    _http.close_session()
    hub.create(NAME)
    for options in ({}, {"timeout": 3.0}, {}):
        hub_client.limit_waiting()
        _http.get_session().get(f"{hub.address}/api/models/{NAME}", **options)
    assert [timeout["read"] for timeout in seen] == [7.0, 3.0, 7.0]
    _http.close_session()
