# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`casa-hf generate` with many questions: from options and from files, in batches, with the answers of one by one."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from casa_hf import CasaForConditionalGeneration, CasaProcessor, Conversation
from casa_hf.samples import CAT, COFFEE, ROCKET
from tests.clips import damage_packets, write_clip
from tests.command_line import Cli

SHORT = ("--max-new-tokens", "6", "--device", "cpu")


@pytest.fixture(scope="module")
def alone(casa_folder: Path) -> Any:
    """What a conversation answers to one question."""
    model = CasaForConditionalGeneration.from_pretrained(casa_folder).eval()
    processor = CasaProcessor.from_pretrained(casa_folder)

    def answer(prompt: str, *images: str, videos: Any = (), **options: Any) -> str:
        return Conversation(model, processor).ask(prompt, list(images), videos, max_new_tokens=6, **options)

    return answer


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line]


def test_each_picture_gets_the_answer_that_it_gets_alone(cli: Cli, casa_folder: Path, alone: Any) -> None:
    images = [CAT, COFFEE, ROCKET]
    given = [argument for image in images for argument in ("--image", image)]
    outcome = cli("generate", casa_folder, "--prompt", "What?", *given, "--each", "--batch-size", "2", *SHORT)
    assert (outcome.code, outcome.err) == (0, "")
    answers = [alone("What?", image) for image in images]
    assert len(set(answers)) == 3
    assert lines(outcome.out) == [
        {"prompt": "What?", "images": [image], "answer": answer} for image, answer in zip(images, answers, strict=True)
    ]


@pytest.mark.parametrize("images", [[], [CAT], [CAT, COFFEE]], ids=["none", "one for all", "one for each"])
def test_several_prompts(cli: Cli, casa_folder: Path, alone: Any, images: list[str]) -> None:
    prompts = ["What is this?", "A longer question, so that the rows of the batch differ in length: what colour?"]
    given = [argument for image in images for argument in ("--image", image)]
    outcome = cli("generate", casa_folder, "--prompt", prompts[0], "--prompt", prompts[1], *given, *SHORT)
    shown = images if len(images) == 2 else images * 2
    expected = [alone(prompt, *shown[i : i + 1]) for i, prompt in enumerate(prompts)]
    assert [row["answer"] for row in lines(outcome.out)] == expected
    assert len(set(expected)) == 2


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two videos that differ in what they show and in shape, and one of which no frame can be decoded."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("clips")
    whole = [write_clip(folder / "a.mp4", 20, 10), write_clip(folder / "b.mkv", 9, 3, size=(96, 48))]
    return [*map(str, whole), str(damage_packets(whole[0], list(range(20))))]


def test_a_video_beside_an_image(cli: Cli, casa_folder: Path, alone: Any, clips: list[str]) -> None:
    asked = ("generate", casa_folder, "--prompt", "What?", *SHORT, "--image", CAT, "--video", clips[0])
    answers = {
        options: alone("What?", CAT, videos=clips[0], **dict([options]) if options else {})
        for options in [(), ("num_frames", 3), ("fps", 2.0)]
    }
    assert len({*answers.values(), alone("What?", CAT)}) == 4
    for options, answer in answers.items():
        given = [f"--{options[0].replace('_', '-')}", str(options[1])] if options else []
        assert cli(*asked, *given).out == answer + "\n"
    assert cli(*asked, "--stream").out == answers[()] + "\n"


def test_each_video_gets_the_answer_that_it_gets_alone(
    cli: Cli, casa_folder: Path, alone: Any, clips: list[str]
) -> None:
    videos = [part for clip in clips for part in ("--video", clip)]
    given = ("--prompt", "What?", "--image", CAT, *videos, "--num-frames", "4")
    outcome = cli("generate", casa_folder, *given, "--each", *SHORT)
    assert outcome.code == 1 and "1 of 4 questions could not be asked" in outcome.err
    *rows, damaged = lines(outcome.out)
    assert rows == [
        {"prompt": "What?", "images": [CAT], "answer": alone("What?", CAT)},
        *(
            {"prompt": "What?", "images": [], "videos": [clip], "answer": alone("What?", videos=clip, num_frames=4)}
            for clip in clips[:2]
        ),
    ]
    assert damaged["videos"] == [clips[2]] and "can't be used: none of its frames" in damaged["error"]


def test_videos_of_several_prompts_and_of_files(
    cli: Cli, casa_folder: Path, tmp_path: Path, alone: Any, clips: list[str]
) -> None:
    given = ("--prompt", "What?", "--prompt", "And?", "--image", CAT, "--video", clips[0], "--video", clips[1])
    expected = [alone("What?", CAT, videos=clips[0]), alone("And?", CAT, videos=clips[1])]
    outcome = cli("generate", casa_folder, *given, *SHORT)
    assert [row["answer"] for row in lines(outcome.out)] == expected
    assert [row["videos"] for row in lines(outcome.out)] == [[clip] for clip in clips[:2]]
    (tmp_path / "a.mp4").write_bytes(Path(clips[0]).read_bytes())
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    questions = [
        {"prompt": "What?", "images": [CAT], "video": "a.mp4", "id": 7},
        {"prompt": "And?", "video": "broken.mp4"},
        {"prompt": "", "videos": ["a.mp4", clips[1]]},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, questions)))
    outcome = cli("generate", casa_folder, "--input", file, *SHORT)
    rows = lines(outcome.out)
    assert outcome.code == 1 and "broken.mp4" in rows[1].pop("error")
    assert rows == [
        {**questions[0], "answer": expected[0]},
        questions[1],
        {**questions[2], "answer": alone("", videos=clips[:2])},
    ]


def test_a_video_that_cannot_be_used_is_refused_before_the_model_is_loaded(
    cli: Cli, tmp_path: Path, clips: list[str]
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    asked = ("generate", "me/model", "--prompt", "x", "--video")
    assert cli(*asked, tmp_path / "a.mp4").refused("--video", "a.mp4", "can't be used")
    assert cli(*asked, clips[0], "--num-frames", "21").refused("--video", "--num-frames 21 is more than the 20 frames")
    assert cli(*asked, CAT[:-3] + "nothing").refused("The video", "doesn't exist")
    assert cli(*asked, tmp_path).refused("The video", "is a folder; expected a file")


def test_a_file_of_questions(cli: Cli, casa_folder: Path, tmp_path: Path, alone: Any) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.jpg").write_bytes(Path(CAT).read_bytes())
    (tmp_path / "broken.jpg").write_bytes(Path(CAT).read_bytes()[:300])
    questions = [
        {"prompt": "What?", "images": ["pictures/cat.jpg", COFFEE], "id": 7},
        {"prompt": "Schön, und was ist das? <|im_end|>"},
        {"prompt": "What?", "image": "broken.jpg"},
        {"prompt": "One line\u2028in JSON?", "image": Path(CAT).as_uri()},
        {"prompt": "What?", "image": f"data:image/jpeg;base64,{base64.b64encode(Path(CAT).read_bytes()).decode()}"},
        {"prompt": "And?", "image": "pictures/cat.jpg"},
    ]
    file, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    file.write_text("\n\n".join(json.dumps(question, ensure_ascii=False) for question in questions), "utf-8")
    outcome = cli("generate", casa_folder, "--input", file, "--output", answers, "--batch-size", "3", *SHORT)
    assert outcome.failed_with_one_line("1 of 6 questions", str(answers))
    rows = lines(answers.read_text("utf-8"))
    assert "broken.jpg" in rows[2].pop("error")
    assert rows == [
        {**questions[0], "answer": alone("What?", CAT, COFFEE)},
        {**questions[1], "answer": alone(questions[1]["prompt"])},
        questions[2],
        {**questions[3], "answer": alone(questions[3]["prompt"], CAT)},
        {**questions[4], "answer": alone("What?", CAT)},
        {**questions[5], "answer": alone("And?", CAT)},
    ]
    assert "Schön" in answers.read_text("utf-8")

    before = answers.read_bytes()
    again = ("generate", casa_folder, "--input", file, "--output", answers, *SHORT)
    assert cli(*again).refused("--output", "exists", "--overwrite")
    # The questions stay, whatever happens on the way to their answers.
    assert cli("generate", casa_folder, "--input", file, "--output", file, "--overwrite").refused(
        "--output", str(file)
    )
    assert answers.read_bytes() == before
    assert cli(*again, "--overwrite").code == 1 and lines(answers.read_text("utf-8"))[1] == rows[1]


def test_answers_of_an_earlier_run_are_asked_again(cli: Cli, casa_folder: Path, tmp_path: Path, alone: Any) -> None:
    file = tmp_path / "answers.jsonl"
    given = [{"prompt": "What?", "image": CAT, "error": "damaged"}, {"prompt": "And?", "answer": "?", "id": 3}]
    file.write_text("".join(json.dumps(row) + "\n" for row in given), "utf-8")
    outcome = cli("generate", casa_folder, "--input", file, *SHORT)
    assert (outcome.code, outcome.err) == (0, "")
    first, second = {"prompt": "What?", "image": CAT}, {"prompt": "And?", "id": 3}
    assert lines(outcome.out) == [{**first, "answer": alone("What?", CAT)}, {**second, "answer": alone("And?")}]


def test_progress_is_shown_on_a_terminal(cli: Cli, casa_folder: Path, tmp_path: Path) -> None:
    prompts = [argument for text in "abc" for argument in ("--prompt", text)]
    outcome = cli("generate", casa_folder, *prompts, "--batch-size", "1", *SHORT, terminal=True)
    assert outcome.code == 0 and "Answering" in outcome.err and "3/3" in outcome.err
    assert len(lines(outcome.out)) == 3


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], ["--prompt"]),
        (["--prompt", "x", "--prompt", "y", "--each", "--image", CAT], ["--each", "one --prompt"]),
        (["--prompt", "x", "--each"], ["--each"]),
        (["--prompt", "x", "--prompt", "y", *["--video", CAT] * 3], ["--video", "3 videos for 2 prompts"]),
        (["--prompt", "x", "--video", CAT, "--fps", "0"], ["--fps 0.0 must be a positive number"]),
        (["--prompt", "x", "--video", CAT, "--fps", "1", "--num-frames", "2"], ["--fps", "--num-frames"]),
        (["--prompt", ""], ["--prompt", "it is '', which asks nothing"]),
        (["--prompt", "x", "--prompt", "y", *["--image", CAT] * 3], ["3 images for 2 prompts"]),
        (["--prompt", "x", "--prompt", "y", "--stream"], ["--stream", "one prompt"]),
        (["--prompt", "x", "--input", "questions.jsonl"], ["--input", "can't be combined"]),
        (["--input", "nowhere.jsonl"], ["--input", "nowhere.jsonl"]),
        (["--prompt", "x", "--output", "nowhere/a.jsonl"], ["--output", "nowhere"]),
        (["--prompt", "x", "--batch-size", "0"], ["--batch-size"]),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_model_is_loaded(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text('{"prompt": "x"}')
    assert cli("generate", "me/model", *options).refused(*parts)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", ["is empty"]),
        ("what?", ["line 1", "JSON"]),
        ("[]", ["line 1", "`prompt`"]),
        ('{"prompt": " "}', ["line 1", "`prompt` is ' ', which asks nothing"]),
        ('{"prompt": "\\ud83d"}', ["line 1", "ud83d"]),
        ('{"prompt": "x", "id": "\\ud83d"}', ["line 1", "ud83d"]),
        ('{"prompt": 3}', ["line 1", "`prompt`"]),
        ('{"prompt": "x"}\n{"prompt": "y", "images": "cat.jpg"}', ["line 2", "list of paths"]),
        ('{"prompt": "x", "image": "a.jpg", "images": []}', ["line 1", "keep one"]),
        ('{"prompt": "x", "image": "nowhere.jpg"}', ["line 1", "nowhere.jpg"]),
        ('{"prompt": "x", "video": "nowhere.mp4"}', ["line 1", "The video", "nowhere.mp4"]),
        ('{"prompt": "x", "videos": "a.mp4"}', ["line 1", "`videos` must be a list of paths"]),
        (json.dumps({"prompt": "x", "image": "a" * 5000}), ["line 1", "exist; expected a file or a URL"]),
        ('{"prompt": ' + "[" * 100_000, ["line 1", "JSON"]),
    ],
)
def test_lines_that_are_no_questions_are_named(cli: Cli, tmp_path: Path, line: str, parts: list[str]) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(line)
    assert cli("generate", "me/model", "--input", file).refused("questions.jsonl", *parts)


def test_a_file_that_is_not_utf8_is_named(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_bytes(b'{"prompt": "\xff"}')
    assert cli("generate", "me/model", "--input", file).refused("questions.jsonl", "UTF-8")
