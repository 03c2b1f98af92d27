# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A model card as front matter and text, in which two HTML comments enclose the part that this package writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..checks import one_line
from ..folder_files import CheckpointError

BEGIN = "<!-- casa_hf begin: each push rewrites this part; write before or after it -->"
END = "<!-- casa_hf end -->"

# The last comment that begins a part before one that ends it, so that a stray one takes nothing that people wrote.
_PART = re.compile(r"<!-- casa_hf begin\b(?:(?!<!-- casa_hf begin\b).)*?<!-- casa_hf end -->", re.DOTALL)
_COMMENT = re.compile(r"<!-- casa_hf .*?-->")
_HEADING = re.compile(r"^## (.*)$", re.MULTILINE)

# Fields that complete another one, and make no statement without it.
_COMPLETES = {"base_model_relation": "base_model", "license_name": "license", "license_link": "license"}

# Lists to which names are added.
_LISTS = ("tags", "datasets")


def decode_card(content: bytes, name: str) -> str:
    """The text of a README.md, without a byte-order mark.

    Args:
        content: Content of the file.
        name: Name of the file, for errors.

    Raises:
        CheckpointError: if it isn't UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name} is not UTF-8 text (at byte {error.start}). Save it as UTF-8.") from error


@dataclass
class Card:
    """A README.md.

    Attributes:
        data: Front matter.
        text: Markdown behind the front matter.
        order: Names of the fields in the front matter, in their order.
    """

    data: ModelCardData
    text: str
    order: list[str]

    @classmethod
    def read(cls, readme: str, name: str) -> Card:
        """The card in a text.

        Args:
            readme: Text of the file, with or without front matter.
            name: Name of the file, for errors.

        Raises:
            CheckpointError: if the front matter is unusable.
        """
        has_metadata = readme.lstrip().startswith("---")
        block = REGEX_YAML_BLOCK.search(readme) if has_metadata else None
        try:
            order = list(yaml.safe_load(block[2]) or ()) if block else []
            unnamed = [key for key in order if not isinstance(key, str)]
            if unnamed:
                raise ValueError(f"the key {unnamed[0]!r} isn't a string; put keys such as on, no and 1 in quotes")
            card = ModelCard(readme if has_metadata else f"---\n\n---\n{readme}")
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise CheckpointError(
                f"The front matter of {name} can't be read ({one_line(error)}). Correct it."
            ) from error
        data = card.data.to_dict()
        if "language" in data:
            data["language"] = _with_norwegian(data["language"])
        return cls(ModelCardData(**data), card.text.strip(), order)

    def write(self) -> str:
        return f"---\n{self.data.to_yaml(original_order=self.order)}\n---\n\n{self.text.strip()}\n"

    def set_field(self, name: str, value: Any) -> None:
        """Set a field of the front matter, or remove it if the value is None."""
        fields = {key: old for key, old in self.data.to_dict().items() if key != name}
        self.data = ModelCardData(**fields, **({} if value is None else {name: value}))

    def add_fields(self, fields: Mapping[str, Any]) -> None:
        """Add those fields that the front matter lacks, and those tags and datasets that its lists lack."""
        stated = self.data.to_dict()
        present = {_COMPLETES.get(key, key) for key, value in stated.items() if value not in (None, "", [], {})}
        added = {key: value for key, value in fields.items() if _COMPLETES.get(key, key) not in present}
        lists = {key: union(stated.get(key), fields[key]) for key in _LISTS if fields.get(key)}
        self.data = ModelCardData(**stated | added | lists)

    def sections(self) -> dict[str | None, str]:
        """Sections of the part between the comments by title, without headings; None for what precedes the first."""
        found = _PART.search(self.text)
        if not found:
            return {}
        first, *rest = _HEADING.split(_COMMENT.sub("", found[0]))
        texts = dict(zip(rest[::2], rest[1::2], strict=True))
        return {title: text.strip() for title, text in {None: first, **texts}.items() if text.strip()}

    def set_sections(self, sections: Mapping[str | None, str]) -> None:
        """Replace the part between the comments, or add it at the end of the text."""
        found = _PART.search(self.text)
        before, after = (self.text[: found.start()], self.text[found.end() :]) if found else (self.text, "")
        first = sections.get(None)
        # Below a title it needs no heading; behind other words it does, or it would seem to be their end.
        is_title = re.fullmatch(r"\s*(# [^\n]*)?\s*", before) is not None
        texts = [] if first is None else [first if is_title else f"## Architecture\n\n{first}"]
        texts += [f"## {title}\n\n{text}" for title, text in sections.items() if title is not None]
        part = "\n\n".join([BEGIN, *texts, END])
        self.text = "\n\n".join(text.strip() for text in (before, part, after) if text.strip())

    def parts(self) -> dict[str, Any]:
        """What the card consists of by name: fields, sections between the comments, and the text around these."""
        sections = {title or "the introduction": text for title, text in self.sections().items()}
        return {**self.data.to_dict(), **sections, "the text around our part": _PART.sub("\n", self.text).strip()}


def _with_norwegian(language: Any) -> Any:
    """A language or languages; YAML 1.1 reads Norwegian, `no`, as false."""
    if isinstance(language, list):
        return [_with_norwegian(each) for each in language]
    return "no" if language is False else language


def union(first: str | list[str] | None, second: str | list[str] | None) -> list[str]:
    """Both without repetition, in order; one name may stand for a list of it."""
    lists = ([value] if isinstance(value, str) else value or [] for value in (first, second))
    return list(dict.fromkeys(name for names in lists for name in names))
