# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf caption` on a real film, with a small checkpoint."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from casa_hf import CasaForConditionalGeneration, CasaProcessor, CasaStream
from casa_hf.cli_caption import Question, _events
from casa_hf.streaming import LiveCaptions
from casa_hf.video import open_video
from tests.test_cli import Cli, cli  # noqa: F401

av = pytest.importorskip("av")

BUNNY = str(Path(__file__).parents[1] / "examples" / "assets" / "bunny.mp4")


@pytest.fixture(scope="module")
def checkpoint(casa_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With small frames, which are as good here and quick."""
    folder = tmp_path_factory.mktemp("checkpoint") / "casa"
    shutil.copytree(casa_folder, folder)
    settings = json.loads((folder / "processor_config.json").read_text("utf-8"))
    settings["frame_max_pixels"] = 56 * 112
    (folder / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def events_of(checkpoint: Path, **options: object) -> list[dict[str, object]]:
    """What the library says of the same seconds."""
    model = CasaForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = CasaProcessor.from_pretrained(checkpoint)
    stream = CasaStream(model, processor, fps=2, max_new_tokens_per_frame=4)
    source = open_video(BUNNY, fps=2, start=1, end=4)
    return [{"kind": event.kind, "start": event.start, "text": event.text} for event in LiveCaptions(stream, source)]


ARGUMENTS = ("--start", "0:01", "--end", "4", "--max-new-tokens", "4", "--device", "cpu")


def test_the_command_does_what_the_library_does(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    files = [tmp_path / name for name in ("a.srt", "a.vtt", "a.jsonl")]
    outs = [argument for file in files for argument in ("--out", file)]
    questions = ["--ask", "What is it?", "--ask", "@2 Where is it?"]
    outcome = cli(
        "caption", BUNNY, "--model", checkpoint, *outs, *ARGUMENTS, *questions, "--overlay", tmp_path / "a.mp4"
    )
    assert outcome.code == 0, outcome.err
    events = [json.loads(line) for line in files[2].read_text("utf-8").splitlines()]
    first_answer = next(index for index, event in enumerate(events) if event["kind"] == "answer")
    assert events[first_answer]["start"] == 2.0, "asked after the first frame at 2 s or later"
    found = [{key: event[key] for key in ("kind", "start", "text")} for event in events[:first_answer]]
    expected = events_of(checkpoint)
    assert found == expected[: len(found)] and len(found) > 6
    assert events[-1]["kind"] == "answered" and events[-2]["kind"] == "answer"

    assert outcome.out.count("answer: ") == 2
    assert re.match(r"\[0:00:0[1-3]\.[05]\] ", outcome.out)
    assert "6 frames in " in outcome.err and outcome.err.count("\n") == 1
    for file in files[:2]:
        with av.open(str(file)) as container:
            starts = [float(packet.pts * packet.time_base) for packet in container.demux() if packet.size]
        assert set(starts) <= {1.0, 1.48, 2.0, 2.48, 3.0, 3.48} and len(starts) > 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(list(container.decode(video=0))) == 75
        assert container.streams.audio


def test_any_number_of_questions_may_be_for_one_moment(checkpoint: Path) -> None:
    class Brief(LiveCaptions):
        """Has answers of one token."""

        def ask(self, question: str, max_new_tokens: int = 1) -> None:
            super().ask(question, max_new_tokens)

    model = CasaForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = CasaProcessor.from_pretrained(checkpoint)
    stream = CasaStream(model, processor, fps=2, max_new_tokens_per_frame=1)
    captions = Brief(stream, open_video(BUNNY, fps=2, end=0.6))
    questions = [Question(0.0, f"{index}?") for index in range(20)]
    ends = [event for event in _events(captions, questions) if event.kind in ("end", "answered")]
    assert [event.start for event in ends] == [0.0] * 21 + [0.48], "all of them are answered before the next frame"
    assert [event.kind for event in ends] == ["end", *["answered"] * 20, "end"]


def test_silent_answers_are_told_from_silent_frames(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    silent = tmp_path / "silent"
    shutil.copytree(checkpoint, silent)
    settings = json.loads((silent / "generation_config.json").read_text("utf-8"))
    model = json.loads((silent / "config.json").read_text("utf-8"))
    settings["eos_token_id"] = list(range(model["text_config"]["vocab_size"]))
    (silent / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    file = tmp_path / "events.jsonl"
    questions = ["--ask", "@2 Who?", "--ask", "@2 What?", "--ask", "Where?"]
    outcome = cli("caption", BUNNY, "--model", silent, *ARGUMENTS, *questions, "--out", file)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == [f"[0:00:0{time}] answer: (silence)" for time in ("2.0", "2.0", "3.5")]
    assert "6 frames in " in outcome.err
    events = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [event["kind"] for event in events] == [*["end"] * 3, *["answered"] * 2, *["end"] * 3, "answered"]
    answered = [event["question"] for event in events if event["kind"] == "answered"]
    assert sorted(answered[:2]) == ["What?", "Who?"] and answered[2] == "Where?"


def test_the_view_of_a_terminal(cli: Cli, checkpoint: Path) -> None:  # noqa: F811
    outcome = cli("caption", BUNNY, "--model", checkpoint, *ARGUMENTS, "--live", "--late", "wait", terminal=True)
    assert outcome.code == 0, outcome.err
    for part in ("time", "of 0:00:04.0", "6 frames", "latency", "mean", "behind", "memory", "text tokens"):
        assert part in outcome.err, part
    assert re.match(r"\[0:00:0[1-3]\.[05]\] ", outcome.out) and "latency" not in outcome.out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["nowhere.mp4"], ["nowhere.mp4", "doesn't exist"]),
        ([__file__], ["test_cli_caption.py", "can't be used"]),
        ([BUNNY, "--out", "captions.txt"], ["captions.txt", ".srt"]),
        ([BUNNY, "--out", "nowhere/captions.srt"], ["nowhere", "doesn't exist"]),
        ([BUNNY, "--overlay", "video.avi"], ["video.avi", ".mp4"]),
        ([BUNNY, "--fps", "0"], ["fps=0", "positive"]),
        ([BUNNY, "--model", "nowhere"], ["'nowhere'", "not a folder"]),
        (["lavfi:testsrc", "--start", "3"], ["start=3", "live"]),
        ([BUNNY, "--out", "a.srt", "--out", "./a.srt"], ["a.srt", "2 times"]),
        ([BUNNY, "--out", "a.srt", "--ask", "<|vision_start|><|image_pad|><|vision_end|>?"], ["marks of images"]),
        ([BUNNY, "--out", "a.srt", "--out", "a.vtt", "--start", "100"], ["no frames between 100 s"]),
    ],
)
def test_it_fails_in_one_line_before_any_work(
    cli: Cli,  # noqa: F811
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in options else ["--model", str(checkpoint)]
    assert cli("caption", *options, *model).failed_with_one_line(*parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--start", "soon"], "'soon' is no time"),
        (["--ask", "@2"], "has a time and no question"),
        (["--ask", " "], "a question is empty"),
        (["--late", "drop"], "needs --live"),
        (["--late", "never"], "merge"),
    ],
)
def test_wrong_usage_is_exit_code_2(cli: Cli, checkpoint: Path, options: list[str], complaint: str) -> None:  # noqa: F811
    outcome = cli("caption", BUNNY, "--model", checkpoint, *options)
    assert outcome.code == 2
    assert complaint in " ".join(outcome.err.split())


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_captioned(checkpoint: Path, tmp_path: Path) -> None:
    """A camera that never ends, in a process of its own."""
    srt, video = tmp_path / "a.srt", tmp_path / "a.mp4"
    command = [sys.executable, "-u", "-m", "casa_hf", "caption", "lavfi:testsrc=size=64x48:rate=20,realtime"]
    command += ["--model", str(checkpoint), "--max-new-tokens", "3", "--out", str(srt), "--overlay", str(video)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    shown = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    lines = [*shown, *rest.splitlines(keepends=True)]
    assert "Interrupted: " in errors and "Traceback" not in errors
    with av.open(str(srt)) as container:
        assert len([packet for packet in container.demux() if packet.size]) in (len(lines), len(lines) + 1)
    with av.open(str(video)) as container:
        assert len(list(container.decode(video=0))) >= 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.srt"]
