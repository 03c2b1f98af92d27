# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The design space of CASA as one table: its settings, their values, and the variants that have a name.

The configuration checks against it, and the command line offers what is in it. It imports nothing but the standard
library, so that `casa-hf --help` waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One setting of the design space.

    Attributes:
        field: of `CasaConfig`.
        option: of `casa-hf convert`.
        meaning: one line.
        choices: the values that it can have; empty for settings that aren't a choice among names.
    """

    field: str
    option: str
    meaning: str
    choices: tuple[str | None, ...] = ()


_HISTORIES = ("latest", "group", "all")

SETTINGS: tuple[Setting, ...] = (
    Setting(
        "casa_share_projections", "--share-projections", "Whether fusion layers use self-attention's projections."
    ),
    Setting("casa_layers", "--layers", "Blocks with a fusion layer: every:2, 4,8,12, last:8 or all."),
    Setting("casa_text_windows", "--text-windows", "Whether text before the first image is a window."),
    Setting("casa_keys", "--keys", "What text attends to in a fusion layer.", ("image", "window", "context")),
    Setting(
        "casa_placement",
        "--placement",
        "Where the fusion layer stands, seen from self-attention.",
        ("parallel", "replace", "before", "after"),
    ),
    Setting(
        "casa_image_updates",
        "--image-updates",
        "What happens to image states from block to block.",
        ("none", "ffn", "full"),
    ),
    Setting("casa_image_history", "--image-history", "Which still images a token sees.", _HISTORIES),
    Setting("casa_video_history", "--video-history", "Which video frames a token sees.", _HISTORIES),
    Setting("casa_positions", "--positions", "Positions of text.", ("contiguous", "insertion")),
    Setting(
        "casa_image_positions", "--image-positions", "Positions of images, seen from their token.", ("at", "before")
    ),
    Setting("casa_gate", "--gate", "Gate of each fusion layer.", (None, "tanh")),
    Setting("num_gist_tokens", "--gist-tokens", "Gist tokens after each image; they see image tokens only."),
)

CHOICES: dict[str, tuple[str | None, ...]] = {
    setting.field: setting.choices for setting in SETTINGS if setting.choices
}

# What a variant is made of; gist tokens go with any of them.
DESIGN_FIELDS: tuple[str, ...] = tuple(setting.field for setting in SETTINGS if setting.field != "num_gist_tokens")


@dataclass(frozen=True)
class Variant:
    """A named point of the design space.

    Attributes:
        overrides: configuration fields that differ from the defaults of `CasaConfig`.
        layers: maps the number of decoder blocks to `casa_layers`; None for all blocks.
        description: one line for tables and model cards.
    """

    overrides: dict[str, Any]
    description: str
    layers: Callable[[Sequence[int]], list[int]] | None = None


def _every_second(fusable_blocks: Sequence[int]) -> list[int]:
    return list(fusable_blocks[1::2])


_INSERTION = {
    "casa_share_projections": True,
    "casa_keys": "context",
    "casa_image_updates": "full",
    "casa_positions": "insertion",
}

VARIANTS: dict[str, Variant] = {
    "casa": Variant({}, "cross-attention to the current image and the text of its window"),
    "ca": Variant({"casa_keys": "image"}, "cross-attention to the current image only"),
    "ca-shared": Variant(
        {"casa_keys": "image", "casa_share_projections": True}, "`ca` with the projections of self-attention"
    ),
    "casa-shared": Variant({"casa_share_projections": True}, "`casa` with the projections of self-attention"),
    "ca-replace": Variant(
        {"casa_keys": "image", "casa_placement": "replace"},
        "`ca` in place of every second self-attention",
        _every_second,
    ),
    "casa-replace": Variant(
        {"casa_placement": "replace", "casa_text_windows": True},
        "`casa` in place of every second self-attention",
        _every_second,
    ),
    "casa-before": Variant({"casa_placement": "before"}, "`casa` before self-attention"),
    "ca-ffn": Variant({"casa_keys": "image", "casa_image_updates": "ffn"}, "`ca`, image tokens pass the MLPs"),
    "casa-ffn": Variant({"casa_image_updates": "ffn"}, "`casa`, image tokens pass the MLPs"),
    "exact": Variant(_INSERTION, "equal to the source for a single group of images, no training"),
    "insertion": Variant(
        {**_INSERTION, "casa_image_history": "all", "casa_video_history": "all"}, "token insertion, the baseline"
    ),
}


def unknown_value(value: object, choices: Iterable[object]) -> str:
    """What to say of a value that isn't among the choices: the nearest one, if one is near, and all of them."""
    names = {str(choice): repr(choice) for choice in choices}
    near = get_close_matches(str(value), names, n=1)
    question = f"did you mean {names[near[0]]}? " if near else ""
    return f"{question}choose one of {', '.join(names.values())}."


__all__ = ["CHOICES", "DESIGN_FIELDS", "SETTINGS", "VARIANTS", "Setting", "Variant", "unknown_value"]
