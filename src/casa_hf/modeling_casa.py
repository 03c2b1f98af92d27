# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""CASA models (arXiv 2512.19535): a language model whose text attends to images outside its sequence.

Read from top to bottom: the language model with its windows (`CasaTextModel`), made of the blocks of
`decoder_casa.py`; vision tower and language model together (`CasaModel`), and the model that generates
(`CasaForConditionalGeneration`). What a call is given is read by `text_inputs.py` and `image_inputs.py`; checkpoints
are loaded by `loading_casa.py`, and `generate` is fed by `generation_casa.py`. Vision tower, norms, MLPs, rotary
embedding and self-attention are the backbone's own Transformers modules; the table in `backbones.py` names them.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    CausalLMOutputWithCrossAttentions,
)
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import Call, FusionLayer
from .attention_backends import (
    PackedMask,
    fusion_windows,
    is_varlen,
    packed_lengths,
    single_row_lengths,
    update_windows,
)
from .backbone import FULL_ATTENTION, LINEAR_ATTENTION, BlockAdapter
from .backbones import BACKBONES
from .cache_casa import Kept, check_room, home_layer, prepare_cache, reserve_images, stored_state, window_state
from .cache_layers import CasaStaticLayer
from .configuration_casa import CasaConfig
from .decoder_casa import CasaDecoderLayer
from .eviction import KeyRotation, check_history, evict_text
from .foreign_arguments import check_foreign, refuse_export, refuse_foreign
from .generation_casa import CasaGenerationMixin
from .image_inputs import check_features, check_grids, check_no_images, delimiters, has_images, place_images
from .loading_casa import CasaLoadingMixin
from .loss_casa import chunked_loss
from .own_copies import is_split
from .patch_embedding import PatchEmbedding, check_patches
from .positions import PositionRules, Rotary, packed_samples
from .publishing_hook import PublishedByHook
from .recurrence import TokenOrder, token_order
from .text_inputs import NewText, cached_length, embed_text, text_masks, without_padding
from .torch_varlen import TORCH_VARLEN, TORCH_VARLEN_TOWER
from .tower_attention import SDPA_TOWER
from .transfers import moved, to_host
from .transformers_versions import CACHE, CacheByBothNames, takes_cache, warn_if_untested
from .vision_tower import tower_inputs
from .window_state import WindowState
from .windows import ImagePlacement, WindowPlan, WindowRules, plan_windows

# Options of a call that apply to the vision tower too.
_RECORDED = ("output_attentions", "output_hidden_states")
# What backends are called for vision towers.
_TOWER_BACKENDS = {TORCH_VARLEN: TORCH_VARLEN_TOWER, "sdpa": SDPA_TOWER}


class _NestedOutput(CacheByBothNames):
    """An output that holds another one, which is a tuple within its tuple."""

    def to_tuple(self) -> tuple[Any, ...]:
        values = super().to_tuple()  # type: ignore[misc]
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in values)


@dataclass
class CasaModelOutput(_NestedOutput, BaseModelOutputWithPastAndCrossAttentions):
    """What [`CasaModel`] returns: `attentions` of self-attention, `cross_attentions` of the fusion layers, and
    `image_outputs` of the vision tower where pixels were given.

    With `output_router_logits`, families with experts also give, for each block that has any, `router_logits` of text,
    (batch * tokens, experts), and where image states pass them `image_router_logits`, (image tokens, experts); and
    `aux_loss`, which balances the experts over both."""

    image_outputs: BaseModelOutputWithPooling | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    image_router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None


@dataclass
class CasaOutput(_NestedOutput, CausalLMOutputWithCrossAttentions):
    """What [`CasaForConditionalGeneration`] returns: the same beside logits and the loss. That has `aux_loss` in it,
    times the text configuration's `router_aux_loss_coef`."""

    image_outputs: BaseModelOutputWithPooling | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    image_router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None


class CasaPreTrainedModel(CasaLoadingMixin, PublishedByHook, PreTrainedModel):
    """Loading, saving and initialisation that all CASA models share."""

    config: CasaConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CasaDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        """Initialise what no checkpoint provided; fusion layers start as copies of their block's self-attention."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, CasaTextModel):
                for block, origin in zip(module.layers, module.origins_of_fusion, strict=True):
                    _initialize_fusion(block, module.layers[origin])

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FusionLayer):
            module.reset_gate()
        text_config: Any = self.config.get_text_config()
        self._blocks.initialize(module, text_config.initializer_range)

    @property
    def _blocks(self) -> BlockAdapter:
        """How blocks of the language model are made and called."""
        return BACKBONES[self.config.get_text_config().model_type].block

    def _can_set_experts_implementation(self) -> bool:
        # Transformers reads it off the module of the class, which is the same for families without experts.
        return self._blocks.has_experts

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; "torch_varlen" reaches the vision tower too."""
        super().set_attn_implementation(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, CasaModel):
                module.name_tower_backend()

    def fold_patch_embedding(self) -> None:
        """Fold rescaling, normalisation and the doubled frame of an image into weights of their own, by which 8-bit
        patches are embedded in evaluation mode: two kernels and half the product, equal within rounding.

        The weights of the model stay what they are, in memory and when it is saved. In training mode, and wherever
        gradients reach the patch embedding, the fold isn't used; when the weights have changed, it is made again.

        Raises:
            ValueError: if the weights aren't at hand: split over devices, offloaded, or replaced by an adapter's.
        """
        for embedding in self._patch_embeddings():
            embedding.fold()

    def unfold_patch_embedding(self) -> None:
        """Undo `fold_patch_embedding`: 8-bit patches are normalised on the device again."""
        for embedding in self._patch_embeddings():
            embedding.unfold()

    def _patch_embeddings(self) -> list[PatchEmbedding]:
        return [module for module in self.modules() if isinstance(module, PatchEmbedding)]

    def fuse_projections(self) -> int:
        """Compute queries, keys and values of each decoder block by one product where gradients aren't needed.

        Their parameters become views of one buffer per block; they stay the same objects under the same names, so
        that they can be trained, saved, loaded and moved as before. Blocks in which projections aren't plain linear
        layers (adapters, quantization, tensor parallelism, offloading) stay as they are, and so does training. Streams
        and compiled steps of `generate` call this themselves. `state_dict` undoes it, since tools that save states
        drop or refuse tensors that are parts of one buffer.

        Returns:
            The number of blocks with one product.
        """
        return sum(block.fuse_projections() for block in self._decoder_blocks())

    def unfuse_projections(self) -> None:
        """Give each parameter memory of its own again, and call projections one by one."""
        for block in self._decoder_blocks():
            block.unfuse_projections()

    def _decoder_blocks(self) -> list[CasaDecoderLayer]:
        return [module for module in self.modules() if isinstance(module, CasaDecoderLayer)]

    def _flex_attn_can_dispatch(self, is_init_check: bool = False) -> bool:
        raise ValueError(
            'attn_implementation="flex_attention" isn\'t supported by CASA models: its block masks are '
            "compiled for one shape, but windows differ from call to call, so that every image would be "
            'compiled again. Use "flash_attention_2", "torch_varlen" (CUDA, torch 2.11 or newer, no further '
            'package) or "sdpa".'
        )


def _initialize_fusion(block: Any, origin: Any) -> None:
    """Copy self-attention, that of `origin`, and the input norm into the fusion layer, where no checkpoint provided
    it."""
    norm = dict(block.input_layernorm.named_parameters())
    sources = {f"casa_attn.image_norm.{name}": parameter for name, parameter in norm.items()}
    sources |= {f"casa_layernorm.{name}": parameter for name, parameter in norm.items()}
    parameters = dict(block.named_parameters())
    sources |= {
        name.replace("self_attn.", "casa_attn."): parameter
        for name, parameter in origin.named_parameters()
        if name.startswith("self_attn.")
    }
    for name, parameter in parameters.items():
        if name in sources and not getattr(parameter, "_is_hf_initialized", False):
            is_offloaded = sources[name].is_meta and not parameter.is_meta
            if is_offloaded or is_split(parameter):
                raise NotImplementedError(
                    "The fusion layers of an unconverted checkpoint are copies of its self-attention, which "
                    f"{'device_map has offloaded to disk' if is_offloaded else 'ZeRO-3 has split'}. Convert the "
                    "checkpoint first: `casa-hf convert SOURCE OUTPUT`."
                )
            init.copy_(parameter, sources[name])


def _kept_by(block: Any) -> Kept:
    """What the block's own attention keeps in a cache."""
    if block.kind == LINEAR_ATTENTION:
        return "recurrent"
    return "nothing" if block.self_attn is None else "text"


class _TextInputs(NamedTuple):
    """The text of one forward.

    Attributes:
        embeds: (batch, tokens, hidden) embedded tokens.
        token_mask: (batch, tokens) False for padding.
        padded: whether there may be padding.
        mask: mask of self-attention as it was given.
        text_index: (batch, tokens) index of each token in its sample; None where it wasn't given.
        positions: (axes, batch, tokens).
        samples: (batch, tokens) index of each token's packed sample; None without packing.
        gist: (batch, tokens) True for gist tokens; None without any.
    """

    embeds: torch.Tensor
    token_mask: torch.Tensor
    padded: bool
    mask: torch.Tensor | dict | None
    text_index: torch.Tensor | None
    positions: torch.Tensor
    samples: torch.Tensor | None
    gist: torch.Tensor | None


class CasaTextModel(CasaPreTrainedModel):
    """The backbone's language model with fusion layers; `config` is the text configuration."""

    config: PreTrainedConfig
    input_modalities = ("text",)
    _can_record_outputs = {"hidden_states": OutputRecorder(CasaDecoderLayer, index=0)}

    def __init__(self, config: CasaConfig):
        super().__init__(config.text_config)
        text_config = config.text_config
        self.window_rules = WindowRules(
            config.casa_keys, config.casa_image_history, config.casa_video_history, config.casa_text_windows
        )
        self.position_rules = PositionRules(
            axes=3 if config.backbone.multimodal_rope else 1,
            insertion=config.casa_positions == "insertion",
            before=config.casa_image_positions == "before",
        )
        self.attends_to_update = config.casa_image_updates == "full"
        self.head_groups = text_config.num_attention_heads // text_config.num_key_value_heads
        # No `padding_idx`: padding is masked anyway, and where its token is text, its row could not learn. That token
        # often ends answers too, and trainers write the tokenizer's into the configuration.
        self.embed_tokens = nn.Embedding(text_config.vocab_size, text_config.hidden_size)
        self.layers = nn.ModuleList([CasaDecoderLayer(config, i) for i in range(text_config.num_hidden_layers)])
        self.origins_of_fusion = [config.origin_of_fusion(index) for index in range(len(self.layers))]
        self.kept_by_blocks = [_kept_by(layer) for layer in self.layers]
        self.recurrent_blocks = [index for index, layer in enumerate(self.layers) if layer.kind == LINEAR_ATTENTION]
        self.norm = config.backbone.load("rms_norm")(text_config.hidden_size, eps=text_config.rms_norm_eps)
        self.rotary_emb = config.backbone.load("rotary_embedding")(config=text_config)
        self.gradient_checkpointing = False
        self.post_init()
        self._tp_plan = self._parallel_plan()

    def _parallel_plan(self) -> dict[str, str]:
        """How processes share modules under tensor parallelism, as far as this design has them: fusion layers as the
        family's own attention."""
        plan: dict[str, str] = dict(self._tp_plan)
        rules = {name: style for name, style in plan.items() if "self_attn." in name}
        if rules:  # each process norms its own heads, which not every family says
            rules |= {f"layers.*.self_attn.{norm}": "replicated_with_grad_allreduce" for norm in ("q_norm", "k_norm")}
        plan |= rules | {name.replace("self_attn.", "casa_attn."): style for name, style in rules.items()}
        parts = itertools.chain(self.named_modules(), self.named_parameters())
        names = {re.sub(r"\d+", "*", name) for name, _ in parts}
        return {name: style for name, style in plan.items() if name in names}

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        closes_window: torch.Tensor | None,
        token_mask: torch.Tensor,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        state: WindowState | None = None,
        images: ImagePlacement | None = None,
        image_states: torch.Tensor | None = None,
        deepstack: tuple[torch.Tensor, ...] = (),
        gist: torch.Tensor | None = None,
        static_image_tokens: int = CasaConfig.casa_static_image_tokens,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> CasaModelOutput:
        """Run the blocks over one call's text and new images.

        Windows are planned where `token_mask` is; those of more than one token on the CPU. What describes the call is
        read from devices for that, unless it is there.

        Args:
            inputs_embeds: (batch, tokens, hidden) embedded text.
            closes_window: (batch, tokens) True for tokens that aren't delimiters; None for a decoding step of which
                that doesn't matter (`WindowRules.awaits_more`).
            token_mask: (batch, tokens) False for padding.
            attention_mask: None, (batch, all tokens), or a prepared mask.
            position_ids: None, (batch, tokens), (axes, batch, tokens) or (1 + axes, batch, tokens); see
                `CasaModel.forward`.
            cache: cache with the earlier text, windows and positions.
            state: what the cache remembers about windows, where that has been read from its device.
            images: places of the new images; None without any.
            image_states: (num_image_tokens, hidden) embedded images.
            deepstack: features like `image_states` that are added to them after the first blocks.
            gist: (batch, tokens) True for gist tokens; None without any.
            static_image_tokens: image tokens that a new static cache has room for in each row.
            use_cache: whether to make a cache if none is given.
            output_attentions: whether to return attention weights.
            output_router_logits: whether to return logits of routers, and their loss; None for what the
                configuration says.
        """
        cache = self.prepared(cache)
        state = stored_state(cache) if state is None else state
        if images is not None or (token_mask.shape[1] > 1 and self.may_see(state)):
            mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 else None
            described = closes_window, token_mask, mask, position_ids, state, images, gist
            closes_window, token_mask, mask, position_ids, state, images, gist = to_host(described)
            attention_mask = attention_mask if mask is None else mask
        samples = self._packed_samples(position_ids, token_mask, cache, state)
        if use_cache and cache is None and samples is None and not self.recomputes:
            cache = self.prepared(DynamicCache(config=self.config))
        state = self._window_state(cache, token_mask, attention_mask, images, static_image_tokens, state)
        text_index, positions = self.position_rules.text(position_ids, token_mask, state.next_position, images)
        if closes_window is not None and closes_window.device == token_mask.device:
            closes_window = closes_window & token_mask
        plan = plan_windows(
            state,
            self.window_rules,
            token_mask,
            closes_window,
            positions.amax(0),
            images,
            samples=samples,
            gist=gist,
        )
        padded = attention_mask is not None
        text = _TextInputs(inputs_embeds, token_mask, padded, attention_mask, text_index, positions, samples, gist)
        call = self._call(text, plan, images, cache, kwargs)
        if output_router_logits is None:
            output_router_logits = getattr(self.config, "output_router_logits", False)
        if output_router_logits:
            call = replace(call, router_logits=True)
        hidden_states, weights, router_logits = inputs_embeds, [], []
        for index, layer in enumerate(self.layers):
            hidden_states, image_states, routed, *of_layer = layer(hidden_states, image_states, call)
            if routed is not None:
                router_logits.append(routed)
            if output_attentions or (output_attentions is None and self.config.output_attentions):
                weights.append(of_layer)
            del of_layer  # else the weights of one block would be kept until the next one has made its own
            if image_states is not None and index < len(deepstack):
                image_states = image_states + deepstack[index].to(image_states.device)
        if cache is not None:
            home, next_state = home_layer(cache), replace(plan.next_state, padded=state.padded or padded)
            # A static cache keeps its state on the device, where compiled steps change it.
            is_static = isinstance(home, CasaStaticLayer)
            home.store_state(moved(next_state, inputs_embeds.device) if is_static else next_state)
        self_attentions, cross_attentions = zip(*weights, strict=True) if weights else ((), ())
        return CasaModelOutput(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE: cache},
            attentions=self_attentions if any(w is not None for w in self_attentions) else None,
            cross_attentions=cross_attentions if any(w is not None for w in cross_attentions) else None,
            router_logits=tuple(logits[: token_mask.numel()] for logits in router_logits) or None,
            image_router_logits=tuple(x for logits in router_logits if len(x := logits[token_mask.numel() :])) or None,
            aux_loss=self._balance_loss(router_logits, token_mask, padded=attention_mask is not None),
        )

    def _balance_loss(
        self, router_logits: list[torch.Tensor], token_mask: torch.Tensor, padded: bool
    ) -> torch.Tensor | None:
        """The loss of the routers over all text but padding and the image tokens that were routed; None without."""
        if not router_logits:
            return None
        mask = None
        if padded:
            mask = token_mask.flatten().to(router_logits[0].device, non_blocking=True)
            of_images = mask.new_ones(len(router_logits[0]) - len(mask))
            mask = torch.cat([mask, of_images])
        return self._blocks.balance_loss(self.config, router_logits, mask)

    @takes_cache
    def evict_text(
        self, cache: Cache, keep: int | torch.Tensor, num_sink_tokens: int | torch.Tensor = 4
    ) -> torch.Tensor | None:
        """See [`CasaForConditionalGeneration.evict_text`]."""
        return evict_text(cache, self.window_rules, self.key_rotation, keep, num_sink_tokens)

    def static_cache(self, max_text_tokens: int, max_image_tokens: int, batch_size: int = 1) -> StaticCache:
        """An empty static cache that compiled steps can use from the start: they are the same with and without images,
        and for images of any size up to the given one.

        Args:
            max_text_tokens: number of text tokens, padding included, that there is room for in each row.
            max_image_tokens: number of image tokens of each row that text may see at a time; for more, the room is
                doubled, which is another shape.
            batch_size: number of rows.
        """
        cache = StaticCache(config=self.config, max_cache_len=max_text_tokens)
        layers: Any = self.layers
        like = [layer.stored_images(batch_size) for layer in layers]
        reserve_images(cache, self.kept_by_blocks, like, max_image_tokens, self.window_rules.keeps_all_images)
        return cache

    @property
    def recomputes(self) -> bool:
        """Whether blocks run again in the backward pass; Transformers takes the cache out of their calls then."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def prepared(self, cache: Cache | None) -> Cache | None:
        """The cache of a call; None where gradient checkpointing would run blocks on it a second time."""
        if cache is None:
            return None
        prepare_cache(cache, self.kept_by_blocks)
        if not self.recomputes:
            return cache
        if cached_length(cache):
            raise ValueError(
                "The cache holds text, but gradient checkpointing is on, which computes blocks again in the "
                "backward pass and can't continue from a cache. Call model.eval() or "
                "model.gradient_checkpointing_disable() first."
            )
        return None

    def key_rotation(self) -> KeyRotation:
        """What moves stored keys to other positions.

        Raises:
            ValueError: if this model's keys can't be moved, or its images are kept for ever.
        """
        check_history(self.window_rules)
        blocks: Any = self.layers
        rotations = [None if b.projections is None else b.projections.rotate_one for b in blocks]
        return KeyRotation(self.rotary_emb, rotations)

    def awaits_more(self, state: WindowState | None) -> bool:
        """Whether it matters when text closes the last window of a state on the CPU."""
        return state is not None and self.window_rules.awaits_more(state)

    def may_see(self, state: WindowState | None) -> bool:
        """Whether text may attend to anything in fusion layers, in a call without images."""
        return self.window_rules.text_windows or (state is not None and state.image_columns > 0)

    def _packed_samples(
        self,
        position_ids: torch.Tensor | None,
        token_mask: torch.Tensor,
        cache: Cache | None,
        state: WindowState | None,
    ) -> torch.Tensor | None:
        """(batch, tokens) index of each token's sample; None if every row holds one."""
        if position_ids is None or (position_ids.ndim == 3 and position_ids.shape[0] == self.position_rules.axes):
            return None
        if (cached_length(cache) if state is None else state.length) > 0:
            return None
        index = position_ids if position_ids.ndim == 2 else position_ids[0]
        samples = packed_samples(index.expand_as(token_mask), token_mask)
        if samples is not None and cache is not None:
            raise ValueError(
                "position_ids restart within a row, so the row holds several packed samples, which a cache can't "
                "continue. Leave the cache out, or pass one sample per row."
            )
        return samples

    def _rotary(
        self, states: torch.Tensor, positions: torch.Tensor, images: ImagePlacement | None
    ) -> tuple[Rotary, Rotary | None]:
        """cos and sin of (axes, batch, tokens) positions, and of the new images' tokens.

        In one call for both, since some rope types take their frequencies from the largest position of a call.
        """
        shape = positions.shape[1:]
        if images is not None:
            of_images = self.position_rules.images(positions, images)
            positions = torch.cat([positions.flatten(1), of_images], dim=1)[:, None]
        positions = moved(positions, states.device)
        rotary = self.rotary_emb(states, positions if self.position_rules.axes == 3 else positions[0])
        if images is None:
            return rotary, None
        num_tokens = shape.numel()
        cos, sin = (table[0, :num_tokens].unflatten(0, shape) for table in rotary)
        cos_of_images, sin_of_images = (table[:, num_tokens:] for table in rotary)
        return (cos, sin), (cos_of_images, sin_of_images)

    def _tables(self, rotary: Rotary) -> Rotary | None:
        """What fused projections rotate by; None where projections are called one by one."""
        if self.training or torch.is_grad_enabled():
            return None
        blocks: Any = self.layers
        fused = next((block for block in blocks if block.fused is not None), None)
        # Asked last: of devices without numbers (meta) torch doesn't know.
        if fused is None or torch.is_autocast_enabled(rotary[0].device.type):
            return None
        return fused.projections.tables(rotary)

    def _window_state(
        self,
        cache: Cache | None,
        token_mask: torch.Tensor,
        attention_mask: Any,
        images: ImagePlacement | None,
        static_image_tokens: int,
        held: WindowState | None,
    ) -> WindowState:
        """What earlier calls left behind, in the form that this one works on."""
        batch_size, num_tokens = token_mask.shape
        state = window_state(cache, batch_size, token_mask.device, attention_mask, static_image_tokens, held)
        if images is not None or num_tokens > 1:
            state = state.growing()  # only a decoding step works on the fixed state of a static cache
        check_room(cache, state.length, num_tokens)
        return state

    def _call(
        self, text: _TextInputs, plan: WindowPlan, images: ImagePlacement | None, cache: Cache | None, arguments: dict
    ) -> Call:
        """What all blocks of a forward share."""
        state, implementation = plan.state, self.config._attn_implementation
        dtype, device = text.embeds.dtype, text.embeds.device
        alone = state.only_row and state.capacity is None and text.mask is None and not state.padded
        everything_visible = alone and text.samples is None and text.gist is None
        if text.mask is None and state.padded:
            text = text._replace(mask=plan.next_state.valid)
        if is_varlen(implementation):
            mask, lengths = self._varlen_mask(text, plan, cache)
            text, arguments = text._replace(mask=mask), {**arguments, **moved(lengths, device)}
        rotary, image_rotary = self._rotary(text.embeds, text.positions, images)
        arguments = {"position_ids": moved(text.text_index, device), **arguments}
        order = self._token_order(text, images, cache) if self.recurrent_blocks else None
        masks, order, tables = self._masks(text, cache, state), moved(order, device), self._tables(rotary)
        call = Call(rotary, masks, cache, arguments, order, tables=tables)
        if not plan.active:
            return call
        fusion, all_see = fusion_windows(plan, implementation, dtype, device, self.head_groups, everything_visible)
        of_blocks = plan.for_blocks(device, all_see)
        call = replace(call, plan=of_blocks, fusion=fusion, all_see=all_see, image_rotary=image_rotary)
        if image_rotary is not None:
            call = replace(call, image_tables=self._tables(image_rotary))
        if image_rotary is None or not self.attends_to_update:
            return call
        return replace(call, updates=update_windows(plan, implementation, dtype, device))

    def _varlen_mask(self, text: _TextInputs, plan: WindowPlan, cache: Cache | None) -> tuple[Any, dict[str, Any]]:
        """The mask and further arguments of self-attention: backends of this kind keep neither packed samples nor the
        empty part of a static cache apart by themselves."""
        valid, length = plan.next_state.valid, plan.next_state.length
        if text.samples is not None:
            return None, packed_lengths(text.samples, text.token_mask)
        if cache is None or not isinstance(home_layer(cache), CasaStaticLayer):
            return text.mask, {}
        batch_size, num_tokens = text.token_mask.shape
        if isinstance(length, int) and batch_size == 1 and bool(valid.all()):
            return {FULL_ATTENTION: None}, single_row_lengths(num_tokens, length, valid.device)
        return {FULL_ATTENTION: valid}, {}

    def _token_order(self, text: _TextInputs, images: ImagePlacement | None, cache: Cache | None) -> TokenOrder | None:
        """In which order blocks of linear attention read the tokens."""
        return token_order(
            text.token_mask,
            padded=text.padded,
            continues=cache is not None and cache.has_previous_state(self.recurrent_blocks[0]),
            samples=text.samples,
            images=images if self.attends_to_update else None,
        )

    def _masks(self, text: _TextInputs, cache: Cache | None, state: WindowState) -> dict[str, torch.Tensor | None]:
        """The masks of the text's own attention by kind of block."""
        if isinstance(text.mask, dict):  # prepared for a static cache, or by `_varlen_mask`
            return moved(text.mask, text.embeds.device)
        samples = moved(text.samples, text.embeds.device)
        # Transformers itself keeps packed samples apart only where there is no padding mask.
        beside_mask = text.samples is not None and text.mask is not None
        # Where the mask can't be left out, Transformers would ask the device about it. Lengths there aren't read.
        continues = not isinstance(state.length, int) or state.length > 0
        is_needed = text.mask is not None or (text.token_mask.shape[1] > 1 and continues)
        causal = create_causal_mask(
            config=self.config,
            inputs_embeds=text.embeds,
            attention_mask=moved(text.mask, text.embeds.device),
            position_ids=moved(text.text_index, text.embeds.device),
            and_mask_function=packed_sequence_mask_function(samples) if beside_mask else None,
            allow_is_causal_skip=not is_needed,
            **{CACHE: cache},
        )
        if self.config._attn_implementation == "sdpa":
            causal = PackedMask.of_text(causal, text.embeds.dtype, self.head_groups)
        return {FULL_ATTENTION: causal}


class CasaModel(CasaPreTrainedModel):
    """Vision tower and language model, without the output head."""

    def __init__(self, config: CasaConfig):
        super().__init__(config)
        config.validate_design()
        warn_if_untested()
        tower, vision_config = config.tower, config.vision_config
        for ordinary, name in _TOWER_BACKENDS.items():  # another model of this configuration has been here
            if vision_config._attn_implementation == name:
                vision_config._attn_implementation_internal = ordinary
        self.visual = tower.load()._from_config(vision_config)
        self.visual.patch_embed = PatchEmbedding(self.visual.patch_embed.proj, *config.normalization)
        self.language_model = CasaTextModel(config)
        self.multi_modal_projector: nn.Linear | None = None
        if config.needs_projector:
            self.multi_modal_projector = nn.Linear(
                tower.hidden_size(config.vision_config), config.text_config.hidden_size
            )
        self.name_tower_backend()
        self.post_init()

    def name_tower_backend(self) -> None:
        """Give the tower the name of its backend that it understands: stock towers hand all images to one call only if
        the name says that it is flash attention."""
        own = self.visual.config._attn_implementation
        self.visual.config._attn_implementation_internal = _TOWER_BACKENDS.get(own, own)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.language_model.embed_tokens = value

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Run the vision tower.

        Args:
            pixel_values: (patches, patch dim) as the image processor makes them, normalised or in 8 bits.
            image_grid_thw: (num_images, 3) patches in time (1, or those of a whole video with
                `casa_video_layout="native"`), height and width.

        Returns:
            An output whose `pooler_output` is a tuple with one tensor (tokens, `config.image_features_size`) per
            image: what `image_embeds` of `forward` and `generate` takes in place of pixels. Features for deepstack
            follow those that fusion layers start with.

        Raises:
            ValueError: if the number of patches doesn't fit the grids.
        """
        refuse_foreign(kwargs)
        return self._run_tower(pixel_values, check_grids(self.config, image_grid_thw), **kwargs)

    def _run_tower(self, pixel_values: torch.Tensor, grids: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As `get_image_features`, with sizes as `check_grids` returns them."""
        check_patches(pixel_values, self.visual.patch_embed)
        patches = int(grids.prod(-1).sum())
        if pixel_values.shape[0] != patches:
            raise ValueError(
                f"pixel_values has {pixel_values.shape[0]} patches, but image_grid_thw {grids.tolist()} "
                f"needs {patches}. Pass both as the image processor returned them."
            )
        derived = tower_inputs(self.visual, grids, pixel_values.device)
        outputs = self.visual(pixel_values, grid_thw=grids, **{**derived, **kwargs})
        sizes = (grids.prod(-1) // self.config.vision_config.spatial_merge_size**2).tolist()
        outputs.pooler_output = torch.split(self._features(outputs), sizes)
        return outputs

    def _features(self, outputs: BaseModelOutputWithPooling) -> torch.Tensor:
        """(num_image_tokens, `config.image_features_size`) what fusion layers take of the tower's outputs."""
        features = outputs.pooler_output
        if self.multi_modal_projector is not None:
            features = self.multi_modal_projector(features)
        if self.config.num_deepstack:
            features = torch.cat([features, *outputs.deepstack_features], dim=-1)
        return features

    def tower_for(self, image_grid_thw: torch.Tensor, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        """The vision tower for images of known sizes, as a function of their pixels alone, to be compiled.

        Args:
            image_grid_thw: (num_images, 3) sizes as in `get_image_features`, on the CPU.
            device: device of the pixels.

        Returns:
            A function from `pixel_values` to (num_image_tokens, `config.image_features_size`) features.

        Raises:
            ValueError: for sizes that the model doesn't take.
        """
        grids = check_grids(self.config, image_grid_thw)
        derived = tower_inputs(self.visual, grids, device)

        def run(pixel_values: torch.Tensor) -> torch.Tensor:
            return self._features(self.visual(pixel_values, grid_thw=grids, **derived))

        return run

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        image_positions: torch.LongTensor | None = None,
        image_embeds: torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CasaModelOutput:
        """One call on new text and, optionally, new images.

        Args:
            input_ids: (batch, tokens) new text; exactly one of `input_ids` and `inputs_embeds`.
            attention_mask: (batch, all tokens so far) or (batch, tokens), 0 for padding; or a prepared 4-D mask.
            position_ids: (batch, tokens), (3, batch, tokens) or (4, batch, tokens) with the contiguous text index of
                each sample in row 0. Without a filled cache, a text index that doesn't continue starts a new packed
                sample. None: positions continue those in the cache.
            cache: cache that holds all state between calls; `past_key_values` is another name of this argument.
            inputs_embeds: (batch, tokens, hidden) embedded text. Delimiters and the tokens that images precede are
                recognised where a row equals their embedding exactly: with noise on them, say where images stand.
            use_cache: whether to return a cache.
            pixel_values: (patches, patch dim) of the new images, in reading order over the batch; normalised, or
                pixels from 0 to 255 of dtype uint8 (`processor(..., uint8_pixels=True)`), which the model normalises.
            image_grid_thw: (num_images, 3) patches in time (1, or those of a whole video with
                `casa_video_layout="native"`), height and width.
            image_positions: (num_images, 2) row and index, in that row's new tokens, of the token that each image
                precedes. None: the tokens that `mm_token_type_ids` name, without these each `config.image_token_id`.
            image_embeds: features in place of pixels: (num_image_tokens, `config.image_features_size`), or one tensor
                per image.
            mm_token_type_ids: (batch, tokens) or (batch, all tokens so far) 1 at tokens that an image precedes, 2 at
                those that a video frame precedes, 3 at text that belongs to the delimiters (the time of a frame), else
                0. Without them every image is a still one.
            second_per_grid_ts: (num_images,) seconds from one temporal patch of each image to the next, as
                `CasaProcessor` makes them for whole videos; None for 1 second. Other images have no use for it, nor
                have families that count temporal patches (Qwen2-VL).
            token_mask: (batch, tokens) False for padding; only needed beside a prepared `attention_mask`.
            **kwargs: arguments of the attention interface. A name that nothing is known to read is logged once.

        Returns:
            `attentions` are those of self-attention, `cross_attentions` those of the fusion layers; where both are
            one softmax (`casa_keys="context"`), the weights of its text and of its image columns. `image_outputs` is
            what `get_image_features` gives for the pixels.

        Raises:
            TypeError: if the cache isn't a decoder's `Cache`, or comes under an unknown name.
            ValueError: if images, their placeholders and their positions don't fit each other, for both names of the
                cache at once, for a filled cache under gradient checkpointing, and for images, videos or states in
                another model's form.
            NotImplementedError: for images, or a cache, where `torch.export` traces the call; a decoding step may have
                a static cache as an input.
        """
        check_foreign(kwargs, self.language_model.config._attn_implementation)
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", None)  # where Trainer switches it off
        embedding = self.get_input_embeddings()
        inputs_embeds = embed_text(input_ids, inputs_embeds, embedding)
        with_images = has_images(pixel_values, image_embeds, image_grid_thw)
        if torch.compiler.is_exporting():
            is_step = cache is not None and inputs_embeds.shape[1] == 1 and _is_static_input(cache)
            refuse_export(with_images, not is_step and (cache is not None or use_cache is not False))
        cache = self.language_model.prepared(cache)
        mask = attention_mask if token_mask is None else token_mask
        text = NewText(input_ids, inputs_embeds, embedding, mask, cache, stored_state(cache))
        is_read = with_images or self._reads_text(text)
        if is_read:
            # All that windows are planned from, before the tower has work that reading would wait for.
            mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 else None
            text, described = text.on_host(
                (self.config.delimiter_token_ids, (self.config.image_token_id,), self.config.gist_token_ids or ()),
                *(mask, token_mask, position_ids, image_grid_thw),
                *(image_positions, mm_token_type_ids, second_per_grid_ts),
            )
            mask, token_mask, position_ids, image_grid_thw, image_positions, *types_and_times = described
            mm_token_type_ids, second_per_grid_ts = types_and_times
            attention_mask = attention_mask if mask is None else mask
        alone = not with_images and self._is_step_of_one_row(text, attention_mask, token_mask)
        attention_mask, token_mask = text_masks(attention_mask, token_mask, text, on_host=alone)
        if is_read and not torch.compiler.is_compiling():
            attention_mask = without_padding(attention_mask)

        images = image_states = image_outputs = None
        deepstack: Sequence[torch.Tensor] = ()
        if with_images:
            grids = check_grids(self.config, image_grid_thw)
            images = place_images(self.config, text, grids, image_positions, mm_token_type_ids, second_per_grid_ts)
            recorded = {name: kwargs[name] for name in _RECORDED if name in kwargs}
            features, image_outputs = self._embed_images(pixel_values, image_embeds, grids, **recorded)
            features = features.to(inputs_embeds.device, inputs_embeds.dtype)
            image_states, *deepstack = features.split(self.config.text_config.hidden_size, dim=-1)
        else:
            check_no_images(self.config, text, image_grid_thw, image_positions, mm_token_type_ids)

        closes_window = gist = None
        if not alone or text.is_on_host or self.language_model.awaits_more(text.state):
            closes_window = ~delimiters(self.config, text, mm_token_type_ids)
        if self.config.gist_token_ids:
            gist = text.are(self.config.gist_token_ids)
        if not alone:
            closes_window, gist = moved((closes_window, gist), token_mask.device)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            closes_window=closes_window,
            token_mask=token_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            state=text.state,
            images=images,
            image_states=image_states,
            deepstack=deepstack,
            gist=gist,
            static_image_tokens=self.config.casa_static_image_tokens,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        outputs.image_outputs = image_outputs
        return outputs

    def _reads_text(self, text: NewText) -> bool:
        """Whether a call without images is planned on the CPU."""
        if text.shape[1] == 1 or torch.compiler.is_compiling():
            return False
        return text.is_on_host or self.language_model.may_see(text.state)

    def _is_step_of_one_row(self, text: NewText, attention_mask: Any, token_mask: torch.Tensor | None) -> bool:
        """Whether a call is a decoding step that is planned on the CPU even if only the device knows its token: one
        row that sees all that is stored."""
        state = text.state
        if state is None or text.shape != (1, 1) or torch.compiler.is_compiling() or self.config.gist_token_ids:
            return False
        given = attention_mask is not None or token_mask is not None
        is_alone = state.only_row and state.capacity is None and not state.padded and not given
        return is_alone and state.valid.device.type == "cpu"

    def _embed_images(
        self,
        pixel_values: torch.Tensor | None,
        image_embeds: torch.Tensor | Sequence[torch.Tensor] | None,
        grids: torch.Tensor,
        **recorded: Any,
    ) -> tuple[torch.Tensor, BaseModelOutputWithPooling | None]:
        """(num_image_tokens, `config.image_features_size`) features of all images, and the tower's outputs."""
        if pixel_values is None:
            return check_features(self.config, image_embeds, grids), None
        outputs = self._run_tower(pixel_values, grids, **recorded)
        return torch.cat(outputs.pooler_output), outputs


def _is_static_input(cache: Cache) -> bool:
    """Whether a cache is a static one with its state on the device, and an input of the program that is traced: what a
    program only captures are tensors of the ordinary type, which it would change for good."""
    home = home_layer(cache)
    if not isinstance(home, CasaStaticLayer) or home.window_state is None or home.window_state.capacity is None:
        return False
    return type(home.keys) is not torch.Tensor


def _share_of_update(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | float:
    """The part of an optimizer step's targets that one batch of it has."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[:, 1:] != -100).sum() / num_items_in_batch


class CasaForConditionalGeneration(CasaPreTrainedModel, CasaGenerationMixin):
    """CASA model with the output head; `generate` is Transformers' own."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: CasaConfig):
        super().__init__(config)
        self.model = CasaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # Whether there is a state that tokens can't be taken back from.
        self._is_stateful = "recurrent" in self.model.language_model.kept_by_blocks
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.model.set_input_embeddings(value)

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See [`CasaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def tower_for(self, image_grid_thw: torch.Tensor, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        """See [`CasaModel.tower_for`]."""
        return self.model.tower_for(image_grid_thw, device)

    @takes_cache
    def evict_text(
        self, cache: Cache, keep: int | torch.Tensor, num_sink_tokens: int | torch.Tensor = 4
    ) -> torch.Tensor | None:
        """Forget text between the first tokens and the most recent ones, so that a cache can be used without end.

        In place and in every layer; positions run on from the first tokens without a gap, and relative positions of
        recent text, images and what comes next stay the same. Images stay as long as they are seen. Text that pads
        rows of a batch goes too. Later calls pass masks for what is there now, or for their new tokens alone.

        Args:
            cache: cache that this model has filled.
            keep: number of text tokens that each row keeps, the first ones included; one number, or (batch,).
            num_sink_tokens: number of first tokens to keep; one number, or (batch,).

        Returns:
            (batch, length) the old cache position of each text token that is there now, -1 for padding; None if
            nothing changed. To continue with `generate`, gather ids and mask with it.

        Raises:
            NotImplementedError: for quantized caches.
            TypeError: if the cache isn't one that this model has filled.
            ValueError: if no recent token would stay. Where text is to go, also if every image is kept for ever (the
                history "all"), or the frequencies of the rotary embedding depend on the length of the text.
        """
        return self.model.language_model.evict_text(cache, keep, num_sink_tokens)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        image_positions: torch.LongTensor | None = None,
        image_embeds: torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CasaOutput:
        """Logits and, with `labels`, the loss. Arguments as in [`CasaModel.forward`], and:

        Args:
            labels: (batch, tokens) target ids, -100 where no loss is wanted; shifted inside.
            logits_to_keep: number of last tokens, or indices of the tokens, to compute logits for; 0 for all.
            skip_logits: whether to return the loss alone, with logits None. They are computed for tokens with a label
                only, some at a time, so that memory doesn't grow with tokens times vocabulary; unless the model has
                been given another `loss_function`, which gets all of them.

        Raises:
            ValueError: for `skip_logits` without `labels`.
        """
        if labels is None and skip_logits:
            raise ValueError("skip_logits=True asks for the loss alone, but there are no labels. Pass labels=... too.")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            image_positions=image_positions,
            image_embeds=image_embeds,
            mm_token_type_ids=mm_token_type_ids,
            second_per_grid_ts=second_per_grid_ts,
            token_mask=token_mask,
            **{**kwargs, "return_dict": True},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = outputs.last_hidden_state[:, kept]
        text_config = self.config.text_config
        vocab_size = text_config.vocab_size
        logits = loss = None
        if labels is not None and skip_logits and self.loss_function is ForCausalLMLoss:
            loss = chunked_loss(self.lm_head, states, labels, vocab_size, **kwargs)
        else:
            logits = self.lm_head(states)
            if labels is not None:
                loss = self.loss_function(logits, labels, vocab_size=vocab_size, **kwargs)
        if labels is not None and loss is not None and outputs.aux_loss is not None:
            share = _share_of_update(labels, kwargs.get("num_items_in_batch"))
            loss = loss + share * text_config.router_aux_loss_coef * outputs.aux_loss.to(loss.device)
        return CasaOutput(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.cache},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            image_outputs=outputs.image_outputs,
            router_logits=outputs.router_logits,
            image_router_logits=outputs.image_router_logits,
            aux_loss=outputs.aux_loss,
        )


__all__ = ["CasaForConditionalGeneration", "CasaModel", "CasaPreTrainedModel"]
