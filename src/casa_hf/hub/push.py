# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint folder becomes a Hub repository: checked, uploaded, and published in one commit.

Files go to the Hub's large-file storage first, which keeps what has arrived; nobody sees them until the one commit at
the end names them all. So a broken transfer leaves the repository as it was, and the next try sends only what is
missing.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import (
    HFValidationError,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)

from ..checkpoint_files.hub_client import reason
from ..checks import one_line
from ..folder_files import CheckpointError, WrongKindError, own_file, read_json
from .card import published_card
from .card_parts import Card, decode_card
from .errors import AGAIN, explained, is_lost
from .publishable import CHECKPOINT_FILES, PublishableCheckpoint, check_checkpoint
from .remote_code import code_files, has_code, modelling_files, names_code, without_auto_map
from .repositories import (
    CARD,
    WEIGHT_FILES,
    check_branch_name,
    holds,
    names_of,
    new_branch,
    outdated,
    present_card,
    read_remote_json,
    refuse_foreign,
    repository_info,
    writer,
)

_COMPLETE = "Whether the commit has arrived isn't known. Try again: that completes it, or finds it complete."

_Operation = CommitOperationAdd | CommitOperationDelete


@dataclass(frozen=True)
class PushReport:
    """What a push has published.

    Attributes:
        repository: Hub id.
        url: Address of the repository.
        commit: Hash of the Hub's commit that holds the checkpoint.
        changed: Whether that is a new commit; False if the repository held the same already.
        files: Names of the checkpoint's files in the repository.
        left_out: Names of what is in the folder and was not sent.
        removed: Names of files of an earlier version that the commit has removed.
        card_changes: Fields and sections of the repository's model card that were changed or removed.
        num_bytes: Size of `files` in bytes.
    """

    repository: str
    url: str
    commit: str
    changed: bool
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    removed: tuple[str, ...]
    card_changes: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True)
class _Target:
    """Where a checkpoint goes.

    Attributes:
        api: Client of the Hub.
        repository: Hub id.
        user: Name of the token's user.
        revision: Branch; None for the default one.
        info: Information about the repository in the state that the commit follows; None if it is yet to be made.
        new_branch: Name of the branch that is yet to be made; None if there is none to make.
    """

    api: HfApi
    repository: str
    user: str
    revision: str | None
    info: ModelInfo | None
    new_branch: str | None


def push_checkpoint(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    with_code: bool = False,
    datasets: Sequence[str] = (),
    card: Literal["folder"] | None = None,
    message: str | None = None,
) -> PushReport:
    """Publish a checkpoint folder with its model card on the Hub, in one commit.

    The folder stays as it is. The repository is made if it doesn't exist; one that holds a CASA checkpoint is brought
    to the folder's state, including files of an older version that the new one doesn't have. A broken or interrupted
    transfer leaves it unchanged, and is resumed by the same call.

    Our part of a model card that is there already is written from scratch, the rest stays; see `published_card`.

    Args:
        folder: Folder of a checkpoint, see `check_checkpoint`.
        repository: Hub id "namespace/name", or "name" in your own namespace.
        private: Whether a new repository is private.
        revision: Branch to publish on, made if it doesn't exist; None for the default one.
        token: Token of the Hub with write access; None for that of `hf auth login` or HF_TOKEN.
        with_code: Whether the repository carries the code that it runs with, so that `trust_remote_code=True` loads it
            where casa_hf isn't installed. Code that the folder carries is published in any case.
        datasets: Hub ids or names of what the model was trained on, for the card.
        card: Value "folder" to replace the repository's model card by the folder's; None to keep what people wrote.
        message: Message of the commit.

    Raises:
        CheckpointError: if the folder can't be published, the repository is taken, not yours, or public while private
            was asked for, a card can't be read, there is no valid token, or the transfer fails. Nothing is published
            then, except where the answer to the commit itself was lost, which the error says.
    """
    _check_arguments(repository, revision, card, datasets)
    checkpoint = check_checkpoint(folder)
    with_code = with_code or has_code(checkpoint.folder)
    target = _find_target(repository, revision, private, token)
    repository = target.repository
    additions = [CommitOperationAdd(name, content) for name, content in _contents(checkpoint, with_code).items()]
    names = {addition.path_in_repo for addition in additions}
    present = _present_card(target, is_replaced=card is not None)
    readme = published_card(
        _folder_card(checkpoint.folder),
        checkpoint.config,
        repository,
        revision=revision,
        datasets=datasets,
        with_code=with_code,
        present=None if card is not None else present,
    )
    _check_license_link(readme, checkpoint.folder, names | names_of(target.info))
    with explained(repository, "Checking the model card", target.user):
        _check_front_matter(target.api, readme)
    additions.append(CommitOperationAdd(CARD, readme.encode()))
    with explained(repository, f"Preparing {repository}", target.user):
        info = target.info or _make(target, private)
        removed = _outdated(target, info, names | {CARD})
    _upload(target, additions)
    operations: list[_Operation] = [*additions, *map(CommitOperationDelete, removed)]
    default_message = f"CASA checkpoint ({checkpoint.config.variant or 'a custom design'})"
    commit = _commit(target, operations, message or default_message, info)
    return PushReport(
        repository=repository,
        url=f"{target.api.endpoint}/{repository}" + ("" if revision is None else f"/tree/{revision}"),
        commit=commit,
        changed=commit != info.sha,
        files=tuple(addition.path_in_repo for addition in additions),
        left_out=checkpoint.left_out,
        removed=tuple(removed),
        card_changes=() if present is None else _card_changes(present, readme),
        num_bytes=sum(addition.upload_info.size for addition in additions),
    )


def _check_arguments(repository: str, revision: str | None, card: str | None, datasets: Sequence[str]) -> None:
    if card not in (None, "folder"):
        raise CheckpointError(f"card={card!r} is unknown. Give 'folder' to replace the card, or leave it out.")
    empty = next((name for name in datasets if not name.strip()), None)
    if empty is not None:
        raise CheckpointError(
            f"datasets={empty!r} is an empty name. Give Hub ids or names of datasets, or leave it out."
        )
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise WrongKindError(
            f"{repository!r} is not a valid name of a repository ({one_line(error)}). Give one such as namespace/name."
        ) from error
    check_branch_name(revision)


# ---------------------------------------------------------------- the repository


def _find_target(repository: str, revision: str | None, private: bool, token: str | None) -> _Target:
    """Look at where the checkpoint is to go; nothing is changed there."""
    api = writer(token)
    with explained(repository, "Asking the Hub who you are"):
        user = api.whoami()["name"]
    repository = repository if "/" in repository else f"{user}/{repository}"
    with explained(repository, f"Preparing {repository}", user):
        try:
            info, is_new = repository_info(api, repository, revision)
        except RepositoryNotFoundError:
            branch = None if revision == DEFAULT_REVISION else revision
            return _Target(api, repository, user, revision, None, branch)
        if private and not info.private:
            raise CheckpointError(
                f"{repository} exists and is public, but private=True was given. Choose another name, change its "
                "visibility in its settings, or leave the option out."
            )
        refuse_foreign(api, repository, info)
    return _Target(api, repository, user, revision, info, revision if is_new else None)


def _make(target: _Target, private: bool) -> ModelInfo:
    """A new repository."""
    try:
        target.api.create_repo(target.repository, private=private or None)
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 409:
            raise
        raise CheckpointError(
            f"{target.repository} is taken: it exists, and the token may not read it ({reason(error)}). Choose "
            "another name, or use a token with access to it."
        ) from error
    return target.api.model_info(target.repository)


def _outdated(target: _Target, info: ModelInfo, contents: set[str]) -> list[str]:
    """Names of files of an earlier version of the checkpoint, which loading the new one might read."""
    # Others may have files of such names.
    carries_code = names_code(read_remote_json(target.api, target.repository, info, "config.json") or {})
    code = [file.name for file in modelling_files()] if carries_code else []
    return outdated(info, contents, [*code, *CHECKPOINT_FILES, *WEIGHT_FILES])


# ---------------------------------------------------------------- what is published


def _contents(checkpoint: PublishableCheckpoint, with_code: bool) -> dict[str, str | bytes]:
    """Path or content of every file by its name in the repository, without the model card."""
    contents: dict[str, str | bytes] = {name: str(file) for name, file in checkpoint.files.items()}
    if has_code(checkpoint.folder):
        return contents
    if with_code:
        return contents | code_files(checkpoint.folder)
    # Classes of code that isn't there would keep the Auto classes from loading the checkpoint.
    for name in ("config.json", "processor_config.json"):
        if "auto_map" in read_json(checkpoint.files[name]):
            contents[name] = without_auto_map(checkpoint.files[name])
    return contents


def _folder_card(folder: Path) -> str | None:
    file = own_file(folder, CARD)
    return decode_card(file.read_bytes(), str(file)) if file.is_file() else None


def _present_card(target: _Target, is_replaced: bool) -> str | None:
    """The repository's model card; None if it has none, or one that can't be read and is replaced."""
    try:
        with explained(target.repository, f"Reading the model card of {target.repository}", target.user):
            return None if target.info is None else present_card(target.api, target.repository, target.info)
    except CheckpointError:
        if is_replaced:
            return None
        raise


def _check_license_link(readme: str, folder: Path, names: set[str]) -> None:
    """Refuse a card that refers to a licence which isn't among the names of the repository's files."""
    link = str(Card.read(readme, CARD).data.get("license_link") or "")
    if link and "://" not in link and posixpath.normpath(link) not in names:
        raise CheckpointError(
            f"The model card refers to the licence {link}, which {folder} doesn't hold. Copy it there from the "
            "checkpoint that this one was made from."
        )


def _check_front_matter(api: HfApi, readme: str) -> None:
    """Ask the Hub whether it accepts a card: a commit with one that it refuses would fail after the upload."""
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"content": readme, "repoType": "model"},
        headers=build_hf_headers(token=api.token, library_name="casa_hf"),
    )
    if response.status_code != 400:
        hf_raise_for_status(response)
        return
    try:
        said = " ".join(error["message"] for error in response.json()["errors"])
    except (ValueError, KeyError, TypeError):
        said = response.text
    raise CheckpointError(
        f"The Hub refuses the front matter of the model card ({reason(ValueError(said))}). Correct it in README.md. "
        f"{AGAIN}"
    )


def _card_changes(before: str, after: str) -> tuple[str, ...]:
    kept = Card.read(after, CARD).parts()
    return tuple(name for name, part in Card.read(before, CARD).parts().items() if kept.get(name) != part)


# ---------------------------------------------------------------- the transfer


def _upload(target: _Target, additions: Sequence[CommitOperationAdd]) -> None:
    """Send the contents of large files."""
    # Small files, of which the Hub may store some as large ones, together; weights one by one: together they would be
    # sent by threads, which an interrupt has to wait for.
    weights = [addition for addition in additions if addition.path_in_repo.endswith(".safetensors")]
    others = [addition for addition in additions if addition not in weights]
    # A new branch is made for the commit alone, so that a transfer that fails leaves none.
    revision = None if target.new_branch else target.revision
    with explained(target.repository, f"The upload to {target.repository}", target.user):
        for batch in (others, *([addition] for addition in weights)):
            target.api.preupload_lfs_files(target.repository, batch, revision=revision, free_memory=False)


def _commit(target: _Target, operations: list[_Operation], message: str, parent: ModelInfo) -> str:
    """The hash of the commit, also where the answer to it got lost and the Hub holds its content."""
    api, repository, branch = target.api, target.repository, target.new_branch
    with explained(repository, f"The commit to {repository}", target.user, when_lost=_COMPLETE):
        try:
            with nullcontext() if branch is None else new_branch(api, repository, branch, str(parent.sha)):
                return api.create_commit(
                    repository,
                    operations,
                    commit_message=message,
                    revision=target.revision,
                    parent_commit=parent.sha,
                ).oid
        except Exception as error:  # as many kinds as `explained` knows
            arrived = _arrived(target, operations) if is_lost(error) else None
            if arrived is None:
                raise
            return arrived


def _arrived(target: _Target, operations: Iterable[_Operation]) -> str | None:
    """The newest commit if it holds what the operations make; None if it doesn't, or the Hub can't be asked."""
    try:
        info = target.api.model_info(target.repository, revision=target.revision, files_metadata=True)
    except Exception:  # the connection is likely still broken
        return None
    present = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    for operation in operations:
        sibling = present.get(operation.path_in_repo)
        if isinstance(operation, CommitOperationDelete):
            if sibling is not None:
                return None
        elif sibling is None or not holds(sibling, operation):
            return None
    return info.sha
