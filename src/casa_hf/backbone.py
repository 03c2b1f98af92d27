# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a family of language models and vision towers is: a row of facts and two adapters.

A row (`Backbone`, `VisionTower`) names the Transformers classes that are reused. Where a family's attention or decoder
block is made or called in its own way, the row names a subclass of `Projections` or `BlockAdapter`; what stands here
serves families whose blocks are full attention with rotary positions. docs/new-backbone.md tells how to add a family.

Classes of Transformers are named and imported on first use, so that configurations stay cheap to load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

Shape = tuple[int, ...]

# Kinds of blocks, by the names that Transformers has for them in `layer_types`. Fusion layers stand in those of full
# attention; those of linear attention have a recurrent state in place of keys and values.
FULL_ATTENTION = "full_attention"
LINEAR_ATTENTION = "linear_attention"


class AttentionModule(Protocol):
    """A module with the projections of an attention: a family's self-attention, or a fusion layer with its own."""

    config: PreTrainedConfig
    training: bool
    scaling: float
    attention_dropout: float
    num_key_value_groups: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module  # where the family has norms of single heads
    k_norm: nn.Module


class SelfAttention(AttentionModule, Protocol):
    """A family's own attention."""

    head_dim: int
    layer_idx: int


class DecoderBlock(Protocol):
    """A decoder block, the family's own or CASA's."""

    self_attn: SelfAttention
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module


class Projections:
    """How one block's attention makes queries, keys and outputs.

    `owner` is the module with the projections: self-attention, or a fusion layer with copies of its `modules`.

    Args:
        backbone: row of the family.
        self_attn: the family's own attention of this block.

    Attributes:
        head_dim: width of a head.
        has_norms: whether single heads of queries and keys are normalised.
        rotates: whether queries and keys have positions in this block.
    """

    def __init__(self, backbone: Backbone, self_attn: SelfAttention):
        self.head_dim: int = self_attn.head_dim
        self.has_norms = hasattr(self_attn, "q_norm")
        self.rotates = True
        self._apply_rotary: Callable = backbone.load("apply_rotary")

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the projections that a fusion layer has copies of."""
        norms = ("q_norm", "k_norm") if self.has_norms else ()
        return ("q_proj", "k_proj", "v_proj", "o_proj", *norms)

    def query(self, owner: AttentionModule, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, heads, tokens, head_dim) queries of (batch, tokens, hidden) states, without positions; and a gate
        for `output`, None in families that have none."""
        return self.split_query(owner, owner.q_proj(states))

    def split_query(self, owner: AttentionModule, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same of the query projection's output."""
        query = self._heads(projected)
        return (owner.q_norm(query) if self.has_norms else query).transpose(1, 2), None

    def keys(self, owner: AttentionModule, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, without positions, and values, (batch, kv_heads, tokens, head_dim), of (batch, tokens, hidden)
        states."""
        return self.split_keys(owner, owner.k_proj(states), owner.v_proj(states))

    def split_keys(
        self, owner: AttentionModule, projected_keys: torch.Tensor, projected_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the outputs of the key and the value projection."""
        key, value = self._heads(projected_keys), self._heads(projected_values)
        return (owner.k_norm(key) if self.has_norms else key).transpose(1, 2), value.transpose(1, 2)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, (batch, heads, tokens, head_dim), at the positions of `rotary`: cos and sin, each (batch,
        tokens, head_dim)."""
        return self._apply_rotary(query, key, *rotary)

    def rotate_one(self, states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The same for queries or keys alone."""
        return self.rotate(states, states[:, :0], rotary)[0]

    @property
    def are_heads(self) -> bool:
        """Whether queries and keys are the heads of their projections' outputs as they stand."""
        return not self.has_norms

    def tables(self, rotary: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What `rotate_together` takes, (batch, tokens, 1, channels), of cos and sin; made once for all blocks."""
        import torch

        cos, sin = (table.unsqueeze(2) for table in rotary)
        missing = self.head_dim - cos.shape[-1]
        if missing:  # the last channels have no positions
            cos = torch.cat([cos, cos.new_ones(*cos.shape[:-1], missing)], dim=-1)
        return cos, self._signed(sin)

    def rotate_together(self, heads: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """As `rotate`, of (batch, tokens, heads, head_dim) of any number of queries and keys, without gradients."""
        cos, sin = tables
        turned, width = heads * cos, sin.shape[-1]
        turned[..., :width].addcmul_(self._swapped(heads[..., :width]), sin)
        return turned

    def _swapped(self, heads: torch.Tensor) -> torch.Tensor:
        """Each channel's partner in the rotation in its place: the two halves change places."""
        return heads.roll(heads.shape[-1] // 2, dims=-1)

    def _signed(self, sin: torch.Tensor) -> torch.Tensor:
        """What the partners are multiplied by."""
        import torch

        first, second = sin.chunk(2, dim=-1)
        return torch.cat([-first, second], dim=-1)

    def output(self, owner: AttentionModule, attended: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """(batch, tokens, hidden) output of (batch, tokens, heads * head_dim) attended values."""
        return owner.o_proj(attended)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim)


class BlockAdapter:
    """How a family's decoder blocks are called, and of which kinds they are.

    Attributes:
        recurrent_module: name of the module that blocks of `LINEAR_ATTENTION` have in place of `self_attn`; None in
            families without such blocks.
        has_experts: whether MLPs send each token to a few of many experts; see `backbone_experts.ExpertBlocks`.
    """

    recurrent_module: str | None = None
    has_experts: bool = False

    def kinds(self, text_config: PreTrainedConfig) -> tuple[str, ...]:
        """The kind of each block: `FULL_ATTENTION`, in which fusion layers stand, or `LINEAR_ATTENTION`."""
        return (FULL_ATTENTION,) * text_config.num_hidden_layers

    def recur(
        self, block: DecoderBlock, states: torch.Tensor, valid: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        """What a block of linear attention makes of sequences of tokens.

        Args:
            block: decoder block.
            states: (sequences, length, hidden) normalised states.
            valid: (sequences, length) False for padding; None if there is none. It comes last where the cache holds
                a state of the block, else first.
            cache: cache whose layer holds the block's state; None without.

        Returns:
            (sequences, length, hidden), anything at padding.
        """
        raise NotImplementedError(f"{type(self).__name__} doesn't say how blocks of linear attention are called.")

    def mlp(self, block: DecoderBlock, states: torch.Tensor) -> torch.Tensor:
        """The MLP of (batch, tokens, hidden) normalised states of text or images."""
        return block.mlp(states)

    def router_logits(self, block: DecoderBlock, states: torch.Tensor) -> torch.Tensor | None:
        """(batch * tokens, experts) how a block's router weighs its experts for the same states; None without any."""
        return None

    def balance_loss(
        self, text_config: PreTrainedConfig, router_logits: Sequence[torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss that keeps experts evenly used, as the family defines it, without its factor.

        Args:
            text_config: configuration of the language model.
            router_logits: (tokens, experts) of each block that has a router.
            mask: (tokens,) False for those that don't count; None if all do.
        """
        raise NotImplementedError("only families with experts have a loss of their routers")

    def initialize(self, module: nn.Module, std: float) -> None:
        """Initialise the parameters that a module of the family has itself, if Transformers' own rules for linear
        layers, embeddings and norms don't.

        Args:
            module: any module of the model.
            std: standard deviation of matrices.
        """

    def layouts(self, name: str, shape: Shape) -> Iterator[dict[str, Shape]]:
        """Other ways in which checkpoints of the family store a tensor: names and shapes in its place, by the names
        of tensors in memory."""
        return iter(())

    def weight_converters(self) -> Sequence[Any]:
        """Transformers' `WeightConverter`s by which loading makes tensors of memory from these other layouts."""
        return ()

    def active_part(self, text_config: PreTrainedConfig, name: str) -> float:
        """The part of a stored tensor's parameters that computes a token; of one expert's, on average."""
        return 1.0

    def recurrent_bytes(self, text_config: PreTrainedConfig, number_bytes: int) -> int:
        """Size of one block's recurrent state for one sequence, of a model with numbers of `number_bytes`."""
        return 0


_DEFAULT_BLOCKS = BlockAdapter()


@dataclass(frozen=True)
class VisionTower:
    """A family of vision towers.

    Attributes:
        model_type: type of its configuration; the key of the table.
        modeling: module that defines its class.
        tower: name of the class. It is called with pixels, `grid_thw` and what `vision_tower.tower_inputs` derives,
            returns merged features as `pooler_output`, and has a convolution `patch_embed.proj`.
        hidden_size_field: configuration field with the width of merged features.
        deepstack_field: configuration field that lists the layers whose features, returned as `deepstack_features`,
            are added to image states after the first decoder blocks; None for towers without any.
        deepstack_modules: name of the modules that make these features.
        tokens_per_second_field: configuration field with the number of positions that a second of video takes on the
            time axis; None where the temporal patches of a video are counted.
        image_mean, image_std: mean and standard deviation, by channel, by which the image processors of its published
            checkpoints normalise.
    """

    model_type: str
    modeling: str
    tower: str
    hidden_size_field: str = "out_hidden_size"
    deepstack_field: str | None = None
    deepstack_modules: str = "deepstack_merger_list"
    tokens_per_second_field: str | None = None
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def load(self) -> Any:
        """The class of the tower."""
        return getattr(import_module(self.modeling), self.tower)

    def hidden_size(self, config: PreTrainedConfig) -> int:
        """Width of merged features."""
        return getattr(config, self.hidden_size_field)

    def num_deepstack(self, config: PreTrainedConfig) -> int:
        """Number of features per token that are added after the first decoder blocks."""
        return 0 if self.deepstack_field is None else len(getattr(config, self.deepstack_field))

    def positions_per_second(self, config: PreTrainedConfig) -> float | None:
        """Number of positions that a second of video takes in time; None where temporal patches are counted."""
        return None if self.tokens_per_second_field is None else getattr(config, self.tokens_per_second_field)


@dataclass(frozen=True)
class Backbone:
    """A family of language models, and how its checkpoints are laid out.

    Attributes:
        source_model_type: `model_type` of the source checkpoint.
        text_model_type: `model_type` of its text configuration; the key of the table.
        vision: vision tower of the source.
        display_name: the name people use.
        modeling: module that defines the classes below.
        decoder_layer, rotary_embedding, rms_norm: class names in that module. `decoder_layer` must have the children
            `self_attn`, `mlp`, `input_layernorm` and `post_attention_layernorm`.
        source_class: the stock class of the source model.
        source_task: task of the source model, by the Hub's name.
        apply_rotary: function `(q, k, cos, sin) -> (q, k)` in that module.
        projections: adapter that makes queries, keys and outputs of attention.
        block: adapter that calls a decoder block, and tells the kinds of blocks.
        multimodal_rope: whether text positions have three rows (time, height, width).
        text_only: whether the source has no vision tower: it is given `vision`, or one of `other_towers`.
        other_towers: further towers that it can be given.
        recipe: what of a model trains unless something else is asked for, as the paper trains its models: of those
            that could see already "paper-qwen", of text models "paper-helium"; see `casa_hf.training.freeze`.
        native_video: what one pair of delimiters stands for in the source's own layout of a video: "video", all of it,
            or "temporal patch"; None for a source that knows no videos.
        native_timestamps: whether the source's processor writes the time of each video frame before it.
        dropped: (pattern of in-memory names, why CASA models don't need them) of tensors of published files that the
            stock class doesn't read either.
        placeholder_id_fields: source configuration fields holding the ids of expanded image and video placeholders.
        load_renamings: (pattern, replacement) pairs that turn the older checkpoint layout into the one in memory.
        save_renamings: the same for the way back, from memory to the names in the source's published files; empty
            where these are the names in memory.
        text_ties_head: whether the text configuration's `tie_word_embeddings` ties the head too, beside that of the
            whole model.
    """

    source_model_type: str
    text_model_type: str
    vision: VisionTower
    display_name: str
    modeling: str
    decoder_layer: str
    rotary_embedding: str
    rms_norm: str
    source_class: str
    apply_rotary: str = "apply_rotary_pos_emb"
    projections: type[Projections] = Projections
    block: BlockAdapter = _DEFAULT_BLOCKS
    multimodal_rope: bool = True
    text_only: bool = False
    other_towers: tuple[VisionTower, ...] = ()
    recipe: str = "paper-qwen"
    source_task: str = "image-text-to-text"
    native_video: str | None = None
    native_timestamps: bool = False
    dropped: tuple[tuple[str, str], ...] = ()
    placeholder_id_fields: tuple[str, ...] = ("image_token_id", "video_token_id")
    load_renamings: tuple[tuple[str, str], ...] = (
        (r"^visual\.", "model.visual."),
        (r"^model\.(?!language_model\.|visual\.|multi_modal_projector\.)", "model.language_model."),
    )
    save_renamings: tuple[tuple[str, str], ...] = (
        (r"^model\.visual\.", "visual."),
        (r"^model\.language_model\.", "model."),
    )
    text_ties_head: bool = False

    @property
    def towers(self) -> tuple[str, ...]:
        """The types of vision configurations that the family can have."""
        return tuple(tower.model_type for tower in (self.vision, *self.other_towers))

    @property
    def default_timestamps(self) -> str | None:
        """The kind of timestamps that a conversion writes unless it is told otherwise; a key of `VIDEO_TIMESTAMPS`."""
        return "native" if self.native_timestamps else None

    def fusable_blocks(self, text_config: PreTrainedConfig) -> tuple[int, ...]:
        """Indices of the decoder blocks that can have a fusion layer: those of full attention."""
        kinds = self.block.kinds(text_config)
        return tuple(index for index, kind in enumerate(kinds) if kind == FULL_ATTENTION)

    def load(self, field: str) -> Any:
        """The object that `field` ("decoder_layer", "apply_rotary", ...) names."""
        return getattr(import_module(self.modeling), getattr(self, field))

    def active_parameters(self, text_config: PreTrainedConfig, sizes: Mapping[str, int]) -> int:
        """Number of parameters that compute a token: all but those of the experts that it isn't sent to.

        Args:
            text_config: configuration of the language model.
            sizes: numbers of parameters of all tensors, by name.
        """
        return round(sum(size * self.block.active_part(text_config, name) for name, size in sizes.items()))

    def in_memory_name(self, name: str) -> str:
        """The name that Transformers 5 gives a checkpoint's tensor, whichever layout the checkpoint has."""
        for pattern, replacement in self.load_renamings:
            name = re.sub(pattern, replacement, name)
        return name

    def source_name(self, name: str) -> str:
        """The name that a tensor has in the files of a source checkpoint; the inverse of `in_memory_name`."""
        for pattern, replacement in self.save_renamings:
            name = re.sub(pattern, replacement, name)
        return name

    def as_stored(self, shapes: Mapping[str, Shape], stored: Mapping[str, Shape]) -> dict[str, Shape]:
        """Names and shapes of weights in the layout in which a checkpoint has them.

        Args:
            shapes: names and shapes in memory.
            stored: names and shapes in the checkpoint, by the names of tensors in memory.
        """
        found: dict[str, Shape] = {}
        for name, shape in shapes.items():
            forms = ({name: shape}, *self.block.layouts(name, shape))
            found |= next((form for form in forms if _has_some(stored, form)), forms[0])
        return found


def _has_some(stored: Mapping[str, Shape], form: Mapping[str, Shape]) -> bool:
    """Whether a checkpoint has one of some tensors; the others are missing, if it lacks them."""
    return any(name in stored and tuple(stored[name]) == shape for name, shape in form.items())
