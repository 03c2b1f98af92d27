# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the package uses of Transformers that isn't public is listed in `INTERNALS`, and is there in this version.

A name is internal if it starts with an underscore, or is imported from a module of Transformers and isn't in the
namespace `transformers` itself. What these tests can't see: names that are put together at run time, and attributes
without an underscore, of which `INTERNALS` has some by hand.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers

import casa_hf
from casa_hf.transformers_versions import ADDED_IN, INTERNALS, is_older_than

PACKAGE = Path(casa_hf.__file__).parent
FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
OWNERS = sorted({(owner, name) for owners in INTERNALS.values() for owner, names in owners.items() for name in names})


@cache
def nodes_of(file: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(Path(file).read_text("utf-8"))))


def imported(nodes: list[ast.AST]) -> Iterator[tuple[str, str]]:
    """Module of Transformers and name of what is imported from it."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not node.level and f"{node.module}.".startswith("transformers."):
            yield from ((str(node.module), alias.name) for alias in node.names)


def attributes(nodes: list[ast.AST], stored: bool = False) -> set[str]:
    """Names of attributes, also those looked up or stored by name; only those that are stored, if wanted."""
    names = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and (not stored or isinstance(node.ctx, ast.Store))
    }
    functions = ("setattr",) if stored else ("getattr", "hasattr", "setattr", "delattr")
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            names |= {str(part.value) for part in node.args[1:2] if isinstance(part, ast.Constant)}
    return names


def defined(nodes: list[ast.AST]) -> set[str]:
    """Names of functions, classes and variables."""
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def private(names: set[str]) -> set[str]:
    return {name for name in names if re.match(r"_[^_]", name)}


@cache
def in_transformers(module: str) -> set[str]:
    """Names in a module of Transformers, in its classes and of what their instances hold."""
    specification = importlib.util.find_spec(module)
    assert specification is not None and specification.origin is not None
    nodes = nodes_of(specification.origin)
    return defined(nodes) | attributes(nodes, stored=True)


# Modules that only import where their engine is installed, by the beginnings of their names.
ENGINES = {"serving.vllm": "vllm", "serving.lmms_eval": "lmms_eval"}


@cache
def extended() -> dict[tuple[str, str], set[str]]:
    """Modules of Transformers with classes that a class of the package extends, itself or where it is mixed in."""
    modules: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in FILES:
        engine = next((of for at, of in ENGINES.items() if name.startswith(at)), None)
        if engine is not None and importlib.util.find_spec(engine) is None:
            continue  # it has an environment of its own
        if any(isinstance(node, ast.ClassDef) for node in nodes_of(str(FILES[name]))):
            for _, ours in inspect.getmembers(importlib.import_module(f"casa_hf.{name}"), inspect.isclass):
                bases = {base.__module__ for base in ours.__mro__}
                for base in ours.__mro__:
                    modules[base.__module__.removeprefix("casa_hf."), base.__name__] |= bases
    return {ours: {name for name in bases if name.startswith("transformers.")} for ours, bases in modules.items()}


@cache
def known_modules() -> set[str]:
    """Modules of Transformers that the package imports from or whose classes it extends."""
    direct = {module for file in FILES.values() for module, _ in imported(nodes_of(str(file)))} - {"transformers"}
    return direct.union(*extended().values())


@cache
def own_names() -> set[str]:
    """Private names that the package gives to functions, classes, variables, and attributes of `self`, overrides of
    Transformers' own aside."""
    nodes = [node for file in FILES.values() for node in nodes_of(str(file))]
    of_objects = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    return private(defined(nodes) | attributes(list(of_objects), stored=True)) - {name for _, name in OWNERS}


def internals_of(module: str) -> set[str]:
    """Internal names of Transformers that a module of the package uses or overrides."""
    nodes = nodes_of(str(FILES[module]))
    names = {name for _, name in imported(nodes) if name.startswith("_") or name not in transformers.__all__}
    used = private(attributes(nodes)) - own_names()
    names |= {name for name in used if any(name in in_transformers(known) for known in known_modules())}
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            inside = list(ast.walk(node))
            for base in extended().get((module, node.name), ()):
                names |= private(defined(inside) | attributes(inside)) & in_transformers(base)
    return names


def found(path: str) -> Any:
    """A module, or something in one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        owner, _, name = path.rpartition(".")
        return getattr(found(owner), name)


def is_there(owner: str, name: str) -> bool:
    """Whether Transformers has this, as an attribute, or as one that instances are given."""
    try:
        found(f"{owner}.{name}")
    except AttributeError:
        return name in in_transformers(getattr(found(owner), "__module__", owner))
    return True


@pytest.mark.parametrize("module", FILES)
def test_what_is_internal_to_transformers_is_listed(module: str) -> None:
    listed = {name for names in INTERNALS.get(module, {}).values() for name in names}
    missing = sorted(internals_of(module) - listed)
    assert not missing, f"add to INTERNALS[{module!r}] in transformers_versions.py, under the owner: {missing}"


@pytest.mark.parametrize("module", INTERNALS)
def test_what_is_listed_is_used(module: str) -> None:
    nodes = nodes_of(str(FILES[module])) if module in FILES else []
    names = defined(nodes) | attributes(nodes) | {name for _, name in imported(nodes)}
    unused = sorted({name for listed in INTERNALS[module].values() for name in listed} - names)
    assert not unused, f"remove from INTERNALS[{module!r}] in transformers_versions.py: {unused}"


@pytest.mark.parametrize("owner, name", OWNERS)
def test_what_is_listed_is_there(owner: str, name: str) -> None:
    if is_older_than(*ADDED_IN.get(name, (0, 0))):
        pytest.skip("added later")
    if owner.startswith("transformers.cli.serving."):
        pytest.importorskip("fastapi")
    message = f"Transformers {transformers.__version__} has no {owner}.{name}; INTERNALS says where it is used"
    assert is_there(owner, name), message
