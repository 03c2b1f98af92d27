# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a repository on the Hub holds, what may be published there, and the branch that it goes to.

One rule for all ways to publish: a checkpoint goes into a new repository, one without model or processor, or one that
holds a CASA checkpoint. Whoever wants to replace something else deletes its files there first.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from ..checkpoint_files.hub_client import hub_token, limit_waiting
from ..checkpoint_files.shards import INDEX_FILE, SINGLE_FILE
from ..checks import listed
from ..configuration_casa import CasaConfig
from ..folder_files import CheckpointError, parse_json
from .card_parts import Card, decode_card
from .errors import is_lost

CARD = "README.md"
WEIGHT_FILES = (SINGLE_FILE, "model-*-of-*.safetensors", INDEX_FILE)

_BRANCH = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")

# Weights in any format: a repository that holds some belongs to a model.
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)")
# What a Trainer puts beside them, in such formats too.
_STATES = re.compile(r"training_args\.bin|optimizer.*|scheduler\.pt|scaler\.pt|rng_state.*\.pth")
_ADAPTER = re.compile(r"adapter_model(-\d+-of-\d+)?\.(safetensors|bin)")

# Of a processor or tokenizer; none of them says by its name whose it is.
_PROCESSORS = {"preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


def client(token: str | bool | None = None) -> HfApi:
    """The Hub's client, with a valid token and a time-out for each request; see `hub_token`."""
    limit_waiting()
    return HfApi(token=hub_token(token) or False)


def writer(token: str | bool | None = None) -> HfApi:
    """The Hub's client with a token; only the Hub knows whether that may write.

    Args:
        token: Argument of `hub_token`.

    Raises:
        CheckpointError: if there is no token, or it is invalid.
    """
    if hub_token(token) is None:
        raise CheckpointError("No token for the Hub was found. Log in with `hf auth login`, or set HF_TOKEN.")
    return client(token)


def names_of(info: ModelInfo | None) -> set[str]:
    """Names of a repository's files; none of None, a repository that doesn't exist."""
    return set() if info is None else {sibling.rfilename for sibling in info.siblings or ()}


def holds(sibling: RepoSibling, addition: CommitOperationAdd) -> bool:
    """Whether a file in a repository has the content that an addition brings."""
    if sibling.lfs is not None:
        return sibling.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as stream:
        return sibling.blob_id == git_hash(stream.read())


def read_remote_json(api: HfApi, repository: str, info: ModelInfo, name: str) -> dict[str, Any] | None:
    """A JSON object in a repository; None if the file doesn't exist, or holds something else."""
    if name not in names_of(info):
        return None
    try:
        return parse_json(_download(api, repository, info, name), name)
    except ValueError:
        return None


def present_card(api: HfApi, repository: str, info: ModelInfo) -> str | None:
    """The model card that a repository has before a commit; None if it has none.

    Args:
        api: Client of the Hub.
        repository: Hub id.
        info: Information about the repository at the commit before.

    Raises:
        CheckpointError: if it isn't UTF-8, or its front matter can't be read.
    """
    if CARD not in names_of(info):
        return None
    name = f"the {CARD} of {repository}"
    readme = decode_card(_download(api, repository, info, CARD), name)
    Card.read(readme, name)
    return readme


def outdated(info: ModelInfo, contents: Collection[str], patterns: Collection[str]) -> list[str]:
    """Names of a repository's files that match one of the patterns and aren't among those that are sent."""
    return sorted(
        name for name in names_of(info) - set(contents) if any(fnmatch(name, pattern) for pattern in patterns)
    )


def repository_info(api: HfApi, repository: str, revision: str | None) -> tuple[ModelInfo, bool]:
    """A repository in the state that a commit to a branch follows.

    Args:
        api: Client of the Hub.
        repository: Hub id.
        revision: Branch; None for the default one, from which a new one starts.

    Returns:
        Information with the metadata of the files, and whether the branch is yet to be made.

    Raises:
        CheckpointError: if the revision is a tag or a commit, to which nothing can be added.
    """
    try:
        info = api.model_info(repository, revision=revision, files_metadata=True)
    except RevisionNotFoundError:
        return api.model_info(repository, files_metadata=True), True
    if revision is None or revision.startswith("refs/pr/"):
        return info, False
    if revision not in {branch.name for branch in api.list_repo_refs(repository).branches}:
        raise CheckpointError(
            f"revision={revision!r} is a tag or a commit of {repository}, to which nothing can be added. Give the "
            "name of a branch, which may be new."
        )
    return info, False


def check_branch_name(revision: str | None) -> None:
    """Refuse an invalid name of a branch; None is the default one.

    Raises:
        CheckpointError: for such a name.
    """
    if revision is not None and (not _BRANCH.fullmatch(revision) or ".." in revision or revision.startswith("refs/")):
        raise CheckpointError(f"revision={revision!r} is not a valid branch name. Give one such as main or v1.")


def refuse_foreign(api: HfApi, repository: str, info: ModelInfo, suits_adapters: bool = False) -> None:
    """Refuse a repository that holds another model than a CASA checkpoint.

    Args:
        api: Client of the Hub.
        repository: Hub id.
        info: Information about the repository at the commit before.
        suits_adapters: Whether what is published may be added to adapters: other adapters, or a processor.

    Raises:
        CheckpointError: for such a repository.
    """
    held = _foreign(api, repository, info, suits_adapters)
    if held is not None:
        raise CheckpointError(
            f"{repository} is taken: it holds {held}. Choose another name, or delete these files there first."
        )


def check_repository(repository: str, token: str | bool | None, revision: str | None, suits_adapters: bool) -> None:
    """Check before anything is saved or trained whether a repository, if it exists, can be published to.

    Args:
        repository: Hub id, or a name in the user's own namespace.
        token: Argument of `hub_token`.
        revision: Branch; None for the default one.
        suits_adapters: Argument of `refuse_foreign`.

    Raises:
        CheckpointError: if the token or the branch is invalid, the repository holds another model, or its card can't
            be read.
    """
    if revision is None or not revision.startswith("refs/pr/"):
        check_branch_name(revision)
    api = client(token)
    if "/" not in repository:
        if not api.token:
            return  # the Hub says so when the repository is to be made
        repository = f"{api.whoami()['name']}/{repository}"
    try:
        info, is_new = repository_info(api, repository, revision)
    except RepositoryNotFoundError:
        return
    refuse_foreign(api, repository, info, suits_adapters)
    present_card(api, repository, info)
    if revision is not None and not is_new:
        # Transformers reads the default branch's card in any case.
        present_card(api, repository, api.model_info(repository))


@contextmanager
def new_branch(api: HfApi, repository: str, branch: str, start: str) -> Iterator[None]:
    """Make a branch for a commit, and remove it if the commit is refused; it stays if the commit may have arrived.

    Args:
        api: Client of the Hub.
        repository: Hub id.
        branch: Name of the branch.
        start: Hash of the commit that it starts from.
    """
    api.create_branch(repository, branch=branch, revision=start)
    try:
        yield
    except Exception as error:
        if not is_lost(error):
            with suppress(Exception):  # the error of the commit counts
                if api.model_info(repository, revision=branch).sha == start:
                    api.delete_branch(repository, branch=branch)
        raise


def _foreign(api: HfApi, repository: str, info: ModelInfo, suits_adapters: bool) -> str | None:
    """What a repository holds instead of a CASA checkpoint, in words; None if nothing."""
    names = names_of(info)
    if "config.json" in names:
        model_type = (read_remote_json(api, repository, info, "config.json") or {}).get("model_type")
        if model_type == CasaConfig.model_type:
            return None
        return f"a model of type {model_type!r}" if model_type else "a config.json of something else"
    weights = sorted(
        name for name in names if _WEIGHTS.fullmatch(name) and not _STATES.fullmatch(posixpath.basename(name))
    )
    are_adapters = all(_ADAPTER.fullmatch(posixpath.basename(name)) for name in weights)
    if weights and not ("adapter_config.json" in names and are_adapters):
        return f"weights without a config.json ({listed(weights)})"
    if weights and not suits_adapters:
        return f"adapters ({listed(weights)})"
    processors = sorted(names & _PROCESSORS)
    if processors and (read_remote_json(api, repository, info, "processor_config.json") or {}).get(
        "processor_class"
    ) != ("CasaProcessor"):
        return f"a processor or tokenizer of another model ({listed(processors)})"
    return None


def _download(api: HfApi, repository: str, info: ModelInfo, name: str) -> bytes:
    file = hf_hub_download(
        repository, name, revision=info.sha, token=api.token, endpoint=api.endpoint, library_name="casa_hf"
    )
    return Path(file).read_bytes()
