# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""lmms-eval runs CASA models and their sources: answers of `generate`, scores that are computed by hand here.

Needs lmms-eval, which has an environment of its own (`make test-lmms`); skipped without it. The model is the small
trained one; its answers are taken from `generate`, one question at a time, and references are made from them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.frames_casa import load_frames
from casa_hf.serving.lmms_eval import PAPER_TASKS
from examples.tiny_source import build_tiny_source
from tests.clips import numbers, write_clip

pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: make test-lmms")
# lmms-eval's own.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "examples" / "tiny_world" / "checkpoints"
HELD_OUT = ROOT / "examples" / "tiny_world" / "held_out"


def questions() -> list[tuple[str, str]]:
    """File of a picture and a question about it, six times; their answers have one word or two."""
    rows = [json.loads(line) for line in (HELD_OUT / "questions.jsonl").read_text().splitlines()]
    alone = [row for row in rows if len(row["images"]) == 1]
    return [(str(HELD_OUT / row["images"][0]), row["messages"][0]["content"][1]["text"]) for row in alone[:6]]


@pytest.fixture(scope="module")
def model() -> CasaForConditionalGeneration:
    return CasaForConditionalGeneration.from_pretrained(CHECKPOINTS / "casa").eval()


@pytest.fixture(scope="module")
def processor() -> CasaProcessor:
    return CasaProcessor.from_pretrained(CHECKPOINTS / "casa")


@pytest.fixture(scope="module")
def lm() -> Any:
    from casa_hf.serving.lmms_eval.model import CasaLmms

    lm = CasaLmms(str(CHECKPOINTS / "casa"))
    lm.clean = lambda: None  # lmms-eval throws the model away after a run
    return lm


def said(model: Any, processor: Any, shown: Sequence[str], question: str, **options: Any) -> str:
    """What `generate` says to one question."""
    videos = [name for name in shown if name.endswith(".mp4")]
    images = [Image.open(name).convert("RGB") for name in shown if name not in videos]
    parts = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = processor(text=[prompt], images=images or None, videos=videos or None, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, **{"max_new_tokens": 16, **options})
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# -------------------------------------------------------------------- tasks on local files


def write_rows(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Rows of a dataset, whose `image` is a file, as parquet with the pictures in it."""
    from datasets import Dataset
    from datasets import Image as ImageFeature

    dataset = Dataset.from_list([dict(row) for row in rows])
    if "image" in dataset.column_names:
        dataset = dataset.cast_column("image", ImageFeature())
    dataset.to_parquet(file)


def write_task(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], split: str, **settings: Any) -> None:
    """A task of these rows; settings named `..._function` are written as functions."""
    write_rows(rows, folder / f"{name}.parquet")
    functions = {key.removesuffix("_function"): settings.pop(key) for key in list(settings) if "_function" in key}
    config = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(folder / f"{name}.parquet")}},
        **settings,
    }
    lines = [yaml.safe_dump(config), *(f"{key}: !function {function}\n" for key, function in functions.items())]
    (folder / f"{name}.yaml").write_text("".join(lines))


def paper_task(
    folder: Path, base: str, rows: Sequence[Mapping[str, Any]], split: str = "test", **settings: Any
) -> str:
    """A task of the paper on local rows, named after it, with questions as they are."""
    asked = {"lmms_eval_specific_kwargs": {"default": {"post_prompt": "", "prompt_format": "mcq"}}}
    extended = {"class_function": "casa_hf.serving.lmms_eval.task.PaperTask", "extends": f"{PAPER_TASKS}/{base}.yaml"}
    write_task(folder, f"local_{base}", rows, split, **{**extended, **asked, **settings})
    return f"local_{base}"


def evaluate(lm: Any, folder: Path, *tasks: str, batch_size: int = 1) -> dict[str, Any]:
    """What `simple_evaluate` of lmms-eval gives."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    lm.batch_size = batch_size
    manager = TaskManager("WARNING", include_path=str(folder), include_defaults=False, model_name="casa_hf")
    return simple_evaluate(model=lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)


def answers(results: Mapping[str, Any], task: str) -> list[str]:
    """What was answered to the questions of a task, in their order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def check_both_sizes(lm: Any, folder: Path, task: str, expected: Sequence[str]) -> dict[str, float]:
    """Its metrics; with batches of one and three, answers are those of `generate`."""
    metrics = {}
    for size in (1, 3):
        rows: set[int] = set()
        hook = lm._model.register_forward_pre_hook(
            lambda module, args, kwargs, rows=rows: rows.add(len(kwargs["input_ids"])), with_kwargs=True
        )
        results = evaluate(lm, folder, task, batch_size=size)
        hook.remove()
        assert max(rows) == size
        assert answers(results, task) == list(expected)
        scores = {
            key.partition(",")[0]: value
            for key, value in results["results"][task].items()
            if isinstance(value, float) and "stderr" not in key
        }
        assert not metrics or scores == metrics
        metrics = scores
    return metrics


def allow(processor: CasaProcessor, words: Sequence[str]) -> dict[str, Any]:
    """Options by which an answer is that of these words that the model likes best; each is one token."""
    ids = [processor.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    assert all(len(each) == 1 for each in ids)
    return {"max_new_tokens": 1, "sequence_bias": [[each, 1000.0] for each in ids]}


# -------------------------------------------------------------------- scores, by hand


def edits(one: str, other: str) -> int:
    """Levenshtein distance."""
    distances = list(range(len(other) + 1))
    for row, a in enumerate(one, 1):
        diagonal, distances[0] = distances[0], row
        for column, b in enumerate(other, 1):
            diagonal, distances[column] = (
                distances[column],
                min(distances[column] + 1, distances[column - 1] + 1, diagonal + (a != b)),
            )
    return distances[-1]


def test_exact_match(lm: Any, model: Any, processor: Any, tmp_path: Path) -> None:
    """Case and punctuation don't count; an article or a plural does."""
    asked = questions()
    expected = [said(model, processor, [image], text) for image, text in asked]
    references = [expected[0], expected[1].lower(), expected[2].upper() + "!", "red", f"a {expected[4]}", expected[5]]
    rows = [
        {"image": image, "question": text, "answer": answer}
        for (image, text), answer in zip(asked, references, strict=True)
    ]
    task = paper_task(tmp_path, "casa_gqa", rows, "testdev", process_docs=None)
    assert len(set(expected)) == 6 and "red" not in expected
    assert check_both_sizes(lm, tmp_path, task, expected) == {"exact_match": pytest.approx(4 / 6)}


def test_vqa_accuracy(lm: Any, model: Any, processor: Any, tmp_path: Path) -> None:
    """Of ten people's answers, three that agree are a whole point; the mean over leaving one of them out."""
    asked = questions()[2:]
    expected = [said(model, processor, [image], text) for image, text in asked]
    agreeing = (10, 3, 1, 0)
    rows = [
        {
            "image": image,
            "question": text,
            "question_id": number,
            "answer": expected[number],
            "answers": [expected[number]] * agree + ["something else"] * (10 - agree),
        }
        for number, ((image, text), agree) in enumerate(zip(asked, agreeing, strict=True))
    ]
    by_hand = [(n * min(1, (n - 1) / 3) + (10 - n) * min(1, n / 3)) / 10 for n in agreeing]
    assert by_hand == pytest.approx([1, 0.9, 0.3, 0])
    task = paper_task(tmp_path, "casa_textvqa_val", rows, "validation")
    assert check_both_sizes(lm, tmp_path, task, expected) == {"exact_match": pytest.approx(mean(by_hand))}


@pytest.mark.parametrize("base", ["casa_docvqa_val", "casa_infovqa_val"])
def test_anls(base: str, lm: Any, model: Any, processor: Any, tmp_path: Path) -> None:
    """The best reference counts, and a similarity below one half for nothing."""
    asked = questions()
    expected = [said(model, processor, [image], text) for image, text in asked]
    references = [
        [expected[0].upper()],
        [expected[1] + "89"],  # two of four letters
        ["no such thing", expected[2][:-3]],
        [expected[3][:3]],  # too little
        [expected[4] + "s", "nothing"],
        ["zzz"],
    ]
    by_hand = []
    for answer, ways in zip(expected, references, strict=True):
        similar = [1 - edits(answer.lower(), way.lower()) / max(len(answer), len(way)) for way in ways]
        by_hand.append(max(similar) if max(similar) >= 0.5 else 0.0)
    assert by_hand[1] == 0.5 and 0.5 < by_hand[2] < by_hand[4] < 1 and by_hand[3] == by_hand[5] == 0
    rows = [
        {"image": image, "question": text, "questionId": str(number), "answers": ways}
        for number, ((image, text), ways) in enumerate(zip(asked, references, strict=True))
    ]
    task = paper_task(tmp_path, base, rows, "validation")
    assert check_both_sizes(lm, tmp_path, task, expected) == {"anls": pytest.approx(mean(by_hand))}


def test_relaxed_accuracy(lm: Any, model: Any, processor: Any, tmp_path: Path) -> None:
    """A number may be off by 5 % of the reference, and no more."""
    asked, digits = questions(), allow(processor, "123456789")
    expected = [said(model, processor, [image], text, **digits) for image, text in asked]
    of_reference = (1.0, 1.05, 1.06, 0.96, 0.94, None)
    references = [
        "many" if factor is None else f"{int(answer) * factor:.4f}"
        for answer, factor in zip(expected, of_reference, strict=True)
    ]
    kinds = ["human_test", "augmented_test"] * 3
    rows = [
        {"image": image, "question": text, "answer": reference, "type": kind}
        for (image, text), reference, kind in zip(asked, references, kinds, strict=True)
    ]
    task = paper_task(tmp_path, "casa_chartqa", rows, generation_kwargs={**digits, "until": []})
    assert check_both_sizes(lm, tmp_path, task, expected) == {
        "relaxed_overall": pytest.approx(3 / 6),
        "relaxed_human_split": pytest.approx(1 / 3),
        "relaxed_augmented_split": pytest.approx(2 / 3),
    }


def test_multiple_choice(lm: Any, model: Any, processor: Any, tmp_path: Path) -> None:
    """The letter of the choice; choices stand in the question."""
    asked, letters = questions(), allow(processor, "ABCD")
    options = ["red", "blue", "green", "black"]
    choices = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
    expected = [
        said(model, processor, [image], f"Question: {text}\nChoices:\n{choices}", **letters) for image, text in asked
    ]
    right = [0, 1, 1, 0, 1, 1]
    rows = [
        {"image": image, "question": text, "options": options, "answer": str(("ABCD".index(letter) + 1 - hit) % 4)}
        for (image, text), letter, hit in zip(asked, expected, right, strict=True)
    ]
    task = paper_task(tmp_path, "casa_ai2d", rows, generation_kwargs={**letters, "until": []})
    assert check_both_sizes(lm, tmp_path, task, expected) == {"exact_match": pytest.approx(4 / 6)}


def test_letters_and_words(lm: Any, model: Any, processor: Any, tmp_path: Path) -> None:
    """RealWorldQA: a letter where the reference is one, else the words."""
    asked = questions()
    expected = [said(model, processor, [image], text) for image, text in asked]
    references = [expected[0], "B", expected[2].capitalize(), "A", expected[4], "blue"]
    rows = [
        {"image": image, "question": text, "answer": reference}
        for (image, text), reference in zip(asked, references, strict=True)
    ]
    task = paper_task(tmp_path, "casa_realworldqa", rows)
    assert check_both_sizes(lm, tmp_path, task, expected) == {"exact_match": pytest.approx(3 / 6)}


def test_ocrbench(lm: Any, model: Any, processor: Any, tmp_path: Path) -> None:
    """A reference within the answer counts; formulas without their spaces, but with their case. Twice the same."""
    asked = questions()[1:]
    expected = [said(model, processor, [image], text) for image, text in asked]
    rows = [
        {"image": image, "question": text, "answer": ways, "dataset": dataset, "question_type": kind}
        for (image, text), ways, dataset, kind in zip(
            asked,
            [["zzz", expected[0][0].lower()], ["purplecross"], ["RedCross"], ["TRIANGLE"], ["blue rings"]],
            ["IC13", "HME100k", "HME100k", "docVQA", "docVQA"],
            [
                "Regular Text Recognition",
                "Handwritten Mathematical Expression Recognition",
                "Handwritten Mathematical Expression Recognition",
                "Doc-oriented VQA",
                "Doc-oriented VQA",
            ],
            strict=True,
        )
    ]
    assert expected[1:] == ["purple cross", "red cross", "red triangle", "blue ring"]
    task = paper_task(tmp_path, "casa_ocrbench", rows)
    assert check_both_sizes(lm, tmp_path, task, expected) == {"ocrbench_accuracy": pytest.approx(3 / 5)}


def test_mme(lm: Any, model: Any, processor: Any, tmp_path: Path) -> None:
    """Of two questions about a picture, the share of right ones, and once more if both are right; by category.

    A picture of which one question is asked, as with a limit, doesn't count.
    """
    asked, words = questions(), allow(processor, ["y", "no"])
    pairs = [(image, f"{text} {ending}") for image, text in asked[:4] for ending in ("It is red.", "What?")]
    expected = [said(model, processor, [image], text, **words) for image, text in pairs]
    right = [1, 1, 1, 0, 0, 1, 1, 1]
    truth = [("Yes" if (answer == "y") == bool(hit) else "No") for answer, hit in zip(expected, right, strict=True)]
    categories = ["existence", "existence", "existence", "existence", "OCR", "OCR", "code_reasoning", "code_reasoning"]
    rows = [
        {"image": image, "question": text, "answer": answer, "question_id": f"{number // 2}.png", "category": category}
        for number, ((image, text), answer, category) in enumerate(zip(pairs, truth, categories, strict=True))
    ]
    torn = {**rows[0], "question_id": "torn.png", "answer": truth[0]}
    rows.append(torn)
    expected.append(expected[0])
    task = paper_task(tmp_path, "casa_mme", rows, generation_kwargs={**words, "until": []})
    assert check_both_sizes(lm, tmp_path, task, expected) == {
        "mme_perception_score": pytest.approx((200 + 50) / 2 + 50),
        "mme_cognition_score": pytest.approx(200),
    }


# -------------------------------------------------------------------- how answers are cleaned


SCRIPTED = {
    "casa_gqa": ([("Red.", "red"), ("A red one", "red")], {}, 0.5),
    "casa_chartqa": ([("12.", "12"), ("Blue. ", "blue"), ("Blue...", "blue")], {"type": "human_test"}, 2 / 3),
    "casa_docvqa_val": ([("ab.", ["ab"]), ("abcdef. ", ["abcdef"])], {"questionId": "1"}, (1 + 6 / 7) / 2),
    "casa_realworldqa": ([("Two.", "two"), ("two", "2")], {}, 0.5),
    "casa_ai2d": ([("Answer: B", "1"), ("A. red", "0"), ("a", "0"), ("The A", "0")], {"options": ["x", "y"]}, 0.5),
}


@pytest.mark.parametrize("base", SCRIPTED)
def test_clean_up(base: str, tmp_path: Path) -> None:
    """Answers that a model may give, through lmms-eval's whole pipeline."""
    from lmms_eval.api.model import lmms

    given, other, expected = SCRIPTED[base]

    class Scripted(lmms):
        is_simple = False

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [given[request.args[3]][0] for request in requests]

        loglikelihood = generate_until_multi_round = generate_until

    image = questions()[0][0]
    name = "answers" if isinstance(given[0][1], list) else "answer"
    rows = [{"image": image, "question": "What?", name: reference, **other} for _, reference in given]
    split = {"casa_gqa": "testdev", "casa_docvqa_val": "validation"}.get(base, "test")
    settings = {"process_docs": None} if base == "casa_gqa" else {}
    task = paper_task(tmp_path, base, rows, split, **settings)
    results = evaluate(Scripted(), tmp_path, task)["results"][task]
    values = [value for key, value in results.items() if isinstance(value, float) and "stderr" not in key]
    assert values[0] == pytest.approx(expected)


# -------------------------------------------------------------------- requests of every kind


def write_shows(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], **settings: Any) -> None:
    """A task whose rows have `shown`, files of images and videos."""
    (folder / "shows.py").write_text(
        "from PIL import Image\n\n\n"
        "def visuals(doc):\n"
        "    return [name if name.endswith('.mp4') else Image.open(name).convert('RGB') for name in doc['shown']]\n"
    )
    write_task(
        folder,
        name,
        rows,
        "test",
        test_split="test",
        output_type="generate_until",
        doc_to_text="question",
        doc_to_target="answer",
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        doc_to_visual_function="shows.visuals",
        **settings,
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two videos of different sizes and lengths, whose colours change."""
    folder = tmp_path_factory.mktemp("clips")
    kinds = [((64, 48), 12), ((56, 84), 30)]
    return [
        str(write_clip(folder / f"{number}.mp4", frames, 4, size=size)) for number, (size, frames) in enumerate(kinds)
    ]


def test_mixed_requests(lm: Any, model: Any, processor: Any, clips: list[str], tmp_path: Path) -> None:
    """One run: no image, one, two of different sizes, videos; three ways to generate; three at a time."""
    asked = questions()
    pictures = [image for image, _ in asked]
    wide = str(tmp_path / "wide.png")
    Image.open(pictures[0]).convert("RGB").resize((168, 56)).save(wide)
    asks = [
        ([pictures[2]], asked[2][1]),
        ([], asked[0][1]),
        ([pictures[0], wide], "What changed?"),
        ([clips[0]], "What is in it?"),
        ([wide, pictures[1]], "Which pair has Q in it?"),
        ([clips[1]], "How many?"),
        ([pictures[3], clips[0]], "What?"),
    ]
    rows = [{"shown": shown, "question": text, "answer": ""} for shown, text in asks]
    write_shows(tmp_path, "plain", rows, generation_kwargs={"max_new_tokens": 6, "temperature": 0})
    write_shows(tmp_path, "stopped", rows, generation_kwargs={"max_new_tokens": 16, "until": [" cross", "ee"]})
    write_shows(tmp_path, "beams", rows, generation_kwargs={"max_new_tokens": 5, "num_beams": 2, "do_sample": False})

    def expected(**options: Any) -> list[str]:
        return [said(model, processor, shown, text, **options) for shown, text in asks]

    results = evaluate(lm, tmp_path, "plain", "stopped", "beams", batch_size=3)
    assert answers(results, "plain") == expected(max_new_tokens=6, do_sample=False)
    whole = expected()
    assert answers(results, "stopped") == [re.split(" cross|ee", answer)[0] for answer in whole]
    assert answers(results, "beams") == expected(max_new_tokens=5, num_beams=2)
    assert whole[0] == "purple cross" and answers(results, "stopped")[0] == "purple"
    assert len(set(whole)) > 3
    assert evaluate(lm, tmp_path, "plain", batch_size=1)["samples"]["plain"][3]["resps"] == [
        [answers(results, "plain")[3]]
    ]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_of_the_source(family: str, clips: list[str], tmp_path: Path) -> None:
    """A token-insertion checkpoint is shown the frames that a CASA one would be, with their rate."""
    from casa_hf.serving.lmms_eval.model import CasaLmms

    folder = CHECKPOINTS / "source"
    if family == "qwen3_vl":  # which samples videos by itself, and writes the times of frames
        folder = build_tiny_source(tmp_path / "source", family=family)
    processor = AutoProcessor.from_pretrained(folder)
    if family == "qwen3_vl":
        with pytest.raises(ValueError, match="a whole video"):
            CasaLmms(str(folder), frame_max_pixels=64 * 64)
        lm = CasaLmms(str(folder))
    else:
        lm = CasaLmms(str(folder), frame_max_pixels=64 * 64)
        smallest = processor.video_processor.size["shortest_edge"]
        processor.video_processor.size = {"shortest_edge": smallest, "longest_edge": 64 * 64}
    model, lm.clean = lm._model, lambda: None
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is in it?"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    pixels: list[Any] = []
    calls: list[dict[str, Any]] = []
    hooks = [
        model.model.visual.register_forward_pre_hook(lambda module, args: pixels.append(args[0])),
        model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True),
    ]
    expected = []
    for clip, count, total in zip(clips, (12, 20), (12, 30), strict=True):  # below 10 seconds: 20 frames, or all
        frames = load_frames(clip)
        assert len(frames) == count
        inputs = processor(
            text=[prompt],
            videos=[np.stack([np.asarray(frame) for frame in frames])],
            video_metadata=[VideoMetadata(total, fps=4.0, frames_indices=numbers(frames))],
            do_sample_frames=False,
            return_tensors="pt",
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=8)
        new = output[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(new, skip_special_tokens=True))
    rows = [{"shown": [clip], "question": "What is in it?", "answer": ""} for clip in clips]
    write_shows(tmp_path, "videos", rows, generation_kwargs={"max_new_tokens": 8})
    for size in (1, 2):
        assert answers(evaluate(lm, tmp_path, "videos", batch_size=size), "videos") == expected
    for hook in hooks:
        hook.remove()
    first, second, alone, other, both = pixels
    assert torch.equal(first, alone) and torch.equal(second, other)
    assert torch.equal(both, torch.cat([first, second]))
    prompts = [call["position_ids"] for call in calls if call["position_ids"].shape[-1] > 1]  # the rate is in these
    assert torch.equal(prompts[0], prompts[2]) and torch.equal(prompts[1], prompts[3])


def test_fewer_frames(lm: Any, model: Any, processor: Any, clips: list[str], tmp_path: Path) -> None:
    """Of a video that would have more frames, as many as allowed, evenly spaced; of a shorter one all."""
    write_shows(tmp_path, "videos", [{"shown": [clip], "question": "What?", "answer": ""} for clip in clips])
    called = []
    hook = lm._model.register_forward_pre_hook(
        lambda module, args, kwargs: called.append(kwargs.get("image_grid_thw")), with_kwargs=True
    )
    try:
        lm.max_frames = 15
        evaluate(lm, tmp_path, "videos", batch_size=2)
        lm.max_frames, lm.fps = None, 1.0
        evaluate(lm, tmp_path, "videos", batch_size=2)
    finally:
        hook.remove()
        lm.max_frames = lm.fps = None
    numbers = [len(grid) for grid in called if grid is not None and len(grid)]
    assert numbers == [12, 15, 3 + 7]  # apart where frames are taken differently


def test_refusals(lm: Any, tmp_path: Path) -> None:
    """What can't be answered says so by name."""
    from casa_hf.serving.lmms_eval.model import CasaLmms

    with pytest.raises(ValueError, match="batch_size='auto'"):
        CasaLmms(str(CHECKPOINTS / "casa"), batch_size="auto")
    with pytest.raises(TypeError, match="max_num_frames"):
        CasaLmms.create_from_arg_string(f"pretrained={CHECKPOINTS / 'casa'},max_num_frames=8")
    (tmp_path / "sound.wav").write_bytes(b"")
    write_shows(tmp_path, "sound", [{"shown": [], "question": "What?", "answer": ""}])
    (tmp_path / "shows.py").write_text(f"def visuals(doc):\n    return [{str(tmp_path / 'sound.wav')!r}]\n")
    with pytest.raises(ValueError, match="sound"):
        evaluate(lm, tmp_path, "sound")


def test_system_prompt(processor: Any, tmp_path: Path) -> None:
    """It replaces the one that the template writes by itself."""
    from casa_hf.serving.lmms_eval.model import CasaLmms

    (tmp_path / "system.txt").write_text("Be brief.\n")
    lm = CasaLmms(str(CHECKPOINTS / "casa"), system_prompt=str(tmp_path / "system.txt"))
    image, text = questions()[0]
    write_shows(tmp_path, "shown", [{"shown": [image], "question": text, "answer": ""}])
    seen = []
    hook = lm._model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    evaluate(lm, tmp_path, "shown")
    hook.remove()
    prompt = processor.tokenizer.decode(seen[0][0])
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt and "helpful" not in prompt


# -------------------------------------------------------------------- the command


def run(program: Sequence[str], checkpoint: Path, folder: Path, *options: str) -> str:
    """What the program prints."""
    words = [*program, str(checkpoint), "--tasks", "casa_chartqa", "--include_path", str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def logged(output: Path) -> list[str]:
    (file,) = output.rglob("*_samples_casa_chartqa.jsonl")
    samples = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


PROGRAM = ["-m", "casa_hf.serving.lmms_eval"]
LAUNCHED = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", *PROGRAM]


@pytest.mark.parametrize(
    ("program", "kind"), [(PROGRAM, "casa"), (PROGRAM, "source"), (LAUNCHED, "casa")], ids=["casa", "source", "two"]
)
def test_command(program: list[str], kind: str, tmp_path: Path) -> None:
    """A CASA checkpoint, the token-insertion checkpoint that it comes from, and two processes: one command."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINTS / kind).eval()
    processor: Callable[..., Any] = AutoProcessor.from_pretrained(CHECKPOINTS / kind, max_pixels=896 * 896)
    asked = questions()[:5]
    expected = [said(model, processor, [image], text) for image, text in asked]
    references = [*expected[:2], "nothing", *expected[3:]]
    rows = [
        {"image": image, "question": text, "answer": reference, "type": "human_test"}
        for (image, text), reference in zip(asked, references, strict=True)
    ]
    paper_task(tmp_path, "casa_chartqa", rows, task="casa_chartqa")
    printed = run([sys.executable, *program], CHECKPOINTS / kind, tmp_path, "--log_samples", "--batch-size", "2")
    assert logged(tmp_path / "evaluation") == expected
    assert f"| **{CHECKPOINTS / kind}** | 80.0 |" in printed
    assert "| CASA-Qwen2_5-VL-3B (README) | 81.8 |" in printed
    if kind == "casa" and program == PROGRAM:
        printed = run([sys.executable, *program], CHECKPOINTS / kind, tmp_path, "--limit", "3")
        assert f"| **{CHECKPOINTS / kind}** | 66.7* |" in printed


def test_a_run_that_fails(tmp_path: Path) -> None:
    """lmms-eval ends as if nothing had happened; the program doesn't."""
    words = [sys.executable, *PROGRAM, str(tmp_path), "--tasks", "casa_chartqa"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1 and "no results" in done.stderr
