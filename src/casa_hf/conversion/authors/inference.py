# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The design of a released checkpoint: what its tensors and its configuration say, and what has to be asked.

Nothing that changes an ordinary answer is guessed. What is assumed all the same is said with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...checks import counted
from ...configuration_casa import CasaConfig, variant_overrides
from ...design_space import FIELDS, VARIANTS
from ...folder_files import CheckpointError
from ..design import resolve_design
from ..mapping import GATE, LAYER
from .facts import Facts
from .tensors import IMAGE_NORM, Assignment

_OWN_NORM = LAYER + "casa_layernorm.weight"
_SELF_ATTENTION = LAYER + "self_attn.q_proj.weight"


@dataclass(frozen=True)
class Design:
    """A point of the design space.

    Attributes:
        fields: every design field.
        findings: where each value comes from, in sentences.
        questions: what must be asked, with the reason, in sentences.
    """

    fields: dict[str, Any]
    findings: tuple[str, ...]
    questions: tuple[str, ...]


def infer_design(facts: Facts, tensors: Assignment, given: Mapping[str, Any]) -> Design:
    """The design of a checkpoint.

    Args:
        facts: what its files say.
        tensors: what its tensors are.
        given: design fields that the caller is sure of; they win where nothing in the checkpoint contradicts them.

    Raises:
        CheckpointError: for a value that the tensors contradict.
    """
    return _Inference(facts, tensors, given).result()


class _Inference:
    def __init__(self, facts: Facts, tensors: Assignment, given: Mapping[str, Any]):
        self.facts = facts
        self.found = tensors.found
        self.fused = tensors.fused
        self.given = given
        self.blocks = range(facts.text.num_hidden_layers)
        self.fields: dict[str, Any] = {name: getattr(CasaConfig, name) for name in FIELDS}
        self.findings: list[str] = []
        self.questions: list[str] = []

    def result(self) -> Design:
        if self._inserts():
            self._insertion()
        else:
            self._fusion()
        return Design(self.fields, tuple(self.findings), tuple(self.questions))

    def _inserts(self) -> bool:
        """Whether image tokens stand in the sequence: one attention, and no fusion layer."""
        if "casa_keys" in self.given:
            return self.given["casa_keys"] == "context"
        return not self.fused and not self.facts.fusion

    def _insertion(self) -> None:
        if self.fused:
            blocks = counted(len(self.fused), "block")
            raise CheckpointError(
                f"casa_keys='context' contradicts the tensors: the fusion layers of {blocks} have projections of "
                "their own. Leave it out, or correct the mapping."
            )
        self.fields |= VARIANTS["insertion"].overrides
        reason = f"the name {self.facts.name!r} has no CASA in it, and no tensor belongs to a fusion layer"
        if "casa_keys" not in self.given and self.facts.code is not None:
            self._ask(
                "casa_keys",
                f"{reason}, so that image tokens stand in the sequence ('context'); but {self.facts.code}, so that "
                "there may be fusion layers that share self-attention's projections",
                "'context', 'image' or 'window'",
            )
        elif "casa_keys" not in self.given:
            self.findings.append(f"variant 'insertion': {reason}")
        for name, value in self.given.items():
            self._set(name, value, "given")

    def _fusion(self) -> None:
        self._from_tensors()
        self._keys()
        self._image_norm()
        self._gate()
        if self.fields["casa_keys"] == "window":
            self._ask(
                "casa_image_positions",
                "where image positions begin isn't public; the paper's 'frozen' reading is 'at', token insertion's "
                "geometry is 'before'",
                "'at' or 'before'",
            )
            self._ask(
                "casa_text_windows",
                "whether text before the first image attends to itself in fusion layers isn't public; the paper's "
                "drawing shows it",
                "True or False",
            )
        self._assume("casa_positions", "contiguous", "the authors' scripts count text alone")
        self._assume("casa_image_updates", "none", "the released models are described without updates of image states")
        for name in ("casa_image_history", "casa_video_history"):
            self._assume(name, "latest", "the authors' README says that only the latest image is looked at")
        for name, value in self.given.items():
            self.fields[name] = value

    # ---------------------------------------------------------------- what tensors say

    def _from_tensors(self) -> None:
        has = self._blocks_with
        shared = not self.fused
        reason = f"the fusion layers of {counted(len(self.fused), 'block')} have projections of their own"
        reason = "no fusion layer has projections of its own" if shared else reason
        self._conclude("casa_share_projections", shared, reason)
        if shared:
            self._assume("casa_layers", None, "shared projections don't tell which blocks have fusion layers: all")
        else:
            layers = None if self.fused == tuple(self.blocks) else list(self.fused)
            self._conclude("casa_layers", layers, f"blocks with projections of fusion layers: {layers or 'all'}")
        replaced = tuple(index for index in self.fused if not has(_SELF_ATTENTION, index))
        if replaced:
            if replaced != self.fused:
                raise CheckpointError(
                    f"Blocks {list(replaced)} have a fusion layer in place of self-attention, others one beside it; "
                    "expected the same in all. CASA models here can't be such."
                )
            self._conclude("casa_placement", "replace", "blocks with fusion layers have no self-attention")
        elif any(has(_OWN_NORM, index) for index in self.blocks):
            self._ask(
                "casa_placement",
                "fusion layers have a norm of the text of their own (casa_layernorm), so they stand before or after "
                "self-attention, and tensors don't say which",
                "'before' or 'after'",
            )
        else:
            self._conclude("casa_placement", "parallel", "fusion layers have no norm of the text of their own")

    def _keys(self) -> None:
        known = self.facts.keys
        if known is not None and "casa_keys" not in self.given:
            self._set("casa_keys", known[0], known[1])
        else:
            self._ask(
                "casa_keys",
                "the models of December 2025 also attend to the text of the window ('window'), those of 2026 to "
                "images alone ('image'), under the same names; no code beside the weights tells which these are",
                "'image' or 'window'",
            )

    def _image_norm(self) -> None:
        norms = [self.found[name].name for index in self.blocks if (name := IMAGE_NORM.format(index)) in self.found]
        if norms:
            self._conclude(
                "casa_image_norm", "input", f"fusion layers have a norm of image states, such as {norms[0]}"
            )
            return
        self._ask(
            "casa_image_norm",
            "no tensor is a norm of image states: either they pass the block's input norm ('input') or none ('none'); "
            "the modelling code beside the weights shows what is given to k_proj",
            "'input' or 'none'",
        )

    def _gate(self) -> None:
        if any(self._blocks_with(GATE, index) for index in self.blocks):
            self._ask("casa_gate", "there are gates, and their function isn't stored", "'tanh'")
        else:
            self._conclude("casa_gate", None, "there are no gates")

    def _blocks_with(self, name: str, index: int) -> bool:
        return name.format(index) in self.found

    # ---------------------------------------------------------------- how it is said

    def _set(self, name: str, value: Any, reason: str) -> None:
        self.fields[name] = value
        self.findings.append(f"{name}={value!r}: {reason}")

    def _conclude(self, name: str, value: Any, reason: str) -> None:
        """A value that the tensors prove."""
        if name in self.given and self.given[name] != value:
            raise CheckpointError(
                f"{name}={self.given[name]!r} contradicts the tensors: {reason}. Leave it out, or correct the mapping."
            )
        self._set(name, value, reason)

    def _assume(self, name: str, value: Any, reason: str) -> None:
        if name in self.given:
            self._set(name, self.given[name], "given")
        else:
            self._set(name, value, f"assumed; {reason}")

    def _ask(self, name: str, reason: str, choices: str) -> None:
        if name in self.given:
            self._set(name, self.given[name], "given")
        else:
            self.questions.append(f"{name} ({choices}): {reason}")


# What a variant says by not overriding it.
_AXES = ("casa_keys", "casa_share_projections", "casa_placement")


def given_design(variant: str | None, design: Mapping[str, Any], blocks: Sequence[int]) -> dict[str, Any]:
    """Design fields that a caller has named, one by one or as a variant.

    Raises:
        CheckpointError, ValueError: as `resolve_design`.
    """
    resolved = resolve_design(variant, design, blocks)
    if resolved["num_gist_tokens"]:
        raise CheckpointError(
            f"num_gist_tokens={resolved['num_gist_tokens']} are tokens that a checkpoint of the authors doesn't have. "
            "Leave it out."
        )
    named = set(design)
    if variant is not None:
        named |= {*_AXES, *variant_overrides(variant, blocks)}
    given = {name: resolved[name] for name in named - {"num_gist_tokens"}}
    if isinstance(given.get("casa_layers"), list) and given["casa_layers"] == list(blocks):
        given["casa_layers"] = None
    return given
