# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A model card as metadata and sections, and two cards of one model as one.

A repository's card can be edited on the Hub while the folder that is pushed has a card too. What only one of them says
is kept; where both say different things nobody but the author knows which counts, so that is a conflict, unless one of
the two texts was generated, or the caller says which card counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

# Which of two cards counts where both say different things.
Preference = Literal["folder", "hub"]

# Fields that make one statement together.
FIELD_GROUPS = (("base_model", "base_model_relation"), ("license", "license_name", "license_link"))

INTRODUCTION = "the text before the first section"
UNTRAINED, MADE_BY, TRAINED_ON = "What is untrained", "How it was made", "Training data"

_COLLECTIONS = ("tags", "datasets")
# CommonMark's: an opening one of backticks has none behind it, which would make it code within a line.
_OPENING_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
_CLOSING_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*")

_PLACEHOLDER = re.compile(r"\[?more information needed\]?", re.IGNORECASE)


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


def lines_of(text: str) -> Iterator[tuple[str, bool]]:
    """The lines of a Markdown text, and whether each belongs to a fenced block of code.

    A block that isn't closed goes on to the end, as in CommonMark; its last line comes on top of the text's then, so
    that what is written behind is not in it.
    """
    fence = ""
    for line in text.splitlines():
        if fence:
            closing = _CLOSING_FENCE.fullmatch(line)
            yield line, True
            if closing and closing[1].startswith(fence):
                fence = ""
        else:
            opening = _OPENING_FENCE.match(line)
            fence = opening[1] if opening else ""
            yield line, bool(fence)
    if fence:
        yield fence, True


@dataclass
class CardBody:
    """A card without its front matter, as sections.

    Attributes:
        sections: (title, text with the line of its heading) in order; what comes before the first heading of the
            second level has the title None.
    """

    sections: list[tuple[str | None, str]]

    @classmethod
    def read(cls, text: str) -> CardBody:
        sections: list[tuple[str | None, str]] = [(None, "")]
        for line, is_code in lines_of(text.strip()):
            if line.startswith("## ") and not is_code:
                sections.append((line.removeprefix("## ").strip(), ""))
            title, before = sections[-1]
            sections[-1] = (title, f"{before}{line}\n")
        return cls(sections)

    def get(self, title: str | None) -> str | None:
        """The section of this title without its heading; None if there is none."""
        return next((content(name, text) for name, text in self.sections if name == title), None)

    def set(self, title: str | None, text: str) -> None:
        """Replace the section of this title, or append one; the text has no heading."""
        self.put(next((index for index, (name, _) in enumerate(self.sections) if name == title), None), title, text)

    def put(self, index: int | None, title: str | None, text: str) -> None:
        """Replace the section at an index, or append one; the text has no heading."""
        section = (title, f"## {title}\n\n{text}\n" if title else f"{text}\n")
        if index is None:
            self.sections.append(section)
        else:
            self.sections[index] = section

    def rename(self, old: str, new: str) -> None:
        self.sections = [
            (new, f"## {new}\n\n{content(name, text)}\n") if name == old else (name, text)
            for name, text in self.sections
        ]

    def remove(self, title: str) -> None:
        self.sections = [section for section in self.sections if section[0] != title]

    def write(self) -> str:
        return "\n".join(text.strip() + "\n" for _, text in self.sections if text.strip())


@dataclass
class Card:
    """A README.md.

    Attributes:
        data: its front matter.
        body: the rest.
        order: of the fields in the front matter.
    """

    data: ModelCardData
    body: CardBody
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
        return cls(ModelCardData(**data), CardBody.read(card.text), order)

    def write(self) -> str:
        return f"---\n{self.data.to_yaml(original_order=self.order)}\n---\n\n{self.body.write()}"

    def parts(self) -> dict[str, Any]:
        """What the card consists of: fields of the front matter, and sections by title."""
        texts: dict[str, str] = {}
        for title, text in self.body.sections:
            if text.strip():
                name = title or INTRODUCTION
                texts[name] = f"{texts.get(name, '')}\n{text}".strip()
        return {**self.data.to_dict(), **texts}


def _with_norwegian(language: Any) -> Any:
    """Languages, of which YAML 1.1 reads `no` as false."""
    if isinstance(language, list):
        return [_with_norwegian(each) for each in language]
    return "no" if language is False else language


def content(title: str | None, text: str) -> str:
    """A section without its heading."""
    return (text if title is None else text.partition("\n")[2]).strip()


def merge(
    own: Card,
    there: Card,
    *,
    is_generated: Callable[[str | None, str], bool],
    generated_fields: Collection[Mapping[str, Any]],
    follows: bool,
    prefer: Preference | None,
    fresh: Collection[str | None] = (),
) -> list[str]:
    """Bring what a folder's card says into the card of its repository.

    Args:
        own: the folder's card.
        there: the repository's card, which is changed.
        is_generated: (title, section without heading) -> whether nobody wrote that by hand.
        generated_fields: metadata that is generated, one mapping for each configuration it may come from.
        follows: whether the repository's card describes an earlier version. If so, a section that it doesn't have may
            be new, or removed there on purpose, which is a conflict; otherwise it is new.
        prefer: which card counts in a conflict; None for neither.
        fresh: fields, and titles of sections, in which the folder's card counts whatever `prefer` says.

    Returns:
        Names of the fields and sections in conflict; empty if `prefer` is given.
    """
    there.data, conflicts = _merged_fields(own.data, there.data, generated_fields, prefer, fresh)
    stated = {(title, content(title, text)) for title, text in own.body.sections}
    known = {(title, content(title, text)) for title, text in there.body.sections}
    # Titles may repeat: of the sections that only one card has, the first of a title belong together, and so on.
    others: dict[str | None, list[int]] = {}
    for index, (title, text) in enumerate(there.body.sections):
        if (title, content(title, text)) not in stated:
            others.setdefault(title, []).append(index)
    for title, text in own.body.sections:
        said = content(title, text)
        if not said or _PLACEHOLDER.fullmatch(said) or is_generated(title, said) or (title, said) in known:
            continue
        if title == UNTRAINED and there.body.get(TRAINED_ON) is not None:
            continue  # it was replaced by that
        place = others[title].pop(0) if others.get(title) else None
        present = None if place is None else content(*there.body.sections[place])
        counts = prefer == "folder" or title in fresh
        if present is None:
            is_new = counts or not follows
        else:
            is_new = counts or not present or bool(_PLACEHOLDER.fullmatch(present)) or is_generated(title, present)
        if is_new:
            there.body.put(place, title, said)
        elif prefer is None:
            conflicts.append(title or INTRODUCTION)
    return conflicts


def _merged_fields(
    own: ModelCardData,
    there: ModelCardData,
    generated: Collection[Mapping[str, Any]],
    prefer: Preference | None,
    fresh: Collection[str | None],
) -> tuple[ModelCardData, list[str]]:
    stated, present = own.to_dict(), there.to_dict()
    grouped = {key for group in FIELD_GROUPS for key in group}
    conflicts = []
    for group in (*FIELD_GROUPS, *((key,) for key in stated if key not in grouped)):
        said, says = fields(stated, group), fields(present, group)
        if group[0] not in said or said == says:
            continue
        if group[0] in _COLLECTIONS:
            present[group[0]] = union(says.get(group[0]), said[group[0]])
            continue
        is_written, was_written = (
            all(values != fields(known, group) for known in generated) for values in (said, says)
        )
        counts = prefer == "folder" or group[0] in fresh
        if group[0] not in says or (is_written and (not was_written or counts)):
            present = {key: value for key, value in present.items() if key not in group} | said
        elif is_written and prefer is None:
            conflicts.append(group[0])
    return ModelCardData(**present), conflicts


def fields(metadata: Mapping[str, Any], group: Collection[str]) -> dict[str, Any]:
    """Those of some fields that metadata has; an empty text or list says nothing, `false` and 0 do."""
    return {key: metadata[key] for key in group if metadata.get(key) not in (None, "", [], {})}


def union(first: str | list[str] | None, second: str | list[str] | None) -> list[str]:
    """Both without repetition, in order; one name may stand for a list of it."""
    lists = ([value] if isinstance(value, str) else value or [] for value in (first, second))
    return list(dict.fromkeys(name for names in lists for name in names))
