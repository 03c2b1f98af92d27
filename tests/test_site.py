# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The site: it builds without a warning, has all that is public, and its links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import logging
import os
import pkgutil
import re
import subprocess
import sys
import zlib
from functools import reduce
from pathlib import Path

import griffe
import pytest
import yaml

import casa_hf
from tools.site_docstrings import LINK, Docstrings, find

ROOT = Path(__file__).parents[1]
MODULES = [module.name for module in pkgutil.walk_packages(casa_hf.__path__, "casa_hf.")]


def docstrings() -> list[tuple[str, str]]:
    """Each one in the package, with the name of its module."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    nodes = (
        (name, node)
        for name in MODULES
        for node in ast.walk(ast.parse(Path(importlib.util.find_spec(name).origin).read_text("utf-8")))
    )
    found = ((name, ast.get_docstring(node)) for name, node in nodes if isinstance(node, documented))
    return [(name, docstring) for name, docstring in found if docstring]


@pytest.mark.integration
def test_it_builds_without_a_warning_and_has_all_that_is_public(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr

    _, _, _, _, entries = (tmp_path / "site" / "objects.inv").read_bytes().split(b"\n", 4)
    names = {line.split(" ")[0] for line in zlib.decompress(entries).decode().splitlines()}
    assert names >= {f"casa_hf.{name}" for name in casa_hf.__all__}
    assert names >= {name for name in MODULES if "._" not in name}

    pages = {file: file.read_text("utf-8") for file in (tmp_path / "site").rglob("index.html")}
    assert {file.stem for file in ROOT.glob("docs/*.md")} - {"README"} <= {file.parent.name for file in pages}
    assert {file.stem for file in ROOT.glob("notebooks/*.ipynb")} <= {file.parent.name for file in pages}
    fetched = re.compile(r"<(?:script|img|iframe)[^>]* src=\"?(?:https?:)?//|<link[^>]* href=\"?https?:")
    for file, page in pages.items():
        assert "[<code" not in page, f"{file} has a link that isn't one"
        assert not fetched.search(page), f"{file} fetches something from elsewhere"
        for target in re.findall(r"<a [^>]*href=\"?([^\s\">]+)", page):
            address, _, anchor = target.partition("#")
            if not address.startswith(("http:", "https:", "mailto:")):
                there = (file.parent / address).resolve() if address else file
                there = there / "index.html" if there.is_dir() else there
                assert there.is_file(), f"{file} links to {target}"
                assert not anchor or f'id="{anchor}"' in pages[there], f"{file} links to {target}"


def test_links_of_docstrings_lead_to_what_they_name() -> None:
    package = griffe.load("casa_hf", search_paths=[ROOT / "src"])
    links = {link[2] for _, docstring in docstrings() for link in LINK.finditer(docstring)}
    assert len(links) > 10
    for link in links:
        target = find(package, link)
        assert target is not None, link
        module = max((name for name in MODULES if target.startswith(f"{name}.")), key=len)
        rest = target.removeprefix(f"{module}.").split(".")
        assert reduce(getattr, rest, importlib.import_module(module)) is not None
        assert rest[-1] == link.rpartition(".")[2]


def load(folder: Path, docstring: str | None = None) -> griffe.Module:
    """The package `tiny`, as the site has it; with a docstring, of one function."""
    if docstring is not None:
        (folder / "tiny.py").write_text(f'def do(one: int, two: float = 2) -> str:\n    """{docstring}"""\n', "utf-8")
    ours = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), yaml.SafeLoader)["plugins"][1]["mkdocstrings"]
    return griffe.load(
        "tiny",
        search_paths=[folder],
        extensions=griffe.load_extensions(Docstrings()),
        docstring_parser="google",
        docstring_options=ours["handlers"]["python"]["options"]["docstring_options"],
    )


@pytest.mark.parametrize(
    "docstring, warning",
    [
        ("See [`gone`].", "the link [`gone`] leads to nothing in tiny"),
        (
            "Do.\n\n    Args:\n        one: a number.\n        two, three: others.\n    ",
            "no argument 'three'",
        ),
    ],
)
def test_a_docstring_that_is_wrong_ends_the_build(
    docstring: str, warning: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load(tmp_path, docstring)
    (record,) = caplog.records
    assert warning in record.getMessage()


def test_arguments_and_what_is_returned(tmp_path: Path) -> None:
    returns = "In words: both.\n        In others: see [`do`]."
    docstring = f"Do.\n\n    Args:\n        one, two: a number.\n\n    Returns:\n        {returns}\n    "
    _, arguments, returned = load(tmp_path, docstring)["do"].docstring.parsed
    described = [(entry.name, str(entry.annotation), entry.value, entry.description) for entry in arguments.value]
    assert described == [("one", "int", None, "a number."), ("two", "float", "2", "a number.")]
    (entry,) = returned.value
    assert (str(entry.annotation), entry.description) == ("str", "In words: both.\nIn others: see [`do`][tiny.do].")


def test_attributes(tmp_path: Path) -> None:
    text = "Thing.\n\n    Attributes:\n        one, two, three: numbers.\n        four: another.\n    "
    fields = "    one: int\n    two: float\n    three: int\n"
    (tmp_path / "tiny.py").write_text(f'class Thing:\n    """{text}"""\n\n{fields}', "utf-8")
    _, attributes = load(tmp_path)["Thing"].docstring.parsed
    described = [(entry.name, entry.annotation and str(entry.annotation)) for entry in attributes.value]
    assert described == [("one", "int"), ("two", "float"), ("three", "int"), ("four", None)]
    assert [entry.description for entry in attributes.value] == ["numbers."] * 3 + ["another."]
