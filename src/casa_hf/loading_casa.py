# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How CASA models load and save checkpoints beyond what Transformers does: tensors under the names of source
checkpoints are found, weight files outside the folder aren't read, and a checkpoint that lacks tensors is refused."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.auto import AutoQuantizationConfig

from .backbones import BACKBONES
from .checks import listed
from .configuration_casa import CasaConfig
from .folder_files import own_file

_WITH_HEAD, _WITHOUT_HEAD = "CasaForConditionalGeneration", "CasaModel"

# Where the names of their tensors start, `model.` aside.
_BODY = ("visual.", "language_model.", "multi_modal_projector.")
_HEAD = ("lm_head.",)

# Names of the tensors that a source doesn't have. In replaced blocks the projections are its own, under another name.
_ADDED = r"\.casa_(attn|layernorm)\.|(^|\.)multi_modal_projector\."
_ADDED_WHERE_REPLACED = r"\.casa_attn\.image_norm\.|(^|\.)multi_modal_projector\."
_ADDED_TO_TEXT_ONLY = r"(^|\.)visual\."

# What finds the config.json beside weights again.
_DOWNLOAD_OPTIONS = ("cache_dir", "proxies", "local_files_only", "token", "revision", "subfolder")

# What a quantization leaves as it is, by the names of either class: few parameters, and those that errors hurt most.
# Kernels for 4 bits don't take every width that towers have.
QUANTIZATION_SKIPS = ("model.visual", "visual", "model.multi_modal_projector", "multi_modal_projector", "lm_head")
# How bitsandbytes, and how the other quantizations call it.
_SKIP_ARGUMENTS = ("llm_int8_skip_modules", "modules_to_not_convert")

# Where `_finalize_model_loading` leaves the refusal for `from_pretrained`.
_REFUSAL = "_refusal_of_checkpoint"


class CasaLoadingMixin:
    """Loading and saving of all CASA models."""

    _keys_to_ignore_on_load_unexpected = [name for backbone in BACKBONES.values() for name, _ in backbone.dropped]

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        """Load, and let a replaced block's fusion layer take the self-attention that a source checkpoint has there."""
        folder = load_config.pretrained_model_name_or_path
        if folder is not None and os.path.isdir(folder):
            for file in checkpoint_files or ():
                own_file(folder, Path.cwd() / file)
        if not load_config.ignore_mismatched_sizes:
            _check_experts(model, state_dict, checkpoint_files or (), folder)
        if model.config.casa_placement == "replace":
            renamings = [
                WeightRenaming(f"layers.{index}.self_attn.", f"layers.{index}.casa_attn.")
                for index in model.config.fusion_layers
            ]
            load_config = replace(load_config, weight_mapping=[*(load_config.weight_mapping or ()), *renamings])
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        if not load_config.ignore_mismatched_sizes:
            model.__dict__[_REFUSAL] = _refusal(model, load_config, loading_info)
        return loading_info

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, fold_patch_embedding: bool = False, **kwargs: Any
    ) -> Any:
        """As in Transformers, but a checkpoint that lacks tensors of the model which its config.json describes is
        refused: Transformers would make random ones.

        Not refused are tensors that follow from this call: fusion layers of an unconverted source, those that
        `casa_gate`, `casa_layers` or another setting adds (they start as a conversion starts them), and a head that
        another class has. With `ignore_mismatched_sizes=True` or `output_loading_info=True` nothing is refused.

        A `quantization_config` that doesn't say what it leaves as it is leaves the vision tower, the projector and the
        output head (`QUANTIZATION_SKIPS`).

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            *args, **kwargs: arguments as elsewhere in Transformers.
            fold_patch_embedding: whether the loaded model's `fold_patch_embedding` is called.

        Raises:
            ValueError: naming tensors that are missing; for a weight file outside its folder.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _with_skips(kwargs["quantization_config"])
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        reported = isinstance(loaded, tuple)
        refusal = (loaded[0] if reported else loaded).__dict__.pop(_REFUSAL, None)
        if refusal and not reported:
            raise ValueError(refusal)
        if fold_patch_embedding:
            (loaded[0] if reported else loaded).fold_patch_embedding()
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in Transformers, but tensors keep the names that they have in memory (the source's older layouts are
        read, never written)."""
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def _with_skips(quantization: Any) -> Any:
    """A quantization's configuration that says what is left as it is; the given one, if it says so."""
    if isinstance(quantization, Mapping):
        quantization = AutoQuantizationConfig.from_dict(dict(quantization))
    for name in _SKIP_ARGUMENTS:
        if getattr(quantization, name, ()) is None:
            quantization = copy.copy(quantization)
            setattr(quantization, name, list(QUANTIZATION_SKIPS))
    return quantization


def _check_experts(model: Any, state_dict: Any, checkpoint_files: Iterable[str], source: Any) -> None:
    """Refuse a checkpoint that stores experts one by one and lacks some of a block: Transformers would stack those
    that there are, and complain of the shape.

    Raises:
        ValueError: naming what is missing.
    """
    backbone = model.config.backbone
    experts = {
        _bare(name): [[_bare(part) for part in form] for form in backbone.block.layouts(name, tuple(parameter.shape))]
        for name, parameter in model.named_parameters()
    }
    forms = [form for layouts in experts.values() for form in layouts if len(form) > 1]
    if not forms:
        return
    names = set(state_dict or ())
    for file in checkpoint_files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                names.update(tensors.keys())
    stored = {_bare(backbone.in_memory_name(name)) for name in names}
    lost = [part for form in forms for part in form if part not in stored and not stored.isdisjoint(form)]
    if lost:
        raise ValueError(_lacks(source, [f"model.{name}" for name in lost]))


def _lacks(source: Any, lost: list[str], further: str = "") -> str:
    """The message about missing tensors."""
    return (
        f"The checkpoint {source} lacks {len(lost)} tensors of the model that its config.json describes: "
        f"{listed(sorted(lost))}.{further} Download or write it again, with the config.json that belongs to it."
    )


def _refusal(model: Any, load_config: Any, loading_info: Any) -> str | None:
    """The message if a checkpoint lacks tensors of the model that its own config.json describes; else None."""
    source = load_config.pretrained_model_name_or_path
    if source is None or not loading_info.missing_keys:
        return None
    options = {name: value for name, value in load_config.download_kwargs.items() if name in _DOWNLOAD_OPTIONS}
    stated = PreTrainedConfig.get_config_dict(source, **options)[0]
    if stated.get("model_type") in (None, CasaConfig.model_type):
        lost = _lost_from_casa(type(model), stated, model.config, loading_info.missing_keys)
    else:
        lost = _lost_from_source(model.config, loading_info.missing_keys)
    if not lost:
        return None
    found = loading_info.unexpected_keys
    others = f" It holds {len(found)} that the model doesn't have: {listed(sorted(found))}." if found else ""
    advice = " from_pretrained(..., ignore_mismatched_sizes=True) makes new values for what is missing."
    return _lacks(source, lost, others) + advice


def _lost_from_casa(
    model_class: type, stated: dict[str, Any], config: CasaConfig, missing: Iterable[str]
) -> list[str]:
    """Those of the missing tensors that a CASA checkpoint with this config.json has."""
    with torch.device("meta"):
        template = model_class(CasaConfig.from_dict(stated) if stated else config)
    promised = {_bare(name) for name in template.state_dict().keys() - template.all_tied_weights_keys.keys()}
    written_by = next(iter(stated.get("architectures") or ()), _WITH_HEAD)
    if written_by != model_class.__name__:
        # Another class has another head; that of a class outside this package isn't known.
        known = _BODY + (_HEAD if written_by == _WITH_HEAD else ())
        promised = {name for name in promised if name.startswith(known)}
    return [name for name in missing if _bare(name) in promised]


def _lost_from_source(config: CasaConfig, missing: Iterable[str]) -> list[str]:
    """Those of the missing tensors that the source checkpoint of this model has."""
    added = [_ADDED_WHERE_REPLACED if config.casa_placement == "replace" else _ADDED]
    added += [_ADDED_TO_TEXT_ONLY] if config.backbone.text_only else []
    return [name for name in missing if not re.search("|".join(added), name)]


def _bare(name: str) -> str:
    """The name of a tensor, whether or not the model has a head."""
    return name.removeprefix("model.")


def _register_source_layouts() -> None:
    """Let `from_pretrained` read source checkpoints, converted or not: older names of tensors, and experts in the ways
    that files store them."""
    renamings = {pair for backbone in BACKBONES.values() for pair in backbone.load_renamings}
    mapping: list[WeightRenaming | WeightConverter] = [
        WeightRenaming(source_patterns=old, target_patterns=new) for old, new in sorted(renamings)
    ]
    for backbone in BACKBONES.values():
        mapping += backbone.block.weight_converters()
    for name in (_WITH_HEAD, _WITHOUT_HEAD):
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


_register_source_layouts()
