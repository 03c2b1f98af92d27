# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The notebooks run from top to bottom, and what they show is what a run gives."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from tests.notebooks import NOTEBOOKS, ran

pytestmark = pytest.mark.integration


def printed(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """What cells have printed, and what kinds of results they have, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [(output.get("name", output.output_type), output.get("text", "")) for output in outputs]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook(notebook: Path) -> None:
    stored = nbformat.read(notebook, as_version=4)
    with ran(notebook) as (content, hub):
        shown, run = printed(stored), printed(content)
    assert [kind for kind, _ in run] == [kind for kind, _ in shown]
    assert {kind for kind, _ in shown} <= {"stdout", "execute_result", "display_data"}
    assert not re.search(r"/(tmp|home|root|usr)/|localhost|127\.0\.0\.1", notebook.read_text("utf-8"))
    if "publish" in notebook.stem:
        # Losses and scores of a training differ a little from machine to machine.
        scores = [dict(re.findall(r"^(\w+) +(\d+)%$", text, re.M)) for _, text in run]
        before, after, loaded = filter(None, scores)
        assert len(before) == 3 and all(int(before[kind]) < int(after[kind]) for kind in before)
        assert loaded == after
        assert "# my-finetuned-model" in run[-2][1] and run[-2] == shown[-2]
        files = hub.files("me/my-finetuned-model")
        assert files.keys() >= {"README.md", "config.json", "model.safetensors", "processor_config.json"}
    else:
        assert run == shown


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) == 3
