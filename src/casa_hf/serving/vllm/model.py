# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""CASA models of vLLM's own parts: vision towers, decoder blocks and samplers, with fusion layers beside
self-attention.

What a step shows the model is put together before its blocks run, outside of compiled graphs: `embed_input_ids` is
given the features of the step's images, and `forward` plans the step (`steps.py`) and leaves the plan where fusion
layers find it, in the metadata of their attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, extract_layer_index, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from casa_hf.configuration_casa import CasaConfig

from .adapters import Names, project_images
from .families import TOWERS, build_text_model
from .fusion import FusionAttention, text_backend
from .processing import CasaDummyInputs, CasaMultiModalProcessor, CasaProcessingInfo
from .steps import NewImage, WindowMemory
from .support import fusion_rules

# Numbers in the row before the tokens of an image are written in digits that every floating-point type holds.
_BASE = 128
_HEADER = 5


class CasaFusion(nn.Module):
    """A fusion layer: projections of its own, or (shared) those of self-attention, and the attention to images.

    Args:
        casa: configuration of the model.
        self_attn: vLLM's self-attention of the block.
        layer_norm: input norm of the block.
        vllm_config: vLLM's configuration.
        prefix: name of the layer.
    """

    image_norm: Any
    o_proj: Any

    def __init__(self, casa: CasaConfig, self_attn: Any, layer_norm: nn.Module, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config, quant_config = casa.text_config, vllm_config.quant_config
        self.index = extract_layer_index(prefix)
        self.with_text, self.shared = casa.casa_keys != "image", casa.casa_share_projections
        self.image_size, self.num_deepstack = config.hidden_size, casa.num_deepstack
        self.borrowed: list[Any] = [self_attn, layer_norm]  # not submodules
        if not self.shared:
            self.qkv_proj = QKVParallelLinear(
                config.hidden_size,
                self_attn.head_dim,
                config.num_attention_heads,
                config.num_key_value_heads,
                bias=self_attn.qkv_proj.bias is not None,
                quant_config=quant_config,
                prefix=f"{prefix}.qkv_proj",
            )
            self.o_proj = RowParallelLinear(
                config.num_attention_heads * self_attn.head_dim,
                config.hidden_size,
                bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.o_proj",
            )
            if hasattr(self_attn, "q_norm"):
                self.q_norm = RMSNorm(self_attn.head_dim, eps=config.rms_norm_eps)
                self.k_norm = RMSNorm(self_attn.head_dim, eps=config.rms_norm_eps)
        self.normalises_images = casa.casa_image_norm != "none"
        if not self.shared and self.normalises_images:
            self.image_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gated = casa.casa_gate is not None
        if self.gated:
            self.gate = nn.Parameter(torch.zeros(1))
        self.attn = FusionAttention(
            self_attn.num_heads,
            self_attn.head_dim,
            self_attn.scaling,
            num_kv_heads=self_attn.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        self.attn.owner.append(self)

    @property
    def projections(self) -> Any:
        """The module with the projections of queries, keys and values."""
        return self.borrowed[0] if self.shared else self

    def project(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of (tokens, hidden) normalised states, each (tokens, heads * head_dim)."""
        return _project(self.projections, self.borrowed[0], states)

    def image_keys(
        self, features: torch.Tensor, positions: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of new image tokens, each (tokens, kv_heads, head_dim).

        Args:
            features: (tokens, hidden * (1 + deepstack)) states, and what is added to them after the first blocks.
            positions: (axes, tokens) positions.
            text: (tokens,) the text tokens that they precede; None without LoRA.
        """
        states = features[:, : self.image_size]
        for level in range(1, min(self.index, self.num_deepstack) + 1):
            states = states + features[:, level * self.image_size : (level + 1) * self.image_size]
        states = states.contiguous()
        if self.normalises_images:
            states = (self.borrowed[1] if self.shared else self.image_norm)(states)
        self_attn = self.borrowed[0]
        qkv = project_images(self.projections.qkv_proj, states, text)
        _, key, value = _split(self.projections, self_attn, qkv)
        heads = (len(states), self_attn.num_kv_heads, self_attn.head_dim)
        key, value = key.reshape(heads), value.reshape(heads)
        return (_rotate(self_attn.rotary_emb, key, positions) if self.with_text else key), value


def _project(owner: Any, self_attn: Any, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _split(owner, self_attn, owner.qkv_proj(states)[0])


def _split(owner: Any, self_attn: Any, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of what one projection makes of them all."""
    query, key, value = qkv.split([self_attn.q_size, self_attn.kv_size, self_attn.kv_size], dim=-1)
    if hasattr(owner, "q_norm"):
        heads = (len(qkv), -1, self_attn.head_dim)
        query = owner.q_norm(query.reshape(heads)).flatten(1)
        key = owner.k_norm(key.reshape(heads)).flatten(1)
    return query.contiguous(), key.contiguous(), value.contiguous()


def _rotate(rotary: Any, key: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys (tokens, kv_heads, head_dim) at (axes, tokens) positions, which may be negative: tables begin at 0."""
    table = rotary.cos_sin_cache.to(key.device)[positions.abs().clamp(max=len(rotary.cos_sin_cache) - 1)]
    cos, sin = table.float().chunk(2, dim=-1)  # (axes, tokens, head_dim / 2)
    sin = sin * positions.sign()[..., None]
    sections: list[int] = getattr(rotary, "mrope_section", None) or []
    if len(positions) == 1:
        cos, sin = cos[0], sin[0]
    elif getattr(rotary, "mrope_interleaved", False):
        cos, sin = (_interleaved(part, sections) for part in (cos, sin))
    else:
        cos, sin = (
            torch.cat([part[axis] for axis, part in enumerate(x.split(sections, dim=-1))], dim=-1) for x in (cos, sin)
        )
    cos, sin = cos[:, None].to(key.dtype), sin[:, None].to(key.dtype)
    first, second = key.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _interleaved(table: torch.Tensor, sections: list[int]) -> torch.Tensor:
    """(tokens, n) of (3, tokens, n): every third place is the height's, every next the width's, as far as they go."""
    mixed = table[0].clone()
    for axis in (1, 2):
        mixed[..., axis : sections[axis] * 3 : 3] = table[axis][..., axis : sections[axis] * 3 : 3]
    return mixed


def with_fusion(layer: type[nn.Module]) -> type[nn.Module]:
    """The class of a block that has a fusion layer where `add_fusion` is called."""

    class CasaDecoderLayer(layer):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.casa_attn: CasaFusion | None = None

        def add_fusion(self, casa: CasaConfig, vllm_config: VllmConfig, prefix: str) -> None:
            self.casa_attn = CasaFusion(casa, self.self_attn, self.input_layernorm, vllm_config, prefix)

        def forward(
            self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            fusion = self.casa_attn
            if fusion is None:
                return super().forward(positions, hidden_states, residual)
            if residual is None:
                residual = hidden_states
                hidden_states = self.input_layernorm(hidden_states)
            else:
                hidden_states, residual = self.input_layernorm(hidden_states, residual)
            attention = self.self_attn
            query, key, value = _project(attention, attention, hidden_states)
            plain = query
            query, key = attention.rotary_emb(positions, query.clone(), key)
            attended = attention.attn(query, key, value)
            if not fusion.shared:
                query, key, value = fusion.project(hidden_states)
                if fusion.with_text:
                    query, key = attention.rotary_emb(positions, query, key)
            elif not fusion.with_text:
                query = plain
            fused = fusion.attn(query, key, value)
            if fusion.gated and fusion.shared:
                fused = fused * fusion.gate.tanh()
            if fusion.shared:
                output, _ = attention.o_proj(attended + fused)
            else:
                fused, _ = fusion.o_proj(fused)
                output = attention.o_proj(attended)[0] + (fused * fusion.gate.tanh() if fusion.gated else fused)
            hidden_states, residual = self.post_attention_layernorm(output, residual)
            return self.mlp(hidden_states), residual

    return CasaDecoderLayer


@MULTIMODAL_REGISTRY.register_processor(CasaMultiModalProcessor, info=CasaProcessingInfo, dummy_inputs=CasaDummyInputs)
class CasaForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsMRoPE, SupportsLoRA):
    """A CASA model in vLLM.

    Args:
        vllm_config: vLLM's configuration.
        prefix: name of the model in a larger one.
    """

    visual: Any
    language_model: Any
    lm_head: Any
    _mark_tower_model: Any
    _mark_language_model: Any

    requires_raw_input_tokens = True
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "qkv": ["qkv"],
    }
    hf_to_vllm_mapper = Names(
        orig_to_new_prefix={"model.visual.": "visual.", "model.language_model.": "language_model."}
    )

    def get_mm_mapping(self) -> MultiModelKeys:
        """Names of the parts, by which vLLM knows those that adapters are for."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="visual.merger.", tower_model="visual."
        )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """How a message writes an image or a video where the chat template takes strings only."""
        if modality.startswith("image"):
            return "<|vision_start|><|image_pad|><|vision_end|>"
        if modality.startswith("video"):
            return "<|vision_start|><|video_pad|><|vision_end|>"
        raise ValueError(f"CASA models take images and videos; got a part of type {modality!r}. Leave it out.")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        casa = vllm_config.model_config.hf_config
        text = casa.text_config
        self.config: CasaConfig = casa
        self.with_adapters = vllm_config.lora_config is not None
        quant_config = vllm_config.quant_config
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.visual = TOWERS[casa.vision_config.model_type].build(
                casa.vision_config, quant_config=quant_config, prefix=maybe_prefix(prefix, "visual")
            )
        name = maybe_prefix(prefix, "language_model")
        with self._mark_language_model(vllm_config):
            self.language_model = build_text_model(vllm_config, name, with_fusion)
            for index in casa.fusion_layers:
                layer = self.language_model.layers[index]
                layer.add_fusion(casa, vllm_config, f"{name}.layers.{index}.casa_attn")
            for layer in self.language_model.layers:
                attention = layer.self_attn.attn
                attention.attn_backend = text_backend(attention.attn_backend)
        self._text_layer = self.language_model.layers[0].self_attn.attn
        self._fusion_layer = self.language_model.layers[casa.fusion_layers[0]].casa_attn.attn
        self.lm_head = ParallelLMHead(
            text.vocab_size, text.hidden_size, quant_config=quant_config, prefix=maybe_prefix(prefix, "lm_head")
        )
        if casa.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.language_model.embed_tokens)
        self.logits_processor = LogitsProcessor(text.vocab_size)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self._merge = casa.vision_config.spatial_merge_size
        self._axes = 3 if casa.backbone.multimodal_rope else 1
        self._memory: WindowMemory | None = None
        self._new: tuple[list[NewImage], torch.Tensor] | None = None

    # ---------------------------------------------------------------- images

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """For each image or video (rows, hidden * (1 + deepstack)): a row with each image's size, then its tokens."""
        found: list[torch.Tensor] = []
        for key in kwargs:  # in the order in which vLLM asks for the modalities
            if key == "pixel_values":
                grids = kwargs["image_grid_thw"].reshape(-1, 3)
                found += self._encode(kwargs["pixel_values"], grids, [1] * len(grids), is_frame=False)
            elif key == "pixel_values_videos":
                grids, numbers = kwargs["video_grid_thw"], kwargs["num_frames"].flatten().tolist()
                if isinstance(grids, list | tuple):
                    grids = torch.cat([grid.reshape(-1, 3) for grid in grids])
                found += self._encode(kwargs["pixel_values_videos"], grids.reshape(-1, 3), numbers, is_frame=True)
        return found

    def _encode(self, pixels: Any, grids: torch.Tensor, numbers: list[int], is_frame: bool) -> list[torch.Tensor]:
        if isinstance(pixels, list | tuple):
            pixels = torch.cat(list(pixels))
        sizes = grids.tolist()
        states = self.visual(pixels.type(self.visual.dtype), grid_thw=sizes)
        states = states[:, : self.config.image_features_size]
        parts = states.split([time * height * width // self._merge**2 for time, height, width in sizes])
        images = []
        for tokens, (_, height, width) in zip(parts, sizes, strict=True):
            header = tokens.new_zeros(1, tokens.shape[1])
            header[0, :_HEADER] = header.new_tensor(
                [*divmod(height // self._merge, _BASE), *divmod(width // self._merge, _BASE), int(is_frame)]
            )
            images.append(torch.cat([header, tokens]))
        items = iter(images)
        return [torch.cat([next(items) for _ in range(number)]) for number in numbers]

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(tokens, hidden) embeddings of the text; images are kept for the step."""
        self._new = None
        if multimodal_embeddings is not None and len(multimodal_embeddings) and is_multimodal is not None:
            self._new = self._read_images(torch.cat(list(multimodal_embeddings)), is_multimodal)
        return self.language_model.embed_input_ids(input_ids)

    def _read_images(self, rows: torch.Tensor, is_multimodal: torch.Tensor) -> tuple[list[NewImage], torch.Tensor]:
        """Images by the tokens that they precede, and (tokens, features) of them all."""
        numbers = rows[:, :_HEADER].float().round().long().cpu()
        images, kept, place = [], [], 0
        for index in is_multimodal.nonzero()[:, 0].tolist():
            if place >= len(numbers):
                break  # an image that isn't there is not seen
            high, low, wide, narrow, is_frame = numbers[place].tolist()
            image = NewImage(index, (high * _BASE + low, wide * _BASE + narrow), bool(is_frame))
            images.append(image)
            kept.append(rows[place + 1 : place + 1 + image.num_tokens])
            place += 1 + image.num_tokens
        return images, torch.cat(kept)

    # ---------------------------------------------------------------- positions

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[torch.Tensor, int]:
        """(3, tokens) positions of a prompt, and by how much later ones are ahead of their index."""
        positions = torch.arange(len(input_tokens))
        if self.config.casa_positions == "insertion":
            for feature in mm_features:
                grids = feature.data["video_grid_thw" if feature.modality == "video" else "image_grid_thw"].data
                is_embed = feature.mm_position.is_embed
                for place, grid in zip(is_embed.nonzero()[:, 0].tolist(), grids.reshape(-1, 3), strict=True):
                    positions[feature.mm_position.offset + place :] += int(grid[1:].max()) // self._merge
        return positions.expand(3, -1).clone(), int(positions[-1]) + 1 - len(input_tokens)

    def _image_positions(self, images: list[NewImage], positions: torch.Tensor) -> torch.Tensor:
        """(axes, image tokens) positions of the images of a step."""
        before = self.config.casa_positions == "insertion" or self.config.casa_image_positions == "before"
        found = []
        for image in images:
            height, width = image.grid
            tokens = torch.arange(image.num_tokens, device=positions.device)
            at = positions[..., image.token].reshape(self._axes, 1).expand(-1, image.num_tokens)
            if self._axes == 3:
                at = at - (max(height, width) if before else 0)
                found.append(at + torch.stack([tokens * 0, tokens // width, tokens % width]))
            else:
                found.append(at - image.num_tokens + tokens if before else at)
        return torch.cat(found, dim=1)

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(tokens, hidden) final states of a step."""
        self._plan(input_ids, positions)
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def _plan(self, input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        new, self._new = self._new, None
        all_metadata = get_forward_context().attn_metadata
        if not isinstance(all_metadata, dict):
            return  # a run without requests, to measure memory or to compile
        metadata = all_metadata[self._fusion_layer.layer_name]
        text = all_metadata[self._text_layer.layer_name].casa_text
        if self._memory is None:
            num_slots = self._text_layer.kv_cache.shape[0] * text.block_size
            self._memory = WindowMemory(fusion_rules(self.config), num_slots, input_ids.device)
        images: list[NewImage] = []
        if new is not None:
            images, features = new
            text_tokens = None
            if self.with_adapters:
                text_tokens = torch.tensor([image.token for image in images for _ in range(image.num_tokens)])
                text_tokens = text_tokens.to(input_ids.device)
            metadata.images = (features, self._image_positions(images, positions), text_tokens)
        metadata.plan(self._memory, text, input_ids, images)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(tokens, vocabulary) logits."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the names of parameters that were."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
