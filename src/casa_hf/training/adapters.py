# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Adapters by PEFT, as the settings of a run describe them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from .parameters import EXPERT_PARAMETERS, LORA_TARGETS
from .settings import check_name, typed


def lora_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of PEFT's `LoraConfig`, typed.

    Raises:
        ValueError: if one is unknown or of the wrong type.
    """
    from peft import LoraConfig

    hints = get_type_hints(LoraConfig)
    for name in given:
        check_name(name, [f.name for f in fields(LoraConfig)], f"lora.{name} is not an argument of PEFT's LoraConfig")
    return {name: typed(f"lora.{name}", value, hints[name] | None) for name, value in given.items()}


def add_adapters(model: Any, lora: Mapping[str, Any]) -> Any:
    """Freeze a model and add adapters; the projector of a text-only source and new tokens train beside them.

    Args:
        model: a CASA model.
        lora: arguments of `LoraConfig`; without `target_modules` the fusion layers get adapters. Those of the whole
            language model are at its experts too, unless `target_parameters` says otherwise.

    Returns:
        The model in PEFT's wrapper.

    Raises:
        ValueError: if an argument is unknown or of the wrong type, or `target_modules` match no layer.
    """
    from peft import LoraConfig, get_peft_model

    lora = lora_arguments(lora)
    given = "fusion" if lora.get("target_modules") is None else lora["target_modules"]
    targets = LORA_TARGETS.get(given, given) if isinstance(given, str) else given
    # PEFT knows "all-linear" by name.
    if given != "all-linear" and not any(_is_target(name, targets) for name, _ in model.named_modules()):
        known = [name for name in LORA_TARGETS if name != given]
        raise ValueError(
            f"lora.target_modules={given!r} matches no layer of this model (variant {model.config.variant}). Use "
            f"{' or '.join(known)}, a regular expression of whole names, or a list of the last parts of names."
        )
    defaults = _beside_adapters(model) | _adapters_of_experts(model, given, lora)
    return get_peft_model(model, LoraConfig(**{**defaults, **lora, "target_modules": targets}))


def _adapters_of_experts(model: Any, given: Any, lora: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `LoraConfig` for matrices that aren't modules, where the whole language model gets adapters."""
    parameters = lora.get("target_parameters", EXPERT_PARAMETERS)
    if given != "language-model" or not model.config.backbone.block.has_experts or not parameters:
        return {}
    if lora.get("lora_dropout"):
        raise ValueError(
            f"lora.lora_dropout={lora['lora_dropout']} can't be used with adapters of experts, which PEFT adds to "
            "their matrices. Leave lora_dropout out, or keep experts without adapters by target_parameters: []."
        )
    return {"target_parameters": list(parameters)}


def _is_target(module: str, targets: Any) -> bool:
    """Whether `target_modules` match this module for PEFT."""
    if not isinstance(targets, str):
        return any(module == target or module.endswith(f".{target}") for target in targets)
    try:
        return re.fullmatch(targets, module) is not None
    except re.error as error:
        raise ValueError(f"lora.target_modules={targets!r} is not a valid regular expression: {error}.") from error


def _beside_adapters(model: Any) -> dict[str, Any]:
    """Arguments of `LoraConfig` for what nobody has trained yet."""
    beside: dict[str, Any] = {}
    if any("multi_modal_projector." in name for name, _ in model.named_parameters()):
        beside["modules_to_save"] = ["multi_modal_projector"]
    if model.config.new_token_ids:
        beside["trainable_token_indices"] = {"embed_tokens": list(model.config.new_token_ids)}
    return beside
