# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Write docs/coverage.md from what `coverage` has measured: the last step of `make coverage`."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from coverage import Coverage

ROOT = Path(__file__).parents[1]

PAGE = """\
# Coverage

The quick tests reach **{percent}** of the statements and branches of the package. `make coverage` has measured that on
{date} at commit {commit}, with Python {python}, in the programs that tests start as well. What only the integration
tests, the slow ones, or those on a CUDA device reach isn't counted.

| part of `src` | statements | not reached | branches | not taken | reached |
|---|---|---|---|---|---|
{rows}

`make coverage` writes this page; `.venv/bin/coverage html` shows the lines.
"""


def part_of(file: str) -> str:
    """The row that a file is counted in: its folder, or one for all files that lie flat in the package.

    Args:
        file: path of the file in the repository.
    """
    _, *folders, _ = Path(file).parts
    return "/".join(folders[:2]) + "/" if len(folders) > 1 else "flat modules"


def percent(counts: Counter[str]) -> str:
    """The share of statements and branches that was reached.

    Args:
        counts: numbers named as `coverage json` names them.
    """
    wanted = counts["num_statements"] + counts["num_branches"]
    reached = counts["covered_lines"] + counts["covered_branches"]
    # Rounded down: 100 % says that nothing is missing.
    return f"{1000 * reached // wanted / 10 if wanted else 100.0:.1f} %"


def page(report: dict[str, Any], **facts: str) -> str:
    """The page, from the report of `coverage json`.

    Args:
        report: the report.
        facts: date, commit and version of Python.
    """
    parts: dict[str, Counter[str]] = {}
    for file, found in report["files"].items():
        summary = {key: value for key, value in found["summary"].items() if isinstance(value, int)}
        for part in (part_of(file), "all"):
            parts.setdefault(part, Counter()).update(summary)
    columns = ("num_statements", "missing_lines", "num_branches", "missing_branches")
    rows = [
        f"| {part} | {' | '.join(f'{counts[column]:,}' for column in columns)} | {percent(counts)} |"
        for part, counts in sorted(parts.items(), key=lambda item: (item[0] == "all", item[0]))
    ]
    return PAGE.format(percent=percent(parts["all"]), rows="\n".join(rows), **facts)


def main() -> None:
    """Write the page for this repository."""
    measured = Coverage()
    measured.load()
    with tempfile.TemporaryDirectory() as folder:
        measured.json_report(outfile=f"{folder}/report.json")
        report = json.loads(Path(folder, "report.json").read_text("utf-8"))
    commit = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    text = page(
        report,
        date=datetime.date.today().isoformat(),
        commit=subprocess.run(commit, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip(),
        python=platform.python_version(),
    )
    incomplete = ROOT / "docs" / ".coverage.md.incomplete"
    incomplete.write_text(text, "utf-8")
    incomplete.replace(ROOT / "docs" / "coverage.md")
    print(text)


if __name__ == "__main__":
    main()
