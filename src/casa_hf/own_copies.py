# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Copies of modules, also of those whose parameters ZeRO-3 splits between processes as soon as they are made."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import TypeVar

import torch
from torch import nn
from transformers.integrations.deepspeed import deepspeed_config

_Module = TypeVar("_Module", bound=nn.Module)


def is_split(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 has put an empty tensor in the place of a parameter."""
    return hasattr(parameter, "ds_id")


def own_copy(module: _Module) -> _Module:
    """A module with parameters of its own that are equal to those of another; split if those are."""
    parameters = list(module.parameters())
    if not any(map(is_split, parameters)):
        return copy.deepcopy(module)
    zero = import_module("deepspeed").zero  # not an import statement: who loads a checkpoint's code needn't have it
    with zero.GatheredParameters(parameters):
        copied = copy.deepcopy(module)
    zero.Init(module=copied, config_dict_or_path=deepspeed_config())
    return copied
