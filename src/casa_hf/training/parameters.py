# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Which parameters train, and at which rate.

Parameters are named as in a checkpoint (docs/architecture.md). A pattern is a regular expression that is searched for
in these names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from .new_tokens import NEW_TOKENS, new_tokens_name, train_new_tokens

NUM_VISION_BLOCKS = 4  # the last ones, which the paper trains

# What conversion adds: it starts as a copy or at random, and learns at a rate of its own.
FUSION = r"(^|\.)(casa_attn|casa_layernorm)\."
_NEW_TOKENS = rf"{re.escape(NEW_TOKENS)}$"
_ADAPTERS = r"\.lora_|\.trainable_tokens_delta\b"  # of PEFT: beside matrices, and in place of rows of embeddings
_NEW = rf"{FUSION}|{_NEW_TOKENS}|(^|\.)multi_modal_projector\.|{_ADAPTERS}|\.modules_to_save\."

# For `target_modules` of PEFT, which matches whole names.
LORA_TARGETS: dict[str, str] = {
    "fusion": r".*\.casa_attn\.[qkvo]_proj",
    "self-attention": r".*language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    "language-model": r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_\w+|out_proj)"
    r"|mlp\.(shared_expert\.)?\w+_proj)",
}

# For `target_parameters` of PEFT: matrices of experts, which are parameters of one module.
EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

_LANGUAGE_MODEL = r"(^|\.)(language_model|lm_head|multi_modal_projector)\."
RECIPES = ("paper-qwen", "paper-helium", "fusion-only")

_PARTS = {
    "adapters": _ADAPTERS,
    "vision tower, blocks": r"(^|\.)visual\.blocks\.",
    "vision tower, rest": r"(^|\.)visual\.",
    "projector": r"(^|\.)multi_modal_projector\.",
    "new tokens": _NEW_TOKENS,
    "embeddings": r"(^|\.)embed_tokens\.",
    "fusion layers": FUSION,
    "self-attention": r"(^|\.)self_attn\.",
    "linear attention": r"(^|\.)linear_attn\.",
    "experts": r"(^|\.)mlp\.experts\.",
    "routers": r"(^|\.)mlp\.gate\.",
    "MLPs": r"(^|\.)mlp\.",
    "norms": r"norm\.",
    "output head": r"(^|\.)lm_head\.",
}


@dataclass(frozen=True)
class Part:
    """A part of a model in the table of what trains.

    Attributes:
        name: name such as "fusion layers".
        parameters: number of its parameters; one that two parts share is counted once.
        trainable: number of the parameters that train.
    """

    name: str
    parameters: int
    trainable: int


def freeze(model: nn.Module, trainable: str | Sequence[str] = "paper-qwen") -> list[Part]:
    """Freeze a model except for what is to be trained.

    Frozen parts before the first trainable one keep no graph: neither the vision tower below its last trained blocks,
    nor, if it is frozen, the embeddings.

    Tokens that conversion has added (gist tokens; delimiters of a text-only source) train where the rest of the
    embeddings doesn't: their rows become a parameter `...embed_tokens.new_tokens.weight` (tokens, hidden size), which
    stands in for them until the next call of this function. No other row changes, whatever the optimizer. State
    dicts, and so checkpoints, have neither a further name nor another shape: the rows are in the matrix.

    Args:
        model: CASA model.
        trainable: patterns of parameter names, or a recipe: "paper-qwen" trains the fusion layers and the last
            four blocks of the vision tower (the language model stays as it is), "paper-helium" the whole language
            model with its fusion layers, the projector and these vision blocks, "fusion-only" the fusion layers. All
            train the projector that conversion adds to a text-only source, since it starts at random, and new tokens.
            As a pattern, "new_tokens" trains the latter.

    Returns:
        What trains, by part of the model.

    Raises:
        ValueError: if a pattern is malformed or matches no parameter, or a recipe trains the fusion layers of a model
            in which they have no parameters of their own. The model is unchanged then.
    """
    new_tokens = new_tokens_name(model)
    names = [name for name, _ in model.named_parameters() if name != new_tokens]
    if new_tokens is not None:
        names.append(new_tokens)
    patterns = _recipe(model, names, trainable) if isinstance(trainable, str) else list(trainable)
    if not patterns:
        raise ValueError(f"trainable={trainable!r} is empty; give a recipe, or patterns of parameter names.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"The pattern {pattern!r} is not a valid regular expression: {error}.") from error
        if not any(re.search(pattern, name) for name in names):
            near = get_close_matches(pattern, RECIPES, n=1)
            raise ValueError(
                f"trainable={pattern!r} is neither a recipe nor part of a parameter name; "
                + (f"did you mean {near[0]!r}? " if near else "")
                + f"Use one of {', '.join(RECIPES)}, or a part of names such as "
                f"{', '.join(names[:: max(1, len(names) // 4)])}."
            )
    trained = {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
    whole_matrix = new_tokens is not None and f"{new_tokens.removesuffix(NEW_TOKENS)}.weight" in trained
    train_new_tokens(model, new_tokens in trained and not whole_matrix)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return trainable_parts(model)


def _recipe(model: nn.Module, names: list[str], recipe: str) -> list[str]:
    """The patterns of a recipe; any other string is a pattern."""
    if recipe not in RECIPES:
        return [recipe]
    projector = [r"(^|\.)multi_modal_projector\."] if any("multi_modal_projector." in name for name in names) else []
    depth = 1 + max(int(found[1]) for name in names if (found := re.search(r"visual\.blocks\.(\d+)\.", name)))
    blocks = "|".join(str(index) for index in range(max(0, depth - NUM_VISION_BLOCKS), depth))
    vision_blocks = rf"visual\.blocks\.({blocks})\."
    if recipe == "paper-helium":
        return [_LANGUAGE_MODEL, vision_blocks]
    if not any(re.search(FUSION, name) for name in names):
        raise ValueError(
            f"{recipe!r} trains fusion layers, but those of this model have no parameters of their own: they share "
            'the projections of self-attention. Train these too ("paper-helium", or patterns such as "self_attn"), or '
            "convert to a variant with projections of its own, such as casa."
        )
    new_tokens = [_NEW_TOKENS] if any(re.search(_NEW_TOKENS, name) for name in names) else []
    return [FUSION, *projector, *new_tokens, *([vision_blocks] if recipe == "paper-qwen" else [])]


def trainable_parts(model: nn.Module) -> list[Part]:
    """List the parts of a model, and how much of each trains; parts without parameters are left out."""
    counts = {name: [0, 0] for name in (*_PARTS, "rest")}
    for name, parameter in model.named_parameters():
        part = next((part for part, pattern in _PARTS.items() if re.search(pattern, name)), "rest")
        size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor in its place
        counts[part][0] += size
        counts[part][1] += size if parameter.requires_grad else 0
    counts["embeddings"][0] -= counts["new tokens"][0]  # rows of the matrix, which has them too
    return [Part(name, *count) for name, count in counts.items() if count[0]]


def parts_table(parts: Sequence[Part]) -> str:
    """Format the parts and their sum as a table."""
    total = Part("all", sum(part.parameters for part in parts), sum(part.trainable for part in parts))
    lines = [f"{'':<22}{'parameters':>16}{'trainable':>16}"]
    lines += [f"{part.name:<22}{part.parameters:>16,}{part.trainable:>16,}" for part in (*parts, total)]
    return "\n".join(lines)


def parameter_groups(
    model: nn.Module, lr_new: float = 1e-4, lr_existing: float = 1e-5, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Group the trainable parameters for an optimizer, at the paper's rates.

    Args:
        model: CASA model, plain or wrapped (PEFT, DDP, FSDP).
        lr_new: learning rate of what the source doesn't have: fusion layers, projector, new tokens, adapters.
        lr_existing: learning rate of the rest.
        weight_decay: weight decay of matrices; norms, biases and gates have none.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and a `name`, new parameters first (the Trainer logs the first
        group's rate); empty ones are left out.

    Raises:
        ValueError: if nothing is trainable.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        new, decays = re.search(_NEW, name) is not None, parameter.ndim > 1
        label = f"{'new' if new else 'existing'}, {'decayed' if decays else 'not decayed'}"
        group = groups.setdefault(
            label,
            {
                "params": [],
                "name": label,
                "lr": lr_new if new else lr_existing,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("No parameter of the model is trainable; choose some by freeze(model, ...).")
    return [groups[label] for label in sorted(groups, reverse=True)]


def checkpoint_activations(model: Any) -> None:
    """Recompute activations inside blocks in the backward pass instead of keeping them.

    Like Transformers' own option, except that embeddings don't count as trained: blocks before the first trained
    parameter then keep no graph and are not recomputed.

    Args:
        model: CASA model, plain or with PEFT adapters.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # The second name is that of older versions of Transformers.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    base.disable_input_require_grads()
