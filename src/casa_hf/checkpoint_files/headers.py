# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the headers of weight files say, of a folder or of a Hub id, whose weights aren't downloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from ..checks import listed
from ..folder_files import CheckpointError
from .download import CODE_FILES, SMALL_FILES, download, hub_id
from .hub_client import hub_token, limit_waiting, reason
from .shards import DTYPES, read_checkpoint


@dataclass(frozen=True)
class Header:
    """What a header says of a tensor.

    Attributes:
        dtype: Key of `DTYPES`.
        shape: Shape of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class WithoutWeights:
    """A checkpoint whose weights aren't needed.

    Attributes:
        folder: Folder with all other files.
        repository: Hub id; None for a local folder.
        commit: Commit of a Hub id; None for a local folder.
    """

    folder: Path
    repository: str | None
    commit: str | None

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> WithoutWeights:
        """The checkpoint of a name; of a Hub id all files but the weights are downloaded.

        Args:
            source: Folder or Hub id.
            revision: Branch, tag or commit of a Hub id.

        Raises:
            CheckpointError: if there is no such checkpoint.
        """
        repository = hub_id(source, revision)
        if repository is None:
            return cls(Path(source), None, None)
        folder = download(repository, revision, (*SMALL_FILES, *CODE_FILES))
        return cls(folder, repository, folder.name)

    def headers(self) -> dict[str, Header]:
        """What headers of weight files say, by name of the tensor. Those of a Hub id may be in the Hub's cache.

        Raises:
            CheckpointError: if weights are missing, broken or quantized.
        """
        try:
            stored = read_checkpoint(self.folder)
        except CheckpointError:
            if self.repository is None or self.commit is None:
                raise
            return _on_hub(self.repository, self.commit)
        return {name: Header(tensor.dtype, tensor.shape) for name, tensor in stored.items()}


def _on_hub(repository: str, commit: str) -> dict[str, Header]:
    limit_waiting()
    token = hub_token()
    try:
        files = HfApi(token=token).get_safetensors_metadata(repository, revision=commit).files_metadata
    except Exception as error:  # the Hub's client lets many kinds through
        raise CheckpointError(
            f"The headers of the weights of {repository!r} can't be read ({reason(error)}). Check that it has "
            "safetensors weights, or download it and give its folder."
        ) from error
    tensors = {
        name: Header(str(tensor.dtype), tuple(tensor.shape))
        for file in files.values()
        for name, tensor in file.tensors.items()
    }
    if others := [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in DTYPES]:
        raise CheckpointError(
            f"{repository} holds quantized or non-float weights: {listed(others)}. Use the original checkpoint, with "
            f"weights in {', '.join(DTYPES)}."
        )
    return tensors
