# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint folder becomes a Hub repository: checked, uploaded, and shown to the world in one commit.

Before anything is sent, the folder is read as a user would load it: configuration, processor, the header of every
weight file against the model. Files go to the Hub's large-file storage first, which keeps what has arrived; nobody
sees them until the one commit at the end names them all. So a broken transfer leaves the repository as it was, and the
same call again sends only what is missing.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Literal

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
)
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import (
    HFValidationError,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)
from transformers import GenerationConfig

from ..checkpoint_files.config import read_source_config
from ..checkpoint_files.errors import PublishingError, disk_is_full, listed, one_line
from ..checkpoint_files.names import (
    KEPT,
    LICENSE_FILES,
    PROCESSOR_FILES,
    SOURCE_ROWS_FILE,
    TEMPLATE_FILES,
    TOKENIZER_FILES,
)
from ..checkpoint_files.shards import INDEX_FILE, SINGLE_FILE, read_checkpoint
from ..configuration_casa import CasaConfig
from ..folder_files import check_json, own_file, parse_json
from ..modeling_casa import CasaForConditionalGeneration
from ..processing_casa import CasaProcessor
from .card import PresentCard, published_card
from .card_parts import Card, decode_card
from .remote_code import code_files, has_code, modelling_files, names_code, without_auto_map
from .repositories import (
    CARD,
    WEIGHT_FILES,
    cause_of,
    check_branch_name,
    holds,
    is_local,
    is_lost,
    is_of_gateway,
    names_of,
    new_branch,
    outdated,
    present_card,
    read_json,
    refuse_foreign,
    repository_info,
    writer,
)

# What belongs to a checkpoint besides its weights; optimizer states, logs and the like stay at home.
_CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    *PROCESSOR_FILES,
    *TOKENIZER_FILES,
    *TEMPLATE_FILES,
    "chat_templates/*.jinja",
    *(KEPT + name for name in (*TOKENIZER_FILES, *TEMPLATE_FILES)),
    SOURCE_ROWS_FILE,
)

_AGAIN = "Nothing was published; the same command again sends only what is missing."
_COMPLETE = "Whether the commit has arrived isn't known; the same command again completes it, or finds it complete."


@dataclass(frozen=True)
class PublishableCheckpoint:
    """A folder that has been checked.

    Attributes:
        folder: of the checkpoint.
        config: of the model.
        files: file by name in the repository, without the model card.
        left_out: names of what else lies in the folder.
        num_bytes: size of `files`.
    """

    folder: Path
    config: CasaConfig
    files: dict[str, Path]
    left_out: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True)
class PushReport:
    """What a push has published.

    Attributes:
        repository: Hub id.
        url: address of the repository.
        commit: the Hub's hash of the commit that holds the checkpoint.
        changed: whether that is a new one; False if the repository held the same already.
        files: names of the checkpoint's files in the repository.
        left_out: names of what lies in the folder and was not sent.
        removed: names of files of an earlier version that the commit has taken out.
        card_changes: fields and sections of the repository's model card that are others now, or gone.
        num_bytes: size of `files`.
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
        info: of the repository at the state that the commit follows; None if the repository is yet to be made.
        branch: that is yet to be made there for the commit; None if there is none to make.
    """

    info: ModelInfo | None
    branch: str | None = None


# ---------------------------------------------------------------- the folder


def check_checkpoint(folder: str | Path) -> PublishableCheckpoint:
    """Read a checkpoint folder as somebody would who downloads it, except for the values of its weights.

    Args:
        folder: of a CASA checkpoint, as `convert_checkpoint`, `save_pretrained` of model and processor, or a Trainer
            with `processing_class=processor` writes it.

    Raises:
        PublishingError, ConversionError: if something is missing, broken, or doesn't fit together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishingError(f"{folder} is not a folder. Give the folder of a CASA checkpoint.")
    if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise PublishingError(
            f"{folder} holds a PEFT adapter without its model. Merge it (`merge_and_unload`) and save the result with "
            "save_pretrained, or push the adapter itself with PEFT."
        )
    config = read_source_config(folder)
    if not isinstance(config, CasaConfig):
        raise PublishingError(
            f"{folder} has model_type {config.model_type!r}, it is not a CASA checkpoint. Convert it first "
            "(`casa-hf convert`)."
        )
    if not (folder / "generation_config.json").is_file():
        raise PublishingError(
            f"{folder} has no generation_config.json. Write it with model.generation_config.save_pretrained."
        )
    check_json(folder, _CHECKPOINT_FILES, PublishingError)
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # of values that don't go together
        raise PublishingError(
            f"generation_config.json in {folder} can't be used ({one_line(error)}). Write it anew with "
            "model.generation_config.save_pretrained."
        ) from error
    _check_processor(folder, config)
    weights = _check_weights(folder, config)
    files = _files(folder, weights)
    left_out = tuple(
        sorted(
            entry.name + ("/" if entry.is_dir() else "")
            for entry in folder.iterdir()
            if entry.name != CARD and not any(name.split("/")[0] == entry.name for name in files)
        )
    )
    num_bytes = sum(file.stat().st_size for file in files.values())
    return PublishableCheckpoint(folder, config, files, left_out, num_bytes)


def _check_processor(folder: Path, config: CasaConfig) -> None:
    for name in ("processor_config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise PublishingError(
                f"{folder} has no processor ({name}). Write it there with processor.save_pretrained, or give the "
                "Trainer processing_class=processor."
            )
    try:
        processor = CasaProcessor.from_pretrained(folder)
    except Exception as error:  # tokenizers raises plain exceptions
        raise PublishingError(
            f"The processor in {folder} can't be loaded ({one_line(error)}). Write it anew with "
            "processor.save_pretrained."
        ) from error
    if processor.chat_template is not None:
        try:
            processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
        except Exception as error:  # of Jinja, or whatever the template runs into
            raise PublishingError(
                f"The chat template in {folder} can't say a user's text ({one_line(error)}). Correct it, or write the "
                "source's with processor.save_pretrained."
            ) from error
    pairs = {
        "image_token_id": (config.image_token_id, processor.image_token_id),
        "gist_token_ids": (config.gist_token_ids or [], processor.gist_token_ids),
    }
    for name, (of_model, of_processor) in pairs.items():
        if of_model != of_processor:
            raise PublishingError(
                f"Model and processor in {folder} don't belong together: {name} is {of_model} in config.json and "
                f"{of_processor} in the processor. Save both from the same checkpoint."
            )
    if len(processor.tokenizer) > config.text_config.vocab_size:
        raise PublishingError(
            f"Model and processor in {folder} don't belong together: the tokenizer has {len(processor.tokenizer)} "
            f"tokens, the model embeds {config.text_config.vocab_size}. Save both from the same checkpoint."
        )


def _check_weights(folder: Path, config: CasaConfig) -> set[str]:
    """Names of the weight files, whose tensors are those of the model."""
    stored = read_checkpoint(folder)
    if (folder / SINGLE_FILE).is_file() and (folder / INDEX_FILE).is_file():
        raise PublishingError(
            f"{folder} holds weights twice, as {SINGLE_FILE} and as shards with {INDEX_FILE}. Remove the older ones."
        )
    try:
        with torch.device("meta"):
            model = CasaForConditionalGeneration(config)
    except Exception as error:  # such as the KeyError of an unknown rope_type
        raise PublishingError(
            f"config.json in {folder} describes no model that could be built ({type(error).__name__}: "
            f"{one_line(error)}). Save the model anew with save_pretrained."
        ) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        for name in model.all_tied_weights_keys:
            if name not in stored:
                del wanted[name]
    wrong = sorted(
        f"{name} ({_shape(stored, name)} instead of {_shape(wanted, name)})"
        for name in stored.keys() | wanted.keys()
        if _shape(stored, name) != _shape(wanted, name)
    )
    if wrong:
        raise PublishingError(
            f"The weights in {folder} aren't those of the model that config.json describes: {listed(wrong)}. Save the "
            "model anew with save_pretrained."
        )
    names = {tensor.file.name for tensor in stored.values()}
    return names if SINGLE_FILE in names else names | {INDEX_FILE}


def _shape(tensors: dict, name: str) -> str:
    if name not in tensors:
        return "none"
    return str(list(getattr(tensors[name], "shape", tensors[name])))


def _files(folder: Path, weights: set[str]) -> dict[str, Path]:
    patterns = (*_CHECKPOINT_FILES, *LICENSE_FILES)
    names = weights | {
        file.relative_to(folder).as_posix() for pattern in patterns for file in folder.glob(pattern) if file.is_file()
    }
    if has_code(folder):
        names |= {file.name for file in modelling_files(folder)}
    return {name: own_file(folder, name, PublishingError) for name in sorted(names)}


# ---------------------------------------------------------------- the repository


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
    to the folder's state, files of the older version that the new one doesn't have included. A broken or interrupted
    transfer leaves it unchanged, and is taken up by the same call again.

    A model card that is there already keeps what people wrote; see `published_card`.

    Args:
        folder: of a checkpoint, see `check_checkpoint`.
        repository: Hub id "namespace/name", or "name" for one of your own.
        private: whether a new repository is private.
        revision: branch to publish on, made if it doesn't exist; None for the default one.
        token: of the Hub, with write access; None for that of `hf auth login` or HF_TOKEN.
        with_code: whether the repository carries the code that it runs with, so that `trust_remote_code=True` loads it
            where casa_hf isn't installed. Code that the folder carries is published in any case.
        datasets: what the model was trained on, for the card: Hub ids, or names in words.
        card: "folder" to replace the repository's model card by the folder's; None to keep what people wrote there.
        message: of the commit.

    Raises:
        PublishingError, ConversionError: if the folder isn't publishable, the repository is taken, not yours, or more
            public than asked for, a card can't be read, there is no valid token, or the transfer fails.
            Nothing is published then, except where the answer to the commit itself was lost, which the error says.
    """
    if card not in (None, "folder"):
        raise PublishingError(f'card={card!r} is not possible. Give "folder" to replace the card, or leave it out.')
    if any(not name.strip() for name in datasets):
        raise PublishingError(
            "datasets has an empty name (--dataset). Give Hub ids, or names in words, or leave it out."
        )
    checkpoint = check_checkpoint(folder)
    with_code = with_code or has_code(checkpoint.folder)
    _check_names(repository, revision)
    api = writer(token)
    with explained(repository, "Asking the Hub who you are"):
        user = api.whoami()["name"]
    repository = repository if "/" in repository else f"{user}/{repository}"
    with explained(repository, f"Preparing {repository}", user):
        target = _find_repository(api, repository, private, revision)
    additions = [CommitOperationAdd(name, content) for name, content in _contents(checkpoint, with_code).items()]
    with explained(repository, f"Reading the model card of {repository}", user):
        present = _present_card(api, repository, target.info, must_be_readable=card is None)
    names = {addition.path_in_repo for addition in additions} | names_of(target.info)
    readme = _card(checkpoint, repository, revision, with_code, datasets, present, card == "folder", names)
    additions.append(CommitOperationAdd(CARD, readme.encode()))
    with explained(repository, "Checking the model card", user):
        _check_card(api, readme)
    with explained(repository, f"Preparing {repository}", user):
        info = target.info or _make(api, repository, private)
        removed = _outdated(api, repository, info, {addition.path_in_repo for addition in additions})
    with explained(repository, f"The upload to {repository}", user):
        # Small files, of which the Hub may store some as large ones, together; weights one by one: together they would
        # be sent by threads, which an interrupt has to wait for.
        weights = [addition for addition in additions if addition.path_in_repo.endswith(".safetensors")]
        others = [addition for addition in additions if addition not in weights]
        for batch in (others, *([addition] for addition in weights)):
            # A new branch is made for the commit alone, so that a transfer that fails leaves none.
            api.preupload_lfs_files(repository, batch, revision=None if target.branch else revision, free_memory=False)
    commit = _commit(
        api,
        repository,
        user,
        [*additions, *(CommitOperationDelete(name) for name in removed)],
        message or f"CASA checkpoint ({checkpoint.config.variant or 'a custom design'})",
        revision,
        target.branch,
        info,
    )
    return PushReport(
        repository=repository,
        url=f"{api.endpoint}/{repository}" + ("" if revision is None else f"/tree/{revision}"),
        commit=commit,
        changed=commit != info.sha,
        files=tuple(addition.path_in_repo for addition in additions),
        left_out=checkpoint.left_out,
        removed=tuple(removed),
        card_changes=() if present is None else _card_changes(present.readme, readme),
        num_bytes=sum(addition.upload_info.size for addition in additions),
    )


def _check_names(repository: str, revision: str | None) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise PublishingError(
            f"{repository!r} is no name of a repository ({one_line(error)}). Give one such as namespace/name."
        ) from error
    check_branch_name(revision)


def _contents(checkpoint: PublishableCheckpoint, with_code: bool) -> dict[str, str | bytes]:
    """Path or content of every file by its name in the repository, without the model card."""
    contents: dict[str, str | bytes] = {name: str(file) for name, file in checkpoint.files.items()}
    if not has_code(checkpoint.folder):
        if with_code:
            contents |= code_files(checkpoint.folder)
        else:
            # Classes of code that isn't there would keep the Auto classes from loading the checkpoint.
            for name in ("config.json", "processor_config.json"):
                if "auto_map" in parse_json(checkpoint.files[name].read_bytes(), name, PublishingError):
                    contents[name] = without_auto_map(checkpoint.files[name])
    return contents


def _present_card(api: HfApi, repository: str, info: ModelInfo | None, must_be_readable: bool) -> PresentCard | None:
    try:
        return None if info is None else present_card(api, repository, info)
    except PublishingError:
        if must_be_readable:
            raise
        return None


def _card(
    checkpoint: PublishableCheckpoint,
    repository: str,
    revision: str | None,
    with_code: bool,
    datasets: Sequence[str],
    present: PresentCard | None,
    prefer_folder: bool,
    names: set[str],
) -> str:
    """The model card to publish, which refers to no licence that isn't among the names of the repository's files."""
    readme = own_file(checkpoint.folder, CARD, PublishingError)
    try:
        card = published_card(
            decode_card(readme.read_bytes(), CARD) if readme.is_file() else None,
            checkpoint.config,
            repository,
            revision=revision,
            datasets=datasets,
            with_code=with_code,
            present=present,
            prefer_folder=prefer_folder,
        )
    except ValueError as error:
        raise PublishingError(f"{checkpoint.folder}: {one_line(error)}") from error
    link = str(Card.read(card, CARD).data.get("license_link") or "")
    if link and "://" not in link and posixpath.normpath(link) not in names:
        raise PublishingError(
            f"The model card refers to the licence {link}, which {checkpoint.folder} doesn't hold. Copy it there "
            "from the checkpoint that this one was made from."
        )
    return card


def _check_card(api: HfApi, readme: str) -> None:
    """Ask the Hub whether it accepts a card: a commit with one that it refuses would fail when all is sent."""
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
        said = shorten(response.text, 160, placeholder=" ...")
    raise PublishingError(
        f"The Hub refuses the front matter of the model card ({said}). Correct it in README.md. {_AGAIN}"
    )


def _card_changes(before: str, after: str) -> tuple[str, ...]:
    kept = Card.read(after, CARD).parts()
    return tuple(name for name, part in Card.read(before, CARD).parts().items() if kept.get(name) != part)


def _find_repository(api: HfApi, repository: str, private: bool, revision: str | None) -> _Target:
    """Look where the checkpoint is to go; nothing is changed there."""
    try:
        info, is_new = repository_info(api, repository, revision)
    except RepositoryNotFoundError:
        return _Target(None, branch=None if revision == DEFAULT_REVISION else revision)
    if private and not info.private:
        raise PublishingError(
            f"{repository} exists and is public. Choose another name, make it private in its settings, or leave out "
            "private (--private)."
        )
    refuse_foreign(api, repository, info)
    return _Target(info, branch=revision if is_new else None)


def _make(api: HfApi, repository: str, private: bool) -> ModelInfo:
    """A new repository."""
    _create(api, repository, private)
    return api.model_info(repository)


def _create(api: HfApi, repository: str, private: bool) -> None:
    try:
        api.create_repo(repository, private=private or None)
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 409:
            raise
        raise PublishingError(
            f"{repository} is taken: it exists, and the token may not read it ({_reason(error)}). Choose another "
            "name, or use a token with access to it."
        ) from error


def _outdated(api: HfApi, repository: str, info: ModelInfo, contents: set[str]) -> list[str]:
    """Names of files of an earlier version of the checkpoint, which loading the new one might pick up."""
    # Others may have files of such names.
    carries_code = names_code(read_json(api, repository, info, "config.json") or {})
    code = [file.name for file in modelling_files()] if carries_code else []
    return outdated(info, contents, [*code, *_CHECKPOINT_FILES, *WEIGHT_FILES])


def _commit(
    api: HfApi,
    repository: str,
    user: str,
    operations: list[CommitOperationAdd | CommitOperationDelete],
    message: str,
    revision: str | None,
    branch: str | None,
    parent: ModelInfo,
) -> str:
    """The hash of the commit, also where the answer to it got lost and the Hub holds its content."""
    with explained(repository, f"The commit to {repository}", user, when_lost=_COMPLETE):
        try:
            with nullcontext() if branch is None else new_branch(api, repository, branch, str(parent.sha)):
                return api.create_commit(
                    repository,
                    operations,
                    commit_message=message,
                    revision=revision,
                    parent_commit=parent.sha,
                ).oid
        except Exception as error:  # as many kinds as `explained` knows
            if not is_lost(error):
                raise
            arrived = _arrived(api, repository, operations, revision)
            if arrived is None:
                raise
            return arrived


def _arrived(
    api: HfApi,
    repository: str,
    operations: Iterable[CommitOperationAdd | CommitOperationDelete],
    revision: str | None,
) -> str | None:
    """The newest commit if it holds what the operations make; None if it doesn't, or can't be asked for."""
    try:
        info = api.model_info(repository, revision=revision, files_metadata=True)
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


# ---------------------------------------------------------------- what can go wrong


@contextmanager
def explained(repository: str, doing: str, user: str | None = None, when_lost: str = _AGAIN) -> Iterator[None]:
    """Turn whatever the Hub's client raises into one line with the way out.

    Args:
        repository: Hub id.
        doing: what is being done, as the subject of a sentence.
        user: of the token, once known.
        when_lost: what to do if there was no answer, or none of the Hub itself.

    Raises:
        PublishingError: for any error inside.
    """
    try:
        yield
    except PublishingError:
        raise
    except Exception as error:  # the Hub's client lets many kinds through, also wrapped in each other
        cause = cause_of(error)
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            raise PublishingError(_refusal(cause, status, repository, doing, user, when_lost)) from error
        if is_local(cause):
            raise PublishingError(f"{doing} failed ({_reason(cause)}). {_AGAIN}") from error
        remedy = "Free some space on the disk." if disk_is_full(error) else "Check the connection."
        raise PublishingError(f"{doing} failed ({_reason(cause)}). {remedy} {when_lost}") from error


def _refusal(error: HfHubHTTPError, status: int, repository: str, doing: str, user: str | None, when_lost: str) -> str:
    said = _reason(error)
    if status == 401:
        return f"The Hub doesn't accept the token ({said}). Log in anew with `hf auth login`, or set another HF_TOKEN."
    if status == 403:
        own = f"{user}/{repository.rpartition('/')[2]}"
        remedy = "a token with write access"
        if user is not None and own != repository:
            remedy += f", or a name of your own such as {own}"
        return f"The Hub doesn't let {user or 'you'} write to {repository} ({said}). Use {remedy}."
    if status in (409, 412):
        return f"{repository} was changed during the upload ({said}). {_AGAIN}"
    if status in (402, 413, 507):
        return f"The Hub has no room for this ({said}). Free some storage in your account's settings. {_AGAIN}"
    return f"{doing} failed ({said}). {when_lost if is_of_gateway(status) else _AGAIN}"


def _reason(error: BaseException) -> str:
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return shorten(said, 160, placeholder=" ...")
