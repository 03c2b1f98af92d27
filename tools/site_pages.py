# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Pages of the site that no file under docs/ holds: README, notebooks, and the reference from the package itself.

MkDocs calls the functions whose names begin with `on_` (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from tools.site_docstrings import with_links

ROOT = Path(__file__).parents[1]
PACKAGE = "casa_hf"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add these pages, and the navigation, with the guides in the order of docs/README.md."""
    guides = re.findall(r"^\| \[.*?\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text("utf-8"), re.M)
    notebooks = {f"notebooks/{file.stem}.md": as_markdown(file) for file in sorted(ROOT.glob("notebooks/*.ipynb"))}
    package = griffe.load(PACKAGE, search_paths=[ROOT / "src"])
    assert isinstance(package, griffe.Module)
    names, modules = reference(package)
    start = re.sub(r"`docs/([\w-]+\.md)`", r"[\g<0>](\1)", (ROOT / "README.md").read_text("utf-8"))
    for name, content in ({"start.md": start} | notebooks | names | modules).items():
        files.append(File.generated(config, name, content=content))
    config.nav = [
        {"Guides": ["README.md", {"Start": "start.md"}, *guides]},
        *([{"Notebooks": [*notebooks]}] if notebooks else []),
        {"Reference": [name if name.endswith("index.md") else {Path(name).stem: name} for name in names]},
        {"Modules": [{Path(name).stem: name} for name in modules]},
    ]
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Links out of docs/ lead to the pages of modules and notebooks; other files aren't on the site, and are named."""

    def replacement(link: re.Match) -> str:
        text, folder, path = link.groups()
        if folder == "notebooks":
            return f"[{text}]({folder}/{path.replace('.ipynb', '.md')})"
        module = re.fullmatch(r"(.*?)(?:/__init__)?\.py", path)
        return f"[{text}][{module[1].replace('/', '.')}]" if module and folder == "src" else f"`{folder}/{path}`"

    return re.sub(r"\[([^]]*)\]\(\.\./(\w+)/([^)]*)\)", replacement, markdown)


def as_markdown(file: Path) -> str:
    """A notebook with what its cells printed."""
    parts = []
    for cell in json.loads(file.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![](data:image/png;base64,{''.join(data['image/png']).strip()})")
            else:
                text = "".join(output.get("text", ()) or data.get("text/plain", ())).strip("\n")
                parts.append(f"````text\n{text}\n````")  # a text may itself have fences of three
    return "\n\n".join(parts)


# ------------------------------------------------------------ reference


def reference(package: griffe.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Pages of the package's public names, after a list of them, and of each module and package in it.

    What several modules offer is described once: by the package itself, then by the one nearest to it.
    """
    described: set[str] = set()
    index = [f"# Public names\n\nOf `{PACKAGE}` itself; those of its modules have pages, too.\n\n| | |\n|---|---|"]
    names = {"api/index.md": ""}
    for name in offered(package):
        names[f"api/{name}.md"] = directive(package[name], level=1)
        described.add(package[name].canonical_path)
        index.append(f"| [`{name}`][{PACKAGE}.{name}] | {with_links(package, summary(package[name]))} |")
    names["api/index.md"] = "\n".join(index)

    modules = {}
    for module in submodules(package):
        parts = [section(part, min(part.path.count("."), 2), described) for part in (module, *below(module))]
        modules[f"api/{module.path.replace('.', '/')}.md"] = "\n\n".join(parts)
    return names, modules


def section(module: griffe.Module, level: int, described: set[str]) -> str:
    """A module: what it is for, what it offers that is described already, and the rest."""
    names = offered(module)
    elsewhere = [name for name in names if module[name].canonical_path in described]
    parts = [directive(module, level, members=False)]
    if elsewhere:
        parts.append("Also: " + ", ".join(f"[`{name}`][{module[name].canonical_path}]" for name in elsewhere) + ".")
    parts += [directive(module[name], level + 1) for name in names if name not in elsewhere]
    described |= {module[name].canonical_path for name in names}
    return "\n\n".join(parts)


def directive(target: griffe.Object | griffe.Alias, level: int, **options: Any) -> str:
    """What mkdocstrings puts a description in the place of."""
    return f"::: {target.path}\n    options: {json.dumps({'heading_level': level, **options})}"


def offered(module: griffe.Module) -> list[str]:
    """Public names: those of `__all__`, else what is defined and described here."""
    if module.exports is not None:
        return sorted(str(name) for name in module.exports)
    members = [one for one in module.members.values() if not one.is_alias and not one.is_module]
    return [one.name for one in members if one.docstring and not one.name.startswith("_")]


def submodules(module: griffe.Module) -> list[griffe.Module]:
    """In alphabetical order, without private ones."""
    members = sorted(module.modules.values(), key=lambda one: one.name)
    return [one for one in members if not one.is_alias and not one.name.startswith("_")]


def below(module: griffe.Module) -> Iterator[griffe.Module]:
    """All modules in a package."""
    for one in submodules(module):
        yield one
        yield from below(one)


def summary(target: griffe.Object | griffe.Alias) -> str:
    """The first sentence of a docstring, for a cell of a table."""
    first = target.docstring.value.partition("\n\n")[0].replace("\n", " ") if target.docstring else ""
    return re.split(r"(?<=\.)\s", first)[0].replace("|", r"\|")
