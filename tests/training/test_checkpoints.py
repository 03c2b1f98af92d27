# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of a run: how many are kept, which one it is resumed from, and what an interrupted run says."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from threading import Timer

import pytest
import torch
import torch.distributed.checkpoint
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from casa_hf.checkpoint_files.disk import disk_is_full
from casa_hf.cli.train import _interrupted
from casa_hf.training import TrainingConfig, train
from casa_hf.training.checkpoints import last_checkpoint
from tests.conversion.helpers import load_weights
from tests.training.helpers import CONVERSATIONS

ROOT = Path(__file__).parents[2]


def configuration(casa_folder, folder, **changes):
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in CONVERSATIONS))
    return {
        "model": str(casa_folder),
        "data": str(folder / "data.jsonl"),
        "output": str(folder / "trained"),
        "checkpoints": str(folder / "checkpoints"),
        "max_pixels": 84 * 84,
        "sequences_per_update": 1,
        "max_steps": 3,
        "lr_new": 1e-3,
        "use_cpu": True,
        "logging_steps": 1,
        "save_steps": 1,
        **changes,
    }


@pytest.fixture(scope="module")
def finished(casa_folder, tmp_path_factory):
    """A run of three steps, with a checkpoint after each; read only."""
    folder = tmp_path_factory.mktemp("finished")
    train(TrainingConfig.from_dict(configuration(casa_folder, folder)))
    return folder


def cut(file, size=None):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2 if size is None else size])


def spoil(file):
    """Other bytes in the middle, as a machine that goes down may leave them; the end is whole."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(255 - byte for byte in content[middle : middle + 64])
    file.write_bytes(content)


def restate(folder, content):
    (folder / "trainer_state.json").write_bytes(content)


DAMAGES = {
    "trainer_state.json, which is written last": lambda folder: (folder / "trainer_state.json").unlink(),
    "trainer_state.json is damaged": lambda folder: cut(folder / "trainer_state.json"),
    "model.safetensors is truncated": lambda folder: cut(folder / "model.safetensors"),
    "without weights": lambda folder: (folder / "model.safetensors").unlink(),
    "optimizer.pt is truncated": lambda folder: cut(folder / "optimizer.pt"),
    "with checkpoint-is-incomplete.txt": lambda folder: (folder / "checkpoint-is-incomplete.txt").touch(),
    "rng_state.pth is truncated": lambda folder: cut(folder / "rng_state.pth", size=0),
    "optimizer.pt is damaged": lambda folder: spoil(folder / "optimizer.pt"),
    "scheduler.pt is damaged": lambda folder: spoil(folder / "scheduler.pt"),
    "rng_state.pth is damaged": lambda folder: spoil(folder / "rng_state.pth"),
    "trainer_state.json is damaged ": lambda folder: restate(folder, b"[]"),
    "trainer_state.json is damaged  ": lambda folder: restate(folder, b'{"steps": 3}'),
    "trainer_state.json is damaged   ": lambda folder: restate(folder, b'{"global_step": "\xff"}'),
    "trainer_state.json is damaged    ": lambda folder: restate(folder, b"[" * 100_000),
    "without optimizer.pt": lambda folder: (folder / "optimizer.pt").unlink(),
    "without scheduler.pt": lambda folder: (folder / "scheduler.pt").unlink(),
    "without rng_state.pth": lambda folder: (folder / "rng_state.pth").unlink(),
}


def test_the_last_two_are_kept(finished):
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {
        "_settings.json",
        "checkpoint-2",
        "checkpoint-3",
    }


@pytest.mark.parametrize("fault", DAMAGES)
def test_a_checkpoint_that_is_cut_off_is_skipped(finished, tmp_path, fault):
    shutil.copytree(finished / "checkpoints", tmp_path, dirs_exist_ok=True)
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-3", {})
    DAMAGES[fault](tmp_path / "checkpoint-3")
    last, skipped = last_checkpoint(tmp_path)
    assert last == tmp_path / "checkpoint-2"
    assert list(skipped) == [tmp_path / "checkpoint-3"] and fault.strip() in skipped[tmp_path / "checkpoint-3"]


def test_a_lost_shard_is_noticed(finished, tmp_path):
    shutil.copytree(finished / "checkpoints" / "checkpoint-3", tmp_path / "checkpoint-3")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "checkpoint-3" / "model.safetensors.index.json").write_text(json.dumps(index))
    last, skipped = last_checkpoint(tmp_path)
    assert last is None and "without model-00002-of-00002.safetensors" in skipped.values()


@pytest.mark.parametrize(
    ("lost", "kept"),
    [
        (["optimizer.pt"], "optimizer.bin"),  # FSDP, whole
        (["optimizer.pt", "scheduler.pt"], "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"),  # DeepSpeed
        (["rng_state.pth"], "rng_state_1.pth"),  # of several processes
    ],
)
def test_states_of_several_processes_have_other_names(finished, tmp_path, lost, kept):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(finished / "checkpoints" / "checkpoint-3", folder)
    (folder / kept).parent.mkdir(exist_ok=True)
    (folder / lost[0]).rename(folder / kept)
    for name in lost[1:]:
        (folder / name).unlink()
    assert last_checkpoint(tmp_path) == (folder, {})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_shards_of_fsdp(finished, tmp_path):
    """As it writes model and optimizer; a file that is truncated, or metadata that are missing, are noticed."""
    for name in ("checkpoint-2", "checkpoint-3"):
        folder = shutil.copytree(finished / "checkpoints" / name, tmp_path / name)
        for file, shards in (("model.safetensors", "pytorch_model_fsdp_0"), ("optimizer.pt", "optimizer_0")):
            (folder / file).unlink()
            torch.distributed.checkpoint.save(
                {"a": torch.ones(1_000), "b": torch.ones(1_000)}, checkpoint_id=folder / shards, no_dist=True
            )
    assert last_checkpoint(tmp_path) == (folder, {})
    (shard,) = (folder / "optimizer_0").glob("*.distcp")
    for damage, fault in (
        (lambda: cut(shard), f"is incomplete: {shard.name} is missing or truncated"),
        (lambda: cut(shard.parent / ".metadata"), "has no readable .metadata beside it"),
    ):
        damage()
        assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", {folder: f"{shard.name} {fault}"})


@pytest.mark.parametrize("resume", [True, False])
def test_weights_alone_are_nothing_to_resume_from(casa_folder, tmp_path, resume):
    run = configuration(casa_folder, tmp_path, max_steps=2, save_only_model=True)
    train(TrainingConfig.from_dict(run))
    folder = tmp_path / "checkpoints" / "checkpoint-2"
    assert last_checkpoint(tmp_path / "checkpoints")[0] is None
    said = _interrupted(Path("run.yaml"), tmp_path / "no", folder.parent, existed=False)
    assert f"{folder} is incomplete (without optimizer.pt)." in said
    again = configuration(casa_folder, tmp_path, output=str(tmp_path / "again"), resume=resume)
    with pytest.raises(ValueError, match="save_only_model") as refused:
        train(TrainingConfig.from_dict(again))
    assert f"{folder} is without optimizer.pt" in str(refused.value) and "set model to it" in str(refused.value)
    started = {**again, "model": str(folder), "checkpoints": str(tmp_path / "more"), "max_steps": 1}
    assert train(TrainingConfig.from_dict(started)).steps == 1  # as the error advises


def test_steps_are_compared_as_numbers_and_other_folders_passed_over(finished, tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "runs"):
        shutil.copytree(finished / "checkpoints" / "checkpoint-3", tmp_path / name)
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-10", {})
    assert last_checkpoint(tmp_path / "nowhere") == (None, {})


@pytest.mark.parametrize("fault", ["trainer_state.json, which is written last", "model.safetensors is truncated"])
def test_a_run_resumes_from_the_last_complete_checkpoint(casa_folder, finished, tmp_path, caplog, fault):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    DAMAGES[fault](tmp_path / "checkpoints" / "checkpoint-3")
    logs = []
    run = configuration(casa_folder, tmp_path, resume=True)
    report = train(TrainingConfig.from_dict(run), logs.append)
    assert len([log for log in logs if "loss" in log]) == 1  # the third step alone
    (message,) = [record.getMessage() for record in caplog.records if "incomplete" in record.getMessage()]
    assert "checkpoint-3 is incomplete" in message and "resuming from checkpoint-2" in message
    expected, found = load_weights(finished / "trained"), load_weights(report.output)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_incomplete_checkpoint_alone_means_the_start(casa_folder, finished, tmp_path, caplog):
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(finished / "checkpoints" / "checkpoint-2", tmp_path / "checkpoints" / "checkpoint-2")
    cut(tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors")
    run = configuration(casa_folder, tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        train(TrainingConfig.from_dict(run))
    report = train(TrainingConfig.from_dict({**run, "resume": True}))
    assert "starting from scratch" in caplog.text
    expected, found = load_weights(finished / "trained"), load_weights(report.output)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_an_interrupted_command_says_depends_on_what_is_there(finished, tmp_path):
    def said(output, checkpoints, existed=False):
        return _interrupted(Path("run.yaml"), output, checkpoints, existed)

    assert "The same command starts it from scratch" in said(tmp_path / "trained", tmp_path / "checkpoints")
    assert f"continues from {finished / 'checkpoints' / 'checkpoint-3'}." in said(
        tmp_path / "trained", finished / "checkpoints"
    )
    assert f"saved in {finished / 'trained'}." in said(finished / "trained", finished / "checkpoints")
    assert "saved" not in said(finished / "trained", finished / "checkpoints", existed=True)


@pytest.mark.parametrize("before", [0, 1], ids=["at its first checkpoint", "at its second"])
def test_a_full_disk_leaves_what_a_run_can_resume_from(casa_folder, finished, tmp_path, before):
    """No file may grow beyond a limit, from the log that comes before a checkpoint on."""
    run = configuration(casa_folder, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    logs = []

    def fill(values):
        logs.append(values)
        if len(logs) == before + 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with pytest.raises(OSError, match="The disk is full") as failed:
            train(TrainingConfig.from_dict(run), fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    named = "checkpoint-1" if before else "No checkpoint"
    assert f"{named} in {run['checkpoints']} is complete" in str(failed.value)
    assert "free some space, and set resume (--resume)" in str(failed.value)
    assert "\n" not in str(failed.value)
    report = train(TrainingConfig.from_dict({**run, "resume": True}))
    expected, found = load_weights(finished / "trained"), load_weights(report.output)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_disk_that_is_full_from_the_start_is_one_line(casa_folder, tmp_path):
    """The settings, written first, have no room."""
    run = configuration(casa_folder, tmp_path, max_steps=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(parts, data):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))

    try:
        with pytest.raises(OSError, match=r"The disk is full.*No checkpoint in .* is complete") as failed:
            train(TrainingConfig.from_dict(run), on_start=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(failed.value) and not (tmp_path / "trained").exists()
    assert train(TrainingConfig.from_dict({**run, "resume": True})).steps == 1  # as it advises


def save_by_name(tensors, file):
    torch.save(tensors, file)


def save_to_stream(tensors, file):
    with open(file, "wb") as stream:
        torch.save(tensors, stream)


@pytest.mark.parametrize("save", [save_file, save_by_name, save_to_stream])
def test_every_writer_of_tensors_says_that_the_disk_is_full(tmp_path, save):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(Exception) as failed:  # each has its own kind
            save({"a": torch.ones(1_000), "b": torch.ones(5_000)}, tmp_path / "tensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert disk_is_full(failed.value)
    assert not disk_is_full(SafetensorError("I/O error: Permission denied (os error 13)"))
    assert not disk_is_full(RuntimeError("PytorchStreamReader failed reading zip archive"))


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_a_run_that_is_told_to_end_is_no_finished_one(casa_folder, tmp_path, monkeypatch):
    """The Trainer's own handler of SIGTERM waits three seconds, writes a checkpoint, and ends training as usual."""
    monkeypatch.setattr(threading, "Timer", lambda seconds, function: Timer(0.1, function))
    run = configuration(casa_folder, tmp_path, max_steps=10_000, save_steps=10_000, enable_jit_checkpoint=True)
    before = signal.getsignal(signal.SIGTERM)
    sent = []

    def end(logs):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    try:
        with pytest.raises(InterruptedError, match=r"stopped from outside after \d+ of 10000 steps") as stopped:
            train(TrainingConfig.from_dict(run), end)
    finally:
        signal.signal(signal.SIGTERM, before)
    last, skipped = last_checkpoint(tmp_path / "checkpoints")
    assert last is not None and not skipped and str(stopped.value).endswith(f" to continue from {last}.")
    assert not (tmp_path / "trained").exists()


@pytest.mark.integration
@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_an_interrupted_command_says_how_to_resume(casa_folder, tmp_path):
    file, checkpoints = tmp_path / "run.yaml", tmp_path / "checkpoints"
    file.write_text(yaml.safe_dump(configuration(casa_folder, tmp_path, max_steps=10_000)))
    command = [sys.executable, "-m", "casa_hf", "train", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    with open(tmp_path / "errors", "w+") as errors:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            # A job in the background of a shell ignores the signal, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            while not (checkpoints / "checkpoint-2" / "trainer_state.json").exists() and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) == 130
        finally:
            process.kill()
        errors.seek(0)
        said = errors.read().splitlines()[-1]
    last, _ = last_checkpoint(checkpoints)
    assert last is not None
    assert said == f"error: The training was interrupted. `casa-hf train {file} --resume` continues from {last}."
