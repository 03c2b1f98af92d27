# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A model card as front matter and text, in which two HTML comments enclose the part that this package writes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

BEGIN = "<!-- casa_hf begin: each push writes this part anew; write before or after it -->"
END = "<!-- casa_hf end -->"

# The last comment that begins a part before one that ends it, so that a stray one takes nothing that people wrote.
_PART = re.compile(r"<!-- casa_hf begin\b(?:(?!<!-- casa_hf begin\b).)*?<!-- casa_hf end -->", re.DOTALL)
_COMMENT = re.compile(r"<!-- casa_hf .*?-->")
_HEADING = re.compile(r"^## (.*)$", re.MULTILINE)

# Fields that make one statement together.
FIELD_GROUPS = (("base_model", "base_model_relation"), ("license", "license_name", "license_link"))


def decode_card(content: bytes, name: str) -> str:
    """The text of a README.md; a byte order mark isn't part of it.

    Args:
        content: of the file.
        name: of the file, for errors.

    Raises:
        ValueError: if it isn't UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} isn't encoded as UTF-8 (at byte {error.start}). Save it as UTF-8.") from error


@dataclass
class Card:
    """A README.md.

    Attributes:
        data: its front matter.
        text: the rest.
        order: of the fields in the front matter.
    """

    data: ModelCardData
    text: str
    order: list[str]

    @classmethod
    def read(cls, readme: str, name: str) -> Card:
        """The card in a text.

        Args:
            readme: the text, with or without front matter.
            name: of the file, for errors.

        Raises:
            ValueError: if the front matter is unusable.
        """
        has_metadata = readme.lstrip().startswith("---")
        block = REGEX_YAML_BLOCK.search(readme) if has_metadata else None
        try:
            order = list(yaml.safe_load(block[2]) or ()) if block else []
            unnamed = [key for key in order if not isinstance(key, str)]
            if unnamed:
                raise ValueError(f"YAML reads a key as {unnamed[0]!r}; put such as on, no, and numbers in quotes")
            card = ModelCard(readme if has_metadata else f"---\n\n---\n{readme}")
        except (ValueError, TypeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"The front matter of {name} can't be read ({reason}). Correct it.") from error
        data = card.data.to_dict()
        if "language" in data:
            data["language"] = _with_norwegian(data["language"])
        return cls(ModelCardData(**data), card.text.strip(), order)

    def write(self) -> str:
        return f"---\n{self.data.to_yaml(original_order=self.order)}\n---\n\n{self.text.strip()}\n"

    def sections(self) -> dict[str | None, str]:
        """The part between the comments: texts by title, without headings; what comes before the first has None."""
        found = _PART.search(self.text)
        if not found:
            return {}
        first, *rest = _HEADING.split(_COMMENT.sub("", found[0]))
        texts = dict(zip(rest[::2], rest[1::2], strict=True))
        return {title: text.strip() for title, text in {None: first, **texts}.items() if text.strip()}

    def set_sections(self, sections: Mapping[str | None, str]) -> None:
        """Write the part between the comments anew, at the end of the text if there is none yet."""
        found = _PART.search(self.text)
        before, after = (self.text[: found.start()], self.text[found.end() :]) if found else (self.text, "")
        first = sections.get(None)
        # Below a title it needs no heading; behind other words it does, or it would seem to be their end.
        is_title = re.fullmatch(r"\s*(# [^\n]*)?\s*", before) is not None
        texts = [] if first is None else [first if is_title else f"## Architecture\n\n{first}"]
        texts += [f"## {title}\n\n{text}" for title, text in sections.items() if title is not None]
        part = "\n\n".join([BEGIN, *texts, END])
        self.text = "\n\n".join(text.strip() for text in (before, part, after) if text.strip())

    def others(self) -> str:
        """The text around the part between the comments."""
        return _PART.sub("\n", self.text).strip()

    def parts(self) -> dict[str, Any]:
        """What the card consists of, by name: fields, sections between the comments, and the text around these."""
        sections = {title or "the introduction": text for title, text in self.sections().items()}
        return {**self.data.to_dict(), **sections, "the text around our part": self.others()}


def _with_norwegian(language: Any) -> Any:
    """Languages, of which YAML 1.1 reads `no` as false."""
    if isinstance(language, list):
        return [_with_norwegian(each) for each in language]
    return "no" if language is False else language


def fields(metadata: Mapping[str, Any], group: Collection[str]) -> dict[str, Any]:
    """Those of some fields that metadata has; an empty text or list says nothing, `false` and 0 do."""
    return {key: metadata[key] for key in group if metadata.get(key) not in (None, "", [], {})}


def union(first: str | list[str] | None, second: str | list[str] | None) -> list[str]:
    """Both without repetition, in order; one name may stand for a list of it."""
    lists = ([value] if isinstance(value, str) else value or [] for value in (first, second))
    return list(dict.fromkeys(name for names in lists for name in names))
