# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The model card under which a checkpoint is published.

Our part of it, between two HTML comments, is written from scratch each time. The text around it and the front matter
stay as they are; the front matter gets the fields that it lacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ..configuration_casa import CasaConfig
from ..folder_files import CheckpointError
from .card_parts import Card
from .card_text import CITATION, HUB_NAME, datasets_text, intro_text, license_text, metadata, usage_text
from .origins import recorded_origins

UNTRAINED, MADE_BY = "What is untrained", "How it was made"
TRAINED_ON, PROCEDURE = "Training data", "Training procedure"

# In the card that Transformers' Trainer writes.
_RESULTS = re.compile(r"^It achieves the following results on the evaluation set:\n(?:- .*(?:\n|\Z))+", re.MULTILINE)
_PROCEDURE = re.compile(rf"^## {PROCEDURE}\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def published_card(
    readme: str | None,
    config: CasaConfig,
    repository: str,
    *,
    revision: str | None = None,
    datasets: Sequence[str] = (),
    with_code: bool = False,
    present: str | None = None,
    procedure: str | None = None,
    needs_origin: bool = True,
) -> str:
    """The README.md under which a checkpoint is published.

    Args:
        readme: README.md of the folder; None if it has none. Its part tells what is untrained, and how the checkpoint
            was made and trained.
        config: Configuration of the checkpoint.
        repository: Hub id.
        revision: Branch that it is published on; None for the default one.
        datasets: Hub ids or names of what it was trained on; empty for what the folder's card says.
        with_code: Whether the repository carries the code to load it with `trust_remote_code=True`.
        present: README.md that the repository has there, whose text and front matter stay; None if it has none, or
            the folder's takes its place.
        procedure: Markdown on how it was trained, by a run whose results `readme` states in its front matter; None for
            what the folder's card says.
        needs_origin: Whether a card that tells neither base model nor licence is an error.

    Returns:
        Markdown with front matter.

    Raises:
        CheckpointError: if the front matter of a card is unusable, or if neither card nor configuration tells what the
            checkpoint was made from or its licence.
    """
    folder = Card.read(readme or "", "README.md")
    card = folder
    if present is not None:
        card = Card.read(present, f"the README.md of {repository}")
        card.add_fields(folder.data.to_dict())
        if procedure is not None:
            card.set_field("model-index", folder.data.to_dict().get("model-index"))
    origins = recorded_origins(config)
    if needs_origin and not origins and not card.data.get("license") and not card.data.get("base_model"):
        raise CheckpointError(
            "Neither README.md nor config.json says what the checkpoint was made from and under which licence. Add "
            "`base_model` and `license` to the front matter of README.md."
        )
    told = folder.sections()
    trained_on = datasets_text(datasets) or told.get(TRAINED_ON)
    procedure = procedure or told.get(PROCEDURE)
    branch = "" if revision is None else f", revision={json.dumps(revision)}"
    sections = {
        None: intro_text(config, origins),
        UNTRAINED: None if trained_on or procedure else told.get(UNTRAINED),
        TRAINED_ON: trained_on,
        PROCEDURE: procedure,
        MADE_BY: told.get(MADE_BY),
        "Usage": usage_text(json.dumps(repository) + branch, with_code),
        "Licence": license_text(origins),
        "Citation": CITATION,
    }
    card.text = card.text or f"# {repository.rpartition('/')[2]}"
    card.set_sections({title: text for title, text in sections.items() if text})
    card.add_fields(metadata(origins, "image-text-to-text", ["casa"]).to_dict())
    card.add_fields({"datasets": [name for name in datasets if HUB_NAME.fullmatch(name)]})
    tags = [tag for tag in card.data["tags"] if tag != "custom_code"]
    card.data["tags"] = [*tags, "custom_code"] if with_code else tags
    return card.write()


def training_procedure(readme: str) -> str | None:
    """Results and procedure of a run, from the card that Transformers' Trainer writes; None if it tells neither."""
    results, procedure = _RESULTS.search(readme), _PROCEDURE.search(readme)
    return "\n\n".join(text.strip() for text in (results and results[0], procedure and procedure[1]) if text) or None


def without_untrained(readme: str) -> str:
    """A folder's card without its section on what is untrained, which may be wrong once a model is saved there."""
    card = Card.read(readme, "README.md")
    sections = card.sections()
    if UNTRAINED not in sections:
        return readme
    card.set_sections({title: text for title, text in sections.items() if title != UNTRAINED})
    return card.write()
