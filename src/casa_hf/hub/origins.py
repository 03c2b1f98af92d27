# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where a checkpoint comes from, and under which licence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from ..checkpoint_files.names import LICENSE_FILES
from ..configuration_casa import CasaConfig


@dataclass(frozen=True)
class Origin:
    """Where a source checkpoint comes from.

    Attributes:
        name: Hub id, or name of a local folder.
        on_hub: Whether `name` is a Hub id.
        commit: Hash of the Hub's commit, where known.
    """

    name: str
    on_hub: bool
    commit: str | None = None

    @classmethod
    def of(cls, folder: Path) -> Origin:
        """The origin of a folder; the path of one in the Hub's download cache tells repository and commit."""
        folder = folder.absolute()
        repository, snapshots = folder.parent.parent.name, folder.parent.name
        if repository.startswith("models--") and snapshots == "snapshots":
            return cls(repository.removeprefix("models--").replace("--", "/"), on_hub=True, commit=folder.name)
        return cls(folder.name, on_hub=False)

    def described(self) -> str:
        """The origin as the subject of a sentence in Markdown."""
        if not self.on_hub:
            return f"The checkpoint in the local folder `{self.name}`"
        commit = f" at commit `{self.commit}`" if self.commit else ""
        return f"[{self.name}](https://huggingface.co/{self.name}){commit}"


# An origin, and what its files state about its licence, see `read_license`.
Licensed = tuple[Origin, dict[str, Any]]


def licensed(folder: Path) -> Licensed:
    """Origin and licence of the checkpoint in a folder."""
    return Origin.of(folder), read_license(folder)


def origin_records(origins: Sequence[Licensed]) -> list[dict[str, Any]]:
    """Origins with their licences in the form of `CasaConfig.source_origins`."""
    return [
        {"name": origin.name, "on_hub": origin.on_hub, "commit": origin.commit, "license": stated}
        for origin, stated in origins
    ]


def recorded_origins(config: CasaConfig) -> list[Licensed]:
    """The origins that `CasaConfig.source_origins` holds; empty if it holds none that can be read."""
    try:
        return [
            (Origin(str(entry["name"]), bool(entry["on_hub"]), entry.get("commit")), dict(entry["license"]))
            for entry in config.source_origins or ()
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def read_license(folder: Path) -> dict[str, Any]:
    """The licence that a checkpoint states, as model card metadata.

    Args:
        folder: Folder of the checkpoint; the front matter of its README.md is read, else its licence files count.

    Returns:
        Those of "license", "license_name" and "license_link" that are stated; empty if none is.
    """
    try:
        stated = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        stated = {}
    if stated.get("license"):
        return {key: stated[key] for key in ("license", "license_name", "license_link") if stated.get(key)}
    files = license_files(folder)
    return {"license": "other", "license_link": files[0].name} if files else {}


def license_files(folder: Path) -> list[Path]:
    """The licence texts and notices in a folder."""
    return sorted(file for pattern in LICENSE_FILES for file in folder.glob(pattern) if file.is_file())
