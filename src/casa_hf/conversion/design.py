# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The point of the design space that a conversion aims at: a named variant, and axes chosen one by one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..configuration_casa import CasaConfig, variant_overrides
from ..design_space import CHOICES, FIELDS, check_gist_tokens, unknown_value
from ..folder_files import CheckpointError


def resolve_design(
    variant: str | None, design: Mapping[str, Any], blocks: Sequence[int], own: CasaConfig | None = None
) -> dict[str, Any]:
    """Every design field of a variant of which some axes are chosen otherwise.

    Args:
        variant: Key of `VARIANTS`; None for the design of `own`, or "casa" without it.
        design: Values of design fields, which override the variant's. `casa_layers` may also be written as in
            `layer_indices`.
        blocks: Indices of the decoder blocks that can have a fusion layer.
        own: Configuration of the checkpoint if it is a CASA checkpoint.

    Raises:
        CheckpointError: for an unknown field, an invalid choice of blocks, or a number of gist tokens that is out of
            range.
        ValueError: for an unknown variant.
    """
    check_fields(design)
    if own is not None and variant is None:
        fields = {name: getattr(own, name) for name in FIELDS}
    else:
        fields = {name: getattr(CasaConfig, name) for name in FIELDS}
        fields |= variant_overrides(variant or "casa", blocks)
    fields |= dict(design)
    try:
        check_gist_tokens(fields["num_gist_tokens"])
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if isinstance(fields["casa_layers"], str):
        fields["casa_layers"] = layer_indices(fields["casa_layers"], blocks)
    return fields


def check_fields(design: Mapping[str, Any]) -> None:
    """Check names of design fields, and the values of those that are choices.

    Raises:
        CheckpointError: for an unknown field.
        ValueError: for an unknown value.
    """
    for name, value in design.items():
        if name not in FIELDS:
            raise CheckpointError(f"{name!r} is not a design option; {unknown_value(name, FIELDS)}")
        if value not in CHOICES.get(name, (value,)):
            raise ValueError(f"{name}={value!r} is unknown; {unknown_value(value, CHOICES[name])}")


def layer_indices(text: str, blocks: Sequence[int]) -> list[int] | None:
    """Indices of decoder blocks, None for all.

    Args:
        text: Text "all"; "every:2" for every second of `blocks`; "last:8"; or indices such as "4,8,12".
        blocks: Indices of the decoder blocks that can have a fusion layer.

    Raises:
        CheckpointError: if it is none of these, or more blocks than there are.
    """
    if text == "all":
        return None
    if match := re.fullmatch(r"(every|last):(\d+)", text):
        number = int(match[2])
        if not 0 < number <= len(blocks):
            raise CheckpointError(
                f"casa_layers={text!r} is out of range; expected {match[1]}:1 to {match[1]}:{len(blocks)}, since "
                f"{len(blocks)} blocks can have a fusion layer. Choose a number of these."
            )
        return list(blocks[number - 1 :: number] if match[1] == "every" else blocks[-number:])
    if re.fullmatch(r"\d+(,\d+)*", text):
        return [int(index) for index in text.split(",")]
    raise CheckpointError(
        f"casa_layers={text!r} is not a choice of blocks. Write 'every:2', '4,8,12', 'last:8' or 'all'."
    )
