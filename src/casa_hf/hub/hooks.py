# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Transformers' `push_to_hub` of model and processor by the rules of `casa-hf push`.

The modelling files know nothing of the Hub, and checkpoints that carry their code don't carry this. Here their hook is
filled: a model card that says what the model is, on the branch it goes to, and a look at what the repository holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError

from ..folder_files import own_file, parse_json
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
    is_conflict,
    names_of,
    new_branch,
    outdated,
    present_card,
    read_json,
    refuse_foreign,
    repository_info,
)

# How often a commit is tried while others change the repository.
_ATTEMPTS = 3

# Attributes of a model: the card that a folder has before a call of `save_pretrained`, the tags that one of
# `push_to_hub` asks for.
_FOLDER_CARD, _ASKED_TAGS = "_casa_folder_card", "_casa_asked_tags"


class _Publishing(PublishingHook):
    """What processor and model have in common; it has to follow Transformers' `PushToHubMixin`."""

    def suits_adapters(self, pushed: Any) -> bool:
        """Whether it may go where adapters are."""
        raise NotImplementedError

    def card(
        self,
        pushed: Any,
        folder: Path,
        api: HfApi,
        repository: str,
        info: ModelInfo,
        revision: str | None,
        additions: list[CommitOperationAdd],
    ) -> str | None:
        """The README.md for what a folder holds, on top of a state of the repository; None to leave that one alone."""
        return None

    @contextmanager
    def pushing(self, pushed: Any, repository: str, options: Mapping[str, Any]) -> Iterator[None]:
        """The repository is looked at before anything is saved, see `casa_hf.hub.repositories`."""
        check_repository(repository, options.get("token"), options.get("revision"), self.suits_adapters(pushed))
        yield

    @contextmanager
    def saving(self, saved: Any, folder: Any, options: Mapping[str, Any]) -> Iterator[None]:
        """With `push_to_hub=True` the repository is looked at first too."""
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

        What is written into the repository's card during the upload is kept too: the commit says which one it follows,
        and is made anew where another came first. Weights of an earlier push that new ones don't replace go. A branch
        that doesn't exist is made for it, and removed if it is refused.
        """
        folder, api = Path(folder), client(token)
        names = _modified_files(folder, timestamps)
        attempts = 0
        while True:
            attempts += 1
            info, is_new = repository_info(api, repository, revision)
            refuse_foreign(api, repository, info, self.suits_adapters(pushed))
            additions = [CommitOperationAdd(name, str(own_file(folder, name))) for name in names]
            card = self.card(pushed, folder, api, repository, info, revision, additions)
            if card is not None:
                (folder / CARD).write_text(card, "utf-8")
                additions.append(CommitOperationAdd(CARD, card.encode()))
            # Of weights in one file and in several, those in one would be loaded, new or old.
            brings_weights = any(fnmatch(name, pattern) for name in names for pattern in WEIGHT_FILES)
            saved = [file.name for file in folder.iterdir()]
            removed = outdated(info, saved, WEIGHT_FILES) if brings_weights else []
            operations = [*additions, *map(CommitOperationDelete, removed)]

            def commit(operations: list[Any] = operations, parent: str | None = info.sha) -> Any:
                return api.create_commit(
                    repository,
                    operations,
                    commit_message=commit_message or f"Upload {type(pushed).__name__}",
                    commit_description=commit_description,
                    create_pr=create_pr,
                    revision=revision,
                    parent_commit=parent,
                )

            try:
                if revision is None or not is_new or revision.startswith("refs/pr"):
                    return commit()
                with new_branch(api, repository, revision, str(info.sha)):
                    return commit()
            except HfHubHTTPError as error:
                if attempts == _ATTEMPTS or not is_conflict(error):
                    raise


class _ModelPublishing(_Publishing):
    """Its model card too. What a call asks for is kept at the model while it lasts."""

    def suits_adapters(self, pushed: Any) -> bool:
        return bool(getattr(pushed, "_hf_peft_config_loaded", False))

    @contextmanager
    def saving(self, saved: Any, folder: Any, options: Mapping[str, Any]) -> Iterator[None]:
        """What the card in the folder says is published too.

        A card that is in the folder stays as it is, but for what it says to be untrained. Where there is none, the
        published one comes beside the weights.
        """
        is_pushed = bool(options.get("push_to_hub"))
        file = own_file(folder, CARD) if is_pushed else Path(folder) / CARD
        # Transformers writes the repository's card or a template over it before the upload.
        before = file.read_bytes() if file.is_file() else None
        after = before
        try:
            if before is not None:
                after = without_untrained(decode_card(before, str(file))).encode()
        except ValueError:
            if is_pushed:
                raise  # before anything is written
        is_saved = False
        try:
            with super().saving(saved, folder, options), _remembered(saved, _FOLDER_CARD, after):
                yield
            is_saved = True
        finally:
            kept = after if is_saved else before
            if kept is not None and file.read_bytes() != kept:
                file.write_bytes(kept)

    @contextmanager
    def pushing(self, pushed: Any, repository: str, options: Mapping[str, Any]) -> Iterator[None]:
        # Transformers adds them to the card of the default branch, where they can't be told from those it had.
        with _remembered(pushed, _ASKED_TAGS, options.get("tags")), super().pushing(pushed, repository, options):
            yield

    def card(
        self,
        pushed: Any,
        folder: Path,
        api: HfApi,
        repository: str,
        info: ModelInfo,
        revision: str | None,
        additions: list[CommitOperationAdd],
    ) -> str:
        folder_card, asked_tags = getattr(pushed, _FOLDER_CARD, None), getattr(pushed, _ASKED_TAGS, None)
        config = folder / "config.json"  # adapters have none
        named = (
            parse_json(config.read_bytes(), str(config))
            if config.is_file()
            else read_json(api, repository, info, config.name)
        )
        there = names_of(info) | {addition.path_in_repo for addition in additions}
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
        card.data["tags"] = union(union(card.data.get("tags"), asked_tags), pushed.model_tags)
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
    """Have an attribute at a model for a while."""
    setattr(model, name, value)
    try:
        yield
    finally:
        delattr(model, name)


def _modified_files(folder: Path, timestamps: Mapping[str, float]) -> list[str]:
    """Names of the files in a folder and its folders that came after these times, without the model card."""
    modified = [
        path for path in sorted(folder.iterdir()) if path.stat().st_mtime > timestamps.get(path.name, -math.inf)
    ]
    files = [file for path in modified for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return [file.relative_to(folder).as_posix() for file in files if file != folder / CARD]
