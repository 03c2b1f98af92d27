# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The design space of CASA as one table: its settings, their values, and the variants that have a name.

The configuration and its error messages, the options of `casa-hf convert`, model cards and the table in
docs/architecture.md come from it. It imports nothing but the standard library, so that `casa-hf --help` waits for
nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One setting of the design space.

    Attributes:
        field: name of the field of `CasaConfig`.
        option: name of the option of `casa-hf convert`.
        meaning: one line, for help texts and tables.
        choices: values that the setting can have, with what each means; empty for settings that aren't a choice among
            names.
        changes_tensors: whether it decides which tensors a checkpoint has.
    """

    field: str
    option: str
    meaning: str
    choices: Mapping[str | None, str] = dataclasses.field(default_factory=dict)
    changes_tensors: bool = False

    @property
    def parameter(self) -> str:
        """Name of the parameter of the command's function that has the option."""
        return self.option.removeprefix("--").replace("-", "_")


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "casa_share_projections",
        "--share-projections",
        "Whether fusion layers use self-attention's projections.",
        changes_tensors=True,
    ),
    Setting(
        "casa_layers",
        "--layers",
        "Blocks with a fusion layer: every:2, 4,8,12, last:8 or all.",
        changes_tensors=True,
    ),
    Setting(
        "casa_text_windows",
        "--text-windows",
        "Whether text before the first image attends to itself in fusion layers.",
    ),
    Setting(
        "casa_keys",
        "--keys",
        "What text attends to in a fusion layer.",
        {
            "image": "the visible image tokens; queries and keys are not rotated",
            "window": "the visible image tokens and the text of the window up to itself, with rotary positions",
            "context": "the visible image tokens and all text up to itself, with rotary positions; this one softmax "
            "is the self-attention too",
        },
    ),
    Setting(
        "casa_placement",
        "--placement",
        "Where the fusion layer stands, seen from self-attention.",
        {
            "parallel": "beside it: both read the same normed states, and their sum is added",
            "replace": "in its place",
            "before": "before it, as a residual step with a norm of its own",
            "after": "after it, as a residual step with a norm of its own",
        },
        changes_tensors=True,
    ),
    Setting(
        "casa_image_updates",
        "--image-updates",
        "What happens to image states from block to block.",
        {
            "none": "they stay as they are",
            "ffn": "they pass the MLP of each block",
            "full": "they pass the self-attention of each block, where they see the text before their image, their "
            "own image up to themselves and the earlier images that text there sees, and its MLP",
        },
    ),
    Setting(
        "casa_image_history",
        "--image-history",
        "Which still images a token sees.",
        {
            "latest": "the last one before it",
            "group": "its group: the last one, and those before it with nothing but delimiters in between",
            "all": "all before it",
        },
    ),
    Setting(
        "casa_video_history",
        "--video-history",
        "Which video frames a token sees.",
        {
            "latest": "the last one before it",
            "group": "its group: the last one, and those before it with nothing but delimiters in between",
            "all": "all before it",
        },
    ),
    Setting(
        "casa_positions",
        "--positions",
        "Positions of text.",
        {
            "contiguous": "they count text alone; images don't advance them",
            "insertion": "images advance them, as in the source",
        },
    ),
    Setting(
        "casa_image_positions",
        "--image-positions",
        "Positions of images with contiguous text positions.",
        {
            "at": "they begin at the position of the token that the image precedes",
            "before": "they begin before it, by the larger side of the image",
        },
    ),
    Setting(
        "casa_video_layout",
        "--video-layout",
        "Layout of videos.",
        {
            None: "one pair of delimiters per frame, or per two frames (`frames_per_image` of the processor)",
            "native": "the source's own: Qwen2-VL and Qwen2.5-VL put a whole video between one pair, with positions "
            "in time (`insertion` positions only), Qwen3-VL and its successors each temporal patch of two frames",
        },
    ),
    Setting(
        "casa_image_norm",
        "--image-norm",
        "Whether image states are normalised before keys and values are made of them.",
        {
            "input": "by the block's input norm, of which fusion layers with projections of their own have a copy",
            "none": "they aren't, as in some models that were trained elsewhere",
        },
        changes_tensors=True,
    ),
    Setting(
        "casa_gate",
        "--gate",
        "Gate of each fusion layer.",
        {
            None: "none",
            "tanh": "the tanh of one learned number, which starts at 0",
        },
        changes_tensors=True,
    ),
    Setting(
        "num_gist_tokens",
        "--gist-tokens",
        "Gist tokens after each image; they see image tokens only.",
        changes_tensors=True,
    ),
)

CHOICES: dict[str, tuple[str | None, ...]] = {
    setting.field: tuple(setting.choices) for setting in SETTINGS if setting.choices
}

FIELDS: tuple[str, ...] = tuple(setting.field for setting in SETTINGS)

# Gist tokens stand for an image in fewer tokens; this is about as many as a large image has.
MAX_GIST_TOKENS = 1024

# What a variant is made of; gist tokens go with any of them.
DESIGN_FIELDS: tuple[str, ...] = tuple(name for name in FIELDS if name != "num_gist_tokens")


@dataclass(frozen=True)
class Variant:
    """A named point of the design space.

    Attributes:
        overrides: configuration fields that differ from the defaults of `CasaConfig`.
        description: one line for tables and model cards.
        layers: function from the indices of the blocks that can have a fusion layer to `casa_layers`; None for all.
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


def check_gist_tokens(number: int) -> None:
    """Check a number of gist tokens, before they are made.

    Raises:
        ValueError: if it isn't an integer from 0 to `MAX_GIST_TOKENS`.
    """
    if type(number) is not int or not 0 <= number <= MAX_GIST_TOKENS:
        raise ValueError(
            f"num_gist_tokens={number!r} is out of range; expected an integer from 0 to {MAX_GIST_TOKENS}. Use 0 for "
            "none, or a few, such as 4."
        )


def unknown_value(value: object, choices: Iterable[object]) -> str:
    """The end of an error message about a value that is none of the choices: the nearest one, if any, and all."""
    names = {str(choice): repr(choice) for choice in choices}
    near = get_close_matches(str(value), names, n=1)
    question = f"did you mean {names[near[0]]}? Choose" if near else "choose"
    return f"{question} one of {', '.join(names.values())}."


__all__ = [
    "CHOICES",
    "DESIGN_FIELDS",
    "FIELDS",
    "MAX_GIST_TOKENS",
    "SETTINGS",
    "VARIANTS",
    "Setting",
    "Variant",
    "check_gist_tokens",
    "unknown_value",
]
