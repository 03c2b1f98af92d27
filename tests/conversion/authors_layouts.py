# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints as the method's authors may have written them: the models of `authors_reference.py` under many names.

A layout says how tensors are called and which lie in one, and `write` makes a folder of it with a configuration in the
style of Transformers 4, a tokenizer, and code of which only a few words matter. Nothing of the package is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.tiny_source import build_text_tokenizer, build_tokenizer
from tests.conversion.authors_reference import Spec, Weights

FIRST, SECOND = "model.reset_casa_streaming_states()\n", "def start_ca_streaming_states(self):\n    ...\n"
IMAGE_TOKENS = ("<|begin_image|>", "<|end_image|>")

SEPARATE = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


@dataclass(frozen=True)
class Layout:
    """Names of a checkpoint.

    Attributes:
        decoder: what stands before the language model's `layers`.
        outer: what stands before its head.
        tower: what stands before the tower's parts.
        blocks: list of blocks.
        norms: names of a block's two norms.
        attention, fusion, mlp: modules in a block; `fusion` may hold {block}, then it is the whole path.
        attention_names, fusion_names: names of the projections.
        fusion_norm, text_norm, gate: names of the norms of images and of text, and of the gate.
        tower_norm, projection: names of the norm and of the projection behind the tower.
        joined: (pattern of names, the projections that lie in one tensor, its name), applied in turn.
        patch: form of the patch embedding: "summed", "one frame", "two frames", "flat", or any function.
        rename: last change of a name.
    """

    decoder: str = "model."
    outer: str = ""
    tower: str = "image_prefix.visual."
    blocks: str = "layers"
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    attention: str = "self_attn."
    fusion: str = "casa_attn."
    mlp: str = "mlp."
    attention_names: Mapping[str, str] = field(default_factory=lambda: SEPARATE)
    fusion_names: Mapping[str, str] = field(default_factory=lambda: SEPARATE)
    fusion_norm: str = "norm_kv"
    gate: str = "gate"
    text_norm: str = "text_norm"
    tower_norm: str = "image_prefix.norm_xa"
    projection: str = "image_prefix.proj_xa"
    joined: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    patch: str = "summed"
    rename: Callable[[str], str] = lambda name: name

    def tensors(self, weights: Weights) -> Weights:
        """Tensors by stored name."""
        stored = {self._name(name): tensor for name, tensor in weights.items() if name != "tower.patch"}
        stored[f"{self.tower}patch_embed.proj.weight"] = _patch(weights["tower.patch"], self.patch)
        for pattern, parts, joined in self.joined:
            for name in list(stored):
                match = re.fullmatch(pattern.format(part=re.escape(parts[0])), name)
                if match:
                    pieces = [stored.pop(name.replace(parts[0], part)) for part in parts]
                    stored[name.replace(parts[0], joined)] = torch.cat(pieces)
        return {self.rename(name): tensor.contiguous() for name, tensor in stored.items()}

    def _name(self, name: str) -> str:
        if name in ("embedding", "norm", "head"):
            return {
                "embedding": f"{self.decoder}embed_tokens.weight",
                "norm": f"{self.decoder}norm.weight",
                "head": f"{self.outer}lm_head.weight",
            }[name]
        if name.startswith("projection."):
            return f"{self.projection}.{name.partition('.')[2]}"
        if name == "tower_norm":
            return f"{self.tower_norm}.weight"
        first, _, rest = name.partition(".")
        if first == "tower":
            return self.tower + _TOWER[rest] if rest in _TOWER else self.tower + _tower_block(rest)
        number, _, rest = rest.partition(".")
        block = f"{self.decoder}{self.blocks}.{number}."
        if rest in ("norm1", "norm2"):
            return f"{block}{self.norms[rest == 'norm2']}.weight"
        module, _, rest = rest.partition(".")
        if module == "mlp":
            return f"{block}{self.mlp}{rest}_proj.weight"
        if module == "self":
            projection, _, leaf = rest.partition(".")
            return f"{block}{self.attention}{self.attention_names[projection]}.{leaf}"
        place = self.fusion.format(block=number) if "{" in self.fusion else block + self.fusion
        if rest == "norm":
            return f"{place}{self.fusion_norm}.weight"
        if rest == "text_norm":
            return f"{place}{self.text_norm}.weight"
        if rest == "gate":
            return f"{place}{self.gate}"
        projection, _, leaf = rest.partition(".")
        return f"{place}{self.fusion_names[projection]}.{leaf}"


_TOWER = {
    "norm": "merger.ln_q.weight",
    "out0.weight": "merger.mlp.0.weight",
    "out0.bias": "merger.mlp.0.bias",
    "out2.weight": "merger.mlp.2.weight",
    "out2.bias": "merger.mlp.2.bias",
}


def _tower_block(rest: str) -> str:
    _, number, part, *leaf = rest.split(".")
    module = {"qkv": "attn.qkv", "proj": "attn.proj", "norm1": "norm1", "norm2": "norm2"}.get(part, f"mlp.{part}_proj")
    return ".".join(["blocks", number, module, *(leaf or ["weight"])])


def _patch(weight: Tensor, form: str) -> Tensor:
    """The patch embedding of one frame, (out, 3, 14, 14), as it may be stored."""
    if form == "two frames":
        return two_frames(weight)
    return {
        "summed": weight,
        "one frame": weight[:, :, None],
        "chw": weight.flatten(1),
        "hwc": weight.permute(0, 2, 3, 1).flatten(1),
    }[form]


def two_frames(weight: Tensor) -> Tensor:
    """A patch embedding of two frames, which differ, (out, 3, 2, 14, 14); its sum is that of one."""
    first = 0.3 * weight + 0.1
    return torch.stack([first, weight - first], dim=2)


def write(
    folder: Path,
    spec: Spec,
    layout: Layout,
    *,
    name: str,
    code: str | None = SECOND,
    weights: Weights | None = None,
    tensors: Callable[[Weights], Weights] | None = None,
    config: Callable[[dict[str, Any]], Any] | None = None,
    nested: bool = False,
    delimiters: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Path:
    """Write a checkpoint.

    Args:
        folder: where; made.
        spec: the model.
        layout: names.
        name: `model_type`.
        code: content of a Python file.
        weights: other weights than `spec.weights()`.
        tensors: last change of the stored tensors.
        config: last change of the configuration.
        nested: whether the language model's settings stand in `text_config`.
        delimiters: whether the configuration names the tokens at an image.
        dtype: of the stored tensors.
    """
    folder.mkdir(parents=True)
    stored = layout.tensors(weights or spec.weights())
    stored = {key: tensor.to(dtype) for key, tensor in (tensors or (lambda all: all))(stored).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    qwen = spec.sections is not None
    tokenizer = build_tokenizer() if qwen else build_text_tokenizer()
    if not qwen:
        tokenizer.add_special_tokens({"extra_special_tokens": list(IMAGE_TOKENS)})
    tokenizer.save_pretrained(folder)
    start, end = tokenizer.convert_tokens_to_ids(
        ["<|vision_start|>", "<|vision_end|>"] if qwen else list(IMAGE_TOKENS)
    )
    text: dict[str, Any] = {
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp,
        "num_hidden_layers": spec.blocks,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "rms_norm_eps": spec.eps,
        "rope_theta": spec.theta,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if qwen:
        text["rope_scaling"] = {"type": "mrope", "mrope_section": list(spec.sections or ())}
        text |= {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 70}  # as Qwen's files
    else:
        text |= {"head_dim": spec.head, "rope_scaling": None}
    if nested:
        text["model_type"] = "qwen2_5_vl" if qwen else "llama"
    content: dict[str, Any] = {
        "model_type": name,
        "architectures": [name.replace("_", "")],
        "auto_map": {"AutoModel": "modeling.Model"},
        "tie_word_embeddings": spec.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **({"text_config": text} if nested else text),
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": spec.tower_blocks,
            "hidden_size": spec.tower_width,
            "intermediate_size": spec.tower_mlp,
            "num_heads": spec.tower_heads,
            "out_hidden_size": spec.tower_out or spec.width,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
        },
    }
    if delimiters:
        content |= {"pre_image_tokens": [start], "post_image_tokens": [end]}
    if config is not None:
        config(content)
    (folder / "config.json").write_text(json.dumps(content))
    if code is not None:
        (folder / "modeling.py").write_text(f"raise RuntimeError('this must never be run')\n{code}")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n# A model\n")
    return folder


def vocabulary(qwen: bool) -> int:
    """Size of the tokenizer's vocabulary."""
    return len(build_tokenizer()) if qwen else len(build_text_tokenizer()) + len(IMAGE_TOKENS)
