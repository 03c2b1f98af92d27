# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The tasks ask what their images show, only their images, and the same for the same seed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import pytest

from examples.tiny_world.world import SPLITS, TASKS, Example, examples
from tests.tiny_world.reader import read

ALL_SIZES = [(task.name, size) for task in TASKS.values() for size in task.sizes]


def digest(example: Example) -> str:
    pixels = b"".join(image.tobytes() for image in example.images)
    return hashlib.sha256(pixels + repr((example.lead, example.turns)).encode()).hexdigest()


@pytest.mark.parametrize(("name", "size"), ALL_SIZES)
def test_answers_agree_with_images(name, size):
    for index in range(5):
        example = TASKS[name].example(size, "test", index)
        assert read(example) == example.turns[0][1], (index, example.turns)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.turns > 1])
def test_every_question_about_an_image_is_answered_from_it(name):
    task = TASKS[name]
    example = task.example(task.standard[-1], "train", 0, turns=task.turns)
    of_its_own = len(example.images) > example.lead.count(None)  # whether each question has an image
    assert len(example.turns) > 1 and (of_its_own or len(set(example.turns)) == len(example.turns))
    for index, turn in enumerate(example.turns):
        shown = example.images[index : index + 1] if of_its_own else example.images
        assert read(Example(name, example.size, example.lead, shown, (turn,))) == turn[1]


def test_splits_share_no_image():
    images = defaultdict(set)
    for split in SPLITS:
        for example in islice(examples(split), 270):
            images[split] |= {image.tobytes() for image in example.images}
    for split, others in (("train", ("validation", "test")), ("validation", ("test",))):
        for other in others:
            assert not images[split] & images[other]
    assert all(len(found) > 250 for found in images.values())


def test_splits_differ_in_images_only():
    """Which split an image belongs to isn't told by what it shows."""
    answers = {}
    for split in ("train", "test"):
        answers[split] = Counter(TASKS["frames"].example(2, split, index).turns[0][1] for index in range(900))
    # Thirty answers, thirty expected of each; differences have a standard deviation below eight.
    assert all(abs(answers["train"][key] - answers["test"][key]) < 40 for key in answers["train"] | answers["test"])


def test_an_example_is_determined_by_its_arguments():
    code = (
        "from tests.tiny_world.test_world import digest, TASKS\n"
        "for task in TASKS.values(): print(digest(task.example(task.sizes[1], 'test', 3, turns=2)))"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    here = [digest(task.example(task.sizes[1], "test", 3, turns=2)) for task in TASKS.values()]
    assert run.stdout.split() == here
    task = TASKS["place"]
    variations = [
        task.example(2, "test", 3),
        task.example(2, "test", 4),
        task.example(2, "train", 3),
        task.example(3, "test", 3),
        task.example(2, "test", 3, seed=1),
    ]
    assert len({digest(example) for example in variations}) == len(variations)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_questions_alone_are_answered_by_chance(task):
    """The best guess per question, learnt on one half, is right on the other half about as often as `chance` says."""
    size = task.standard[0]
    found = [task.example(size, "train", index) for index in range(1200)]
    learnt: dict[str, Counter] = defaultdict(Counter)
    for known, answer in map(_blindly, found[:600]):
        learnt[known][answer] += 1
    common = sum(learnt.values(), Counter())
    guesses = [learnt.get(known, common).most_common(1)[0][0] for known, _ in map(_blindly, found[600:])]
    right = [guess == answer for guess, (_, answer) in zip(guesses, map(_blindly, found[600:]), strict=True)]
    assert sum(right) / len(right) < task.chance(size) + 0.05


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_chance_is_that_of_guessing_one_of_the_possible_answers(task):
    size = task.standard[-1]
    found = [task.example(size, "train", index) for index in range(600)]
    if task.name == "rule":  # only numbers of the rule are possible
        answers = Counter(_entries(example).index(example.turns[0][1]) for example in found)
    else:
        answers = Counter(_told(example) for example in found)
    assert len(answers) == round(1 / task.chance(size))
    expected = len(found) * task.chance(size)
    # Chi-squared; the line lies above its 99.99 % quantile for up to 30 degrees of freedom.
    spread = sum((number - expected) ** 2 / expected for number in answers.values())
    assert spread < 2.2 * (len(answers) - 1) + 15


@pytest.mark.parametrize(("size", "split", "message"), [(5, "test", "4, 8, 16"), (4, "tset", "'train', 'validation'")])
def test_unknown_sizes_and_splits_are_refused(size, split, message):
    with pytest.raises(ValueError, match=message):
        TASKS["pairs"].example(size, split, 0)


def _blindly(example: Example) -> tuple[str, str | int]:
    """What is known without the image, and the answer: as no rule comes twice, the number of its entry."""
    question, answer = example.turns[0]
    if example.task == "rule":
        return question, _entries(example).index(answer)
    return f"{example.lead} {question}", answer


def _entries(example: Example) -> list[str]:
    return example.lead[0].removeprefix("Rule: ").removesuffix(".").split(", ")


def _told(example: Example) -> str:
    """An answer without what its question says already."""
    answer = example.turns[0][1]
    return {"pairs": answer[-1], "colour": answer.split()[-1]}.get(example.task, answer)
