# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Registers CASA's classes: with the Auto classes of Transformers, in its namespace, where some libraries look classes
up by name, and with the rules for publishing."""

from __future__ import annotations

import sys
from types import ModuleType

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_casa import CasaConfig
from .hub.hooks import fill_hooks
from .modeling_casa import CasaForConditionalGeneration, CasaModel
from .processing_casa import CasaProcessor


def register() -> None:
    """Register the classes with the Auto classes, and publish them in the namespace of `transformers`.

    Their `push_to_hub` brings the model card from then on.

    TRL and `transformers serve` read the name of a model's class from its configuration (`architectures`) and take the
    attribute of that name from the module `transformers`. Calling this again changes nothing.
    """
    AutoConfig.register(CasaConfig.model_type, CasaConfig, exist_ok=True)
    AutoModel.register(CasaConfig, CasaModel, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(CasaConfig, CasaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(CasaConfig, CasaProcessor, exist_ok=True)
    fill_hooks()
    # Transformers puts another object in the place of its module while it loads; this is the one that others get.
    _publish(sys.modules["transformers"], CasaConfig, CasaModel, CasaForConditionalGeneration, CasaProcessor)


def _publish(module: ModuleType, *classes: type) -> None:
    """Add classes to a module under their names, except where it has something of such a name already."""
    # Not by `hasattr`, which would load what a lazy module only lists.
    taken = vars(module).keys() | set(getattr(module, "__all__", ()))
    for each in classes:
        if each.__name__ not in taken:
            setattr(module, each.__name__, each)
