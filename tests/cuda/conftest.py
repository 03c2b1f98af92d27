# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Devices that say they are CUDA's, and what tests on them share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.labelled_device import LabelledDevices


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[LabelledDevices]:
    """`cuda:0` and `cuda:1`, from the start of the test to its end; what is on the CPU goes on as ever.

    A compiler would have nothing to compile for: what is to be compiled runs as it is, on a static cache.
    """
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with LabelledDevices() as labelled:
        yield labelled
