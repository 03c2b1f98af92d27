# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The start of the command: nothing waits for Transformers that doesn't need it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# As the installed script does it, and then what was imported.
SCRIPT = """
import json, sys
from casa_hf_command import main
sys.argv[0] = "casa-hf"
try:
    main()
except SystemExit as ended:
    print(json.dumps({"code": ended.code or 0, "loaded": sorted({"torch", "transformers"} & sys.modules.keys())}))
"""


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["convert", "--help"], 0),
        (["caption", "--help"], 0),
        (["convrt"], 2),
        (["generate", "me/model", "--promt", "x"], 2),
        (["convert", "me/model", "x", "--variant", "cassa"], 2),
        (["convert", "nowhere/at/all", "x"], 2),
        (["inspect", "nowhere"], 2),
        (["push", "nowhere", "me/model"], 2),
        (["generate", "nowhere/at/all", "--prompt", "x"], 2),
        (["generate", "me/model", "--prompt", "x", "--image", "nowhere.jpg"], 2),
        (["caption", "nowhere.mp4", "--model", "me/model"], 2),
        (["train", "nowhere.yaml"], 2),
    ],
)
def test_help_and_refusals_load_neither_torch_nor_transformers(arguments: list[str], code: int) -> None:
    done = run(*arguments)
    assert json.loads(done.stdout.splitlines()[-1]) == {"code": code, "loaded": []}
    if code:
        assert done.stderr.startswith("Usage: casa-hf")


def test_a_command_that_runs_finds_the_whole_package(casa_folder: Path) -> None:
    done = run("inspect", casa_folder)
    *shown, report = done.stdout.splitlines()
    assert shown[0].split() == ["variant", "casa"]
    assert json.loads(report) == {"code": 0, "loaded": ["torch", "transformers"]}
    assert done.stderr == ""


def test_the_version_names_what_a_bug_report_needs() -> None:
    import torch
    import transformers

    import casa_hf

    shown = run("--version").stdout.splitlines()[0]
    versions = (
        f"casa_hf {casa_hf.__version__}",
        f"transformers {transformers.__version__}",
        f"torch {torch.__version__}",
    )
    assert all(version in shown for version in versions)


def test_the_shell_completes_commands_and_variants() -> None:
    words = {"_CASA_HF_COMPLETE": "complete_bash", "COMP_CWORD": "1", "COMP_WORDS": "casa-hf con"}
    assert run(**words).stdout.splitlines()[0] == "convert"
    words |= {"COMP_CWORD": "5", "COMP_WORDS": "casa-hf convert a b --variant casa-"}
    completed = run(**words).stdout.split()
    assert {"casa-shared", "casa-replace", "casa-before", "casa-ffn"} <= set(completed) and "ca-ffn" not in completed


def test_an_unconverted_checkpoint_is_named_before_it_is_loaded(source_folder: Path) -> None:
    done = run("generate", source_folder, "--prompt", "x")
    assert json.loads(done.stdout.splitlines()[-1]) == {"code": 2, "loaded": []}
    assert "qwen2_5_vl" in done.stderr and f"casa-hf convert {source_folder} OUTPUT" in " ".join(done.stderr.split())
