# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Jobs over many machines: a local Ray cluster of two workers, whose worker or driver is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.answers import Question, answer_batch
from examples.scale import caption

ROOT = Path(__file__).parents[1]
CAPTIONER = ROOT / "examples" / "tiny_world" / "checkpoints" / "casa"
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray isn't installed: make test-ray")
ROWS = 24


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Questions about pictures, one of them broken; each answer depends on its picture."""
    lines = []
    for number in range(ROWS):
        name = f"{number}.png"
        colour = (10 * number, 255 - 10 * number, 60 * (number % 4))
        Image.new("RGB", (56, 56), colour).save(tmp_path / name)
        lines.append(json.dumps({"id": f"q{number}", "prompt": "What is there?", "images": [name]}))
    (tmp_path / "7.png").write_bytes(b"no picture")
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def expected(file: Path) -> list[str]:
    """What one process says, row by row."""
    model = CasaForConditionalGeneration.from_pretrained(CAPTIONER).eval()
    processor = CasaProcessor.from_pretrained(CAPTIONER)
    said = []
    for row in caption.read_rows(file, ""):
        try:
            (answer,) = answer_batch(model, processor, [Question(row.prompt, list(row.images))], max_new_tokens=8)
        except (ValueError, OSError):
            answer = ""
        said.append(answer)
    return said


def job(file: Path, output: Path) -> list[str]:
    options = ["--workers", "2", "--cpus", "1", "--batch-size", "2", "--max-new-tokens", "8"]
    return [sys.executable, "-m", "examples.scale.caption", str(CAPTIONER), str(file), str(output), *options]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def check_captions(file: Path, output: Path) -> None:
    """One line for each row, in order, with what one process says; each row in one part."""
    lines = [json.loads(line) for line in (output / "captions.jsonl").read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == [f"q{number}" for number in range(ROWS)]
    assert [line.get("answer", "") for line in lines] == expected(file)
    assert [number for number, line in enumerate(lines) if "error" in line] == [7]
    parts = [json.loads(line) for part in (output / "parts").glob("*.jsonl") for line in part.read_text().splitlines()]
    assert sorted(part["row"] for part in parts) == list(range(ROWS))


def wait_for_parts(output: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 900  # a cluster is started first
    while len(list((output / "parts").glob("*.jsonl"))) < count:
        assert process.poll() is None and time.monotonic() < end, "the job has ended, or hangs"
        time.sleep(0.01)


@needs_ray
@pytest.mark.slow
def test_a_worker_is_killed_and_its_rows_are_done_by_another(questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions"
    process = subprocess.Popen(job(questions, output), cwd=ROOT, env=environment(), start_new_session=True)
    try:
        wait_for_parts(output, 1, process)
        listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
        own = [int(line.split()[0]) for line in listed.splitlines() if "ray::MapWorker" in line]
        assert own, listed
        os.kill(own[0], signal.SIGKILL)
        assert process.wait(900) == 0
    finally:
        process.kill()
    check_captions(questions, output)


@needs_ray
@pytest.mark.slow
def test_the_driver_is_killed_and_the_job_resumes(questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions"
    process = subprocess.Popen(job(questions, output), cwd=ROOT, env=environment())
    try:
        wait_for_parts(output, 2, process)
    finally:
        process.kill()
        process.wait()
    finished = caption.read_parts(output)
    assert 0 < len(finished) < ROWS and not (output / "captions.jsonl").exists()
    again = subprocess.run(job(questions, output), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    done = int(again.stdout.split(" of them are done")[0].split()[-1])
    assert len(finished) <= done < ROWS  # what the workers wrote before they saw that the driver is gone counts too
    check_captions(questions, output)


def test_a_worker_says_what_one_process_says_and_errors_row_by_row(questions: Path, tmp_path: Path) -> None:
    """Without Ray; a batch that runs twice leaves one file."""
    output = tmp_path / "captions"
    rows = caption.read_rows(questions, "")
    caption.check_same_job(output, rows, "m")
    worker = caption.GenerateWorker(str(CAPTIONER), str(output), 8)
    for begin in (0, 5, 5, 15):
        numbers = list(range(ROWS))[begin : begin + (10 if begin else 5)]
        worker({"number": numbers, "row": [caption._text(rows[number]) for number in numbers]})
        if begin < 15:
            with pytest.raises(RuntimeError, match=f"{ROWS - numbers[-1] - 1} of {ROWS} rows are missing"):
                caption.finish(output, ROWS)
    caption.finish(output, ROWS)
    check_captions(questions, output)
    caption.check_same_job(output, rows, "m")
    with pytest.raises(ValueError, match="other rows or of another model"):
        caption.check_same_job(output, rows[1:], "m")


def test_a_folder_has_a_row_for_each_picture_and_clip(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/c.png", "a/d.mp4", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    rows = caption.read_rows(tmp_path, "What?")
    assert [row.given for row in rows] == [
        {"prompt": "What?", "images": ["a/c.png"]},
        {"prompt": "What?", "videos": ["a/d.mp4"]},
        {"prompt": "What?", "images": ["b.JPG"]},
    ]
    assert rows[0].images == (str(tmp_path / "a" / "c.png"),) and rows[1].videos == (str(tmp_path / "a" / "d.mp4"),)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no pictures or clips"):
        caption.read_rows(tmp_path / "empty", "What?")


def test_messages_for_vllm_hold_their_files(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"content")
    parts = caption._parts(caption.Row("What?", (str(file), "https://x.org/b.jpg")))
    urls = [part["image_url"]["url"] for part in parts[:2]]
    assert urls == ["data:image/png;base64,Y29udGVudA==", "https://x.org/b.jpg"]
    assert parts[2] == {"type": "text", "text": "What?"}
