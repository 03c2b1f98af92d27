# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What `make release` checks and builds, on a repository of the files of this one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import casa_hf
from tools.release import ReleaseError, build, problems

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.integration


def git(repository: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=Tester", "-c", "user.email=tester@example.com")
    subprocess.run(["git", *identity, *arguments], cwd=repository, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("these files are in no git repository")
    copy = tmp_path / "repository"
    for name in listed.stdout.split("\0")[:-1]:
        if name.endswith(".safetensors"):
            continue  # 20 MB that change nothing here
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    git(copy, "init", "--quiet")
    git(copy, "add", "--all")
    git(copy, "commit", "--quiet", "--message", "All")
    return copy


def prepare(repository: Path, date: str) -> None:
    """Make the version of a repository ready to be released."""
    version = casa_hf.__version__
    changelog, citation = repository / "CHANGELOG.md", repository / "CITATION.cff"
    text = re.sub(r"^## .+$", f"## [{version}] - {date}", changelog.read_text("utf-8"), count=1, flags=re.M)
    changelog.write_text(text, "utf-8")
    text = re.sub(r"^date-released:.*\n", "", citation.read_text("utf-8"), flags=re.M)
    citation.write_text(f"{text}date-released: {date}\n", "utf-8")
    git(repository, "commit", "--quiet", "--all", "--message", "Release")
    git(repository, "tag", f"v{version}")


def test_a_commit_that_is_ready_has_no_problem(repository: Path) -> None:
    prepare(repository, "2030-01-31")
    assert problems(repository) == []


def test_each_problem_is_named(repository: Path) -> None:
    prepare(repository, "2030-01-31")
    for name, old, new in (
        ("CHANGELOG.md", f"[{casa_hf.__version__}] - 2030-01-31", "[Unreleased]"),
        ("CITATION.cff", f"version: {casa_hf.__version__}", "version: 0.0.9"),
    ):
        file = repository / name
        assert old in file.read_text("utf-8")
        file.write_text(file.read_text("utf-8").replace(old, new), "utf-8")
    (repository / "left-over.txt").write_text("", "utf-8")
    tree, changelog, citation = problems(repository)
    assert "CHANGELOG.md, CITATION.cff, left-over.txt" in tree
    assert "CHANGELOG.md is [Unreleased]" in changelog
    assert f"version: {casa_hf.__version__}" in citation

    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "After the tag")
    *_, tag = problems(repository)
    assert f"no tag v{casa_hf.__version__}" in tag


def test_the_date_of_the_citation_is_that_of_the_changelog(repository: Path) -> None:
    prepare(repository, "2030-01-31")
    file = repository / "CITATION.cff"
    file.write_text(file.read_text("utf-8").replace("2030-01-31", "2030-01-30"), "utf-8")
    assert "`date-released: 2030-01-31`" in problems(repository)[-1]


def test_the_last_commit_is_built_and_nothing_else(repository: Path, tmp_path: Path) -> None:
    (repository / "src" / "casa_hf" / "not_committed.py").write_text("", "utf-8")
    source, wheel = build(repository, tmp_path / "dist", isolated=False)
    assert source.name == f"casa_hf-{casa_hf.__version__}.tar.gz"
    assert wheel.name == f"casa_hf-{casa_hf.__version__}-py3-none-any.whl"

    (repository / "new-folder").mkdir()
    (repository / "new-folder" / "file.txt").write_text("", "utf-8")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "A folder that MANIFEST.in doesn't name")
    with pytest.raises(ReleaseError, match=r"lacks new-folder/file\.txt\. Change MANIFEST\.in"):
        build(repository, tmp_path / "again", isolated=False)
