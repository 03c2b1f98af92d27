# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The Hub's own client, directed to a Hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers.dynamic_module_utils
import transformers.utils.hub
from huggingface_hub import constants

from tests.hub.loopback import WRITER, Hub, running_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub; the client has an empty cache and the token of its user "me"."""
    with running_hub() as server:
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it would keep to its first address
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        empty_cache(tmp_path / "cache", monkeypatch)
        yield server


def empty_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let downloads go to a new folder from now on."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))


def process_environment(hub: Hub, home: Path, token: str | None = WRITER) -> dict[str, str]:
    """Environment variables that do the same for another process."""
    token_variable = {} if token is None else {"HF_TOKEN": token}
    return {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), **token_variable}
