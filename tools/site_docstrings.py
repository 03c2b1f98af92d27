# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Docstrings as the site shows them. They are written as Transformers' own, which Markdown alone doesn't understand:

- [`CasaModel`] and [`~media_casa.MediaPolicy`] are links to the reference,
- "a, b: text" under `Args:` and `Attributes:` describes several at once,
- a configuration's fields stand under `Args:`, though no `__init__` has them,
- a colon under `Returns:` is part of the sentence; the type stands in the signature.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

LINK = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
_logger = griffe.get_logger("casa_hf")


class Docstrings(griffe.Extension):
    """What mkdocstrings does to the package before it writes the reference."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite all docstrings; what is wrong with them becomes a warning, which ends a strict build."""
        for owner in objects(pkg):
            if owner.docstring:
                owner.docstring.value = with_links(pkg, owner.docstring.value, owner.path)
                for index, section in enumerate(owner.docstring.parsed):
                    if section.kind is griffe.DocstringSectionKind.returns:
                        _set_type(owner, section)
                    elif section.kind is griffe.DocstringSectionKind.attributes or (
                        section.kind is griffe.DocstringSectionKind.parameters and not _arguments(owner)
                    ):
                        owner.docstring.parsed[index] = _attributes(owner, section)
                    elif section.kind is griffe.DocstringSectionKind.parameters:
                        owner.docstring.parsed[index] = _parameters(owner, section)


def objects(owner: griffe.Module | griffe.Class) -> Iterator[griffe.Object]:
    """A module or class, and all that is defined in it."""
    yield owner
    for member in owner.members.values():
        if isinstance(member, griffe.Alias):
            continue
        if isinstance(member, griffe.Module | griffe.Class):
            yield from objects(member)
        else:
            yield member


def find(package: griffe.Module, name: str) -> str | None:
    """The full name of what a link names: from the package on, or the only one whose full name ends so."""
    try:
        return package[name].canonical_path
    except (KeyError, griffe.AliasResolutionError):
        found = {one.canonical_path for one in objects(package) if one.canonical_path.endswith(f".{name}")}
        return found.pop() if len(found) == 1 else None


def with_links(package: griffe.Module, text: str, place: str = "") -> str:
    """A text whose links are Markdown's; one that leads nowhere becomes a warning about its place."""

    def linked(link: re.Match) -> str:
        short, name = link.groups()
        target = find(package, name)
        if target is None:
            _logger.warning(f"{place}: the link {link[0]} leads to nothing in {package.name}, or to several things")
        return f"[`{name.rpartition('.')[2] if short else name}`][{target}]" if target else f"`{name}`"

    return LINK.sub(linked, text)


def _arguments(owner: griffe.Object) -> dict[str, Any]:
    return {argument.name: argument for argument in getattr(owner, "parameters", ())}


def _parameters(owner: griffe.Object, section: griffe.DocstringSection) -> griffe.DocstringSection:
    known, entries = _arguments(owner), []
    for name, text in _each(section):
        if (argument := known.get(name.lstrip("*"))) is None:
            _logger.warning(f"{owner.path}: there is no argument {name!r}, which the docstring describes")
        else:
            what = {"value": argument.default, "annotation": argument.annotation, "description": text}
            entries.append(griffe.DocstringParameter(name, **what))
    return griffe.DocstringSectionParameters(entries, section.title)


def _attributes(owner: griffe.Object, section: griffe.DocstringSection) -> griffe.DocstringSection:
    known = owner.all_members
    entries = [
        griffe.DocstringAttribute(name, annotation=getattr(known.get(name), "annotation", None), description=text)
        for name, text in _each(section)
    ]
    return griffe.DocstringSectionAttributes(entries, section.title)


def _each(section: griffe.DocstringSection) -> Iterator[tuple[str, str]]:
    """Every name that a section describes, with its description."""
    for entry in section.value:
        # Of attributes, names after the first were taken for its type.
        names = f"{entry.name} {str(entry.annotation).strip('()')}" if entry.name.endswith(",") else entry.name
        for name in names.removesuffix(", ...").split(", "):
            yield name, entry.description


def _set_type(owner: griffe.Object, section: griffe.DocstringSection) -> None:
    """The type that a function's signature gives; what was taken for one goes back to where it stood."""
    for value in section.value:
        stated = getattr(owner, "returns", None) or getattr(owner, "annotation", None)
        if str(value.annotation) != str(stated):
            value.description = f"{value.annotation}: {value.description}"
            value.annotation = stated
