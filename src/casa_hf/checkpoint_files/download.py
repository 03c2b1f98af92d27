# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints from the Hub, in its client's cache."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from ..folder_files import CheckpointError
from .disk import disk_is_full
from .hub_client import hub_token, limit_waiting, reason
from .names import LICENSE_FILES, is_hub_id

# What is downloaded: first everything that decides whether the source can be converted, then the weights.
SMALL_FILES = ("*.json", "*.jinja", "*merges.txt", "README.md", *LICENSE_FILES)
WEIGHT_FILES = ("*.safetensors",)
CODE_FILES = ("*.py",)


def hub_id(source: str | Path, revision: str | None) -> str | None:
    """The Hub id that `source` is, or None for a local folder.

    Raises:
        CheckpointError: if it can be neither, or if a local folder is given with a revision.
    """
    if os.path.isdir(source):
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r} is only for Hub ids, but {source} is a local folder. Leave it out."
            )
        return None
    if not is_hub_id(source):
        raise CheckpointError(
            f"{source} is not a folder. Give the folder of a checkpoint, or a Hub id such as "
            "Qwen/Qwen2.5-VL-3B-Instruct."
        )
    return str(source)


def download(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Download the files at the top level of a Hub repository whose names match a pattern.

    Args:
        repository: Hub id.
        revision: Branch, tag or commit; None for the default branch.
        patterns: Patterns of file names.

    Returns:
        The folder in the Hub's cache; its name is the commit.

    Raises:
        CheckpointError: if the download fails, or the token is unusable.
    """
    limit_waiting()
    hub_token()  # the Hub's client would show an unusable one in its error
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"])
        )
    except Exception as error:  # the Hub's client lets many kinds through, from bad names to broken connections
        if disk_is_full(error):
            raise CheckpointError(
                f"The disk has no room to download {repository} into {constants.HF_HUB_CACHE} ({reason(error)}). Free "
                "some space, or set HF_HOME to a folder on another disk."
            ) from error
        raise CheckpointError(
            f"{repository!r} is not a local folder, and downloading it from the Hub failed ({reason(error)}). Check "
            "the name, the connection and your login (`hf auth login`), or give a local folder."
        ) from error
