# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What CASA computes, written down once more, slowly, as the truth that the model is compared with.

A reading of its own of the project's mathematics (arXiv 2512.19535; docs/architecture.md): it imports nothing from
the package, takes parameters by their checkpoint names and covers the whole design space, implemented or not. One
sample at a time and without a cache; batches, padding, packing and chunks of the model are compared with the runs of
their samples alone. Every mask is a list, for each query, of the keys it may see, made by looping over all pairs and
asking the rules.

What differs between families inside a decoder block is stated here by subclasses of `Block`, from reading the stock
modules: never asked of the package, nor of the tensors that its models happen to have.

Everything is float64, except where the backbones themselves say float32: rotary angles, cosines and sines, and the
inside of RMSNorm (the stock classes round their input to float32 whatever the model's type; without the same rounding
a float64 comparison would stop at 1e-6 for a reason that isn't CASA's). Softmax is float64, as in SDPA; the stock
eager attention takes it in float32.

Notation: T text tokens, N image tokens of all images together, H query heads, G key/value heads, D width of a head,
A position axes (3 with M-RoPE, else 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Image:
    """An image, or a frame of a video.

    Attributes:
        position: index of the text token that it stands immediately before.
        grid: height and width in merged-grid units.
        features: (height * width, hidden), the vision tower's merged output, row by row.
        is_frame: whether it belongs to a video.
        deepstack: one tensor like `features` for each of the first decoder blocks.
    """

    position: int
    grid: tuple[int, int]
    features: Tensor
    is_frame: bool = False
    deepstack: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Eviction:
    """Text that is forgotten at some moment.

    Attributes:
        before: index of the text token that is the first to come afterwards.
        text: indices of the text tokens that go, with no remaining text between them.
    """

    before: int
    text: Sequence[int]


@dataclass(frozen=True)
class Sample:
    """Text and the images in it, in reading order.

    Attributes:
        input_ids: T token ids.
        images: by position; images at the same position in the order in which they are read.
        positions: (A, T) positions that replace those of the configuration, or None.
        evictions: in the order in which they happen.
        delimiters: indices of text tokens that belong to the delimiters whatever their ids, such as a frame's time.
    """

    input_ids: Sequence[int]
    images: Sequence[Image] = field(default=())
    positions: Tensor | None = None
    evictions: Sequence[Eviction] = field(default=())
    delimiters: Sequence[int] = field(default=())


def reference_logits(
    config: Any, state_dict: Mapping[str, Tensor], samples: Sequence[Sample], block: type[Block] | None = None
) -> list[Tensor]:
    """The logits of each sample, (T, vocabulary), float64.

    Args:
        config: a `CasaConfig`, or an object with the same design fields and a `text_config`.
        state_dict: parameters of the language model by checkpoint name, and those of other parts, which are ignored.
        samples: what to run, each by itself.
        block: decoder blocks of the family; Qwen2-VL's and Qwen2.5-VL's if None.
    """
    parameters = {
        name: tensor.double() for name, tensor in state_dict.items() if name.startswith(("model.language", "lm_head"))
    }
    return [_logits(config, parameters, sample, block or Block) for sample in samples]


def _logits(config: Any, parameters: Mapping[str, Tensor], sample: Sample, block: type[Block]) -> Tensor:
    assert list(sample.images) == sorted(sample.images, key=lambda image: image.position)
    assert all(0 <= image.position < len(sample.input_ids) for image in sample.images)
    assert all(len(image.features) == image.grid[0] * image.grid[1] for image in sample.images)
    embedding = parameters["model.language_model.embed_tokens.weight"]
    masks = _Masks(config, sample)
    angles = [_Angles(config, sample, masks, epoch) for epoch in range(len(sample.evictions) + 1)]
    text = embedding[torch.tensor(list(sample.input_ids))]
    images = torch.cat([embedding.new_zeros(0, embedding.shape[1]), *(i.features.double() for i in sample.images)])
    for index in range(config.text_config.num_hidden_layers):
        text, images = block(config, parameters, index, masks, angles)(text, images)
        images = images + _deepstack(sample, index, images)
    weight = block.norm_offset + parameters["model.language_model.norm.weight"]
    text = _rms_norm(text, weight, config.text_config.rms_norm_eps)
    return text @ parameters.get("lm_head.weight", embedding).T


def _deepstack(sample: Sample, index: int, images: Tensor) -> Tensor:
    added = [i.deepstack[index].double() for i in sample.images if index < len(i.deepstack)]
    return torch.cat(added) if added else torch.zeros_like(images)


class _Masks:
    """For every query of a sample, the keys that it may see.

    Keys are numbered [all image tokens ; all text tokens], images in reading order and row by row.

    The table of histories leaves open what happens where stills and frames with different histories meet. Read here:
    an image joins the window of the image before it if both have the history "group" and only delimiters stand between
    the two; else it opens a window. A token sees the images of the newest window, and whatever has the history "all".
    So what has been hidden stays hidden, which a cache that frees it needs.

    Attributes:
        self_attention: text token t sees text up to t.
        fusion: what text token t sees in a fusion layer; empty for a token that the layer leaves alone.
        image_updates: what an image token sees in self-attention under "full" updates, by its number.
        text_epochs, image_epochs: for each text or image token, how many evictions there have been when it comes.
    """

    def __init__(self, config: Any, sample: Sample) -> None:
        self.config = config
        self.sample = sample
        self.ids = list(sample.input_ids)
        self.images = list(sample.images)
        self.windows = self._windows()
        self.newest = [self._newest(t) for t in range(len(self.ids))]
        image_tokens = [(j, n) for j, image in enumerate(self.images) for n in range(len(image.features))]
        tokens = range(len(self.ids))
        count = len(image_tokens)

        self.text_epochs = [sum(eviction.before <= t for eviction in sample.evictions) for t in tokens]
        self.image_epochs = [self.text_epochs[self.images[j].position] for j, _ in image_tokens]
        self.self_attention = [[s for s in tokens if s <= t and self._is_there(s, t)] for t in tokens]
        self.fusion = [
            [key for key, (j, _) in enumerate(image_tokens) if self._text_sees_image(t, j)]
            + [count + s for s in tokens if self._text_sees_text(t, s) and self._is_there(s, t)]
            for t in tokens
        ]
        self.image_updates = [
            [key for key, other in enumerate(image_tokens) if self._image_token_sees(token, other)]
            + [count + s for s in tokens if s < (place := self.images[token[0]].position) and self._is_there(s, place)]
            for token in image_tokens
        ]

    def _is_there(self, s: int, t: int) -> bool:
        """Whether text token s hasn't been evicted when text token t comes."""
        return not any(s in eviction.text and eviction.before <= t for eviction in self.sample.evictions)

    def current_images(self, t: int) -> list[int]:
        """The images of the window that text token t belongs to."""
        newest = self.newest[t]
        if newest is None:
            return []
        return [j for j in range(newest + 1) if self.windows[j] == self.windows[newest]]

    def _history(self, j: int) -> str:
        return self.config.casa_video_history if self.images[j].is_frame else self.config.casa_image_history

    def _windows(self) -> list[int]:
        """For each image, the first image of its window."""
        delimiters = {
            self.config.vision_start_token_id,
            self.config.vision_end_token_id,
            self.config.image_token_id,
            *(self.config.gist_token_ids or ()),
        }
        windows: list[int] = []
        for j, image in enumerate(self.images):
            joins = False
            if j > 0 and self._history(j - 1) == self._history(j) == "group":
                between = range(self.images[j - 1].position, image.position)
                joins = all(self.ids[t] in delimiters or t in self.sample.delimiters for t in between)
            windows.append(windows[-1] if joins else j)
        return windows

    def _newest(self, t: int) -> int | None:
        """The last image that stands before text token t."""
        seen = [j for j, image in enumerate(self.images) if image.position <= t]
        return seen[-1] if seen else None

    def _text_sees_image(self, t: int, j: int) -> bool:
        newest = self.newest[t]
        if newest is None or j > newest:
            return False
        return self._history(j) == "all" or self.windows[j] == self.windows[newest]

    def _text_sees_text(self, t: int, s: int) -> bool:
        """Whether text token t sees text token s in a fusion layer.

        Under "context" the fusion layer is the self-attention too, so there a gist token sees text like any other.
        Under the history "all" the window's text begins at the newest image.
        """
        if s > t or self.config.casa_keys == "image":
            return False
        if self.config.casa_keys == "context":
            return True
        if self.ids[t] in (self.config.gist_token_ids or ()):
            return False
        newest = self.newest[t]
        if newest is None:
            return self.config.casa_text_windows
        return s >= self.images[self.windows[newest]].position

    def _image_token_sees(self, token: tuple[int, int], other: tuple[int, int]) -> bool:
        """Whether image token (image, index) sees another: its own image causally, earlier ones as text there does."""
        (j, n), (i, m) = token, other
        if i == j:
            return m <= n
        return i < j and (self._history(i) == "all" or self.windows[i] == self.windows[j])


class _Angles:
    """Rotary angles of all positions of a sample in an epoch, that is after a number of evictions.

    Attributes:
        text, images: (tokens, pairs of rotated dimensions), float32, of all text tokens and of all image tokens.
    """

    def __init__(self, config: Any, sample: Sample, masks: _Masks, epoch: int) -> None:
        rope = config.text_config.rope_parameters
        assert rope["rope_type"] == "default"
        axes = 3 if "mrope_section" in rope else 1
        text, images = _positions(config, sample, axes, masks, epoch)
        rotated = int(rope.get("partial_rotary_factor", 1) * _head_dim(config.text_config))
        exponents = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
        self.frequencies = 1.0 / rope["rope_theta"] ** exponents
        self.axis_of_pair = _axis_of_pair(rope, rotated // 2)
        self.text = self._angles(text)
        self.images = self._angles(images)

    def _angles(self, positions: list[tuple[int, ...]]) -> Tensor:
        """Each pair of dimensions turns by its axis' position times its frequency."""
        by_pair = [[position[axis] for axis in self.axis_of_pair] for position in positions]
        return torch.tensor(by_pair, dtype=torch.float32).view(-1, len(self.frequencies)) * self.frequencies


def _head_dim(text_config: Any) -> int:
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def _axis_of_pair(rope: Mapping[str, Any], pairs: int) -> list[int]:
    """Which position axis (time, height, width) turns each pair of a head's dimensions."""
    if "mrope_section" not in rope:
        return [0] * pairs
    sections = rope["mrope_section"]
    if rope.get("mrope_interleaved"):  # t h w t h w ..., each axis until its section is used up, the rest is time
        return [pair % 3 if pair < 3 * sections[pair % 3] else 0 for pair in range(pairs)]
    return [axis for axis in range(3) for _ in range(sections[axis])]


def _positions(
    config: Any, sample: Sample, axes: int, masks: _Masks, epoch: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Positions of the text tokens and of the image tokens in an epoch, each a tuple of `axes` numbers."""
    grids = [image.grid for image in sample.images]
    advance = [max(grid) if axes == 3 else grid[0] * grid[1] for grid in grids]
    insertion, before = config.casa_positions == "insertion", config.casa_image_positions == "before"
    text, starts = [(0,) * axes] * len(sample.input_ids), [(0,) * axes] * len(grids)
    if sample.positions is not None:
        assert not sample.evictions
        text = [tuple(column) for column in sample.positions.T.tolist()]
        for j, image in enumerate(sample.images):
            back = 0  # from the image's start to the token that it precedes
            if insertion:
                back = sum(advance[i] for i in range(j, len(grids)) if sample.images[i].position == image.position)
            elif before:
                back = advance[j]
            starts[j] = tuple(p - back for p in text[image.position])
    else:
        cursor = 0
        for kind, index in _line(sample, masks, epoch):
            if kind == "text":
                text[index] = (cursor,) * axes
                cursor += 1
            else:
                starts[index] = (cursor - advance[index] if before and not insertion else cursor,) * axes
                cursor += advance[index] if insertion else 0

    images: list[tuple[int, ...]] = []
    for start, (height, width) in zip(starts, grids, strict=True):
        for row in range(height):
            for column in range(width):
                if axes == 3:
                    images.append((start[0], start[1] + row, start[2] + column))
                else:
                    images.append((start[0] + (row * width + column if insertion or before else 0),))
    return text, images


def _line(sample: Sample, masks: _Masks, epoch: int) -> list[tuple[str, int]]:
    """What takes up positions in an epoch, in order: ("image", its number) and ("text", its index).

    Evicted text leaves the line, and with it the images around it up to the text that remains, but for those that are
    seen at that moment. What stands between these stays too, and images before the same token as the first of them.
    """
    line = []
    for t in range(len(sample.input_ids)):
        line += [("image", j) for j, image in enumerate(sample.images) if image.position == t]
        line.append(("text", t))
    gone: set[int] = set()
    for eviction in sample.evictions[:epoch]:
        if not eviction.text:
            continue
        gone |= set(eviction.text)
        seen = [sample.images[j].position for j in masks.current_images(eviction.before - 1)]
        begin = end = line.index(("text", eviction.text[0]))
        while begin > 0 and (line[begin - 1][0] == "image" or line[begin - 1][1] in gone):
            begin -= 1
        while line[end][0] == "image" or line[end][1] in gone:
            end += 1
        line[begin:end] = [
            (kind, index)
            for kind, index in line[begin:end]
            if seen
            and (
                seen[0] <= index < seen[-1] if kind == "text" else seen[0] <= sample.images[index].position <= seen[-1]
            )
        ]
    return line


class Block:
    """One decoder block: text and image states in, text and image states out. As in Qwen2-VL and Qwen2.5-VL.

    Attributes:
        head_norms: whether queries and keys of single heads are normalised, before they are rotated.
        neighbours: which two dimensions of a head rotate together: neighbours, or i and i + half of those that do.
        norm_offset: what is added to the weights of norms.
        without_positions: indices of blocks whose queries and keys aren't rotated.
        rotates, fusion_rotates: whether self-attention and fusion have positions in this block; plain cross-attention
            never has.
        scale: factor of the products of queries and keys.
    """

    head_norms = False
    neighbours = False
    norm_offset = 0.0
    without_positions: frozenset[int] = frozenset()

    def __init__(
        self, config: Any, parameters: Mapping[str, Tensor], index: int, masks: _Masks, angles: list[_Angles]
    ) -> None:
        self.config, self.parameters, self.masks, self.angles = config, parameters, masks, angles
        self.index = index
        self.prefix = f"model.language_model.layers.{index}."
        self.fused = config.casa_layers is None or index in config.casa_layers
        self.fusion_module = "self_attn" if config.casa_share_projections else "casa_attn"
        self.rotates = index not in self.without_positions
        self.fusion_rotates = self.rotates and config.casa_keys != "image"
        self.scale = _head_dim(config.text_config) ** -0.5

    def __call__(self, text: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        placement = self.config.casa_placement if self.fused else None
        x = text
        if placement == "before":
            x = x + self.fusion_output(self.fusion(self.norm("casa_layernorm", x), images))

        # What self-attention reads; in `full` updates the image tokens read the same text.
        normed = self.norm("input_layernorm", x)
        if placement is None or placement in ("before", "after"):
            x = x + self.out("self_attn", self.self_attention(normed))
        elif placement == "replace":
            x = x + self.fusion_output(self.fusion(normed, images))
        elif self.config.casa_keys == "context":
            x = x + self.out("self_attn", self.fusion(normed, images))
        elif self.config.casa_share_projections:
            both = self.self_attention(normed) + self.gate() * self.fusion(normed, images)
            x = x + self.out("self_attn", both)
        else:
            fusion = self.fusion_output(self.fusion(normed, images))
            x = x + self.out("self_attn", self.self_attention(normed)) + fusion

        if placement == "after":
            x = x + self.fusion_output(self.fusion(self.norm("casa_layernorm", x), images))
        x = x + self.mlp(self.norm("post_attention_layernorm", x))
        return x, self.update_images(images, normed)

    def update_images(self, images: Tensor, normed_text: Tensor) -> Tensor:
        if self.config.casa_image_updates == "none":
            return images
        if self.config.casa_image_updates == "full":
            normed = self.norm("input_layernorm", images)
            q, k, v = (self.heads("self_attn", p, normed) for p in "qkv")
            text_k, text_v = (self.heads("self_attn", p, normed_text) for p in "kv")
            attended = torch.zeros(len(q), q.shape[1] * q.shape[2], dtype=q.dtype)
            for epoch, angles in enumerate(self.angles):
                attended += _attend(
                    self.rotated(q, angles.images, self.rotates),
                    torch.cat(
                        [self.rotated(k, angles.images, self.rotates), self.rotated(text_k, angles.text, self.rotates)]
                    ),
                    torch.cat([v, text_v]),
                    _of_epoch(self.masks.image_updates, self.masks.image_epochs, epoch),
                    self.scale,
                )
            images = images + self.out("self_attn", self.gated("self_attn", normed, attended))
        return images + self.mlp(self.norm("post_attention_layernorm", images))

    def self_attention(self, normed: Tensor) -> Tensor:
        """Causal attention over the text, (T, H * D), before the output projection."""
        q, k, v = (self.heads("self_attn", p, normed) for p in "qkv")
        attended = torch.zeros(len(q), q.shape[1] * q.shape[2], dtype=q.dtype)
        for epoch, angles in enumerate(self.angles):
            seen = _of_epoch(self.masks.self_attention, self.masks.text_epochs, epoch)
            rotated_q, rotated_k = (self.rotated(x, angles.text, self.rotates) for x in (q, k))
            attended += _attend(rotated_q, rotated_k, v, seen, self.scale)
        return self.gated("self_attn", normed, attended)

    def fusion(self, normed: Tensor, images: Tensor) -> Tensor:
        """Attention to image tokens and, as the masks say, text; (T, H * D), before the output projection."""
        image_norm = "input_layernorm" if self.config.casa_share_projections else "casa_attn.image_norm"
        normed_images = images if self.config.casa_image_norm == "none" else self.norm(image_norm, images)
        q, text_k, text_v = (self.heads(self.fusion_module, p, normed) for p in "qkv")
        image_k, image_v = (self.heads(self.fusion_module, p, normed_images) for p in "kv")
        values = torch.cat([image_v, text_v])
        attended = torch.zeros(len(q), q.shape[1] * q.shape[2], dtype=q.dtype)
        for epoch, angles in enumerate(self.angles):
            rotated_q, rotated_k = (self.rotated(x, angles.text, self.fusion_rotates) for x in (q, text_k))
            keys = torch.cat([self.rotated(image_k, angles.images, self.fusion_rotates), rotated_k])
            seen = _of_epoch(self.masks.fusion, self.masks.text_epochs, epoch)
            attended += _attend(rotated_q, keys, values, seen, self.scale)
        return self.gated(self.fusion_module, normed, attended)

    def gated(self, module: str, normed: Tensor, attended: Tensor) -> Tensor:
        """What is attended (tokens, H * D), by queries of the normed states, on its way to the output projection."""
        return attended

    def fusion_output(self, attended: Tensor) -> Tensor:
        """What a fusion layer adds to the text: exactly 0, without even a bias, where a token sees nothing."""
        output = self.gate() * self.out(self.fusion_module, attended)
        sees_something = torch.tensor([bool(keys) for keys in self.masks.fusion])
        return torch.where(sees_something[:, None], output, 0.0)

    def gate(self) -> Tensor:
        if self.config.casa_gate is None:
            return torch.tensor(1.0, dtype=torch.float64)
        return self.parameters[self.prefix + "casa_attn.gate"].tanh()

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.norm_offset + self.parameters[f"{self.prefix}{name}.weight"]
        return _rms_norm(x, weight, self.config.text_config.rms_norm_eps)

    def linear(self, name: str, x: Tensor) -> Tensor:
        output = x @ self.parameters[f"{self.prefix}{name}.weight"].T
        bias = self.parameters.get(f"{self.prefix}{name}.bias")
        return output if bias is None else output + bias

    def heads(self, module: str, projection: str, x: Tensor) -> Tensor:
        """Queries "q", keys "k" or values "v": (tokens, heads, D), not rotated."""
        text = self.config.text_config
        count = text.num_attention_heads if projection == "q" else text.num_key_value_heads
        output = self.linear(f"{module}.{projection}_proj", x)
        output = output.view(len(x), count, output.shape[-1] // count)
        if self.head_norms and projection != "v":
            return self.norm(f"{module}.{projection}_norm", output)
        return output

    def rotated(self, x: Tensor, angles: Tensor, rotates: bool) -> Tensor:
        """Queries or keys (tokens, heads, D) at positions of (tokens, pairs) angles, if they have any; the dimensions
        that aren't in a pair stay."""
        if not rotates:
            return x
        x, rest = x.split([2 * angles.shape[1], x.shape[-1] - 2 * angles.shape[1]], dim=-1)
        cos, sin = angles.cos().double()[:, None], angles.sin().double()[:, None]
        first, second = (x[..., ::2], x[..., 1::2]) if self.neighbours else x.chunk(2, dim=-1)
        pairs = first * cos - second * sin, second * cos + first * sin
        rotated = torch.stack(pairs, dim=-1).flatten(-2) if self.neighbours else torch.cat(pairs, dim=-1)
        return torch.cat([rotated, rest], dim=-1)

    def out(self, module: str, x: Tensor) -> Tensor:
        return self.linear(f"{module}.o_proj", x)

    def mlp(self, x: Tensor) -> Tensor:
        assert self.config.text_config.hidden_act == "silu"
        gate = self.linear("mlp.gate_proj", x)
        return self.linear("mlp.down_proj", gate * gate.sigmoid() * self.linear("mlp.up_proj", x))


class Qwen3Block(Block):
    """As in Qwen3-VL."""

    head_norms = True


class ExpertBlock(Block):
    """MLPs with experts.

    Attributes:
        dense: indices of blocks with an ordinary MLP.
        chosen: number of experts that a token is sent to.
        shared: whether every token also passes an expert of its own, as much as a sigmoid says.
    """

    has_experts = True
    dense: frozenset[int] = frozenset()
    shared = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.chosen = self.config.text_config.num_experts_per_tok

    def mlp(self, x: Tensor) -> Tensor:
        """Each token alone: the experts whose logits are largest, weighted by the softmax of these logits."""
        if self.index in self.dense:
            return super().mlp(x)
        gate_up, down = (self.parameters[f"{self.prefix}mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
        output = torch.zeros_like(x)
        for token, logits in enumerate(self.linear("mlp.gate", x)):
            chosen = logits.argsort(descending=True)[: self.chosen].tolist()
            for expert, weight in zip(chosen, logits[chosen].float().softmax(dim=0), strict=True):
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                output[token] += weight.double() * (down[expert] @ (gate * gate.sigmoid() * up))
        return output + self.shared_expert(x) if self.shared else output

    def shared_expert(self, x: Tensor) -> Tensor:
        gate = self.linear("mlp.shared_expert.gate_proj", x)
        up = self.linear("mlp.shared_expert.up_proj", x)
        output = self.linear("mlp.shared_expert.down_proj", gate * gate.sigmoid() * up)
        return self.linear("mlp.shared_expert_gate", x).sigmoid() * output


class Qwen3ExpertBlock(ExpertBlock, Qwen3Block):
    """As in Qwen3-VL-MoE; which blocks have a dense MLP is the tiny configuration's `mlp_only_layers`."""

    dense = frozenset({1})


class SmolLM3Block(Block):
    """As in SmolLM3; which blocks have no positions is the tiny configuration's `no_rope_layers`."""

    without_positions = frozenset({1})


class HeliumBlock(Block):
    """As in Helium, whose norms multiply by their weights in float32 too."""

    neighbours = True

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.parameters[f"{self.prefix}{name}.weight"]
        unscaled = _rms_norm(x, torch.ones_like(weight), self.config.text_config.rms_norm_eps)
        return (weight.float() * unscaled.float()).double()


class Qwen3_5Block(Block):
    """As in Qwen3.5: gates on attention, and blocks of gated linear attention (arXiv 2412.06464).

    Attributes:
        has_gate: whether what is attended is multiplied by a sigmoid of the second half of each head's queries.
        remembers: whether linear attention has a state.
        images_enter: whether the tokens of updated images enter it.
    """

    head_norms = True
    norm_offset = 1.0
    has_gate = True
    remembers = True
    images_enter = True

    def __init__(
        self, config: Any, parameters: Mapping[str, Tensor], index: int, masks: _Masks, angles: list[_Angles]
    ) -> None:
        super().__init__(config, parameters, index, masks, angles)
        self.is_linear = config.text_config.layer_types[index] == "linear_attention"

    def __call__(self, text: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_linear:
            return super().__call__(text, images)
        # Only where it is asked for: an experiment.
        placement = self.config.casa_placement if self.config.casa_layers is not None and self.fused else None
        if placement == "before":
            text = text + self.fusion_output(self.fusion(self.norm("casa_layernorm", text), images))
        beside = torch.zeros_like(text)
        if placement == "parallel":
            beside = self.fusion_output(self.fusion(self.norm("input_layernorm", text), images))
        before, updates = images, self.config.casa_image_updates
        enters = updates == "full" and self.images_enter
        order = [("text", t) for t in range(len(text))]
        if enters:
            counts = [len(image.features) for image in self.masks.images]
            order = []
            for t in range(len(text)):
                for j, image in enumerate(self.masks.images):
                    if image.position == t:
                        order += [("image", sum(counts[:j]) + n) for n in range(counts[j])]
                order.append(("text", t))
        states = torch.stack([text[n] if kind == "text" else images[n] for kind, n in order])
        states = states + self.linear_attention(self.norm("input_layernorm", states))
        text = beside + states[[place for place, (kind, _) in enumerate(order) if kind == "text"]]
        if placement == "after":
            text = text + self.fusion_output(self.fusion(self.norm("casa_layernorm", text), before))
        if enters:
            images = states[[place for place, (kind, _) in enumerate(order) if kind == "image"]]
        if updates != "none":
            images = images + self.mlp(self.norm("post_attention_layernorm", images))
        return text + self.mlp(self.norm("post_attention_layernorm", text)), images

    def linear_attention(self, x: Tensor) -> Tensor:
        """The gated delta rule over (tokens, hidden), token by token."""
        text = self.config.text_config
        key_heads, value_heads = text.linear_num_key_heads, text.linear_num_value_heads
        inputs = self.linear("linear_attn.in_proj_qkv", x)
        kernel = self.parameters[self.prefix + "linear_attn.conv1d.weight"][:, 0]  # (channels, taps)
        padded = torch.cat([inputs.new_zeros(kernel.shape[1] - 1, inputs.shape[1]), inputs])
        mixed = torch.stack([(kernel.T * padded[t : t + kernel.shape[1]]).sum(0) for t in range(len(x))])
        mixed = mixed * mixed.sigmoid()
        width = key_heads * text.linear_key_head_dim
        q, k, v = mixed.split([width, width, value_heads * text.linear_value_head_dim], dim=-1)
        q, k = (_l2_norm(part.view(len(x), key_heads, -1)) for part in (q, k))
        v = v.view(len(x), value_heads, -1)
        strength = self.linear("linear_attn.in_proj_b", x).sigmoid()
        step = self.linear("linear_attn.in_proj_a", x) + self.parameters[self.prefix + "linear_attn.dt_bias"]
        rate = self.parameters[self.prefix + "linear_attn.A_log"].exp()
        decay = (-rate * (1 + step.exp()).log()).exp()
        output = torch.zeros_like(v)
        for head in range(value_heads):
            key_head = head // (value_heads // key_heads)
            state = v.new_zeros(text.linear_key_head_dim, text.linear_value_head_dim)
            for t in range(len(x)):
                state = state * decay[t, head] if self.remembers else torch.zeros_like(state)
                correction = strength[t, head] * (v[t, head] - k[t, key_head] @ state)
                state = state + torch.outer(k[t, key_head], correction)
                output[t, head] = q[t, key_head] @ state / text.linear_key_head_dim**0.5
        weight = self.parameters[self.prefix + "linear_attn.norm.weight"]
        gate = self.linear("linear_attn.in_proj_z", x).view(len(x), value_heads, -1)
        output = _rms_norm(output, weight, text.rms_norm_eps) * gate * gate.sigmoid()
        return self.linear("linear_attn.out_proj", output.flatten(1))

    def heads(self, module: str, projection: str, x: Tensor) -> Tensor:
        if projection != "q":
            return super().heads(module, projection, x)
        return self.norm(f"{module}.q_norm", self.halves(module, x)[0])

    def gated(self, module: str, normed: Tensor, attended: Tensor) -> Tensor:
        return attended * self.halves(module, normed)[1].sigmoid().flatten(1) if self.has_gate else attended

    def halves(self, module: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and gates of each head, (tokens, H, D)."""
        both = self.linear(f"{module}.q_proj", x)
        heads = self.config.text_config.num_attention_heads
        queries, gates = both.view(len(x), heads, both.shape[1] // heads).chunk(2, dim=-1)
        return queries, gates


class Qwen3_5ExpertBlock(ExpertBlock, Qwen3_5Block):
    """As in Qwen3.5-MoE."""

    shared = True


def _of_epoch(seen: list[list[int]], epochs: list[int], epoch: int) -> list[list[int]]:
    """What queries of an epoch see; nothing for the others."""
    return [keys if own == epoch else [] for keys, own in zip(seen, epochs, strict=True)]


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: list[list[int]], scale: float) -> Tensor:
    """Softmax attention of each query over exactly the keys it sees; 0 where it sees none.

    Args:
        q: (queries, H, D).
        k: (keys, G, D).
        v: (keys, G, D).
        seen: for each query the numbers of its keys.
        scale: factor of the products.

    Returns:
        (queries, H * D).
    """
    output = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    for query, keys in enumerate(seen):
        if keys:
            scores = scale * (k[keys] * q[query]).sum(-1)
            weights = scores.softmax(dim=0)
            output[query] = (weights[..., None] * v[keys]).sum(0)
    return output.flatten(1)


def _l2_norm(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    rounded = x.float()
    scale = torch.rsqrt(rounded.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * (rounded * scale).double()
