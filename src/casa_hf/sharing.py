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
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, hf_hub_download
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from .card_merge import UNTRAINED, Card, union
from .configuration_casa import CasaConfig
from .export import modelling_files
from .hub import PresentCard, published_card
from .modeling_casa import CasaForConditionalGeneration as _Model
from .processing_casa import CasaProcessor as _Processor

CARD = "README.md"


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
    readme = _download(api, repository, info, CARD).decode("utf-8", "replace")
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
        """As in Transformers, with the model card of a CASA checkpoint in place of the one that was prepared.

        The one step that `push_to_hub` and `save_pretrained(push_to_hub=True)` share. What somebody wrote into the
        repository's card is kept, see `published_card`.
        """
        folder = Path(working_dir)
        api = HfApi(token=token)
        info = repository_info(api, repo_id, revision)
        weights = [CommitOperationAdd(file.name, str(file)) for file in folder.glob("*.safetensors")]
        present = present_card(api, repo_id, info, weights)
        named = json.loads((folder / "config.json").read_text("utf-8"))
        there = names_of(info) | {file.name for file in folder.iterdir()}
        readme = published_card(
            None,
            self.config,
            repo_id,
            revision=revision,
            with_code="auto_map" in named and {file.name for file in modelling_files()} <= there,
            present=present,
            needs_origin=False,
        )
        # Transformers has added the tags that were asked for to the card of the default branch.
        main = present
        if revision is not None:
            main = present_card(api, repo_id, repository_info(api, repo_id, None), ())
        known = [] if main is None else _tags(main.readme)
        asked = [tag for tag in _tags((folder / CARD).read_text("utf-8")) if tag not in known]
        card = Card.read(readme, CARD)
        card.data["tags"] = union(card.data.get("tags"), asked)
        (folder / CARD).write_text(card.write(), "utf-8")
        return super()._upload_modified_files(
            working_dir, repo_id, files_timestamps, *args, token=token, revision=revision, **kwargs
        )


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


def _tags(readme: str) -> list[str]:
    return union(Card.read(readme, CARD).data.get("tags"), [])
