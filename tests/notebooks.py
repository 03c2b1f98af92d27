# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The notebooks, run as a reader would run them, with a Hub on this machine.

python -m tests.notebooks    # writes what they print into notebooks/
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

from tests.hub.conftest import process_environment
from tests.hub.loopback import Hub, running_hub

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@contextmanager
def ran(notebook: Path) -> Iterator[tuple[nbformat.NotebookNode, Hub]]:
    """A notebook with what its cells print now, and the Hub that it has published on.

    It runs in a temporary copy of its folder, beside the examples of this repository, and with its package.
    """
    with tempfile.TemporaryDirectory() as name, running_hub() as hub:
        copy, home = Path(name, "notebooks"), Path(name, "home")
        copy.mkdir()
        shutil.copy(notebook, copy)
        Path(name, "examples").symlink_to(ROOT / "examples")
        home.mkdir()
        environment = {
            **os.environ,
            **process_environment(hub, home),
            "IPYTHONDIR": str(home),
            "PYTHONPATH": str(ROOT / "src"),
            "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm would have ipywidgets
        }
        content = nbformat.read(copy / notebook.name, as_version=4)
        # Files rather than ports, so that nobody else on the machine can connect.
        files = {"transport": "ipc", "ip": str(home / "kernel"), "connection_file": str(home / "kernel.json")}
        client = NotebookClient(
            content,
            timeout=300,
            coalesce_streams=True,
            resources={"metadata": {"path": str(copy)}},
            config=Config({"KernelManager": files}),
        )
        client.execute(env=environment)
        for cell in content.cells:
            cell.metadata.pop("execution", None)  # times
            for output in cell.get("outputs", ()):
                output.get("data", {}).pop("image/jpeg", None)  # it is there as PNG
        del content.metadata["language_info"]  # versions
        yield content, hub


def main() -> None:
    """Run all and keep what they print."""
    for notebook in NOTEBOOKS:
        with ran(notebook) as (content, _):
            nbformat.write(content, notebook)


if __name__ == "__main__":
    main()
