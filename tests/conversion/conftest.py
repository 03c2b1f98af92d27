# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the tests of the converter share, as fixtures."""

from __future__ import annotations

import pytest
from huggingface_hub import constants


@pytest.fixture
def use_hub(tmp_path, monkeypatch):
    """Directs the Hub's client to an address, with an empty cache."""

    def use(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    (tmp_path / "outputs").mkdir()
    return use
