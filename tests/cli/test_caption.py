# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf caption` on a real film, with a small checkpoint."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from casa_hf import CasaForConditionalGeneration, CasaProcessor, CasaStream, StreamSettings
from casa_hf.cli.app import app
from casa_hf.cli.caption import Question, _events
from casa_hf.streaming import LiveCaptions
from casa_hf.video import open_video
from examples.tiny_source import build_tiny_source
from tests.clips import http_camera, jpeg_part, picture, write_clip
from tests.command_line import Cli

av = pytest.importorskip("av")

BUNNY = str(Path(__file__).parents[2] / "examples" / "assets" / "bunny.mp4")


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


def test_the_command_does_what_the_library_does(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
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


def test_the_times_of_frames_are_those_of_the_file(cli: Cli, tmp_path: Path) -> None:
    source = build_tiny_source(tmp_path / "source", family="qwen3_vl")
    assert cli("convert", source, tmp_path / "casa").code == 0
    events: dict[str, list[dict[str, object]]] = {}
    for kind in ("native", "text", None):
        for name in ("config.json", "processor_config.json"):
            settings = json.loads((tmp_path / "casa" / name).read_text("utf-8"))
            (tmp_path / "casa" / name).write_text(json.dumps({**settings, "video_timestamps": kind}), encoding="utf-8")
        out = tmp_path / f"{kind}.jsonl"
        outcome = cli("caption", BUNNY, "--model", tmp_path / "casa", "--out", out, *ARGUMENTS)
        assert outcome.code == 0, outcome.err
        lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        events[str(kind)] = [{key: line[key] for key in ("kind", "start", "text")} for line in lines]
        assert events[str(kind)] == events_of(tmp_path / "casa")
        row = {"native": "<0.5 seconds> before a frame (native)", "text": "[0.5 seconds] before a frame (text)"}
        assert (row.get(str(kind), "video times") in cli("inspect", tmp_path / "casa").out) == (kind is not None)
    assert events["native"] != events["text"] != events["None"] != events["native"]

    model = CasaForConditionalGeneration.from_pretrained(tmp_path / "casa").eval()
    processor = CasaProcessor.from_pretrained(tmp_path / "casa", video_timestamps="native")
    fed: list[str] = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: fed.append(processor.decode(inputs["input_ids"][0])), with_kwargs=True
    )
    stream = CasaStream(model, processor, fps=2, max_new_tokens_per_frame=1)
    list(LiveCaptions(stream, open_video(BUNNY, fps=2, start=1, end=2.4)))
    times = re.findall(r"<(\d\.\d) seconds><\|vision_start\|><\|vision_end\|>", "".join(fed))
    assert times == ["1.0", "1.5", "2.0"]


@pytest.fixture(scope="module")
def pair(checkpoint: Path) -> tuple[CasaForConditionalGeneration, CasaProcessor]:
    return CasaForConditionalGeneration.from_pretrained(checkpoint).eval(), CasaProcessor.from_pretrained(checkpoint)


def tokens_of(model: CasaForConditionalGeneration, processor: CasaProcessor, **settings: object) -> list[list[int]]:
    """What the library says to each frame of these seconds."""
    said: dict[str, object] = {"fps": 2, "max_new_tokens_per_frame": 8} | settings
    captions = LiveCaptions(CasaStream(model, processor, **said), open_video(BUNNY, fps=2, end=1.6))  # type: ignore[arg-type]
    return [list(event.token_ids) for event in captions if event.kind == "end"]


DRAWN = ("--temperature", "1.5", "--seed", "7")
DRAWS = {"do_sample": True, "temperature": 1.5, "seed": 7}


@pytest.mark.parametrize(
    ("options", "settings", "base"),
    [
        (["--prompt", "Name the colours."], {"prompt": "Name the colours."}, {}),
        (["--system", "Speak French."], {"system": "Speak French."}, {}),
        (["--prefix", "In this video"], {"prefix": "In this video"}, {}),
        (["--max-text-tokens", "90"], {"max_text_tokens": 90}, {}),
        (["--frames-per-image", "2"], {"frames_per_image": 2}, {}),
        (["--frame-budget", "1e-9"], {"frame_budget": 1e-9}, {}),
        (["--allow-repeats"], {"repetition_penalty": None, "no_repeat_ngram_size": 0}, {}),
        (DRAWN, DRAWS, {}),
        ([*DRAWN, "--top-k", "2"], {**DRAWS, "top_k": 2}, DRAWS),
        ([*DRAWN, "--dtype", "bfloat16"], {**DRAWS, "dtype": torch.bfloat16}, DRAWS),
    ],
    ids=lambda value: value[-2] if isinstance(value, list | tuple) and len(value) > 1 else None,
)
def test_each_option_is_the_setting_of_the_library(
    cli: Cli,
    checkpoint: Path,
    pair: tuple[CasaForConditionalGeneration, CasaProcessor],
    tmp_path: Path,
    options: list[str],
    settings: dict[str, Any],
    base: dict[str, Any],
) -> None:
    model, processor = pair
    out = tmp_path / "a.jsonl"
    said = ("--end", "1.6", "--max-new-tokens", "8", "--device", "cpu")
    outcome = cli("caption", BUNNY, "--model", checkpoint, "--out", out, *said, *options)
    assert outcome.code == 0, outcome.err
    events = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    found = [event["token_ids"] for event in events if event["kind"] == "end"]
    dtype = settings.pop("dtype", None)
    if dtype is not None:
        model = CasaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).eval()
    number = 2 if "frames_per_image" in settings else 4
    assert found == tokens_of(model, processor, **settings) and len(found) == number
    assert found != tokens_of(pair[0], processor, **base), "the option makes a difference here"


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip whose frames come too fast for any model."""
    return write_clip(tmp_path_factory.mktemp("clips") / "fast.mp4", 40, 200)


LIVE = ("--fps", "200", "--live", "--max-new-tokens", "9", "--device", "cpu", "--allow-repeats")


@pytest.mark.parametrize(
    ("options", "kind", "whole"),
    [
        ([], "dropped", False),
        (["--frame-budget", "600"], "dropped", True),
        (["--late", "drop", "--frame-budget", "600"], "dropped", True),
        (["--late", "merge", "--frame-budget", "600"], "merged", True),
        (["--late", "wait"], "", True),
    ],
)
def test_what_becomes_of_late_frames(
    cli: Cli,
    checkpoint: Path,
    fast: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    kind: str,
    whole: bool,
) -> None:
    """Live, a frame's time is over after 5 ms by default, and a model is never as quick as nine tokens in that.

    Those that are dropped at a time are told by one event, as they are after a long stall, and counted one by one.
    """
    monkeypatch.setattr("casa_hf.streaming.live._MAX_REPORTS", 0)
    out = tmp_path / "a.jsonl"
    outcome = cli("caption", fast, "--model", checkpoint, "--out", out, *LIVE, "--end", "0.05", *options)
    assert outcome.code == 0, outcome.err
    events = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    counts: Counter[str] = Counter()
    for event in events:
        counts[event["kind"]] += event["count"]
    assert counts["end"] + counts["dropped"] + counts["merged"] == 10
    assert (kind == "dropped" and whole) <= any(event["count"] > 1 for event in events)
    assert (counts["dropped"] > 0) == (kind == "dropped") or kind == "merged"
    assert (counts["merged"] > 0) == (kind == "merged")
    assert kind or counts["end"] == 10, "all frames"
    lengths = [len(event["token_ids"]) for event in events if event["kind"] == "end"]
    assert (max(lengths) == 9) == whole
    if kind:
        assert f"{counts[kind]} {kind}" in outcome.err


@pytest.mark.parametrize(("options", "drops"), [([], False), (["--live"], True)])
def test_on_the_page_too_late_frames_are_dropped_when_live(
    cli: Cli,
    checkpoint: Path,
    fast: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    drops: bool,
) -> None:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    from casa_hf import web
    from tests.web.pages import Listener

    heard: list[dict[str, Any]] = []

    class Watched(web.CaptionServer):
        """Serves until the one page that is open has heard the end."""

        def run(self) -> None:
            server = threading.Thread(target=super().run)
            server.start()
            heard.extend(message.data for message in Listener(self.url).until_state("finished"))
            self.stop()
            server.join()

    monkeypatch.setattr(web, "CaptionServer", Watched)
    said = ("--fps", "200", "--end", "0.05", "--max-new-tokens", "9", "--device", "cpu", "--allow-repeats")
    outcome = cli("caption", fast, "--model", checkpoint, "--web", "--port", "0", *said, *options)
    assert outcome.code == 0, outcome.err
    kinds = Counter(message.get("kind") for message in heard)
    assert (kinds["dropped"] > 0) == drops and kinds["end"] + kinds["dropped"] == 10
    lengths = [len(message["token_ids"]) for message in heard if message.get("kind") == "end"]
    assert (max(lengths) < 9) == drops, "the time of a frame is bounded where frames are dropped"


def test_what_is_said_about_the_source_is_done(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """Raw pixels say neither their size nor their rate; images of a folder not theirs; a device can be a recording."""
    (tmp_path / "folder").mkdir()
    for index in range(6):
        Image.fromarray(picture(index)).save(tmp_path / "folder" / f"{index}.png")
    pixels = np.zeros((10, 64 * 48 * 3 // 2), np.uint8)  # YUV 4:2:0
    (tmp_path / "pixels.yuv").write_bytes(pixels.tobytes())
    raw = ["--option", "video_size=64x48", "--option", "framerate=4"]
    out = tmp_path / "a.jsonl"
    for source, options, expected in (
        (tmp_path / "pixels.yuv", raw, [0.0, 0.5, 1.0, 1.5, 2.0]),
        (tmp_path / "folder", ["--rate", "4"], [0.0, 0.5, 1.0]),
        ("lavfi:testsrc=size=64x48:rate=4:duration=2", ["--recorded-input"], [0.0, 0.5, 1.0, 1.5]),
    ):
        said = ["--max-new-tokens", "1", "--device", "cpu", "--out", out, "--overwrite"]
        outcome = cli("caption", source, "--model", checkpoint, *said, *options)
        assert outcome.code == 0, outcome.err
        events = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        assert [event["start"] for event in events if event["kind"] == "end"] == expected
        assert {event["kind"] for event in events} <= {"text", "end"}


def test_an_http_camera_is_captioned_live(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """At its own speed, whatever FFmpeg makes of it; and as a recording if that is what it is said to be."""
    out = tmp_path / "a.jsonl"

    def parts() -> Iterator[bytes]:
        yield jpeg_part(0)
        until = time.monotonic() + 60
        while not out.exists() and time.monotonic() < until:  # the first frame has been looked at
            time.sleep(0.01)
        for number in range(1, 6):
            time.sleep(0.2)
            yield jpeg_part(number)

    said = ["--max-new-tokens", "1", "--device", "cpu", "--out", out, "--fps", "100"]
    starts = []
    for camera, options in ((parts, ["--late", "merge"]), (lambda: map(jpeg_part, range(6)), ["--recorded-input"])):
        out.unlink(missing_ok=True)
        with http_camera(camera) as address:
            outcome = cli("caption", address, "--model", checkpoint, *said, *options)
        assert outcome.code == 0, outcome.err
        events = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        starts.append([event["start"] for event in events if event["kind"] in ("end", "merged", "dropped")])
    live, recorded = starts
    assert recorded == [index / 25 for index in range(6)]
    assert live[0] == 0 and live[-1] > 0.9, "the last picture is sent a second after the first one has come"


def test_files_are_replaced_and_words_come_one_by_one(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    srt, video = tmp_path / "a.srt", write_clip(tmp_path / "a.mp4", 2, 10)
    srt.write_text("old")
    arguments = ["caption", BUNNY, "--model", checkpoint, "--out", srt, "--overlay", video, "--device", "cpu"]
    arguments += ["--end", "0.4", "--max-new-tokens", "12", "--words", "--allow-repeats", *DRAWN]
    assert cli(*arguments).refused("--out", "a.srt' exists; expected a new name. Choose another, or add --overwrite.")
    assert srt.read_text() == "old"
    outcome = cli(*arguments, "--overwrite")
    assert outcome.code == 0, outcome.err
    assert "1 frame in " in outcome.err and f"wrote {srt}, {video}." in outcome.err
    with av.open(str(srt)) as container:
        shown = [bytes(packet).decode() for packet in container.demux() if packet.size]
    assert len(shown) > 2 and all(later.startswith(earlier) for earlier, later in pairwise(shown))
    with av.open(str(video)) as container:
        assert len(list(container.decode(video=0))) == 10


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_was_not_made_is_not_named(
    cli: Cli,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overwrite: bool,
) -> None:
    """Ctrl-C before the first frame is looked at."""
    srt, video = tmp_path / "a.srt", tmp_path / "a.mp4"
    options = ["--overwrite"] if overwrite else []
    for file in (srt, video) if overwrite else ():
        file.write_text("old")

    def interrupted(self: CasaStream, *arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CasaStream, "push", interrupted)
    outcome = cli("caption", BUNNY, "--model", checkpoint, *ARGUMENTS, "--out", srt, "--overlay", video, *options)
    assert outcome.code == 130
    assert re.fullmatch(r"Interrupted: 0 frames in \d+\.\d s\.\n", outcome.err)
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == ({"a.srt": "old", "a.mp4": "old"} if overwrite else {})


def test_the_source_is_never_replaced(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 10, 10)
    whole = clip.read_bytes()
    (tmp_path / "a.srt").symlink_to(clip)
    for option, file in (("--overlay", clip), ("--out", tmp_path / "a.srt")):
        outcome = cli("caption", clip, "--model", checkpoint, option, file, "--overwrite")
        assert outcome.refused(str(file), "is the input itself; expected a new name")
    assert clip.read_bytes() == whole


def test_any_number_of_questions_may_be_for_one_moment(checkpoint: Path) -> None:
    asked: list[str] = []

    class Brief(LiveCaptions):
        """Has answers of one token."""

        def ask(self, question: str, max_new_tokens: int | None = 1) -> None:
            asked.append(question)
            super().ask(question, max_new_tokens)

    model = CasaForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = CasaProcessor.from_pretrained(checkpoint)
    stream = CasaStream(model, processor, fps=2, max_new_tokens_per_frame=1)
    captions = Brief(stream, open_video(BUNNY, fps=2, end=0.6))
    questions = [Question(0.0, f"{index}?") for index in range(20)]
    ends = [event for event in _events(captions, questions) if event.kind in ("end", "answered")]
    assert [event.start for event in ends] == [0.0] * 21 + [0.48], "all of them are answered before the next frame"
    assert [event.kind for event in ends] == ["end", *["answered"] * 20, "end"]
    assert asked == [question.text for question in questions], "in the order in which they were given"


def test_silent_answers_are_told_from_silent_frames(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
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
    assert [event["question"] for event in events if event["kind"] == "answered"] == ["Who?", "What?", "Where?"]


def test_the_view_of_a_terminal(cli: Cli, checkpoint: Path) -> None:
    outcome = cli("caption", BUNNY, "--model", checkpoint, *ARGUMENTS, "--live", "--late", "wait", terminal=True)
    assert outcome.code == 0, outcome.err
    for part in ("time", "of 0:00:04.0", "6 frames", "latency", "mean", "behind", "memory", "text tokens"):
        assert part in outcome.err, part
    assert re.match(r"\[0:00:0[1-3]\.[05]\] ", outcome.out) and "latency" not in outcome.out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["nowhere.mp4"], ["nowhere.mp4", "exist; give"]),
        ([__file__], ["test_caption.py", "can't be used"]),
        ([BUNNY, "--out", "captions.txt"], ["captions.txt", ".srt"]),
        ([BUNNY, "--out", "nowhere/captions.srt"], ["nowhere", "doesn't exist"]),
        ([BUNNY, "--overlay", "video.avi"], ["video.avi", ".mp4"]),
        ([BUNNY, "--overlay", "video.mp4", "--font", "nowhere.ttf"], ["nowhere.ttf", "can't be used"]),
        ([BUNNY, "--fps", "0"], ["--fps 0.0 must be a positive number"]),
        ([str(Path(BUNNY).parent), "--rate", "0"], ["--rate 0.0 must be a positive number"]),
        ([BUNNY, "--frame-budget", "-1"], ["--frame-budget -1.0 must be a positive number of seconds"]),
        ([BUNNY, "--frame-budget", "nan"], ["--frame-budget nan must be a positive number"]),
        ([BUNNY, "--max-new-tokens", "0"], ["--max-new-tokens 0 must be a positive integer"]),
        ([BUNNY, "--max-text-tokens", "-5"], ["--max-text-tokens -5 must be a positive integer"]),
        ([BUNNY, "--temperature", "0"], ["--temperature 0.0 must be a positive number"]),
        ([BUNNY, "--temperature", "1e-400"], ["--temperature 0.0 must be a positive number"]),
        ([BUNNY, "--temperature", "1", "--top-k", "-1"], ["--top-k -1 must be an integer of 0 or more"]),
        ([BUNNY, "--temperature", "1", "--seed", str(2**64)], ["--seed 18446744073709551616 must be", "64 bits"]),
        ([BUNNY, "--model", "nowhere"], ["'nowhere'", "not a folder"]),
        (["lavfi:testsrc", "--start", "3"], ["--start 3", "live"]),
        ([BUNNY, "--live-input", "--start", "3"], ["--start 3", "live"]),
        ([BUNNY, "--rate", "5"], ["--rate 5.0 can't be used with", "leave it out"]),
        ([str(Path(BUNNY).parent), "--option", "video_size=64x48"], ["video_size", "are for FFmpeg"]),
        ([BUNNY, "--out", "a.srt", "--out", "./a.srt"], ["a.srt", "2 times"]),
        (
            [BUNNY, "--out", "a.srt", "--ask", "<|image_pad|>", "--no-sanitize-control-tokens"],
            ["--ask", "outside of a placeholder"],
        ),
    ],
)
def test_wrong_values_are_refused_before_any_work(
    cli: Cli,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in options else ["--model", str(checkpoint)]
    assert cli("caption", *options, *model).refused(*parts)
    assert list(tmp_path.iterdir()) == []


def test_options_that_are_settings_have_the_defaults_of_the_library() -> None:
    """And none of them is missing that the page and the documents promise."""
    command = typer.main.get_command(app).commands["caption"]  # type: ignore[attr-defined]
    own = {field.name: field.default for field in fields(StreamSettings)}
    found = {option.name: option.default for option in command.params if option.name in own}
    assert {name for name, default in found.items() if default is not None and default != own[name]} == set()
    assert found.keys() == own.keys() - {
        *("do_sample", "max_new_tokens_per_answer", "media_policy", "num_sink_tokens", "stop_bias"),
        *(name for name in own if name.startswith(("repetition_", "no_repeat_"))),
    }


def test_nothing_to_caption_is_said_before_any_file_is_made(
    cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = cli("caption", BUNNY, "--model", checkpoint, "--out", "a.srt", "--out", "a.vtt", "--start", "100")
    assert outcome.failed_with_one_line("no frames between 100 s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--start", "soon"], "'soon' is not a time"),
        (["--ask", "@2"], "has a time and no question"),
        (["--ask", "@x hello"], "'@x hello' begins with '@x'; expected @ and a time"),
        (["--ask", " "], "A question is empty"),
        (["--late", "drop"], "needs --live or --live-input"),
        (["--recorded-input", "--late", "drop"], "needs --live"),
        (["--option", "video_size"], "'video_size' is not an option; write KEY=VALUE"),
        (["--option", "=640x480"], "'=640x480' is not an option"),
        (["--option", "video_size="], "'video_size=' is not an option"),
        (["--option", "a=1", "--option", "a=2"], "a is given twice: 1 and 2"),
        (["--late", "never"], "merge"),
        (["--frame-budget", "soon"], "'--frame-budget': Input should be a valid number"),
        (["--top-k", "5"], "--top-k 5 needs --temperature"),
        (["--seed", "5"], "--seed 5 needs --temperature"),
        (["--font", "a.ttf"], "--font is for --overlay. Add it"),
    ],
)
def test_wrong_usage_is_exit_code_2(cli: Cli, checkpoint: Path, options: list[str], complaint: str) -> None:
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
