# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A release, step by step: what `make release` and `make dist` run.

    python -m tools.release check    is the last commit ready to be released?
    python -m tools.release build    source distribution and wheel of the last commit, checked, in dist/

Nothing is uploaded. See "Releasing" in CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


class ReleaseError(Exception):
    """What keeps a commit from being released."""


def version_in(root: Path) -> str:
    """The version that the package of a repository states.

    Args:
        root: folder of the repository.
    """
    text = (root / "src" / "casa_hf" / "version.py").read_text("utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise ReleaseError("src/casa_hf/version.py has no line `__version__ = ...`. Restore it.")
    return found[1]


def problems(root: Path) -> list[str]:
    """What is missing before the last commit of a repository can be released: one sentence each, none if it's ready.

    Args:
        root: folder of the repository.
    """
    version, found = version_in(root), []
    if changed := _git(root, "status", "--porcelain").splitlines():
        names = ", ".join(line[3:] for line in changed)
        found.append(f"The working tree has changes that aren't committed: {names}. Commit or remove them.")
    newest = re.search(r"^## (.+)$", (root / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    dated = newest and re.fullmatch(rf"\[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)", newest[1])
    if not dated:
        heading = newest[1] if newest else "missing"
        found.append(f"The first heading of CHANGELOG.md is {heading}. It must be [{version}] - YYYY-MM-DD.")
    citation = (root / "CITATION.cff").read_text("utf-8")
    lines = {"version": version, **({"date-released": dated[1]} if dated else {})}
    for key, value in lines.items():
        if not re.search(rf"^{key}: [\"']?{re.escape(value)}[\"']?$", citation, re.MULTILINE):
            found.append(f"CITATION.cff must have the line `{key}: {value}`.")
    tag = f"v{version}"
    if tag not in _git(root, "tag", "--points-at", "HEAD").split():
        found.append(f"The last commit has no tag {tag}. When all else is ready, run `git tag {tag}`.")
    return found


def build(root: Path, folder: Path, isolated: bool = True) -> list[Path]:
    """Build the source distribution and the wheel of the last commit of a repository, and check them.

    The wheel is built from the source distribution, which must hold the files of the commit and no others.

    Args:
        root: folder of the repository.
        folder: folder that the two files come to.
        isolated: whether the build takes its tools from an environment of its own, which pip downloads.

    Returns:
        The source distribution and the wheel.

    Raises:
        ReleaseError: if the files of the source distribution aren't those of the commit.
    """
    with tempfile.TemporaryDirectory() as tree:
        # Nothing that git ignores can get in.
        with tarfile.open(fileobj=io.BytesIO(_git_bytes(root, "archive", "HEAD"))) as archive:
            archive.extractall(tree, filter="data")
        options = () if isolated else ("--no-isolation",)
        _run(sys.executable, "-m", "build", *options, "--outdir", folder, tree)
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    _compare(source, set(_git(root, "ls-tree", "-r", "-z", "--name-only", "HEAD").split("\0")) - {""})
    _run(sys.executable, "-m", "twine", "check", "--strict", source, wheel)
    return [source, wheel]


def _compare(source: Path, committed: set[str]) -> None:
    with tarfile.open(source) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    packed = {name for name in packed if name != "PKG-INFO" and ".egg-info/" not in name}
    for names, what in ((committed - packed, "lacks"), (packed - committed, "has, although git doesn't,")):
        if names:
            raise ReleaseError(f"{source.name} {what} {', '.join(sorted(names))}. Change MANIFEST.in.")


def try_wheel(root: Path, wheel: Path) -> None:
    """Install a wheel into an empty environment, and run the first commands of the README there.

    Args:
        root: folder of the repository: its pinned versions, and its checkpoint instead of one that is downloaded.
        wheel: the wheel.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        _run(sys.executable, "-m", "venv", f"{folder}/venv")
        python, command = f"{folder}/venv/bin/python", f"{folder}/venv/bin/casa-hf"
        pins = root / "constraints.txt"
        _run(python, "-m", "pip", "install", "--quiet", "--constraint", pins, wheel, env=environment)
        checkpoint = root / "examples" / "tiny_world" / "checkpoints" / "source"
        image = root / "src" / "casa_hf" / "samples" / "cat.jpg"
        for arguments in (
            ["--version"],
            ["convert", checkpoint, "my-casa-model", "--variant", "casa"],
            ["generate", "my-casa-model", "--image", image, "--prompt", "What is this?", "--max-new-tokens", "9"],
        ):
            _run(command, *arguments, cwd=folder, env=environment)


def _run(*command: str | Path, cwd: str | None = None, env: dict[str, str] | None = None) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True, cwd=cwd, env=env)


def _git_bytes(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=root, check=True, stdout=subprocess.PIPE).stdout


def _git(root: Path, *arguments: str) -> str:
    return _git_bytes(root, *arguments).decode()


def main() -> None:
    """Run a step for this repository, and exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("check", "build"))
    try:
        if parser.parse_args().step == "check":
            if found := problems(ROOT):
                raise ReleaseError("\n".join(found))
            return
        dist = ROOT / "dist"
        dist.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=dist) as folder:
            built = build(ROOT, Path(folder))
            try_wheel(ROOT, built[1])
            for file in built:
                file.replace(dist / file.name)
    except ReleaseError as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # what failed has said why
    files = " ".join(f"dist/{file.name}" for file in built)
    print(f"Checked: {files}\nUpload them with `.venv/bin/python -m twine upload {files}`.")


if __name__ == "__main__":
    main()
