# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Transformers' `push_to_hub` of model and processor by the rules of `casa-hf push`.

The modelling files know nothing of the Hub, and checkpoints that carry their code don't carry this. Here their hook is
filled: the repository is checked first, and the commit brings the model card of a CASA checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo

from ..folder_files import CheckpointError, own_file, read_json
from ..modeling_casa import CasaForConditionalGeneration
from ..processing_casa import CasaProcessor
from ..publishing_hook import PublishingHook
from .card import published_card, without_untrained
from .card_parts import Card, decode_card, union
from .remote_code import modelling_files
from .repositories import (
    CARD,
    WEIGHT_FILES,
    check_repository,
    client,
    names_of,
    new_branch,
    outdated,
    present_card,
    read_remote_json,
    refuse_foreign,
    repository_info,
)

# Attributes of a model during a call: the card that the folder had before one of `save_pretrained`, the tags that one
# of `push_to_hub` asks for.
_FOLDER_CARD, _ASKED_TAGS = "_casa_folder_card", "_casa_asked_tags"


class _Publishing(PublishingHook):
    """What processor and model have in common; it has to follow Transformers' `PushToHubMixin`."""

    def suits_adapters(self, pushed: Any) -> bool:
        """Whether it may be added to a repository with adapters."""
        raise NotImplementedError

    def card(
        self, pushed: Any, folder: Path, api: HfApi, repository: str, info: ModelInfo, revision: str | None
    ) -> str | None:
        """The README.md for what is in a folder and a repository; None to leave the repository's as it is."""
        return None

    @contextmanager
    def pushing(self, pushed: Any, repository: str, options: Mapping[str, Any]) -> Iterator[None]:
        """The repository is checked before anything is saved, see `casa_hf.hub.repositories`."""
        check_repository(repository, options.get("token"), options.get("revision"), self.suits_adapters(pushed))
        yield

    @contextmanager
    def saving(self, saved: Any, folder: Any, options: Mapping[str, Any]) -> Iterator[None]:
        """With `push_to_hub=True` the repository is checked first too."""
        if options.get("push_to_hub"):
            repository = options.get("repo_id") or Path(folder).name
            check_repository(repository, options.get("token"), options.get("revision"), self.suits_adapters(saved))
        yield

    def upload(  # type: ignore[override]
        self,
        pushed: Any,
        upload: Callable[..., Any],
        folder: Any,
        repository: str,
        timestamps: Mapping[str, float],
        commit_message: str | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
    ) -> Any:
        """One commit, with the model card of a CASA checkpoint in place of the one that Transformers has prepared.

        The Hub refuses it if the repository was changed meanwhile. Weights of an earlier push that the new ones don't
        replace are removed. A branch that doesn't exist is made for it, and removed if it is refused.
        """
        folder, api = Path(folder), client(token)
        info, is_new = repository_info(api, repository, revision)
        refuse_foreign(api, repository, info, self.suits_adapters(pushed))
        contents: dict[str, str | bytes] = {
            name: str(own_file(folder, name)) for name in _modified_files(folder, timestamps)
        }
        # Of weights in one file and in several, those in one would be loaded, new or old.
        brings_weights = any(fnmatch(name, pattern) for name in contents for pattern in WEIGHT_FILES)
        removed = outdated(info, [file.name for file in folder.iterdir()], WEIGHT_FILES) if brings_weights else []
        card = self.card(pushed, folder, api, repository, info, revision)
        if card is not None:
            (folder / CARD).write_text(card, "utf-8")
            contents[CARD] = card.encode()
        additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
        makes_branch = revision is not None and is_new and not revision.startswith("refs/pr")
        with new_branch(api, repository, str(revision), str(info.sha)) if makes_branch else nullcontext():
            return api.create_commit(
                repository,
                [*additions, *map(CommitOperationDelete, removed)],
                commit_message=commit_message or f"Upload {type(pushed).__name__}",
                commit_description=commit_description,
                create_pr=create_pr,
                revision=revision,
                parent_commit=info.sha,
            )


class _ModelPublishing(_Publishing):
    """Its model card too."""

    def suits_adapters(self, pushed: Any) -> bool:
        return bool(getattr(pushed, "_hf_peft_config_loaded", False))

    @contextmanager
    def pushing(self, pushed: Any, repository: str, options: Mapping[str, Any]) -> Iterator[None]:
        # Transformers adds them to the card of the default branch, where they can't be told from those it had.
        with _remembered(pushed, _ASKED_TAGS, options.get("tags")), super().pushing(pushed, repository, options):
            yield

    @contextmanager
    def saving(self, saved: Any, folder: Any, options: Mapping[str, Any]) -> Iterator[None]:
        """A folder's card stays, without its section on what is untrained; what it says is published too.

        In a folder without one, the published card is left beside the weights.
        """
        is_pushed = bool(options.get("push_to_hub"))
        file = own_file(folder, CARD) if is_pushed else Path(folder) / CARD
        # Transformers writes the repository's card, or a template, over it before the upload.
        before = kept = file.read_bytes() if file.is_file() else None
        after = before
        try:
            if before is not None:
                after = without_untrained(decode_card(before, str(file))).encode()
        except CheckpointError:
            if is_pushed:
                raise  # before anything is written
        try:
            with super().saving(saved, folder, options), _remembered(saved, _FOLDER_CARD, after):
                yield
            kept = after
        finally:
            if kept is not None and file.read_bytes() != kept:
                file.write_bytes(kept)

    def card(
        self, pushed: Any, folder: Path, api: HfApi, repository: str, info: ModelInfo, revision: str | None
    ) -> str:
        folder_card = getattr(pushed, _FOLDER_CARD, None)
        config = folder / "config.json"  # adapters have none
        named = read_json(config) if config.is_file() else read_remote_json(api, repository, info, config.name)
        there = names_of(info) | {file.name for file in folder.iterdir()}
        readme = published_card(
            None if folder_card is None else decode_card(folder_card, CARD),
            pushed.config,
            repository,
            revision=revision,
            with_code="auto_map" in (named or {}) and {file.name for file in modelling_files()} <= there,
            present=present_card(api, repository, info),
            needs_origin=False,
        )
        card = Card.read(readme, CARD)
        card.data["tags"] = union(union(card.data["tags"], getattr(pushed, _ASKED_TAGS, None)), pushed.model_tags)
        return card.write()


class _ProcessorPublishing(_Publishing):
    def suits_adapters(self, pushed: Any) -> bool:
        return True  # which are used with it


def fill_hooks() -> None:
    """Let `push_to_hub` and `save_pretrained` of model and processor follow these rules."""
    CasaForConditionalGeneration.publishing_hook = _ModelPublishing()
    CasaProcessor.publishing_hook = _ProcessorPublishing()


@contextmanager
def _remembered(model: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a model as long as the block lasts."""
    setattr(model, name, value)
    try:
        yield
    finally:
        delattr(model, name)


def _modified_files(folder: Path, timestamps: Mapping[str, float]) -> list[str]:
    """Names of the files in a folder and its folders that are newer than these times, without the model card."""
    modified = [
        path for path in sorted(folder.iterdir()) if path.stat().st_mtime > timestamps.get(path.name, -math.inf)
    ]
    files = [file for path in modified for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return [file.relative_to(folder).as_posix() for file in files if file != folder / CARD]
