# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Which tensor of a source checkpoint becomes which tensor of a CASA checkpoint.

Tables and pure functions on names and shapes. The names that a source must have come from the stock model class, never
from the checkpoint itself, so that whatever a file lacks or has too much is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ..backbone import Backbone, Shape
from ..checks import listed, one_line
from ..configuration_casa import CasaConfig
from ..folder_files import CheckpointError

LAYER = "model.language_model.layers.{}."
_IN_BLOCK = re.compile(r"(model\.language_model\.layers\.\d+\.)(.+)")

# What fusion layers start as copies of; a replaced block no longer has it.
SELF_ATTENTION = "self_attn."

# Inside a block with a fusion layer: (prefix of a new name, prefix of the tensor that it starts as a copy of).
PROJECTION_COPIES = (("casa_attn.", SELF_ATTENTION),)
IMAGE_NORM_COPIES = {"input": (("casa_attn.image_norm.", "input_layernorm."),)}
PLACEMENT_COPIES: dict[str, tuple[tuple[str, str], ...]] = {
    "before": (("casa_layernorm.", "input_layernorm."),),
    "after": (("casa_layernorm.", "input_layernorm."),),
}


# Of the names of tensors that conversion adds to a source.
ADDED = re.compile(r"\.layers\.\d+\.(casa_attn|casa_layernorm)\.|^model\.multi_modal_projector\.")

GATE = LAYER + "casa_attn.gate"
PROJECTOR = "model.multi_modal_projector."
VISION = "model.visual."

# (pattern of in-memory names that older checkpoints hold, why they aren't needed).
DROPPED = ((r"\brotary(_pos)?_emb\.inv_freq$", "rotary frequencies are computed from the configuration"),)

EMBEDDINGS = "model.language_model.embed_tokens.weight"

# (head, embedding that it repeats) where the word embeddings are tied.
TIED = ("lm_head.weight", EMBEDDINGS)

# Matrices with a row per token.
TOKEN_ROWS = TIED


@dataclass(frozen=True)
class TensorMap:
    """The outcome for every tensor of a source.

    Attributes:
        found: In-memory name -> name in the source, in the order of the model.
        added: Name of a new tensor -> in-memory name of the tensor that it starts as a copy of.
        computed: Name of a new tensor that copies nothing -> its shape.
        replaced: In-memory names of tensors that are only copied from.
        dropped: Name in the source -> why it isn't needed.
    """

    found: dict[str, str]
    added: dict[str, str]
    computed: dict[str, Shape]
    replaced: set[str]
    dropped: dict[str, str]

    def written(self) -> Iterator[tuple[str, str]]:
        """(new name, name in the source) of all tensors but computed ones, each copy beside its original."""
        copies: dict[str, list[str]] = {}
        for new, original in self.added.items():
            copies.setdefault(original, []).append(new)
        for original, source_name in self.found.items():
            if original not in self.replaced:
                yield original, source_name
            for new in copies.get(original, ()):
                yield new, source_name


def stock_shapes(source_config: PreTrainedConfig, config: CasaConfig) -> dict[str, Shape]:
    """Names and shapes of all weights of the stock model, with the vision tower it is given, without a tied head.

    Args:
        source_config: Configuration of the stock model.
        config: Configuration of the CASA model made from it.

    Raises:
        CheckpointError: if there can't be such a model.
    """
    try:
        with torch.device("meta"):
            model = config.backbone.load("source_class")(source_config)
            weights = model.state_dict()
            if config.backbone.text_only:
                tower = config.tower.load()._from_config(config.vision_config)
                weights |= {VISION + name: tensor for name, tensor in tower.state_dict().items()}
    except Exception as error:  # such as the KeyError of an unknown rope_type
        raise CheckpointError(
            f"No {config.backbone.display_name} model can be built from config.json ({type(error).__name__}: "
            f"{one_line(error)}). Use the config.json that belongs to the weights."
        ) from error
    tied = TIED[:1] if config.tie_word_embeddings else ()
    shapes = {config.backbone.in_memory_name(name): tuple(tensor.shape) for name, tensor in weights.items()}
    return {name: shape for name, shape in shapes.items() if name not in tied}


def shapes_in_file(backbone: Backbone, shapes: Mapping[str, Shape], stored: Mapping[str, Shape]) -> dict[str, Shape]:
    """The given names and shapes, but those of experts in the layout that a checkpoint has: they are copied as they
    are.

    Args:
        backbone: Row of the family.
        shapes: In-memory names and shapes of the stock model, see `stock_shapes`.
        stored: Names and shapes that the checkpoint has.
    """
    return backbone.as_stored(shapes, {backbone.in_memory_name(name): shape for name, shape in stored.items()})


def fusion_copies(config: CasaConfig, names: Iterable[str]) -> dict[str, str]:
    """The tensors that a variant adds to a source with the given in-memory names.

    Returns:
        Name of each new tensor -> name of the tensor that it starts as a copy of.
    """
    copies = PLACEMENT_COPIES.get(config.casa_placement, ())
    if not config.casa_share_projections:
        copies += PROJECTION_COPIES + IMAGE_NORM_COPIES.get(config.casa_image_norm, ())
    inside: dict[str, list[str]] = {}  # names in each block
    for name in names:
        if match := _IN_BLOCK.match(name):
            inside.setdefault(match[1], []).append(match[2])
    return {
        LAYER.format(index) + new + inner.removeprefix(old): block + inner
        for index in config.fusion_layers
        for new, old in copies
        for block in [LAYER.format(config.origin_of_fusion(index) if old == SELF_ATTENTION else index)]
        for inner in inside.get(block, ())
        if inner.startswith(old)
    }


def replaced_names(config: CasaConfig, names: Iterable[str]) -> set[str]:
    """Those of the in-memory names that a variant has no use for but as the start of a fusion layer."""
    if config.casa_placement != "replace":
        return set()
    return {block + inner for block, inner in _inside_fused_blocks(config, names) if inner.startswith(SELF_ATTENTION)}


def _inside_fused_blocks(config: CasaConfig, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(block with its trailing dot, name inside it) of the names in blocks with a fusion layer."""
    blocks = {LAYER.format(index) for index in config.fusion_layers}
    for name in names:
        match = _IN_BLOCK.match(name)
        if match and match[1] in blocks:
            yield match[1], match[2]


def computed_shapes(config: CasaConfig) -> dict[str, Shape]:
    """Names and shapes of the tensors of a variant that start as a copy of nothing: gates and projector."""
    shapes: dict[str, Shape] = {}
    if config.casa_gate:
        shapes |= {GATE.format(index): (1,) for index in config.fusion_layers}
    if config.needs_projector:
        width = config.text_config.hidden_size
        shapes[f"{PROJECTOR}weight"] = (width, config.tower.hidden_size(config.vision_config))
        shapes[f"{PROJECTOR}bias"] = (width,)
    return shapes


def casa_shapes(config: CasaConfig, stock: Mapping[str, Shape]) -> dict[str, Shape]:
    """Names and shapes of all weights of a CASA checkpoint.

    Args:
        config: Configuration of the checkpoint.
        stock: Names and shapes of the source that it was made from, see `stock_shapes`.
    """
    copies = {new: stock[original] for new, original in fusion_copies(config, stock).items()}
    replaced = replaced_names(config, stock)
    kept = {name: shape for name, shape in stock.items() if name not in replaced}
    return kept | copies | computed_shapes(config)


def map_tensors(
    config: CasaConfig, stock: Mapping[str, Shape], stored: Mapping[str, Shape], own: CasaConfig | None = None
) -> TensorMap:
    """Assign every tensor of a checkpoint that becomes one of another design.

    Args:
        config: Configuration of the new CASA model.
        stock: Names and shapes of the stock model, see `stock_shapes`.
        stored: Names and shapes that the checkpoint has.
        own: Configuration of the checkpoint if it is a CASA checkpoint; else it must be one of the stock model.

    Raises:
        CheckpointError: naming tensors that are left over, missing, there twice or of the wrong shape; from one design
            to another also those that the new one has no place for, or needs and can't have.
    """
    stock = shapes_in_file(config.backbone, stock, stored)
    found, dropped = match_tensors(config, stock if own is None else casa_shapes(own, stock), stored)
    wanted = casa_shapes(config, stock)
    copies = fusion_copies(config, stock)
    computed = {name: shape for name, shape in computed_shapes(config).items() if name not in found}
    added = {new: original for new, original in copies.items() if new not in found}
    absent = [name for name in wanted if name not in {*found, *added, *computed}]
    if absent:
        raise CheckpointError(
            f"The checkpoint no longer has {len(absent)} tensors that the new design needs: {listed(absent)}. Convert "
            "the source that it was made from."
        )
    replaced = {name for name in found if name not in wanted}
    lost = [name for name in found if name in replaced and name not in added.values()]
    if lost:
        raise CheckpointError(
            f"The new design has no place for {len(lost)} tensors, whose training would be lost: {listed(lost)}. "
            "Choose a design that keeps them, or convert the source that the checkpoint was made from."
        )
    return TensorMap(found=found, added=added, computed=computed, replaced=replaced, dropped=dropped)


def match_tensors(
    config: CasaConfig, expected: Mapping[str, Shape], stored: Mapping[str, Shape]
) -> tuple[dict[str, str], dict[str, str]]:
    """What each tensor of a checkpoint is.

    Args:
        config: Configuration of the CASA model that it belongs to, or is to become.
        expected: In-memory names and shapes that it must have.
        stored: Names and shapes that it has.

    Returns:
        In-memory name -> stored name, in the order of `expected`; stored name -> why it isn't needed.

    Raises:
        CheckpointError: naming tensors that are left over, missing, there twice or of the wrong shape.
    """
    found: dict[str, str] = {}
    dropped: dict[str, str] = {}
    left_over: list[str] = []
    for name in stored:
        new_name = config.backbone.in_memory_name(name)
        if new_name in found:
            raise CheckpointError(
                f"{found[new_name]} and {name} are the same tensor ({new_name}) under two names. Remove one of them "
                "from the checkpoint."
            )
        if new_name in expected:
            found[new_name] = name
        elif (reason := _drop_reason(new_name, config)) is not None:
            dropped[name] = reason
        else:
            left_over.append(name)
    _check_match(config.backbone.display_name, expected, stored, found, left_over)
    return {name: found[name] for name in expected}, dropped


def _check_match(
    family: str,
    expected: Mapping[str, Shape],
    stored: Mapping[str, Shape],
    found: Mapping[str, str],
    left_over: Sequence[str],
) -> None:
    """Refuse a checkpoint with other tensors than its configuration describes."""
    if left_over:
        raise CheckpointError(
            f"The source has {len(left_over)} tensors that {family} doesn't: {listed(left_over)}. Convert an "
            f"unmodified {family} checkpoint (adapters merged), with the config.json that belongs to it."
        )
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"The source lacks {len(missing)} tensors of {family}: {listed(missing)}. Download the complete "
            "checkpoint, with the config.json that belongs to it."
        )
    wrong = [
        f"{name} is {list(stored[name])}, expected {list(expected[new_name])}"
        for new_name, name in found.items()
        if tuple(stored[name]) != tuple(expected[new_name])
    ]
    if wrong:
        raise CheckpointError(
            f"The source's weights don't have the shapes that its config.json describes: {listed(wrong)}. Use the "
            "config.json that belongs to the weights."
        )


def _drop_reason(name: str, config: CasaConfig) -> str | None:
    head, embedding = TIED
    if config.tie_word_embeddings and name == head:
        return f"tied to {embedding}"
    if config.backbone.text_only and name.startswith(f"{VISION}{config.tower.deepstack_modules}."):
        return "deepstack features of the vision tower, which the blocks of a text model were never trained to take"
    dropped = (*DROPPED, *config.backbone.dropped)
    return next((reason for pattern, reason in dropped if re.search(pattern, name)), None)
