# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The check of a GPU, rehearsed on a CPU: its steps at toy size, and what a step that takes too long leaves behind."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import STEPS, Check, Findings, Step
from benchmarks.streaming import Camera, InsertionContender, LoopRunner

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    """The handler of alarms is put back."""
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, before)


def arguments(folder: Path, *worker: str, seconds: float = 60.0) -> argparse.Namespace:
    given = ["--device", "cpu", "--tiny", "--output", str(folder), "--until", str(time.time() + seconds)]
    return gpu_check.parser().parse_args([*given, *(["--worker", *worker] if worker else [])])


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / gpu_check.RESULTS).read_text())


def test_the_first_pass_and_two_starts_fit_into_a_quarter_of_an_hour() -> None:
    """With what a step may take beyond its time, and a minute for each start."""
    seconds = [step.seconds for step in STEPS.values() if step.first_pass]
    assert sum(seconds) <= gpu_check.FIRST_PASS_SECONDS - gpu_check.GRACE_SECONDS
    rest = sum(step.seconds + gpu_check.GRACE_SECONDS for step in STEPS.values() if not step.first_pass)
    assert gpu_check.FIRST_PASS_SECONDS + rest + 2 * 90 < 900


def test_a_step_that_takes_too_long_is_stopped_and_keeps_what_it_has(tmp_path: Path, monkeypatch) -> None:
    def slow(check: Check, found: Findings) -> None:
        found.judge("of the beginning", 1.0, 2.0)
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("what a step catches isn't the end of its time")

    def broken(check: Check, found: Findings) -> None:
        raise ValueError("broken")

    steps = {"slow": Step(slow, 5.2), "broken": Step(broken, 9), "quick": Step(lambda check, found: None, 9)}
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    monkeypatch.setattr(gpu_check, "REHEARSAL", 1)
    started = time.monotonic()
    gpu_check.work(arguments(tmp_path, *steps))
    assert time.monotonic() - started < 15
    found = results(tmp_path)
    assert found["slow"]["state"] == "stopped after 5 s" and found["slow"]["bars"][0]["met"] is True
    assert found["broken"]["state"] == "failed: ValueError: broken" and found["quick"]["state"] == "done"
    gpu_check.work(arguments(tmp_path, "quick", seconds=3))
    assert results(tmp_path)["quick"]["state"] == "no time was left for it"


@pytest.mark.slow
def test_behind_a_step_that_ends_its_process_the_next_one_runs(tmp_path: Path, monkeypatch) -> None:
    """By an exit, and by a call that Python doesn't come back from."""
    program = """
import ctypes, os, sys, time
from benchmarks import gpu_check
gpu_check.GRACE_SECONDS, gpu_check.REHEARSAL = 1.0, 1
def exits(check, found): os._exit(7)
def hangs(check, found): ctypes.PyDLL(None).system(b"sleep 30")  # holds the lock of the interpreter
def quick(check, found): found.figures["x"] = 1
gpu_check.STEPS = {name: gpu_check.Step(run, 5.0) for name, run in
                   {"exits": exits, "hangs": hangs, "quick": quick}.items()}
gpu_check.work(gpu_check.parser().parse_args())
"""
    (tmp_path / "dying.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    started = time.monotonic()
    found = gpu_check.supervise(arguments(tmp_path), ["exits", "hangs", "quick"], time.time() + 500, "dying")
    assert found["exits"]["state"] == "ended its process (7)"
    assert found["hangs"]["state"].startswith("ended its process")
    assert found["quick"] | {"seconds": 0} == {"state": "done", "seconds": 0, "figures": {"x": 1}, "bars": []}
    assert time.monotonic() - started < 250


def test_one_test_of_every_kind_comes_first() -> None:
    names = [f"t.py::test_a[cuda-{size}-{kernel}]" for size in (64, 128) for kernel in ("sdpa", "torch_varlen")]
    names += ["t.py::test_b[cuda]"]
    assert gpu_check.in_order(names) == [names[0], names[1], names[4], names[2], names[3]]


def test_outcomes_are_read_from_what_pytest_prints(tmp_path: Path) -> None:
    """Of a real run that is cut off."""
    tests = (
        "import os, pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.mark.parametrize('x', ['it FAILED'])\ndef test_c(x): pytest.skip('no')\n"
        "@pytest.fixture\ndef f(): raise ValueError\ndef test_d(f): pass\n"
        "def test_e(): os._exit(1)\ndef test_f(): pass\n"
    )
    (tmp_path / "test_x.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "--color=no", "-p", "no:cacheprovider"]
    log = subprocess.run([*command, "test_x.py"], cwd=tmp_path, capture_output=True, text=True).stdout
    found = gpu_check.outcomes([log, ""], 6)
    assert {name: found[name] for name in ("passed", "failed", "skipped", "not reached")} == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "not reached": 2,
    }
    assert found["failures"] == ["test_x.py::test_b", "test_x.py::test_d"]


def check(results: dict[str, Any] | None = None) -> Check:
    return Check(torch.device("cpu"), True, "sdpa", {} if results is None else results, lambda: None)


def test_a_filled_cache_is_as_long_as_after_so_many_turns() -> None:
    own = check()
    camera = Camera(own.sizes(896))
    contender = InsertionContender(own.source(camera.sizes), camera.sizes)
    runner = LoopRunner(contender, camera, [5, 6, 7])
    for number in range(3):
        runner.turn(camera.jpeg(number))
    length, position = contender.length, contender.position
    runner.begin()
    contender.fill(3)
    assert (contender.length, contender.position) == (length, position)
    assert contender.cache.get_seq_length() == length
    runner.turn(camera.jpeg(0))
    assert contender.cache.get_seq_length() == contender.length > length


@pytest.mark.integration
def test_the_eager_step(monkeypatch) -> None:
    found = Findings()
    saved = []
    own = check()
    own.save = lambda: saved.append(dict(found.figures))
    gpu_check.check_eager(own, found)
    assert list(found.figures) == ["casa", "casa at turn 256", "insertion", "insertion at turn 256"]
    assert [len(figures) for figures in saved] == [1, 2, 3]
    assert all(own["ttft_ms"] > 0 and own["decode_ms"] > 0 for own in found.figures.values())
    assert set(found.figures["casa"]["a step"]) == {"kernels", "copies to the host", "waits"}
    assert [bar.what for bar in found.bars][1] == "decoding time / insertion's, first turns, both eager"


@pytest.mark.slow
def test_the_command_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    """All steps, as `make gpu-check` runs them."""
    steps = [part for name in STEPS for part in ("--only", name)]
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--tiny", *steps]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["src", "."]), "OUT": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = results(tmp_path)
    expected = dict.fromkeys(STEPS, "done")
    if find_spec("vllm") is None:
        expected["vllm"] = "skipped: this Python has no vLLM"
    assert {name: own["state"] for name, own in found.items()} == expected, run.stderr
    assert run.returncode == 0
    table = (tmp_path / gpu_check.TABLE).read_text()
    assert run.stdout.endswith(table + "\n")
    assert table.count("\n| `") == sum(len(own["bars"]) for own in found.values()) > 12
    assert {path.name for path in tmp_path.iterdir()} == {gpu_check.RESULTS, gpu_check.TABLE}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_is_said(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()
    assert "this torch sees no CUDA device; use --device cpu --tiny" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
