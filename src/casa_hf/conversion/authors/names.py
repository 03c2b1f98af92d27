# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Candidate names of tensors in the checkpoints that the method's authors have released, as data.

The code of those checkpoints is public only beside their weights. Known for certain is where the vision tower stands
(`image_prefix.visual` in the Qwen models, `image_prefix.enc.visual` in the Helium ones: kyutai-labs/casa, scripts).
All else is a candidate: names of Transformers' own models, of the authors' earlier kyutai-labs/moshivis
(`cross_attention.mha.in_proj_weight_kv`, `norm_cross`, `gate.alpha`), and usual ones of the field.

A name is looked up whole; shapes play no part, since q and o, and k and v, have equal ones. A name that can mean two
things stands in two tables, which leaves it to the user.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product

from ..mapping import EMBEDDINGS, LAYER, PROJECTOR, TIED, VISION

# In a target: any block with a fusion layer.
ANY_BLOCK = "{i}"

# ---------------------------------------------------------------- where parts stand

_DECODERS = (
    *("", "model.", "model.model.", "language_model.", "language_model.model.", "model.language_model."),
    *("llm.", "llm.model.", "lm.", "lm.model.", "text_model.", "text_model.model.", "backbone.", "backbone.model."),
    *("decoder.", "model.decoder.", "transformer."),
)
_TOWERS = (
    *(
        "image_prefix.visual.",
        "image_prefix.enc.visual.",
        "model.image_prefix.visual.",
        "model.image_prefix.enc.visual.",
    ),
    *("image_prefix.enc.", "image_prefix.model.visual.", "image_prefix.encoder.visual.", "visual.", "model.visual."),
)
_BLOCK_LISTS = ("layers", "blocks")
_FUSION_LISTS = (
    "casa_layers",
    "ca_layers",
    "cross_attn_layers",
    "cross_attention_layers",
    "xa_layers",
    "fusion_layers",
)
# A block that wraps the stock one.
_WRAPPERS = ("", "layer.", "block.", "decoder_layer.", "base_layer.")

# ---------------------------------------------------------------- what stands there

_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "text_emb")
_FINAL_NORM = ("norm", "final_norm", "out_norm", "ln_f")
_HEAD = ("lm_head", "text_linear")

_SELF_ATTENTION = ("self_attn.", "self_attention.", "attn.", "attention.")
_MLP = ("mlp.", "feed_forward.", "ffn.")
_FUSION = (
    *("casa_attn.", "casa.", "casa_layer.", "casa_attention.", "casa.attn.", "casa_layer.attn.", "casa_attn.attn."),
    *("ca_attn.", "ca.", "ca_layer.", "ca_attention.", "ca.attn.", "ca_layer.attn."),
    *("cross_attn.", "cross_attention.", "cross_attention.mha.", "cross_attn.attn.", "crossattention."),
    *("xa.", "xa_attn.", "xattn.", "xa_layer."),
    *("self_attn.casa_attn.", "self_attn.casa.", "self_attn.ca.", "self_attn.cross_attn.", "self_attn.xa."),
    *("self_attn.casa_", "self_attn.ca_", "self_attn.cross_", "self_attn.xa_", "casa_", "ca_", "cross_", "xa_"),
)
_FUSION_IN_LIST = ("", "attn.", "casa_attn.", "ca_attn.", "cross_attn.", "mha.", "self_attn.")

_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "q_proj": ("q_proj", "q", "wq", "to_q", "query", "query_proj", "q_linear", "in_proj_q"),
    "k_proj": ("k_proj", "k", "wk", "to_k", "key", "key_proj", "k_linear", "in_proj_k"),
    "v_proj": ("v_proj", "v", "wv", "to_v", "value", "value_proj", "v_linear", "in_proj_v"),
    "o_proj": ("o_proj", "o", "wo", "to_out", "to_out.0", "out_proj", "o_linear", "output_proj"),
}
_MLP_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3"),
    "down_proj": ("down_proj", "w2"),
}
# Several in one tensor, row after row; the name says in which order.
_JOINED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("q_proj", "k_proj", "v_proj"): ("qkv_proj", "qkv", "wqkv", "Wqkv", "to_qkv", "in_proj"),
    ("k_proj", "v_proj"): ("kv_proj", "kv", "wkv", "Wkv", "to_kv", "in_proj_kv"),
}
_JOINED_MLP: dict[tuple[str, ...], tuple[str, ...]] = {("gate_proj", "up_proj"): ("gate_up_proj", "gate_up", "w13")}

_INPUT_NORM = ("input_layernorm", "norm1", "attention_norm", "input_norm")
_POST_NORM = ("post_attention_layernorm", "norm2", "ffn_norm")
_IMAGE_NORM = (
    *("image_norm", "img_norm", "norm_image", "norm_img", "visual_norm", "vision_norm"),
    *("kv_norm", "norm_kv", "context_norm", "norm_context", "norm_y"),
)
_TEXT_NORM = ("text_norm", "norm_text", "query_norm", "norm_x")
# These don't say whether text, images or both pass through them.
_SOME_NORM = ("norm", "layernorm", "layer_norm", "input_layernorm", "pre_norm", "norm_cross")
_GATE = ("gate", "alpha", "gate.alpha", "attn_gate")

# A norm of image features behind the tower, which is that of every block if the blocks have none.
_TOWER_NORMS = ("image_prefix.norm_xa", "image_prefix.norm_extra", "image_prefix.norm", "image_prefix.enc.norm")

# Where the tower's features have another width than the language model.
_TOWER_PROJECTIONS = ("image_prefix.proj_xa", "image_prefix.proj_extra", "image_prefix.proj", "image_prefix.enc.proj")

_LEAVES = (".weight", ".bias")

# Parameters that torch and moshivis don't keep in a module of their own.
_IRREGULAR = re.compile(r"(.*\.in_proj)_(weight|bias)(_q|_kv)?")

# ---------------------------------------------------------------- looking up


def candidates(name: str) -> list[tuple[str, ...]]:
    """What a tensor can be, by its name.

    Args:
        name: name of a stored tensor.

    Returns:
        For each meaning the names of the CASA checkpoint's tensors that it holds, row after row; no element if the
        name is unknown, several if it is ambiguous. Names that no model has may be among them.
    """
    if match := _IRREGULAR.fullmatch(name):
        name = f"{match[1]}{match[3] or ''}.{match[2]}"
    return list(dict.fromkeys(_meanings(name)))


def is_fusion_list(name: str) -> bool:
    """Whether a tensor stands in a list of fusion layers, whose numbers needn't be those of the blocks."""
    return _fusion_list_pattern().fullmatch(name) is not None


def _meanings(name: str) -> Iterator[tuple[str, ...]]:
    yield from ((VISION + name.removeprefix(tower),) for tower in _TOWERS if name.startswith(tower))
    yield from _top_level().get(name, ())
    for pattern, inner in ((_block_pattern(), _in_block()), (_fusion_list_pattern(), _in_fusion_list())):
        if match := pattern.fullmatch(name):
            block = LAYER.format(match[1])
            yield from (tuple(block + target for target in targets) for targets in inner.get(match[2], ()))


def _alternatives(names: tuple[str, ...]) -> str:
    return "|".join(map(re.escape, names))


@cache
def _block_pattern() -> re.Pattern[str]:
    lists, wrappers = _alternatives(_BLOCK_LISTS), _alternatives(_WRAPPERS[1:])
    return re.compile(rf"(?:{_alternatives(_DECODERS)})(?:{lists})\.(\d+)\.(?:{wrappers})?(.+)")


@cache
def _fusion_list_pattern() -> re.Pattern[str]:
    return re.compile(rf"(?:{_alternatives(_DECODERS)})(?:{_alternatives(_FUSION_LISTS)})\.(\d+)\.(.+)")


_Table = dict[str, list[tuple[str, ...]]]


@cache
def _top_level() -> _Table:
    table: _Table = {}
    parts = (
        (EMBEDDINGS, _EMBEDDINGS),
        ("model.language_model.norm.weight", _FINAL_NORM),
        (TIED[0], _HEAD),
    )
    for decoder, (target, names) in product(_DECODERS, parts):
        for name in names:
            table.setdefault(f"{decoder}{name}.weight", []).append((target,))
    for root, norm in product(("", "model."), _TOWER_NORMS):
        table[f"{root}{norm}.weight"] = [(LAYER.format(ANY_BLOCK) + "casa_attn.image_norm.weight",)]
    for root, projection, leaf in product(("", "model."), _TOWER_PROJECTIONS, _LEAVES):
        table[f"{root}{projection}{leaf}"] = [(f"{PROJECTOR}{leaf.removeprefix('.')}",)]
    return table


@cache
def _in_block() -> _Table:
    """Meanings inside a block."""
    table: _Table = {}
    for target, names in (("input_layernorm", _INPUT_NORM), ("post_attention_layernorm", _POST_NORM)):
        for name in names:
            _add(table, f"{name}.weight", f"{target}.weight")
    for module in _SELF_ATTENTION:
        _add_projections(table, module, "self_attn.", _PROJECTIONS, _JOINED)
    for module in _MLP:
        _add_projections(table, module, "mlp.", _MLP_PROJECTIONS, _JOINED_MLP)
    _add_fusion(table, _FUSION)
    for name in ("norm_cross",):
        _add(table, f"{name}.weight", "casa_attn.image_norm.weight")
        _add(table, f"{name}.weight", "casa_layernorm.weight")
    return table


@cache
def _in_fusion_list() -> _Table:
    """Meanings inside an element of a list of fusion layers."""
    table: _Table = {}
    _add_fusion(table, _FUSION_IN_LIST)
    return table


def _add(table: _Table, name: str, *targets: str) -> None:
    meanings = table.setdefault(name, [])
    if targets not in meanings:
        meanings.append(targets)


def _add_projections(
    table: _Table,
    module: str,
    target: str,
    single: Mapping[str, tuple[str, ...]],
    joined: Mapping[tuple[str, ...], tuple[str, ...]],
) -> None:
    for leaf in _LEAVES:
        for projection, names in single.items():
            for name in names:
                _add(table, f"{module}{name}{leaf}", f"{target}{projection}{leaf}")
        for projections, names in joined.items():
            for name in names:
                _add(table, f"{module}{name}{leaf}", *(f"{target}{projection}{leaf}" for projection in projections))


def _add_fusion(table: _Table, modules: tuple[str, ...]) -> None:
    for module in modules:
        _add_projections(table, module, "casa_attn.", _PROJECTIONS, _JOINED)
        for names, targets in (
            (_IMAGE_NORM, ("casa_attn.image_norm.weight",)),
            (_TEXT_NORM, ("casa_layernorm.weight",)),
            (_SOME_NORM, ("casa_attn.image_norm.weight", "casa_layernorm.weight")),
        ):
            for name, target in product(names, targets):
                _add(table, f"{module}{name}.weight", target)
        for name, ending in product(_GATE, ("", ".weight")):
            _add(table, f"{module}{name}{ending}", "casa_attn.gate")
