# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where Transformers, and those who look classes up in it by name, find CASA's."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType

import transformers

import casa_hf
from casa_hf import registration

NAMES = ("CasaConfig", "CasaForConditionalGeneration", "CasaModel", "CasaProcessor")


def test_the_namespace_of_transformers_has_the_public_classes() -> None:
    """In the module that everybody gets, which isn't the one that Transformers began to load."""
    assert sys.modules["transformers"] is transformers
    for name in NAMES:
        found = getattr(transformers, name)
        assert found is getattr(casa_hf, name) and name in dir(transformers)
        assert found.__module__.startswith("casa_hf.") and pickle.loads(pickle.dumps(found)) is found
    from transformers import CasaForConditionalGeneration

    assert CasaForConditionalGeneration is casa_hf.CasaForConditionalGeneration
    assert not hasattr(transformers, "CasaForSequenceClassification")


def test_the_module_stays_what_it_is() -> None:
    """It still loads its own names when they are asked for, can be pickled, and is the same after another call."""
    before = dict(vars(transformers))
    registration.register()
    assert vars(transformers) == before
    assert pickle.loads(pickle.dumps(transformers)).__name__ == "transformers"
    assert transformers.MambaConfig.model_type == "mamba"


def test_what_transformers_has_itself_counts() -> None:
    """Also what it lists and hasn't loaded, which isn't loaded for that."""

    class Lazy(ModuleType):
        __all__ = ["CasaModel"]

        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"{name} was asked for")

    module = Lazy("transformers")
    theirs = module.CasaConfig = type("CasaConfig", (), {})
    registration._publish(module, casa_hf.CasaConfig, casa_hf.CasaModel, casa_hf.CasaProcessor)
    assert vars(module)["CasaConfig"] is theirs and "CasaModel" not in vars(module)
    assert vars(module)["CasaProcessor"] is casa_hf.CasaProcessor
