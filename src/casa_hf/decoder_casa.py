# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A decoder block of a CASA model: the backbone's own modules, and a fusion layer where the configuration has one."""

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import (
    Attended,
    BlockModules,
    Call,
    CasaContextAttention,
    CasaSharedAttention,
    FusionLayer,
    fusion_layer,
    image_attention,
    self_attention,
)
from .backbone import LINEAR_ATTENTION, DecoderBlock, SelfAttention
from .configuration_casa import CasaConfig
from .fused_projections import FusedProjections, Projected, Wanted, can_be_fused, project
from .own_copies import own_copy

# By what a block mixes tokens, in order: the name of the norm, and of the method of `CasaDecoderLayer` that takes the
# normed states and whose output is added to the states. By `casa_placement`; None: blocks without fusion.
_Mixers = tuple[tuple[str, str], ...]
_SELF_ATTENTION: _Mixers = (("input_layernorm", "attend_text"),)
_MIXERS: dict[str | None, _Mixers] = {
    None: _SELF_ATTENTION,
    "parallel": (("input_layernorm", "attend_text_and_fuse"),),
    "before": (("casa_layernorm", "fuse"), *_SELF_ATTENTION),
    "after": (*_SELF_ATTENTION, ("casa_layernorm", "fuse")),
    "replace": (("input_layernorm", "fuse"),),
}
# What blocks of linear attention do in place of self-attention.
_RECURRENT = {"attend_text": "recur", "attend_text_and_fuse": "recur_and_fuse"}


def _recurrent(mixers: _Mixers) -> _Mixers:
    return tuple((norm, _RECURRENT.get(mixer, mixer)) for norm, mixer in mixers)


class CasaDecoderLayer(GradientCheckpointingLayer):
    """One block: the backbone's own modules, and a fusion layer where `config.fusion_layers` has this index.

    With SA self-attention, F the fusion layer, y the image states and m a norm of its own (axis D3):

        parallel: x' = x + SA(norm x) + F(norm x, y)        before: x' = x + F(m x, y),    x' = x' + SA(norm x')
        replace:  x' = x + F(norm x, y)                     after:  x' = x + SA(norm x),   x' = x' + F(m x', y)

    then x' + MLP(post x'). Where projections are shared in parallel, the fusion layer is SA + F. Blocks of linear
    attention have that in place of SA, and no fusion layer. Image states are updated as `config.casa_image_updates`
    says (axis D4).
    """

    def __init__(self, config: CasaConfig, layer_idx: int):
        super().__init__()
        backbone, text_config = config.backbone, config.text_config
        stock: DecoderBlock = backbone.load("decoder_layer")(text_config, layer_idx)
        fused = layer_idx in config.fusion_layers
        placement = config.casa_placement if fused else None
        self.kind = backbone.block.kinds(text_config)[layer_idx]
        self.adapter = backbone.block
        self.image_updates = config.casa_image_updates
        recurrent = self.kind == LINEAR_ATTENTION
        self.self_attn: SelfAttention | None = None if recurrent or placement == "replace" else stock.self_attn
        if recurrent:
            assert self.adapter.recurrent_module is not None
            setattr(self, self.adapter.recurrent_module, getattr(stock, self.adapter.recurrent_module))
        self.mlp = stock.mlp
        self.input_layernorm = stock.input_layernorm
        self.post_attention_layernorm = stock.post_attention_layernorm
        self.casa_attn: FusionLayer | None = None
        self.projections: Any = None  # `Projections`, where there is attention
        self.fused: FusedProjections | None = None
        if recurrent and fused:
            origin: DecoderBlock = backbone.load("decoder_layer")(text_config, config.origin_of_fusion(layer_idx))
            stock.self_attn = origin.self_attn
        if fused or not recurrent:
            self.projections = backbone.projections(backbone, stock.self_attn)
        if fused:
            self.casa_attn = fusion_layer(config, layer_idx, stock, self.projections)
        if placement in ("before", "after"):
            self.casa_layernorm = own_copy(stock.input_layernorm)
        joint = isinstance(self.casa_attn, CasaSharedAttention | CasaContextAttention)
        self.mixers: _Mixers = (("input_layernorm", "fuse"),) if joint else _MIXERS[placement]
        self.text_mixers: _Mixers = () if placement == "replace" else _SELF_ATTENTION
        if recurrent:
            self.mixers, self.text_mixers = (_recurrent(mixers) for mixers in (self.mixers, self.text_mixers))

    def forward(
        self, hidden_states: torch.Tensor, image_states: torch.Tensor | None, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Text states and image states in, text states and image states out.

        Args:
            hidden_states: (batch, tokens, hidden) text states.
            image_states: (num_image_tokens, hidden) states of the call's new images; None without any.
            call: windows, positions, masks and cache of the forward.

        Returns:
            Text states, image states, logits of the router, if the call asks for them, of all text and then of the
            image states that pass the MLP, and the weights of self-attention and fusion, where the backend gives any.
        """
        attended = Attended(hidden_states)
        for norm, mixer in self.text_mixers if call.plan is None else self.mixers:
            mixed = getattr(self, mixer)(getattr(self, norm)(hidden_states), image_states, call)
            hidden_states = hidden_states + mixed.output
            attended = attended.updated(mixed)
        hidden_states, router_logits = self._through_mlp(hidden_states, call)
        if image_states is not None and self.image_updates != "none":
            image_states, of_images = self._update_images(image_states, attended, call)
            if router_logits is not None and of_images is not None:
                router_logits = torch.cat([router_logits, of_images])
        return hidden_states, image_states, router_logits, attended.self_weights, attended.fusion_weights

    @torch.no_grad()
    def stored_images(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Keys of one image token, each (batch_size, kv_heads, 1, head_dim), by the name under which a cache keeps
        images of this block."""
        if self.casa_attn is None:
            return {}
        modules, weight = self._modules_of_attention(), self.input_layernorm.weight
        assert isinstance(weight, torch.Tensor)
        owners = {"image": self.casa_attn.owner(modules)}
        if self.image_updates == "full" and self.self_attn is not None and not self.casa_attn.gives_images:
            owners["update"] = self.self_attn
        states = torch.zeros(batch_size, 1, len(weight), dtype=weight.dtype, device=weight.device)
        return {name: self.projections.keys(owner, states)[0] for name, owner in owners.items()}

    def attend_text(self, states: torch.Tensor, image_states: torch.Tensor | None, call: Call) -> Attended:
        """Self-attention."""
        attention = self._modules_of_attention().attention
        (text,) = self._projected(states, call, Wanted(attention, True))
        return self_attention(self.projections, attention, text, call)

    def fuse(self, states: torch.Tensor, image_states: torch.Tensor | None, call: Call) -> Attended:
        """What the fusion layer gives; where projections are shared in parallel, with self-attention in it."""
        assert self.casa_attn is not None
        modules = self._modules_of_attention()
        (text,) = self._projected(states, call, self.casa_attn.wanted(modules))
        return self.casa_attn(text, image_states, call, modules)

    def attend_text_and_fuse(self, states: torch.Tensor, image_states: torch.Tensor | None, call: Call) -> Attended:
        """Self-attention and the fusion layer, of the same states."""
        assert self.casa_attn is not None
        modules = self._modules_of_attention()
        wanted = Wanted(modules.attention, True), self.casa_attn.wanted(modules)
        text, for_fusion = self._projected(states, call, *wanted)
        attended = self_attention(self.projections, modules.attention, text, call)
        fused = self.casa_attn(for_fusion, image_states, call, modules)
        return attended.updated(fused)._replace(output=attended.output + fused.output)

    def recur(self, states: torch.Tensor, image_states: torch.Tensor | None, call: Call) -> Attended:
        """Linear attention; where attention updates image states, over text and images in the order of reading."""
        order = call.order
        if order is None:
            return Attended(self.adapter.recur(self, states, None, call.cache))
        enter = image_states is not None and self.image_updates == "full"
        joined = order.join(states, self.input_layernorm(image_states) if enter else None)
        batches = zip(joined, order.valid, strict=True)
        mixed = [self.adapter.recur(self, batch, valid, call.cache) for batch, valid in batches]
        output, of_images = order.split(mixed, like=states)
        return Attended(output, of_images=of_images)

    def recur_and_fuse(self, states: torch.Tensor, image_states: torch.Tensor | None, call: Call) -> Attended:
        """Linear attention and the fusion layer, of the same states."""
        text, fused = self.recur(states, image_states, call), self.fuse(states, image_states, call)
        return text.updated(fused)._replace(output=text.output + fused.output)

    def _update_images(
        self, states: torch.Tensor, attended: Attended, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Image states for the next block: through the block's own attention ("full") and the MLP; logits of
        the router."""
        if attended.of_images is not None:
            states = states + attended.of_images
        elif self.image_updates == "full":
            modules = self._modules_of_attention()
            states = states + image_attention(self.projections, modules, states, attended, call)
        states, router_logits = self._through_mlp(states[None], call)
        return states[0], router_logits

    def _through_mlp(self, states: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, hidden) states with what the MLP adds to them; logits of its router, if the call asks."""
        normed = self.post_attention_layernorm(states)
        router_logits = self.adapter.router_logits(self, normed) if call.router_logits else None
        return states + self.adapter.mlp(self, normed), router_logits

    def _projected(self, states: torch.Tensor, call: Call, *wanted: Wanted) -> list[Projected]:
        """The text of normalised states as attentions take it."""
        fused = None if call.tables is None else self._fused_projections()
        if fused is not None and call.tables is not None and fused.serves(wanted):
            return fused.project(wanted, states, call.tables)
        return project(self.projections, wanted, states, call.rotary)

    def _fused_projections(self) -> FusedProjections | None:
        """What projects all at once; given up where something else has taken its place. A compiled step isn't asked:
        what comes before it (the prompt, a frame) is computed without compilation."""
        fused = self.fused
        if fused is not None and not torch.compiler.is_compiling() and not fused.is_intact():
            self.unfuse_projections()
        return self.fused

    def fuse_projections(self) -> bool:
        """Make the parameters of queries, keys and values views of one buffer; whether that is possible."""
        if self._fused_projections() is not None:
            return True
        owners: list[Any] = [module for module in (self.self_attn, self.casa_attn) if hasattr(module, "q_proj")]
        if owners and can_be_fused(owners):
            self.fused = FusedProjections(self.projections, owners)
        return self.fused is not None

    def unfuse_projections(self) -> None:
        """Give parameters memory of their own again."""
        fused, self.fused = self.fused, None
        if fused is not None:
            fused.release()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As in torch, for `to` and its like; what was fused is fused again."""
        was_fused = self._fused_projections() is not None
        applied = super()._apply(fn, recurse)
        if was_fused and self._fused_projections() is None:
            self.fuse_projections()
        return applied

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As in torch, but of parameters that have memory of their own: what saves states (Accelerate, safetensors)
        takes parts of one buffer for one tensor under several names, and drops or refuses them."""
        self.unfuse_projections()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        """As in torch, but of parameters that have memory of their own, as those of copies have."""
        self.unfuse_projections()
        return super().__getstate__()

    def _modules_of_attention(self) -> BlockModules:
        return BlockModules(self.self_attn, self.input_layernorm)
