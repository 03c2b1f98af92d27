# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A few test questions as files: images, and conversations as `casa-hf train` and `load_conversations` read them.

python -m examples.tiny_world.held_out
"""

from __future__ import annotations

import json
from pathlib import Path

from .world import TASKS, Example

FOLDER = Path(__file__).parent / "held_out"
PER_TASK = 2


def held_out() -> list[Example]:
    """The first test questions of each task at its largest standard size; none was chosen for its answer."""
    return [task.example(task.standard[-1], "test", index) for task in TASKS.values() for index in range(PER_TASK)]


def main(folder: Path = FOLDER) -> None:
    """Write them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, example in enumerate(held_out()):
        names = []
        for place, image in enumerate(example.images):
            names.append(f"{example.task}-{number % PER_TASK}-{place}.png")
            image.save(folder / names[-1], optimize=True)
        lines.append(json.dumps({"task": example.task, "messages": example.messages, "images": names}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
