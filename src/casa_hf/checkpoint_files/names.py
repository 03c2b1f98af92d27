# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Names of checkpoints and of the files that belong to one."""

import re
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
# Further chat templates, a file for each.
TEMPLATE_FOLDER = "additional_chat_templates"
OTHER_FILES = ("generation_config.json",)
LICENSE_FILES = ("LICENSE*", "NOTICE*")

# A source's processor may be described in these.
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")

# Beside a checkpoint: the source's spare rows that new tokens took, for the way back.
SOURCE_ROWS_FILE = "source_rows.safetensors"

# What each tensor of a checkpoint of the method's authors has become.
RELEASED_NAMES_FILE = "released_names.tsv"

# Of the source's files where the tokenizer has new tokens, as of `SOURCE_ROWS_FILE`, for the way back.
SOURCE_PREFIX = "source_"

# What a conversion reads and copies besides the configuration and the weights, where it is there.
_CARRIED = (*TOKENIZER_FILES, *TEMPLATE_FILES, *OTHER_FILES, *PROCESSOR_FILES)
CARRIED_FILES = (*_CARRIED, *(SOURCE_PREFIX + name for name in _CARRIED))

_KEPT_FILES = (f"{SOURCE_PREFIX}*", f"{SOURCE_PREFIX}{TEMPLATE_FOLDER}/*.jinja", RELEASED_NAMES_FILE)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def template_files(folder: Path) -> tuple[str, ...]:
    """Names of all files with chat templates that a folder may have."""
    further = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    return (*TEMPLATE_FILES, *(f"{TEMPLATE_FOLDER}/{file.name}" for file in further))


def kept_files(folder: Path) -> list[str]:
    """Names of the files that tell where a CASA checkpoint comes from, and which every checkpoint that is made of it
    keeps: the source's, for the way back, and the table of the names in a checkpoint of the method's authors."""
    files = {file for pattern in _KEPT_FILES for file in folder.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(folder).as_posix() for file in files)


def is_hub_id(name: str | Path) -> bool:
    """Whether this can be the id of a repository on the Hub, "namespace/name", and isn't a local file."""
    return _HUB_ID.fullmatch(str(name)) is not None and not Path(name).exists()
