# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Tasks: what is shown, what is asked, and what the answer is.

An example is determined by task, size, split, seed and index. Its answer is drawn uniformly and independently of the
text that precedes it, and the image is made to agree; so whoever doesn't see the image can only guess, with the
probability `Task.chance`. The size of a task is its difficulty: how many pairs, steps, frames, ... there are.

Splits share no image: which split an image belongs to is a function of its pixels, and an image that belongs to
another split than the one wanted is drawn again, with the same content.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from PIL import Image

from .drawing import COLOURS, DIRECTIONS, SHAPES, TILE, Canvas, Thing, any_thing, scatter

SPLITS = ("train", "validation", "test")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KEYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ@#$%&+"
CHANGES = ("colour", "shape", "place", "nothing")

_DIGITS = "0123456789"
_HELD_OUT = 8  # one image in so many is for testing, another one for validation


def split_of(image: Image.Image) -> str:
    """The split that an image belongs to: six in eight train."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(image.tobytes()) % _HELD_OUT, "train")


@dataclass(frozen=True)
class Example:
    """A conversation about images.

    Attributes:
        task, size: what it is an example of.
        lead: what precedes the first question: texts, and None for each image.
        images: for these, in order; if there are more, each later question has one of its own.
        turns: questions and answers.
    """

    task: str
    size: int
    lead: tuple[str | None, ...]
    images: tuple[Image.Image, ...]
    turns: tuple[tuple[str, str], ...]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it."""
        messages: list[dict[str, Any]] = []
        for index, (question, answer) in enumerate(self.turns):
            lead = self.before(index)
            parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in lead]
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return messages

    def before(self, turn: int) -> tuple[str | None, ...]:
        """What precedes a question: texts, and None for each image."""
        if turn == 0:
            return self.lead
        return (None,) if len(self.images) > self.lead.count(None) else ()

    @property
    def conversation(self) -> dict[str, Any]:
        """The example as `casa_hf.training` takes it."""
        return {"messages": self.messages, "images": list(self.images)}

    @property
    def blind(self) -> Example:
        """The same conversation without its images."""
        return replace(self, lead=tuple(part for part in self.lead if part is not None), images=())


@dataclass(frozen=True)
class Camera:
    """Takes images that belong to a split."""

    rng: Random
    split: str

    def take(self, draw: Callable[[Random], Image.Image]) -> Image.Image:
        """Draw until the image belongs to the split; `draw` decides nothing but what answers don't depend on."""
        while split_of(image := draw(self.rng)) != self.split:
            pass
        return image


Place = tuple[int, int]  # row and column
Scene = tuple[Sequence["str | None"], Sequence[Image.Image], list[tuple[str, str]]]


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: of the task.
        shows: what its answers tell about a model.
        sizes: the dial, from easy to hard.
        standard: the sizes that models train on and are tested with.
        turns: most questions about one image while training.
        build: (camera, size, most turns) -> lead, images, turns.
        chance: size -> probability of a right answer without the image.
    """

    name: str
    shows: str
    sizes: tuple[int, ...]
    standard: tuple[int, ...]
    turns: int
    build: Callable[[Camera, int, int], Scene] = field(repr=False)
    chance: Callable[[int], float] = field(repr=False)

    def example(self, size: int, split: str, index: int, *, seed: int = 0, turns: int = 1) -> Example:
        """An example; the same arguments give the same one.

        Args:
            size: one of `sizes`.
            split: one of `SPLITS`.
            index: of the example.
            seed: seed of the whole dataset.
            turns: most questions about its images.

        Raises:
            ValueError: for an unknown size or split.
        """
        if size not in self.sizes:
            raise ValueError(f"size={size} is no size of the task {self.name!r}; choose one of {self.sizes}.")
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; choose one of {SPLITS}.")
        rng = Random(f"{seed} {self.name} {size} {split} {index}")
        lead, images, questions = self.build(Camera(rng, split), size, turns)
        return Example(self.name, size, tuple(lead), tuple(images), tuple(questions))


# ---------------------------------------------------------------- the tasks


def _pairs(camera: Camera, size: int, turns: int) -> Scene:
    cells, numbers = _written(camera.rng, size)
    asked = camera.rng.sample(sorted(numbers), min(turns, size))
    questions = [(f"Which pair has {key} in it?", key + numbers[key]) for key in asked]
    return (None,), [camera.take(_characters(cells, numbers))], questions


def _written(rng: Random, size: int) -> tuple[list[Place], dict[str, str]]:
    """Tiles for pairs, and a number for each of as many keys."""
    tiles = rng.sample(_places(_pairs_across(size)), size)
    return tiles, {key: rng.choice(_DIGITS) for key in rng.sample(KEYS, size)}


def _pairs_across(size: int) -> int:
    """Tiles in a row of the smallest square that has room, of two at least."""
    return max(2, math.isqrt(size - 1) + 1)


def _characters(tiles: list[Place], numbers: dict[str, str]) -> Callable[[Random], Image.Image]:
    def draw(rng: Random) -> Image.Image:
        canvas = Canvas(_pairs_across(len(tiles)) * TILE, rng)
        for place, (key, number) in zip(tiles, numbers.items(), strict=True):
            canvas.pair(key, number, *place)
        return canvas.image

    return draw


def _tiles(content: Mapping[Place, Thing | str], across: int) -> Callable[[Random], Image.Image]:
    """Draws objects and, for the name of a direction, arrows; each in a tile of its own."""

    def draw(rng: Random) -> Image.Image:
        canvas = Canvas(across * TILE, rng)
        for place, what in content.items():
            if isinstance(what, Thing):
                canvas.thing_in_tile(what, *place)
            else:
                canvas.arrow(what, *place)
        return canvas.image

    return draw


def _name(place: Place) -> str:
    return f"row {NUMBERS[place[0] + 1]}, column {NUMBERS[place[1] + 1]}"


def _places(side: int) -> list[Place]:
    return [(row, column) for row in range(side) for column in range(side)]


def _place(camera: Camera, size: int, turns: int) -> Scene:
    content = {place: any_thing(camera.rng) for place in _places(size)}
    asked = camera.rng.sample(sorted(content), min(turns, len(content)))
    questions = [(f"What is in {_name(place)}?", str(content[place])) for place in asked]
    return (None,), [camera.take(_tiles(content, size))], questions


def _arrows(camera: Camera, size: int, turns: int) -> Scene:
    rng = camera.rng
    across = 3 if size <= 2 else 4
    places = _places(across)
    while True:
        # Arrows never leave the image; half of the tiles hold the objects that they may lead to.
        content: dict[Place, Thing | str] = {}
        for place in places:
            inside = [name for name in DIRECTIONS if _next(place, name) in places]
            content[place] = rng.choice(inside) if rng.random() < 0.5 else any_thing(rng)
        ends = {place: _follow(content, place, size) for place in places}
        starts = [place for place, end in ends.items() if end is not None]
        if starts:
            break
    asked = rng.sample(starts, min(turns, len(starts)))
    questions = [(f"Where do the arrows from {_name(place)} lead?", str(ends[place])) for place in asked]
    return (None,), [camera.take(_tiles(content, across))], questions


def _next(place: Place, direction: str) -> Place:
    down, right = DIRECTIONS[direction]
    return place[0] + down, place[1] + right


def _follow(content: Mapping[Place, Thing | str], place: Place, steps: int) -> Thing | None:
    """The object that exactly so many arrows lead to, if they do."""
    for _ in range(steps):
        what = content[place]
        if isinstance(what, Thing):
            return None
        place = _next(place, what)
    end = content[place]
    return end if isinstance(end, Thing) else None


def _frames(camera: Camera, size: int, turns: int) -> Scene:
    things = [any_thing(camera.rng) for _ in range(size)]
    images = [camera.take(lambda rng, thing=thing: scatter(thing, rng)) for thing in things]
    asked = camera.rng.sample(range(size), min(turns, size))
    return _clip(size), images, [(f"What was in frame {NUMBERS[index + 1]}?", str(things[index])) for index in asked]


def _clip(frames: int) -> list[str | None]:
    """What introduces so many frames, with the frames."""
    return [part for number in NUMBERS[1 : frames + 1] for part in (f"Frame {number}:", None)]


def _rule(camera: Camera, size: int, turns: int) -> Scene:
    rng = camera.rng
    entries, things = _any_rule(rng, size)
    shown = [rng.randrange(size) for _ in range(turns)]
    images = [camera.take(lambda rng, index=index: scatter(things[index], rng)) for index in shown]
    return (_rule_text(entries), None), images, [("What does this mean?", entries[index]) for index in shown]


def _any_rule(rng: Random, size: int) -> tuple[list[str], list[Thing]]:
    """What different objects mean, and the objects."""
    things = rng.sample([Thing(colour, shape) for colour in COLOURS for shape in SHAPES], size)
    numbers = rng.sample(NUMBERS, size)
    return [f"{thing} {number}" for thing, number in zip(things, numbers, strict=True)], things


def _rule_text(entries: Sequence[str]) -> str:
    return f"Rule: {', '.join(entries)}."


def _name_it(camera: Camera, size: int, turns: int) -> Scene:
    thing = any_thing(camera.rng)
    return (None,), [camera.take(lambda rng: scatter(thing, rng))], [("What is this?", str(thing))]


def _describe(camera: Camera, size: int, turns: int) -> Scene:
    content = {place: any_thing(camera.rng) for place in _places(size)}
    return (None,), [camera.take(_tiles(content, size))], [("What is there?", ", ".join(map(str, content.values())))]


def _recite(camera: Camera, size: int, turns: int) -> Scene:
    cells, numbers = _written(camera.rng, size)
    in_order = sorted(zip(cells, numbers.items(), strict=True))
    answer = "".join(key + number for _, (key, number) in in_order)
    return (None,), [camera.take(_characters(cells, numbers))], [("Which pairs are there?", answer)]


def _scene(things: Sequence[Thing], camera: Camera) -> Image.Image:
    """Objects, each in another tile."""
    across = 3 if len(things) <= 4 else 4
    content = dict(zip(camera.rng.sample(_places(across), len(things)), things, strict=True))
    return camera.take(_tiles(content, across))


def _seek(camera: Camera, size: int, turns: int) -> Scene:
    cells, numbers = _written(camera.rng, size)
    asked = camera.rng.sample(sorted(numbers), size)
    question = f"{', '.join(asked)}: Which pairs are there?"
    answer = "".join(key + numbers[key] for key in asked)
    return (None,), [camera.take(_characters(cells, numbers))], [(question, answer)]


def _recall(camera: Camera, size: int, turns: int) -> Scene:
    rng = camera.rng
    entries, things = _any_rule(rng, size)
    asked = rng.sample(range(size), min(turns, size))
    return (_rule_text(entries),), [], [(f"What does {things[index]} mean?", entries[index]) for index in asked]


def _recall_all(camera: Camera, size: int, turns: int) -> Scene:
    entries, things = _any_rule(camera.rng, size)
    order = camera.rng.sample(range(size), size)
    asked, answer = (", ".join(str(part[index]) for index in order) for part in (things, entries))
    return (_rule_text(entries),), [], [(f"What do {asked} mean?", answer)]


def _colour(camera: Camera, size: int, turns: int) -> Scene:
    rng = camera.rng
    things = [Thing(rng.choice(tuple(COLOURS)), shape) for shape in rng.sample(SHAPES, size)]
    asked = rng.sample(things, min(turns, size))
    questions = [(f"What colour is the {thing.shape}?", f"{thing.shape} {thing.colour}") for thing in asked]
    return (None,), [_scene(things, camera)], questions


def _shape(camera: Camera, size: int, turns: int) -> Scene:
    rng = camera.rng
    things = [Thing(colour, rng.choice(SHAPES)) for colour in rng.sample(tuple(COLOURS), size)]
    asked = rng.sample(things, min(turns, size))
    return (None,), [_scene(things, camera)], [(f"What shape is {thing.colour}?", thing.shape) for thing in asked]


def _colours(camera: Camera, size: int, turns: int) -> Scene:
    rng = camera.rng
    things = [Thing(rng.choice(tuple(COLOURS)), shape) for shape in rng.sample(SHAPES, size)]
    asked = ", ".join(thing.shape for thing in things)
    answer = ", ".join(f"{thing.shape} {thing.colour}" for thing in things)
    return (None,), [_scene(things, camera)], [(f"{asked}: What colour?", answer)]


def _count(camera: Camera, size: int, turns: int) -> Scene:
    rng = camera.rng
    wanted = rng.choice([*COLOURS, *SHAPES])
    number = rng.randint(0, size // 2)
    things: list[Thing] = []
    while len(things) < size:
        thing = any_thing(rng)
        if (wanted in thing) == (len(things) < number):
            things.append(thing)
    # Numbers of all else aren't uniform; so only the first question serves for measuring.
    others = rng.sample([kind for kind in (*COLOURS, *SHAPES) if kind != wanted], turns - 1)
    asked = [(kind, sum(kind in thing for thing in things)) for kind in (wanted, *others)]
    questions = [(f"How many {_plural(kind)} are there?", NUMBERS[number]) for kind, number in asked]
    return (None,), [_scene(things, camera)], questions


def _plural(kind: str) -> str:
    return f"{kind} things" if kind in COLOURS else {"cross": "crosses"}.get(kind, f"{kind}s")


def _change(camera: Camera, size: int, turns: int) -> Scene:
    rng = camera.rng
    answer = rng.choice(CHANGES)
    before, after = any_thing(rng), any_thing(rng)
    places = rng.sample(_places(2), 2)
    while before.colour == after.colour or before.shape == after.shape:
        after = any_thing(rng)
    later = {
        "colour": (Thing(after.colour, before.shape), places[0]),
        "shape": (Thing(before.colour, after.shape), places[0]),
        "place": (before, places[1]),
        "nothing": (before, places[0]),
    }[answer]
    changed = rng.randint(1, size - 1)
    clip = [(before, places[0]) if index < changed else later for index in range(size)]
    images = [camera.take(_tiles({place: thing}, 2)) for thing, place in clip]
    return _clip(size), images, [("What changed?", answer)]


_NUM_THINGS = len(COLOURS) * len(SHAPES)

TASKS = {
    task.name: task
    for task in (
        Task(
            "pairs",
            "reading: one of many numbers",
            (4, 8, 16, 24, 32),
            (4, 8),
            8,
            _pairs,
            lambda size: 1 / len(_DIGITS),
        ),
        Task(
            "place",
            "where image tokens stand",
            (2, 3, 4),
            (2, 3),
            4,
            _place,
            lambda size: 1 / _NUM_THINGS,
        ),
        Task(
            "arrows",
            "image tokens that have to mix",
            (1, 2, 3, 4),
            (1,),
            4,
            _arrows,
            lambda size: 1 / _NUM_THINGS,
        ),
        Task(
            "frames",
            "memory of earlier images, each a window of its own",
            (2, 3, 4, 6, 8),
            (2, 3),
            3,
            _frames,
            lambda size: 1 / _NUM_THINGS,
        ),
        Task(
            "rule", "text, then an image that it is about", (2, 4, 6, 8, 10), (2, 4), 3, _rule, lambda size: 1 / size
        ),
        Task("colour", "everyday", (2, 3, 4, 5), (2, 4), 4, _colour, lambda size: 1 / len(COLOURS)),
        Task("shape", "everyday", (2, 3, 4, 5, 6), (2, 4), 4, _shape, lambda size: 1 / len(SHAPES)),
        Task("count", "everyday", (4, 6, 8), (4,), 4, _count, lambda size: 1 / (size // 2 + 1)),
        Task("change", "a short clip", (2, 3, 4), (2,), 1, _change, lambda size: 1 / len(CHANGES)),
    )
}

# What models train on beside the tasks, since it tells them about every tile at once.
LESSONS = {
    task.name: task
    for task in (
        Task("name", "one object", (1,), (1,), 1, _name_it, lambda size: 1 / _NUM_THINGS),
        Task("describe", "every tile", (2, 3, 4), (2, 3), 1, _describe, lambda size: 0.0),
        Task("recall", "a rule, without an image", (2, 4), (2, 4), 4, _recall, lambda size: 1 / size),
        Task("recall all", "a rule in another order", (2, 4, 6), (2, 4, 6), 1, _recall_all, lambda size: 0.0),
        Task("recall more", "a long rule in another order", (4, 8), (4, 8), 1, _recall_all, lambda size: 0.0),
        Task("seek", "every pair in another order", (2, 4, 8), (2, 4, 8), 1, _seek, lambda size: 0.0),
        Task("colours", "every shape's colour", (2, 3, 4, 5), (2, 4, 5), 1, _colours, lambda size: 0.0),
        Task("recite", "every pair", (1, 2, 4, 8), (1, 2, 4, 8), 1, _recite, lambda size: 0.0),
    )
}


def examples(
    split: str,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    seed: int = 0,
    start: int = 0,
    single: bool = False,
) -> Iterator[Example]:
    """Examples of all tasks in turn, of their standard sizes, without an end.

    Args:
        split: one of `SPLITS`.
        tasks: names of the tasks; one that stands there twice comes twice as often.
        seed: seed of the dataset.
        start: index of the first one.
        single: whether to ask one question about each image, instead of several where the task has them.
    """
    index = start
    while True:
        turn, which = divmod(index, len(tasks))
        task = (TASKS | LESSONS)[tasks[which]]
        # A task that stands there more than once has another example each time.
        number = turn * tasks.count(task.name) + tasks[:which].count(task.name)
        size = task.standard[number % len(task.standard)]
        yield task.example(size, split, number, seed=seed, turns=1 if single else task.turns)
        index += 1


def all_questions(standard: int, others: int, split: str = "test", *, seed: int = 0) -> list[Example]:
    """So many questions of each task and standard size, so many of each other size, each about images of its own."""
    return [
        task.example(size, split, index, seed=seed)
        for task in TASKS.values()
        for size in task.sizes
        for index in range(standard if size in task.standard else others)
    ]


def standard_questions(number: int, split: str = "test", *, seed: int = 0) -> list[Example]:
    """So many questions of each task and standard size, each about images of its own."""
    return all_questions(number, 0, split, seed=seed)
