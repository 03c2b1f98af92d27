# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the authors' papers and scripts describe, once more, tiny and dense, in plain torch: the truth for conversions.

Nothing of the package or of Transformers is imported. A model is a dictionary of tensors under names of this file's
own, such as `block.1.fusion.q.weight`; how a checkpoint calls them is a matter of `authors_layouts.py`. An image comes
as the scripts give it: (rows of patches, columns of patches, 588), one frame, so that the tower's patch embedding has
588 inputs. Everything is float64.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

Weights = dict[str, Tensor]

PATCH = 3 * 14 * 14


@dataclass(frozen=True)
class Spec:
    """A tiny model.

    Attributes:
        vocabulary, width, mlp, blocks, heads, kv_heads: sizes of the language model; a head has width / heads
            channels.
        theta, eps: base of the rotary angles, and what norms add to the mean square.
        sections: pairs of a rotary head for time, height and width; None where positions are single numbers.
        biases: whether projections to queries, keys and values have biases.
        tied: whether the head is the embedding matrix.
        tower_width, tower_heads, tower_blocks, tower_mlp: sizes of the vision tower, which merges 2 x 2 patches.
        fused: blocks with a fusion layer.
        shared: whether fusion uses self-attention's projections.
        replaced: whether it stands in the place of self-attention.
        with_text: whether it also attends to the text of the window (the first generation).
        text_before: whether text before the first image attends to itself there.
        image_norm: what images pass before their keys and values are made: "own" (of each fusion layer), "tower" (one
            norm behind the tower), "input" (the block's) or None.
        gated: whether fusion passes the tanh of a learned number.
        fusion_biases: whether fusion's projections have biases.
        before: whether image positions begin before the token that the image precedes, by the image's longer side.
        placement: "before" or "after" self-attention, with a norm of the text of its own; None beside it.
        tower_out: width of the tower's features, if a projection follows; else None.
        inserted: whether image tokens stand in the sequence instead (the baseline).
    """

    vocabulary: int
    width: int = 64
    mlp: int = 96
    blocks: int = 3
    heads: int = 4
    kv_heads: int = 2
    theta: float = 10_000.0
    eps: float = 1e-5
    sections: tuple[int, int, int] | None = None
    biases: bool = False
    tied: bool = False
    tower_width: int = 32
    tower_heads: int = 2
    tower_blocks: int = 2
    tower_mlp: int = 48
    fused: tuple[int, ...] = (0, 1, 2)
    shared: bool = False
    replaced: bool = False
    with_text: bool = False
    text_before: bool = False
    image_norm: str | None = "own"
    gated: bool = False
    fusion_biases: bool = False
    before: bool = False
    placement: str | None = None
    tower_out: int | None = None
    inserted: bool = False

    @property
    def head(self) -> int:
        return self.width // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors."""
        width, kv = self.width, self.kv_heads * self.head
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.vocabulary, width), "norm": (width,)}
        if not self.tied:
            shapes["head"] = (self.vocabulary, width)
        for index in range(self.blocks):
            block = f"block.{index}."
            shapes |= {f"{block}norm1": (width,), f"{block}norm2": (width,)}
            shapes |= {f"{block}mlp.{name}": (self.mlp, width) for name in ("gate", "up")}
            shapes[f"{block}mlp.down"] = (width, self.mlp)
            own = index in self.fused and not self.shared and not self.inserted
            attentions = [("self", self.biases)] * (not (own and self.replaced))
            attentions += [("fusion", self.fusion_biases)] * own
            for name, biases in attentions:
                for projection, rows in (("q", width), ("k", kv), ("v", kv), ("o", width)):
                    shapes[f"{block}{name}.{projection}.weight"] = (rows, width)
                    if biases and projection != "o":
                        shapes[f"{block}{name}.{projection}.bias"] = (rows,)
            if own and self.image_norm == "own":
                shapes[f"{block}fusion.norm"] = (width,)
            if own and self.placement:
                shapes[f"{block}fusion.text_norm"] = (width,)
            if own and self.gated:
                shapes[f"{block}fusion.gate"] = (1,)
        if self.image_norm == "tower":
            shapes["tower_norm"] = (width,)
        tower, merged = self.tower_width, 4 * self.tower_width
        shapes["tower.patch"] = (tower, 3, 14, 14)
        for index in range(self.tower_blocks):
            block = f"tower.block.{index}."
            shapes |= {f"{block}norm1": (tower,), f"{block}norm2": (tower,)}
            for name, rows, columns in (
                ("qkv", 3 * tower, tower),
                ("proj", tower, tower),
                ("gate", self.tower_mlp, tower),
                ("up", self.tower_mlp, tower),
                ("down", tower, self.tower_mlp),
            ):
                shapes |= {f"{block}{name}.weight": (rows, columns), f"{block}{name}.bias": (rows,)}
        shapes |= {"tower.norm": (tower,), "tower.out0.weight": (merged, merged), "tower.out0.bias": (merged,)}
        if self.tower_out is not None:
            shapes |= {"projection.weight": (width, self.tower_out), "projection.bias": (width,)}
        out = self.tower_out or width
        return shapes | {"tower.out2.weight": (out, merged), "tower.out2.bias": (out,)}

    def weights(self, seed: int = 0) -> Weights:
        """Random tensors, none of which is 0, 1 or a copy."""
        return {name: _random(name, shape, seed) for name, shape in self.shapes().items()}


def _random(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if "norm" in name:
        return 1 + 0.3 * noise
    if len(shape) == 1:
        return 0.5 * noise if name.endswith("gate") else 0.3 * noise
    return 1.5 * noise / _inputs(shape)


def _inputs(shape: tuple[int, ...]) -> float:
    size = 1
    for length in shape[1:]:
        size *= length
    return float(size**0.5)


def logits(spec: Spec, weights: Weights, ids: Sequence[int], images: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Logits (tokens, vocabulary) of a text with images.

    Args:
        spec: the model.
        weights: its tensors.
        ids: tokens.
        images: (index of the token that an image stands before, image) in reading order.
    """
    model = _Model(spec, weights)
    seen = [(index, image.shape[0] // 2, image.shape[1] // 2, model.tower(image)) for index, image in images]
    return model.run(list(ids), seen)


def merge_order(height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns of patches, the four that are merged together."""
    corners = [(i, j) for i in range(0, height, 2) for j in range(0, width, 2)]
    return [(i + a, j + b) for i, j in corners for a in (0, 1) for b in (0, 1)]


class _Model:
    def __init__(self, spec: Spec, weights: Weights):
        self.spec, self.weights = spec, {name: tensor.double() for name, tensor in weights.items()}

    # ---------------------------------------------------------------- language model

    def run(self, ids: list[int], images: list[tuple[int, int, int, Tensor]]) -> Tensor:
        spec, w = self.spec, self.weights
        x = w["embedding"][torch.tensor(ids)]
        if spec.inserted:
            return self._inserted(x, images)
        here = [(t, t, t) for t in range(len(ids))]
        y = torch.cat([features for *_, features in images]) if images else x[:0]
        y = self.norm("tower_norm", y) if spec.image_norm == "tower" else y
        owners, image_positions = [], []
        for j, (index, rows, columns, _) in enumerate(images):
            start = index - max(rows, columns) if spec.before else index
            for row in range(rows):
                for column in range(columns):
                    owners.append(j)
                    if spec.sections:
                        image_positions.append((start, start + row, start + column))
                    else:
                        place = index - rows * columns + row * columns + column if spec.before else index
                        image_positions.append((place,) * 3)
        causal = torch.tensor([[s <= t for s in range(len(ids))] for t in range(len(ids))])
        sees = torch.zeros(len(ids), len(y) + len(ids), dtype=torch.bool)
        for t in range(len(ids)):
            latest = max((j for j, (index, *_) in enumerate(images) if index <= t), default=None)
            for n, owner in enumerate(owners):
                sees[t, n] = owner == latest
            if spec.with_text and (latest is not None or spec.text_before):
                start = 0 if latest is None else images[latest][0]
                sees[t, len(y) + start : len(y) + t + 1] = True
        for i in range(spec.blocks):
            block = f"block.{i}."
            fused = i in spec.fused

            def fusion(n: Tensor, block: str = block) -> Tensor:
                """Before the output projection."""
                name = f"{block}self" if spec.shared else f"{block}fusion"
                image_states = y
                if spec.image_norm in ("own", "input"):
                    image_states = self.norm(f"{block}fusion.norm" if spec.image_norm == "own" else f"{block}norm1", y)
                q, text_k, text_v = (self.heads(f"{name}.{p}", n) for p in "qkv")
                k, v = (self.heads(f"{name}.{p}", image_states) for p in "kv")
                if spec.with_text:
                    q, text_k, k = (self.turn(q, here), self.turn(text_k, here), self.turn(k, image_positions))
                return self.attend(q, torch.cat([k, text_k]), torch.cat([v, text_v]), sees)

            def added(n: Tensor, block: str = block) -> Tensor:
                """Fusion with its own output projection."""
                gate = w[f"{block}fusion.gate"].tanh() if spec.gated else 1.0
                return gate * self.linear(f"{block}fusion.o", fusion(n))

            if fused and spec.placement == "before":
                x = x + added(self.norm(f"{block}fusion.text_norm", x))
            n = self.norm(f"{block}norm1", x)
            step = torch.zeros_like(x)
            if not (fused and spec.replaced):
                q, k, v = (self.heads(f"{block}self.{p}", n) for p in "qkv")
                own = self.attend(self.turn(q, here), self.turn(k, here), v, causal)
                own = own + fusion(n) if spec.shared and fused else own
                step = self.linear(f"{block}self.o", own)
            if fused and not spec.shared and spec.placement is None:
                step = step + added(n)
            x = x + step
            if fused and spec.placement == "after":
                x = x + added(self.norm(f"{block}fusion.text_norm", x))
            x = self.mlp(block, x)
        return self.out(x)

    def _inserted(self, text: Tensor, images: list[tuple[int, int, int, Tensor]]) -> Tensor:
        """The baseline: image tokens stand in the sequence, positions count all tokens (single numbers)."""
        assert self.spec.sections is None
        places = dict((index, features) for index, _, _, features in images)
        rows, is_text = [], []
        for t in range(len(text)):
            if t in places:
                rows.append(places[t])
                is_text += [False] * len(places[t])
            rows.append(text[t : t + 1])
            is_text.append(True)
        x = torch.cat(rows)
        positions = [(t, t, t) for t in range(len(x))]
        causal = torch.ones(len(x), len(x)).tril().bool()
        for i in range(self.spec.blocks):
            block = f"block.{i}."
            n = self.norm(f"{block}norm1", x)
            q, k, v = (self.heads(f"{block}self.{p}", n) for p in "qkv")
            attended = self.attend(self.turn(q, positions), self.turn(k, positions), v, causal)
            x = self.mlp(block, x + self.linear(f"{block}self.o", attended))
        return self.out(x)[torch.tensor(is_text)]

    def mlp(self, block: str, x: Tensor) -> Tensor:
        n, w = self.norm(f"{block}norm2", x), self.weights
        return x + (silu(n @ w[f"{block}mlp.gate"].T) * (n @ w[f"{block}mlp.up"].T)) @ w[f"{block}mlp.down"].T

    def out(self, x: Tensor) -> Tensor:
        return self.norm("norm", x) @ self.weights["embedding" if self.spec.tied else "head"].T

    def norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        return self.weights[name] * x * (x.square().mean(-1, keepdim=True) + (eps or self.spec.eps)).rsqrt()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def heads(self, name: str, x: Tensor) -> Tensor:
        """(tokens, heads, channels); keys and values once for each query head that uses them."""
        made = self.linear(name, x)
        made = made.view(len(x), made.shape[1] // self.spec.head, self.spec.head)
        return made.repeat_interleave(self.spec.heads // made.shape[1], dim=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """(tokens, width); 0 where a token sees nothing."""
        scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0.0)
        return torch.einsum("hts,shd->thd", weights, v).flatten(1)

    def turn(self, x: Tensor, positions: list[tuple[int, int, int]]) -> Tensor:
        """Rotary positions, halves of a head together; each pair by one of three axes."""
        pairs = self.spec.head // 2
        sections = self.spec.sections or (pairs, 0, 0)
        axes = [axis for axis in range(3) for _ in range(sections[axis])]
        frequencies = [self.spec.theta ** (-2 * i / self.spec.head) for i in range(pairs)]
        angles = torch.tensor(
            [[p[axis] * f for axis, f in zip(axes, frequencies, strict=True)] for p in positions], dtype=torch.float64
        ).view(len(positions), 1, pairs)
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    # ---------------------------------------------------------------- vision tower

    def tower(self, image: Tensor) -> Tensor:
        """Features of an image in which all tokens see each other: (merged tokens, width), row by row."""
        spec, w = self.spec, self.weights
        height, width, _ = image.shape
        order = merge_order(height, width)
        x = torch.stack([image[i, j] for i, j in order]).double() @ w["tower.patch"].flatten(1).T
        channels = spec.tower_width // spec.tower_heads
        frequencies = torch.tensor(
            [10_000.0 ** (-4 * i / channels) for i in range(channels // 4)], dtype=torch.float64
        )
        angles = torch.stack([torch.cat([i * frequencies, j * frequencies]) for i, j in order])[:, None]

        def turn(states: Tensor) -> Tensor:
            first, second = states.chunk(2, -1)
            cos, sin = angles.cos(), angles.sin()
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        everything = torch.ones(len(x), len(x)).bool()
        for index in range(spec.tower_blocks):
            block = f"tower.block.{index}."
            q, k, v = self.linear(f"{block}qkv", self.norm(f"{block}norm1", x, 1e-6)).chunk(3, -1)
            q, k, v = (part.view(len(x), spec.tower_heads, channels) for part in (q, k, v))
            x = x + self.linear(f"{block}proj", self.attend(turn(q), turn(k), v, everything))
            n = self.norm(f"{block}norm2", x, 1e-6)
            inner = silu(self.linear(f"{block}gate", n)) * self.linear(f"{block}up", n)
            x = x + self.linear(f"{block}down", inner)
        merged = self.norm("tower.norm", x, 1e-6).view(-1, 4 * spec.tower_width)
        features = self.linear("tower.out2", gelu(self.linear("tower.out0", merged)))
        return features if spec.tower_out is None else self.linear("projection", features)
