# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Model and processor as the package gives them: Transformers' `push_to_hub` by the rules of `casa-hf push`.

The modelling files know nothing of the Hub, and checkpoints that carry their code don't carry this. Their classes get
here what they lack: a model card that says what the model is, on the branch it goes to, and a look at what the
repository holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatch
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError

from ..folder_files import own_file, parse_json
from ..modeling_casa import CasaForConditionalGeneration as _Model
from ..processing_casa import CasaProcessor as _Processor
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


class _Publishing:
    """What model and processor do differently from Transformers' `PushToHubMixin`, which has to follow."""

    def _suits_adapters(self) -> bool:
        """Whether it may go where adapters are."""
        raise NotImplementedError

    def _card(
        self,
        folder: Path,
        api: HfApi,
        repository: str,
        info: ModelInfo,
        revision: str | None,
        additions: list[CommitOperationAdd],
    ) -> str | None:
        """The README.md for what a folder holds, on top of a state of the repository; None to leave that one alone."""
        return None

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; the repository is looked at before anything is saved, see `casa_hf.hub.repositories`."""
        check_repository(repo_id, kwargs.get("token"), kwargs.get("revision"), self._suits_adapters())
        return super().push_to_hub(repo_id, *args, **kwargs)  # type: ignore[misc]

    def _upload_modified_files(
        self,
        working_dir: Any,
        repo_id: str,
        files_timestamps: Mapping[str, float],
        commit_message: str | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
    ) -> Any:
        """As in Transformers, with the model card of a CASA checkpoint in place of the one that was prepared.

        The one step that `push_to_hub` and `save_pretrained(push_to_hub=True)` share. What is written into the
        repository's card during the upload is kept too: the commit says which one it follows, and is made anew where
        another came first. Weights of an earlier push that new ones don't replace go. A branch that doesn't exist is
        made for it, and removed if it is refused.
        """
        folder, api = Path(working_dir), client(token)
        names = _modified_files(folder, files_timestamps)
        attempts = 0
        while True:
            attempts += 1
            info, is_new = repository_info(api, repo_id, revision)
            refuse_foreign(api, repo_id, info, self._suits_adapters())
            additions = [CommitOperationAdd(name, str(own_file(folder, name))) for name in names]
            card = self._card(folder, api, repo_id, info, revision, additions)
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
                    repo_id,
                    operations,
                    commit_message=commit_message or f"Upload {type(self).__name__}",
                    commit_description=commit_description,
                    create_pr=create_pr,
                    revision=revision,
                    parent_commit=parent,
                )

            try:
                if revision is None or not is_new or revision.startswith("refs/pr"):
                    return commit()
                with new_branch(api, repo_id, revision, str(info.sha)):
                    return commit()
            except HfHubHTTPError as error:
                if attempts == _ATTEMPTS or not is_conflict(error):
                    raise


class CasaForConditionalGeneration(_Publishing, _Model):
    __doc__ = _Model.__doc__

    # The tags that a call of `push_to_hub` asks for.
    _asked_tags: list[str] | str | None = None

    # The card that a folder has before a call of `save_pretrained`.
    _folder_card: bytes | None = None

    def _suits_adapters(self) -> bool:
        return bool(getattr(self, "_hf_peft_config_loaded", False))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; with `push_to_hub=True`, what the card in the folder says is published too.

        A card that is in the folder stays as it is, but for what it says to be untrained. Where there is none, the
        published one comes beside the weights.
        """
        is_pushed = bool(kwargs.get("push_to_hub"))
        file = own_file(save_directory, CARD) if is_pushed else Path(save_directory) / CARD
        # Transformers writes the repository's card or a template over it before the upload.
        before = file.read_bytes() if file.is_file() else None
        after = before
        try:
            if before is not None:
                after = without_untrained(decode_card(before, str(file))).encode()
        except ValueError:
            if is_pushed:
                raise  # before anything is written
        if is_pushed:
            repository = kwargs.get("repo_id") or Path(save_directory).name
            check_repository(repository, kwargs.get("token"), kwargs.get("revision"), self._suits_adapters())
        self._folder_card = after
        is_saved = False
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
            is_saved = True
        finally:
            kept = after if is_saved else before
            if kept is not None and file.read_bytes() != kept:
                file.write_bytes(kept)
            self._folder_card = None

    @wraps(_Model.push_to_hub)
    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        # Transformers adds them to the card of the default branch, where they can't be told from those it had.
        self._asked_tags = kwargs.get("tags")
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self._asked_tags = None

    def _card(
        self,
        folder: Path,
        api: HfApi,
        repository: str,
        info: ModelInfo,
        revision: str | None,
        additions: list[CommitOperationAdd],
    ) -> str:
        config = folder / "config.json"  # adapters have none
        named = (
            parse_json(config.read_bytes(), str(config))
            if config.is_file()
            else read_json(api, repository, info, config.name)
        )
        there = names_of(info) | {addition.path_in_repo for addition in additions}
        readme = published_card(
            None if self._folder_card is None else decode_card(self._folder_card, CARD),
            self.config,
            repository,
            revision=revision,
            with_code="auto_map" in (named or {}) and {file.name for file in modelling_files()} <= there,
            present=present_card(api, repository, info),
            needs_origin=False,
        )
        card = Card.read(readme, CARD)
        card.data["tags"] = union(union(card.data.get("tags"), self._asked_tags), self.model_tags)
        return card.write()


class CasaProcessor(_Publishing, _Processor):
    __doc__ = _Processor.__doc__

    def _suits_adapters(self) -> bool:
        return True  # which are used with it

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in Transformers; with `push_to_hub=True` the repository is looked at first, and its card stays."""
        if push_to_hub:
            repository = kwargs.get("repo_id") or Path(save_directory).name
            check_repository(repository, kwargs.get("token"), kwargs.get("revision"), self._suits_adapters())
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _modified_files(folder: Path, timestamps: Mapping[str, float]) -> list[str]:
    """Names of the files in a folder and its folders that came after these times, without the model card."""
    modified = [
        path for path in sorted(folder.iterdir()) if path.stat().st_mtime > timestamps.get(path.name, -math.inf)
    ]
    files = [file for path in modified for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return [file.relative_to(folder).as_posix() for file in files if file != folder / CARD]
