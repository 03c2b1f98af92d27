# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Docstrings as the site shows them. They are written as Transformers' own, which Markdown alone doesn't understand:

- [`CasaModel`] and [`~media_casa.MediaPolicy`] are links to the reference,
- "a, b: text" under `Args:` describes several arguments at once,
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
                    if section.kind is griffe.DocstringSectionKind.parameters:
                        owner.docstring.parsed[index] = _described(owner, section)
                    elif section.kind is griffe.DocstringSectionKind.returns:
                        _set_type(owner, section)


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


def _described(owner: griffe.Object, section: griffe.DocstringSection) -> griffe.DocstringSection:
    """One entry for each argument, with its type and default."""
    arguments = {argument.name: argument for argument in getattr(owner, "parameters", ())}
    is_configuration = isinstance(owner, griffe.Class) and not arguments
    known: dict[str, Any] = owner.members if is_configuration else arguments
    entries: list[Any] = []
    for described in section.value:
        for name in described.name.removesuffix(", ...").split(", "):
            argument = known.get(name.lstrip("*"))
            if argument is None:
                _logger.warning(f"{owner.path}: there is no argument {name!r}, which the docstring describes")
                continue
            what = {"annotation": argument.annotation, "description": described.description}
            if is_configuration:
                entries.append(griffe.DocstringAttribute(name, **what))
            else:
                entries.append(griffe.DocstringParameter(name, value=argument.default, **what))
    kind = griffe.DocstringSectionAttributes if is_configuration else griffe.DocstringSectionParameters
    return kind(entries, section.title)


def _set_type(owner: griffe.Object, section: griffe.DocstringSection) -> None:
    """The type that a function's signature gives; what was taken for one goes back to where it stood."""
    for value in section.value:
        stated = getattr(owner, "returns", None) or getattr(owner, "annotation", None)
        if str(value.annotation) != str(stated):
            value.description = f"{value.annotation}: {value.description}"
            value.annotation = stated
