# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Qwen3.5: gates on attention, and three of four blocks are gated linear attention (arXiv 2412.06464).

The stock module of linear attention is right where rows have no padding, or begin with it. What continues a state with
padding in it is computed here, from the same module's parts.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from .backbone import AttentionModule, BlockAdapter, DecoderBlock, Projections
from .backbone_experts import SeparateExpertBlocks

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache


class GatedProjections(Projections):
    """Projections whose queries come with a gate: for each head the queries, then as many numbers that the attended
    values are multiplied by, through a sigmoid, before the output projection."""

    def split_query(self, owner: AttentionModule, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, gate = projected.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        return owner.q_norm(query).transpose(1, 2), gate.flatten(2)

    def output(self, owner: AttentionModule, attended: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        assert gate is not None
        return owner.o_proj(attended * gate.sigmoid())


class Qwen3_5Blocks(BlockAdapter):
    """Blocks of full attention, and of gated linear attention."""

    recurrent_module = "linear_attn"

    def kinds(self, text_config: PreTrainedConfig) -> tuple[str, ...]:
        return tuple(text_config.layer_types)

    def recur(
        self, block: DecoderBlock, states: torch.Tensor, valid: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        module: Any = getattr(block, self.recurrent_module)
        if valid is None or cache is None or not cache.has_previous_state(module.layer_idx):
            return module(states, cache, valid)
        return _continued(module, states, valid, cache)

    def recurrent_bytes(self, text_config: PreTrainedConfig, number_bytes: int) -> int:
        config: Any = text_config
        heads, key_dim, value_dim = (
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )
        channels = 2 * config.linear_num_key_heads * key_dim + heads * value_dim
        return channels * config.linear_conv_kernel_dim * number_bytes + heads * key_dim * value_dim * 4  # in float32

    def initialize(self, module: nn.Module, std: float) -> None:
        import torch
        from transformers import initialization as init

        # As the stock model does.
        name = type(module).__name__
        if name.endswith("GatedDeltaNet"):
            of_module: Any = module
            init.ones_(of_module.dt_bias)
            init.copy_(of_module.A_log, torch.empty_like(of_module.A_log).uniform_(0.01, 16).log_())
        elif name.endswith("RMSNorm"):  # factors are 1 + weight
            init.zeros_(module.weight)


class Qwen3_5ExpertBlocks(SeparateExpertBlocks, Qwen3_5Blocks):
    """The same with experts, as in Qwen3.5-MoE."""


def _continued(module: Any, states: torch.Tensor, valid: torch.Tensor, cache: Cache) -> torch.Tensor:
    """What the stock module computes of tokens that continue a state, some of which are padding.

    Padding neither decays the state nor writes into it.

    Args:
        module: the stock module.
        states: (batch, tokens, hidden).
        valid: (batch, tokens) False for padding, which comes last.
        cache: cache with the state.
    """
    # Weights that are used without a call of their module may be offloaded.
    hooked = [(part, part._hf_hook) for part in (module, module.conv1d) if getattr(part, "_hf_hook", None) is not None]
    for part, hook in hooked:
        hook.pre_forward(part)
    output = _recurrence(module, states, valid, cache)
    for part, hook in reversed(hooked):
        hook.post_forward(part, ())
    return output


def _recurrence(module: Any, states: torch.Tensor, valid: torch.Tensor, cache: Cache) -> torch.Tensor:
    from torch import nn

    batch_size, num_tokens = valid.shape
    functions: Any = sys.modules[type(module).__module__]  # with the kernels that the stock module runs
    inputs = module.in_proj_qkv(states).transpose(1, 2)
    inputs = cache.update_conv_state(
        inputs, module.layer_idx, conv_kernel_size=module.conv_kernel_size, num_tokens=valid.sum(-1)
    )
    convolved = functions.causal_conv1d_fn(
        inputs, module.conv1d.weight.squeeze(1), module.conv1d.bias, activation=module.activation
    )
    convolved = convolved[..., -num_tokens:].transpose(1, 2)
    query, key, value = convolved.split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    # (batch, tokens, value heads, dim): each head of queries and keys serves several of values.
    groups = module.num_v_heads // module.num_k_heads
    query, key = (x.unflatten(-1, (-1, module.head_k_dim)).repeat_interleave(groups, dim=2) for x in (query, key))
    value = value.unflatten(-1, (-1, module.head_v_dim))
    beta = module.in_proj_b(states).sigmoid()
    decay = -module.A_log.float().exp() * nn.functional.softplus(module.in_proj_a(states).float() + module.dt_bias)
    step = num_tokens == 1
    rule = functions.torch_recurrent_gated_delta_rule if step else functions.torch_chunk_gated_delta_rule
    output, state = rule(
        query,
        key,
        value,
        g=decay.masked_fill(~valid[..., None], 0),
        beta=beta.masked_fill(~valid[..., None], 0),
        initial_state=cache.layers[module.layer_idx].recurrent_states[0],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    cache.update_recurrent_state(state, module.layer_idx)
    gate = module.in_proj_z(states).view(-1, module.head_v_dim)
    output = module.norm(output.reshape(-1, module.head_v_dim), gate)
    return module.out_proj(output.view(batch_size, num_tokens, -1))
