# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Model and processor as the package gives them: Transformers' `push_to_hub` with a model card that says what it is.

The modelling files know nothing of the Hub, and checkpoints that carry their code don't carry this. Their classes get
here the one thing that they lack: Transformers writes a template of a card where there is none, and takes that of the
default branch wherever it pushes to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from .card_merge import UNTRAINED, Card, decode_card, union
from .configuration_casa import CasaConfig
from .export import modelling_files
from .hub import PresentCard, published_card
from .modeling_casa import CasaForConditionalGeneration as _Model
from .processing_casa import CasaProcessor as _Processor

CARD = "README.md"

# How often a commit is tried while others change the repository.
_ATTEMPTS = 3


# ---------------------------------------------------------------- what a repository holds


def names_of(info: ModelInfo | None) -> set[str]:
    """Names of a repository's files; of None, a repository that doesn't exist, none."""
    return set() if info is None else {sibling.rfilename for sibling in info.siblings or ()}


def holds(sibling: RepoSibling, addition: CommitOperationAdd) -> bool:
    """Whether a file in a repository, with its metadata, has the content that an addition brings."""
    if sibling.lfs is not None:
        return sibling.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as stream:
        return sibling.blob_id == git_hash(stream.read())


def read_json(api: HfApi, repository: str, info: ModelInfo, name: str) -> dict[str, Any] | None:
    """A JSON object in a repository; None if the file isn't there, or holds something else."""
    if name not in names_of(info):
        return None
    try:
        content = json.loads(_download(api, repository, info, name))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def present_card(
    api: HfApi, repository: str, info: ModelInfo, additions: Iterable[CommitOperationAdd]
) -> PresentCard | None:
    """The model card that a repository has before a commit; None if it has none.

    Args:
        api: the Hub's client.
        repository: Hub id.
        info: of the repository at the commit before, with the metadata of its files.
        additions: what the commit brings; its weights are compared with those that are there.
    """
    if CARD not in names_of(info):
        return None
    readme = decode_card(_download(api, repository, info, CARD), f"the README.md of {repository}")
    stated = read_json(api, repository, info, "config.json") or {}
    config = None
    if stated.get("model_type") == CasaConfig.model_type:
        try:
            config = CasaConfig.from_dict(stated)
        except Exception:  # of another version, say: then nothing is known about it, as about a card without a model
            config = None
    has_other_weights = False
    if config is not None and UNTRAINED in readme:  # the rest doesn't depend on them, and comparing means reading them
        present = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        has_other_weights = any(
            addition.path_in_repo not in present or not holds(present[addition.path_in_repo], addition)
            for addition in additions
            if addition.path_in_repo.endswith(".safetensors")
        )
    return PresentCard(readme, config, has_other_weights)


def other_model(api: HfApi, repository: str, info: ModelInfo) -> str | None:
    """What model a repository's config.json is of, in words; None if of a CASA checkpoint, or if there is none."""
    if "config.json" not in names_of(info):
        return None
    model_type = (read_json(api, repository, info, "config.json") or {}).get("model_type")
    if model_type == CasaConfig.model_type:
        return None
    return f"a model of type {model_type!r}" if model_type else "a config.json of something else"


def refuse_other_model(api: HfApi, repository: str, info: ModelInfo) -> None:
    """Leave a repository alone whose files a CASA checkpoint would replace by its own.

    Raises:
        ValueError: if it holds another model.
    """
    held = other_model(api, repository, info)
    if held is not None:
        raise ValueError(taken(repository, held))


def taken(repository: str, held: str) -> str:
    """Why nothing is published in a repository, and the way out; `held` is what it holds, in words."""
    return f"{repository} is taken: it holds {held}. Choose another name."


def _download(api: HfApi, repository: str, info: ModelInfo, name: str) -> bytes:
    file = hf_hub_download(
        repository, name, revision=info.sha, token=api.token, endpoint=api.endpoint, library_name="casa_hf"
    )
    return Path(file).read_bytes()


def repository_info(api: HfApi, repository: str, revision: str | None) -> ModelInfo:
    """A repository, with the metadata of its files, at the state that a commit to a branch follows."""
    try:
        return api.model_info(repository, revision=revision, files_metadata=True)
    except RevisionNotFoundError:  # the branch will start from the default one
        return api.model_info(repository, files_metadata=True)


# ---------------------------------------------------------------- the public classes


class CasaForConditionalGeneration(_Model):
    __doc__ = _Model.__doc__

    # The tags that a call of `push_to_hub` asks for.
    _asked_tags: list[str] | str | None = None

    # The card that a folder has before a call of `save_pretrained`.
    _folder_card: bytes | None = None

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; with `push_to_hub=True`, what the card in the folder says is published too.

        A card that is in the folder stays as it is. Where there is none, the published one comes beside the weights.
        """
        file = Path(save_directory) / CARD
        # Transformers writes the repository's card or a template over it before the upload.
        self._folder_card = file.read_bytes() if file.is_file() else None
        if self._folder_card is not None and kwargs.get("push_to_hub"):
            decode_card(self._folder_card, str(file))  # refused before anything is written
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            if self._folder_card is not None and file.read_bytes() != self._folder_card:
                file.write_bytes(self._folder_card)
            self._folder_card = None

    @wraps(_Model.push_to_hub)
    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        # Transformers adds them to the card of the default branch, where they can't be told from those it had.
        self._asked_tags = kwargs.get("tags")
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self._asked_tags = None

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

        The one step that `push_to_hub` and `save_pretrained(push_to_hub=True)` share. What somebody wrote into the
        repository's card is kept, see `published_card`, also what is written during the upload: the commit says which
        one it follows, and is made anew where another came first.
        """
        folder, api = Path(working_dir), HfApi(token=token)
        names = _modified_files(folder, files_timestamps)
        if revision is not None and not revision.startswith("refs/pr"):
            try:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            except HfHubHTTPError as error:  # who may only propose changes has to name a branch that exists
                if not create_pr or error.response.status_code != 403:
                    raise
        attempts = 0
        while True:
            attempts += 1
            info = repository_info(api, repo_id, revision)
            refuse_other_model(api, repo_id, info)
            additions = [CommitOperationAdd(name, str(folder / name)) for name in names]
            card = self._card(folder, api, repo_id, info, revision, additions)
            (folder / CARD).write_text(card, "utf-8")
            try:
                return api.create_commit(
                    repo_id,
                    [*additions, CommitOperationAdd(CARD, card.encode())],
                    commit_message=commit_message or f"Upload {type(self).__name__}",
                    commit_description=commit_description,
                    create_pr=create_pr,
                    revision=revision,
                    parent_commit=info.sha,
                )
            except HfHubHTTPError as error:
                if attempts == _ATTEMPTS or error.response.status_code != 412:
                    raise

    def _card(
        self,
        folder: Path,
        api: HfApi,
        repository: str,
        info: ModelInfo,
        revision: str | None,
        additions: list[CommitOperationAdd],
    ) -> str:
        """The card for what a folder holds, on top of a state of the repository."""
        present = present_card(api, repository, info, additions)
        config = folder / "config.json"  # adapters have none
        named = (
            json.loads(config.read_text("utf-8"))
            if config.is_file()
            else read_json(api, repository, info, config.name)
        )
        there = names_of(info) | {addition.path_in_repo for addition in additions}
        readme = published_card(
            None if self._folder_card is None else _without_untrained(decode_card(self._folder_card, CARD)),
            self.config,
            repository,
            revision=revision,
            with_code="auto_map" in (named or {}) and {file.name for file in modelling_files()} <= there,
            present=present,
            prefer="hub",
            needs_origin=False,
        )
        card = Card.read(readme, CARD)
        card.data["tags"] = union(union(card.data.get("tags"), self._asked_tags), self.model_tags)
        return card.write()


class CasaProcessor(_Processor):
    __doc__ = _Processor.__doc__

    def _upload_modified_files(
        self,
        working_dir: Any,
        repo_id: str,
        files_timestamps: Mapping[str, float],
        *args: Any,
        token: bool | str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers, but the repository's model card stays as it is: a processor has nothing to say there."""
        timestamps = {**files_timestamps, CARD: math.inf}
        return super()._upload_modified_files(
            working_dir, repo_id, timestamps, *args, token=token, revision=revision, **kwargs
        )


def _without_untrained(readme: str) -> str:
    """A folder's card without what it says to be untrained, which a model that is saved there may not be any more."""
    card = Card.read(readme, CARD)
    card.body.remove(UNTRAINED)
    return card.write()


def _modified_files(folder: Path, timestamps: Mapping[str, float]) -> list[str]:
    """Names of the files in a folder and its folders that came after these times, without the model card."""
    modified = [
        path for path in sorted(folder.iterdir()) if path.stat().st_mtime > timestamps.get(path.name, -math.inf)
    ]
    files = [file for path in modified for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return [file.relative_to(folder).as_posix() for file in files if file != folder / CARD]
