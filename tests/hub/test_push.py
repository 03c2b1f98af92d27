# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""From a folder to a repository and back, with the Hub's own client, and every way in which that can break."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import _http
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from casa_hf import (
    CasaConfig,
    CasaForConditionalGeneration,
    CasaProcessor,
    CheckpointError,
    convert_checkpoint,
    push_checkpoint,
)
from casa_hf.checkpoint_files.download import SMALL_FILES, download
from casa_hf.cli import main
from casa_hf.hub.card_parts import BEGIN
from casa_hf.hub.push import check_checkpoint
from examples.tiny_source import build_tiny_helium, build_tiny_source
from tests.hub.conftest import empty_cache, process_environment
from tests.hub.helpers import fine_tuned, logits
from tests.hub.loopback import BLIND, READ_ONLY, READER, WRITER, Hub, Refused, break_connection, sha256
from tests.training.helpers import CONVERSATIONS

NAME = "me/tiny-casa"
FILES = {
    ".gitattributes",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def sharded(casa_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in several weight files; read only."""
    folder = tmp_path_factory.mktemp("sharded") / "casa"
    shutil.copytree(casa_folder, folder)
    (folder / "model.safetensors").unlink()
    CasaForConditionalGeneration.from_pretrained(casa_folder).save_pretrained(folder, max_shard_size="400KB")
    assert len(shards(folder)) >= 3
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def assert_refused(folder: Path, repository: str, *parts: str, **options: Any) -> str:
    """A push must fail with one line that has all parts."""
    with pytest.raises(CheckpointError) as caught:
        push_checkpoint(folder, repository, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for part in parts:
        assert part in message
    return message


def load(repository: str, **options: Any) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(repository, **options)
    return model, AutoProcessor.from_pretrained(repository, **options)


# ---------------------------------------------------------------- what gets there


def test_round_trip(hub: Hub, source_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert, train, push, load by name from an empty cache: the same logits."""
    source = tmp_path / "models--Qwen--Qwen2.5-VL-3B-Instruct" / "snapshots" / "0123abcd"
    shutil.copytree(source_folder, source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    converted = convert_checkpoint(source, tmp_path / "casa").output
    trained = fine_tuned(converted, tmp_path / "trained")
    (tmp_path / "trained" / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "trained" / "checkpoint-10").mkdir()

    report = push_checkpoint(tmp_path / "trained", NAME, datasets=["someone/colours"])
    (commit,) = hub.commits(NAME)
    assert report.commit == commit.sha and report.url == f"{hub.address}/{NAME}"
    assert commit.files.keys() == FILES | {"model.safetensors"}
    assert commit.large == {"model.safetensors"}
    for name in report.files:
        if name != "README.md":
            assert commit.files[name] == (tmp_path / "trained" / name).read_bytes()
    assert report.left_out == ("checkpoint-10/", "optimizer.pt")
    assert not (tmp_path / "trained" / "README.md").exists(), "the folder stays as it is"
    metadata = ModelCard(commit.files["README.md"].decode()).data
    assert metadata.base_model == "Qwen/Qwen2.5-VL-3B-Instruct" and metadata.license == "apache-2.0"
    assert metadata.datasets == ["someone/colours"]

    shutil.rmtree(tmp_path / "trained")
    empty_cache(tmp_path / "empty", monkeypatch)
    model, processor = load(NAME)
    assert isinstance(model, CasaForConditionalGeneration) and isinstance(processor, CasaProcessor)
    assert torch.equal(logits(model, processor), trained)
    untrained = logits(CasaForConditionalGeneration.from_pretrained(converted), processor)
    assert not torch.allclose(trained, untrained, atol=1e-3)


def test_what_training_leaves(
    hub: Hub, casa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`casa-hf train`, `casa-hf push`, load by name: the same logits. On a branch with "/"."""
    hub.large = ("*.safetensors", "tokenizer.json")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{json.dumps(example)}\n" for example in CONVERSATIONS))
    settings = {"model": str(casa_folder), "data": str(data), "output": str(tmp_path / "out"), "max_steps": 2}
    settings |= {"max_pixels": 84 * 84, "max_text_tokens": 70, "sequences_per_update": 1, "lr_new": 1e-2}
    (tmp_path / "run.json").write_text(json.dumps(settings | {"use_cpu": True}))
    branch = "runs/first"
    for command in (["train", str(tmp_path / "run.json")], ["push", settings["output"], NAME, "--revision", branch]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert not ended.value.code, capsys.readouterr().err
    (commit,) = hub.commits(NAME, branch)
    assert commit.large == {"model.safetensors", "tokenizer.json"} and not hub.commits(NAME)
    assert sorted(hub.uploaded) == sorted(sha256(commit.files[name]) for name in commit.large)
    local = Path(settings["output"])
    expected = logits(CasaForConditionalGeneration.from_pretrained(local), CasaProcessor.from_pretrained(local))
    shutil.rmtree(local)
    empty_cache(tmp_path / "empty", monkeypatch)
    model, processor = load(NAME, revision=branch)
    assert torch.equal(logits(model, processor), expected)
    untrained = CasaForConditionalGeneration.from_pretrained(casa_folder)
    assert not torch.allclose(logits(untrained, processor), expected, atol=1e-3)


def test_a_branch_of_its_own(hub: Hub, casa_folder: Path, tmp_path: Path) -> None:
    push_checkpoint(casa_folder, "tiny-casa")
    before = hub.files(NAME)
    trained = fine_tuned(casa_folder, tmp_path / "trained", steps=1)
    report = push_checkpoint(tmp_path / "trained", NAME, revision="v2")
    assert report.url == f"{hub.address}/{NAME}/tree/v2"
    assert hub.files(NAME) == before and len(hub.commits(NAME)) == 1
    assert torch.equal(logits(*load(NAME, revision="v2")), trained)
    assert not torch.allclose(logits(*load(NAME)), trained, atol=1e-3)
    assert f'from_pretrained("{NAME}", revision="v2")' in hub.files(NAME, "v2")["README.md"].decode()
    push_checkpoint(casa_folder, NAME, revision="v2", card="folder", message="Back again")
    assert hub.commits(NAME, "v2")[-1].message == "Back again"


def test_a_new_version_leaves_nothing_of_the_old_one(hub: Hub, casa_folder: Path, sharded: Path) -> None:
    """Transformers prefers a single file to shards, so a forgotten one would be loaded instead."""
    push_checkpoint(casa_folder, NAME, with_code=True)
    repository = hub.repositories[NAME]
    by_hand = {"notes.txt": b"words", "adapter_model.safetensors": b"weights"}
    repository.at("main").files.update(by_hand)
    report = push_checkpoint(sharded, NAME)
    expected = FILES | {file.name for file in shards(sharded)} | {"model.safetensors.index.json", *by_hand}
    assert hub.files(NAME).keys() == expected
    assert "model.safetensors" in report.removed and "modeling_casa.py" in report.removed
    weights = load_file(casa_folder / "model.safetensors")
    model, _ = load(NAME)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_that_has_the_name_of_one_of_ours_stays(hub: Hub, casa_folder: Path) -> None:
    """Nobody's code is removed where the checkpoint that is there doesn't carry ours."""
    theirs = {"attention.py": b"theirs", "media_casa.py": b"theirs"}
    hub.create(NAME, files=theirs)
    for _ in range(2):
        report = push_checkpoint(casa_folder, NAME)
        assert not report.removed and theirs.items() <= hub.files(NAME).items()


def test_the_same_again_is_no_commit(hub: Hub, casa_folder: Path) -> None:
    first = push_checkpoint(casa_folder, NAME)
    again = push_checkpoint(casa_folder, NAME)
    assert len(hub.commits(NAME)) == 1 and len(hub.uploaded) == 1
    assert again.commit == first.commit
    assert first.changed and not again.changed


def test_the_command(hub: Hub, casa_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["push", str(casa_folder), NAME, "--private", "--revision", "main", "--with-code"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--dataset", "my own pictures", "--message", "First"])
    shown = capsys.readouterr()
    assert not ended.value.code and shown.err == ""
    assert shown.out.startswith(f"Published {hub.address}/{NAME}/tree/main: ") and "one commit" in shown.out
    assert hub.repositories[NAME].private
    (commit,) = hub.commits(NAME)
    assert commit.message == "First" and "- my own pictures\n" in commit.files["README.md"].decode()
    assert "modeling_casa.py" in commit.files
    with pytest.raises(SystemExit):
        main([*arguments, "--dataset", "my own pictures"])
    assert capsys.readouterr().out == f"{hub.address}/{NAME}/tree/main holds it already.\n"
    with pytest.raises(SystemExit) as ended:
        main(["generate", NAME, "--prompt", "Hello", "--max-new-tokens", "3", "--device", "cpu"])
    assert not ended.value.code and capsys.readouterr().out.strip()


# ---------------------------------------------------------------- who may read it


def test_private(
    hub: Hub, casa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    push_checkpoint(casa_folder, NAME, private=True)
    assert hub.repositories[NAME].private
    model, processor = load(NAME)
    expected = logits(CasaForConditionalGeneration.from_pretrained(casa_folder), processor)
    assert torch.equal(logits(model, processor), expected)
    for number, token in enumerate((READER, "hf_outdated", None)):
        if token is None:
            monkeypatch.delenv("HF_TOKEN")
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        empty_cache(tmp_path / f"cache-{number}", monkeypatch)
        with pytest.raises(OSError, match="tiny-casa"):
            load(NAME)
        with pytest.raises(SystemExit) as ended:
            main(["generate", NAME, "--prompt", "Hello"])
        complaint = capsys.readouterr().err
        assert ended.value.code == 1 and complaint.count("\n") == 1
        assert "hf auth login" in complaint and NAME in complaint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--private"], "is public, but --private was given"),
        (["--revision", "a..b"], "--revision a..b is not a valid branch name"),
        (["--dataset", " "], "is an empty name"),
    ],
)
def test_the_command_names_options_as_they_are_typed(
    hub: Hub, casa_folder: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.create(NAME)
    with pytest.raises(SystemExit) as ended:
        main(["push", str(casa_folder), NAME, *options])
    complaint = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and said in complaint and f"Invalid value for {options[0]}" in complaint
    assert not hub.commits(NAME) and not hub.uploaded


def test_what_is_to_be_private_never_goes_to_a_public_repository(hub: Hub, casa_folder: Path) -> None:
    hub.create(NAME)
    assert_refused(casa_folder, NAME, "is public", "private=True", private=True)
    assert not hub.commits(NAME) and not hub.uploaded


# ---------------------------------------------------------------- broken transfers


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client pauses before it tries again, up to 24 seconds in all."""
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


def test_a_broken_connection_is_taken_up_by_itself(hub: Hub, casa_folder: Path, no_waiting: None) -> None:
    broken: list[int] = []

    def once(handler: Any, size: int) -> None:
        if not broken:
            broken.append(size)
            break_connection(handler, size)

    hub.on_upload = once
    push_checkpoint(casa_folder, NAME)
    assert broken == [(casa_folder / "model.safetensors").stat().st_size]
    assert hub.files(NAME)["model.safetensors"] == (casa_folder / "model.safetensors").read_bytes()
    assert len(hub.commits(NAME)) == 1


def test_a_connection_that_stays_broken_is_resumed_by_the_same_call(hub: Hub, sharded: Path, no_waiting: None) -> None:
    first, lost, *others = [sha256(file.read_bytes()) for file in shards(sharded)]

    def on_upload(handler: Any, size: int) -> None:
        if handler.path.endswith(lost):
            break_connection(handler, size)

    hub.on_upload = on_upload
    assert_refused(sharded, NAME, "upload", "Nothing was published", "Try again")
    assert not hub.commits(NAME)
    assert hub.uploaded == [first]

    hub.on_upload = None
    push_checkpoint(sharded, NAME)
    assert hub.uploaded == [first, lost, *others], "what had arrived isn't sent again"
    (commit,) = hub.commits(NAME)
    for file in shards(sharded):
        assert commit.files[file.name] == file.read_bytes()


def hang_up() -> None:
    raise ConnectionAbortedError


def time_out(status: int) -> Callable[[], None]:
    """A gateway answers in the Hub's place."""

    def answer() -> None:
        raise Refused(status, "upstream request timeout")

    return answer


@pytest.mark.parametrize("answer", [hang_up, time_out(504), time_out(500), time_out(408)])
def test_a_commit_that_arrived_without_an_answer(hub: Hub, sharded: Path, answer: Callable[[], None]) -> None:
    """The Hub is asked what it holds; a commit with files of all kinds, and files that it takes out."""
    first = push_checkpoint(sharded, NAME, with_code=True)
    trained = shards(sharded)[1].name
    content = hub.repositories[NAME].branches["main"][-1].files
    content[trained] = b"other weights"
    hub.after_commit = answer
    report = push_checkpoint(sharded, NAME)
    assert report.changed and report.commit == hub.commits(NAME)[-1].sha != first.commit
    assert len(hub.commits(NAME)) == 2 and "modeling_casa.py" in report.removed
    assert hub.files(NAME)[trained] == (sharded / trained).read_bytes()


@pytest.mark.parametrize("answer", [hang_up, time_out(504), time_out(408)])
@pytest.mark.parametrize(("moment", "arrived"), [("before_commit", 0), ("after_commit", 1)])
def test_a_commit_of_which_nothing_is_heard(
    hub: Hub, casa_folder: Path, moment: str, arrived: int, answer: Callable[[], None]
) -> None:
    """It may have arrived, or arrive later, and the error doesn't say otherwise."""

    def and_nothing_after() -> None:
        hub.before_info = hang_up
        answer()

    setattr(hub, moment, and_nothing_after)
    message = assert_refused(casa_folder, NAME, "commit", "isn't known", "Try again")
    assert "Nothing was published" not in message
    assert len(hub.commits(NAME)) == arrived
    setattr(hub, moment, None)
    hub.before_info = None
    push_checkpoint(casa_folder, NAME)
    assert len(hub.commits(NAME)) == 1 and len(hub.uploaded) == 1


def test_a_commit_that_may_still_arrive(hub: Hub, casa_folder: Path) -> None:
    """The Hub answers, but doesn't hold it, or holds another."""
    hub.before_commit = time_out(504)
    assert_refused(casa_folder, NAME, "isn't known", "Try again")
    hub.before_commit = None
    push_checkpoint(casa_folder, NAME)

    def somebody_else() -> None:
        hub.edit(NAME, README="# Mine\n")
        raise Refused(504, "upstream request timeout")

    hub.after_commit = somebody_else
    assert_refused(casa_folder, NAME, "isn't known", with_code=True)


def test_a_gateway_that_fails_before_the_commit(hub: Hub, casa_folder: Path) -> None:
    def on_upload(handler: Any, size: int) -> None:
        raise Refused(400, "Bad request")

    hub.on_upload = on_upload
    assert_refused(casa_folder, NAME, "upload", "Nothing was published")
    assert not hub.commits(NAME)


class Shown(threading.Thread):
    """Reads a terminal until the other side closes it."""

    def __init__(self, terminal: int):
        super().__init__(daemon=True)
        self.terminal, self.text = terminal, ""
        self.start()

    def run(self) -> None:
        with open(self.terminal, "rb", buffering=0) as stream:
            try:
                while part := stream.read(4096):
                    self.text += part.decode(errors="replace")
            except OSError:  # Linux's way to say that it is closed
                pass


@pytest.mark.integration
def test_an_interrupted_command_is_resumed(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    """Ctrl-C, while the last weight file is on its way: the command ends without waiting for it.

    On a terminal it shows, until then, how far each file is.
    """
    stuck, ended = threading.Event(), threading.Event()
    number = len(shards(sharded))

    def on_upload(handler: Any, size: int) -> None:
        if len(hub.uploaded) == number - 1:
            stuck.set()
            ended.wait(180)
            break_connection(handler, size)

    hub.on_upload = on_upload
    command = [sys.executable, "-m", "casa_hf", "push", str(sharded), NAME]
    environment = {**os.environ, **process_environment(hub, tmp_path / "home")}
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (24, 100))
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=its_end,
        text=True,
        # Who runs the tests in the background of a shell has them ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(its_end)
    shown = Shown(terminal)
    try:
        assert stuck.wait(180)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        ended.set()
    shown.join()
    assert process.returncode == 130 and out == ""
    for file in shards(sharded)[:-1]:
        assert re.search(rf"{re.escape(file.name)}.*100%", shown.text), shown.text
    last = shown.text.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in shown.text
    assert "interrupted" in last and "Try again" in last
    assert not hub.commits(NAME)

    hub.on_upload = None
    before = list(hub.uploaded)
    push_checkpoint(sharded, NAME)
    assert len(hub.uploaded) == len(before) + 1 == number
    assert len(hub.commits(NAME)) == 1


def test_no_connection(casa_folder: Path, hub: Hub, no_waiting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_refused(casa_folder, NAME, "failed", "connection")


def test_a_full_disk(hub: Hub, casa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pusher, who looks at the repository's configuration, and of somebody who downloads."""
    push_checkpoint(casa_folder, NAME)
    empty_cache(tmp_path / "full", monkeypatch)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        pushing = assert_refused(casa_folder, NAME, "disk", "Nothing was published")
        with pytest.raises(CheckpointError) as downloading:
            download(NAME, None, SMALL_FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Free some space" in pushing
    assert "no room" in str(downloading.value) and "HF_HOME" in str(downloading.value)
    assert len(hub.commits(NAME)) == 1
    push_checkpoint(casa_folder, NAME)
    download(NAME, None, SMALL_FILES)


# ---------------------------------------------------------------- refusals


def test_no_token(hub: Hub, casa_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert_refused(casa_folder, NAME, "No token", "hf auth login", "HF_TOKEN")
    assert hub.requests == []
    push_checkpoint(casa_folder, NAME, token=WRITER)
    assert len(hub.commits(NAME)) == 1


def test_a_token_that_is_not_valid(hub: Hub, casa_folder: Path) -> None:
    assert_refused(casa_folder, NAME, "token", "hf auth login", token="hf_outdated")


@pytest.mark.parametrize("exists", [False, True])
def test_a_token_that_may_not_write(hub: Hub, casa_folder: Path, exists: bool) -> None:
    if exists:
        hub.create(NAME)
    message = assert_refused(
        casa_folder, NAME, "me write to me/tiny-casa", "token with write access.", token=READ_ONLY
    )
    assert "of your own" not in message
    assert not hub.uploaded and (exists or not hub.repositories)


def test_a_name_that_is_taken_unseen(hub: Hub, casa_folder: Path) -> None:
    hub.create(NAME, private=True)
    assert_refused(casa_folder, NAME, "taken", "Choose another name", token=BLIND)
    assert not hub.commits(NAME)


@pytest.mark.parametrize("exists", [False, True])
def test_a_name_of_somebody_else(hub: Hub, casa_folder: Path, exists: bool) -> None:
    if exists:
        hub.create("somebody/model")
    assert_refused(casa_folder, "somebody/model", "me", "somebody/model", "me/model")
    assert not hub.uploaded
    assert not exists or not hub.commits("somebody/model")


@pytest.mark.parametrize(
    ("files", "held"),
    [
        ({"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"}, "'llama'"),
        ({"config.json": b"[broken"}, "config.json of something else"),
        ({"unet.bin": b"weights"}, "unet.bin"),
    ],
)
@pytest.mark.parametrize("revision", [None, "casa"])
def test_a_taken_name(hub: Hub, casa_folder: Path, files: dict[str, bytes], held: str, revision: str | None) -> None:
    hub.create(NAME, files=files)
    assert_refused(casa_folder, NAME, NAME, "taken", held, "another name", revision=revision)
    assert not hub.commits(NAME) and not hub.uploaded and list(hub.repositories[NAME].branches) == ["main"]


def test_a_repository_with_words_alone_is_not_taken(hub: Hub, casa_folder: Path) -> None:
    """Its words stay, and our part comes behind them."""
    words = (
        "---\nlicense: mit\ntags:\n- own\nextra_gated_prompt: Promise.\n---\n\n"
        "# To come\n\nSoon.\n\n## Plans\n\nMany.\n"
    )
    hub.create(NAME, files={"README.md": words.encode(), "picture.png": b"image"})
    report = push_checkpoint(casa_folder, NAME)
    assert {"picture.png", "model.safetensors"} <= hub.files(NAME).keys()
    card = ModelCard(hub.files(NAME)["README.md"].decode())
    assert card.text.strip().startswith(f"# To come\n\nSoon.\n\n## Plans\n\nMany.\n\n{BEGIN}\n\n## Architecture\n\n")
    titles = re.findall("^## (.*)$", card.text, re.MULTILINE)
    assert titles[1:] == ["Architecture", "What is untrained", "How it was made", "Usage", "Licence", "Citation"]
    assert card.data.license == "mit" and card.data.extra_gated_prompt == "Promise."
    assert card.data.tags == ["own", "casa"] and report.card_changes == ("tags",), report.card_changes


def test_somebody_else_commits_meanwhile(hub: Hub, casa_folder: Path) -> None:
    push_checkpoint(casa_folder, NAME)
    branch = hub.repositories[NAME].branches["main"]

    def commit_between() -> None:
        branch.append(type(branch[-1])(dict(branch[-1].files), set(branch[-1].large), "theirs"))
        hub.before_commit = None

    hub.before_commit = commit_between
    assert_refused(casa_folder, NAME, "changed", "Try again", with_code=True)
    assert branch[-1].message == "theirs"
    push_checkpoint(casa_folder, NAME, with_code=True)


def test_a_full_account(hub: Hub, casa_folder: Path) -> None:
    def on_upload(handler: Any, size: int) -> None:
        raise Refused(413, "Private storage limit reached")

    hub.on_upload = on_upload
    assert_refused(casa_folder, NAME, "no room", "storage", "Nothing was published")
    assert not hub.commits(NAME)


@pytest.mark.parametrize("repository", ["a/b/c", "me/tiny casa", "https://huggingface.co/me/x", ""])
def test_no_name_of_a_repository(hub: Hub, casa_folder: Path, repository: str) -> None:
    assert_refused(casa_folder, repository, "namespace/name")
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["", "refs/pr/1", "a b", "../main", "a..b"])
def test_no_name_of_a_branch(hub: Hub, casa_folder: Path, revision: str) -> None:
    assert_refused(casa_folder, NAME, "revision", "branch", revision=revision)
    assert hub.requests == []


@pytest.mark.parametrize("named", ["tag", "commit"])
def test_a_revision_that_nothing_can_be_added_to(hub: Hub, casa_folder: Path, named: str) -> None:
    hub.create(NAME)
    repository = hub.repositories[NAME]
    repository.tags["v1"] = repository.branches["main"][0]
    revision = "v1" if named == "tag" else repository.branches["main"][0].sha
    assert_refused(
        casa_folder, NAME, repr(revision), "tag or a commit", "Give the name of a branch", revision=revision
    )
    assert not hub.uploaded and not hub.commits(NAME) and [*repository.branches] == ["main"]


def test_training_data_without_a_name(hub: Hub, casa_folder: Path) -> None:
    assert_refused(casa_folder, NAME, "datasets=' ' is an empty name", "Hub ids", datasets=["me/colours", " "])
    assert hub.requests == []


# ---------------------------------------------------------------- the folder


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def change(name: str, **values: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return changed


def change_weights(alter: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        alter(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def leave_an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def forget_origin(folder: Path) -> None:
    (folder / "README.md").unlink()
    change("config.json", source_origins=None)(folder)


def add_tokens(folder: Path) -> None:
    processor = CasaProcessor.from_pretrained(folder)
    vocab_size = CasaConfig.from_pretrained(folder).text_config.vocab_size
    number = vocab_size + 1 - len(processor.tokenizer)
    processor.tokenizer.add_tokens([f"<new-{index}>" for index in range(number)])
    processor.save_pretrained(folder)


def without(folder: Path) -> None:
    shutil.rmtree(folder)


NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (without, ["not a folder"]),
        (remove("config.json"), ["config.json"]),
        (change("config.json", model_type="llama"), ["'llama'"]),
        (change("config.json", model_type="qwen2_5_vl", architectures=None), ["'qwen2_5_vl'", "Convert"]),
        (leave_an_adapter, ["adapter", "merge_and_unload"]),
        (remove("generation_config.json"), ["generation_config.json", "save_pretrained"]),
        (lambda folder: (folder / "generation_config.json").write_text("{"), ["generation_config.json", "JSON"]),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% if"), ["chat template", "Correct"]),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages.none() }}"), ["chat template"]),
        (lambda folder: (folder / "README.md").write_bytes(b"# Ma\xe7on\n"), ["README.md", "UTF-8", "byte 4"]),
        (lambda folder: (folder / "README.md").write_text("---\non: 1\n---\n"), ["README.md", "True", "quotes"]),
        (lambda folder: (folder / "README.md").write_text("---\nlicense_link: MY TERMS\n---\n"), ["MY TERMS", "Copy"]),
        (
            lambda folder: (folder / "README.md").write_text("---\nbase_model: /home/me/x\n---\n"),
            ["/home/me/x", "Correct"],
        ),
        (remove("processor_config.json"), ["processor.save_pretrained", "processing_class"]),
        (remove("tokenizer.json"), ["tokenizer.json", "processor.save_pretrained"]),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), ["processor", "can't be loaded"]),
        (change("config.json", image_token_id=3), ["image_token_id", "3", "same checkpoint"]),
        (change("config.json", num_gist_tokens=1, gist_token_ids=[5]), ["gist_token_ids", "[5]", "same checkpoint"]),
        (
            change("processor_config.json", frames_per_image="all"),
            ["whole video is one image is False", "same checkpoint"],
        ),
        (add_tokens, ["the tokenizer has", "tokens, the model embeds"]),
        (remove("model.safetensors"), ["model.safetensors"]),
        (truncate, ["model.safetensors", "not a complete"]),
        (change_weights(lambda tensors: tensors.pop(NORM)), [NORM, "none", "save_pretrained"]),
        (change_weights(lambda tensors: tensors.update(extra=torch.ones(2))), ["extra ([2] instead of none)"]),
        (change_weights(lambda tensors: tensors.update({NORM: torch.ones(7)})), [NORM, "[7] instead of [64]"]),
        (forget_origin, ["base_model", "license", "README.md"]),
        (lambda folder: (folder / "README.md").write_text("---\nlicense: [\n---\n"), ["front matter", "Correct"]),
        (lambda folder: (folder / "README.md").write_text("---\nlicense_link: TERMS\n---\n"), ["TERMS", "Copy"]),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), ["twice"]),
    ],
)
def test_an_unfit_folder_is_refused_before_anything_is_sent(
    hub: Hub, casa_folder: Path, tmp_path: Path, damage: Callable[[Path], None], parts: list[str]
) -> None:
    shutil.copytree(casa_folder, tmp_path / "casa")
    damage(tmp_path / "casa")
    with pytest.raises(CheckpointError) as caught:
        push_checkpoint(tmp_path / "casa", NAME)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert NAME not in hub.repositories and not hub.uploaded


@pytest.mark.parametrize("is_relative", [False, True])
def test_a_licence_file_travels_with_the_weights(
    hub: Hub, source_folder: Path, tmp_path: Path, is_relative: bool
) -> None:
    """Training saves no licence file, and what is pushed without it would break the licence."""
    shutil.copytree(source_folder, tmp_path / "source")
    (tmp_path / "source" / "LICENSE").write_text("Do as you are told.\n")
    converted = convert_checkpoint(tmp_path / "source", tmp_path / "casa").output
    fine_tuned(converted, tmp_path / "trained", steps=1)
    assert_refused(tmp_path / "trained", NAME, "LICENSE", "Copy it")
    shutil.copy(converted / "LICENSE", tmp_path / "trained")
    if is_relative:
        (tmp_path / "trained" / "README.md").write_text("---\nlicense: other\nlicense_link: ./LICENSE\n---\n")
    push_checkpoint(tmp_path / "trained", NAME)
    assert hub.files(NAME)["LICENSE"] == b"Do as you are told.\n"


def test_all_files_of_a_checkpoint_with_new_tokens(hub: Hub, source_folder: Path, tmp_path: Path) -> None:
    """With everything that the way back to the source needs."""
    folder = convert_checkpoint(source_folder, tmp_path / "casa", "ca-replace", num_gist_tokens=2).output
    kept = {file.name for file in folder.iterdir()}
    assert {"source_rows.safetensors", "source_tokenizer.json"} <= kept
    report = push_checkpoint(folder, NAME)
    assert hub.files(NAME).keys() == kept | {".gitattributes"} and not report.left_out
    model, processor = load(NAME)
    expected = logits(CasaForConditionalGeneration.from_pretrained(folder), processor)
    assert torch.equal(logits(model, processor), expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "helium", "tied"])
def test_every_family_is_fit(source_folder: Path, tmp_path: Path, family: str) -> None:
    """Also as Transformers saves it."""
    options = {}
    if family == "helium":
        source, options = build_tiny_helium(tmp_path / "source"), {"vision_from": source_folder}
    elif family == "tied":
        source = build_tiny_source(tmp_path / "source", tie_word_embeddings=True)
    else:
        source = build_tiny_source(tmp_path / "source", family=family)
    folder = convert_checkpoint(source, tmp_path / "casa", "casa-before", **options).output
    assert check_checkpoint(folder).config.variant == "casa-before"
    CasaForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    CasaProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert "model.safetensors" in check_checkpoint(tmp_path / "saved").files
