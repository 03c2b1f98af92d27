# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards of converted checkpoints, and what a conversion computes before any training, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from ..configuration_casa import CasaConfig
from ..design_space import DESIGN_FIELDS
from ..hub.card import MADE_BY, UNTRAINED
from ..hub.card_parts import Card
from ..hub.card_text import CITATION, intro_text, license_text, metadata, usage_text
from ..hub.origins import Licensed, licensed
from .mapping import PROJECTOR
from .plan import ConversionPlan


def model_card(
    config: CasaConfig,
    plan: ConversionPlan,
    *,
    variant: str,
    origins: Sequence[Licensed],
    from_casa: bool,
    command: str,
    model: str,
    new_tokens: Sequence[str] = (),
    cast_to: str | None = None,
    with_code: bool = False,
) -> str:
    """The README.md of a converted checkpoint.

    Args:
        config: Configuration of the converted model.
        plan: Plan of the conversion.
        variant: Name of the variant that was asked for.
        origins: Source, and the checkpoint that gave the vision tower if it was another, with their licences.
        from_casa: Whether the source was a CASA checkpoint.
        command: Command that makes this checkpoint.
        model: Folder or Hub id under which the checkpoint can be loaded.
        new_tokens: Tokens that the source's tokenizer doesn't have.
        cast_to: Name of the dtype that the weights were cast to, if they were.
        with_code: Whether the checkpoint carries its code.

    Returns:
        Markdown with front matter.
    """
    kept = f"{plan.source_parameters:,} parameters of the source are taken over "
    kept += "unchanged" if cast_to is None else f"and cast to {cast_to}"
    untrained = _after_redesign(plan, kept) if from_casa else _after_conversion(config, plan, kept, new_tokens)
    card = Card(metadata(origins, "image-text-to-text", ["casa"]), f"# {Path(model).name}", [])
    card.set_sections(
        {
            None: intro_text(config, origins, variant),
            UNTRAINED: untrained,
            MADE_BY: f"```bash\n{command}\n```",
            "Usage": usage_text(json.dumps(model), with_code),
            "Licence": license_text(origins),
            "Citation": CITATION,
        }
    )
    return card.write()


def source_card(config: CasaConfig, folder: Path, plan: ConversionPlan, name: str) -> str:
    """The README.md of a checkpoint in the source's form that was made from a CASA checkpoint.

    Args:
        config: Configuration of the CASA checkpoint.
        folder: Folder of the CASA checkpoint, whose licence is taken over.
        plan: Plan of the conversion.
        name: Name of the new checkpoint.

    Returns:
        Markdown with front matter.
    """
    origin, stated = licensed(folder)
    data: ModelCardData = metadata([(origin, stated)], config.backbone.source_task, [])
    return f"""\
---
{data.to_yaml()}
---

# {name}

{origin.described()}, a CASA model, converted back to the form of its source ({config.backbone.display_name}): language
model and vision weights as they are there, without {len(plan.dropped)} tensors of fusion layers and new tokens.
{plan.note}

## Licence

{license_text([(origin, stated)])}
"""


def untrained_effect(config: CasaConfig, made_from: CasaConfig | None = None) -> str:
    """What a conversion computes before any further training, in sentences.

    Args:
        config: Configuration of the new model.
        made_from: Configuration of the source if that is a CASA model too.
    """
    if made_from is not None:
        if all(getattr(config, name) == getattr(made_from, name) for name in DESIGN_FIELDS):
            return "It computes what the CASA model that it was made from computes."
        return (
            "It was made from a CASA model of another design, and what that has learned was learned in that design: "
            "answers may be poor until the model is trained in this one."
        )
    prompts = _equal_prompts(config)
    if prompts is not None:
        return f"It needs no training: for {prompts} it computes what the source does."
    if config.casa_gate:
        return (
            "Its gates are closed: text-only prompts are answered as by the source, and images have no effect until "
            "the model is trained."
        )
    if config.casa_placement == "replace":
        return "Fusion layers replace self-attention, so answers to any prompt are poor until the model is trained."
    if config.casa_text_windows:
        return "Its fusion layers are untrained, so answers to any prompt are poor until the model is trained."
    return (
        "Its fusion layers are untrained: text-only prompts are answered as by the source, answers about images are "
        "poor until the model is trained."
    )


def _equal_prompts(config: CasaConfig) -> str | None:
    """The prompts for which an unchanged conversion computes what its source does, in words; None if there are none.

    Videos are among them only in the source's own layout, where all that its text should see is seen: else each frame
    is an image, whereas sources take frames in pairs. A text-only source computes nothing from images that its
    conversion could equal.
    """
    as_inserted = (
        config.casa_keys == "context"
        and config.casa_image_updates == "full"
        and config.casa_positions == "insertion"
        and config.fusion_layers == config.backbone.fusable_blocks(config.text_config)
        and not config.num_gist_tokens
        and not config.backbone.text_only
    )
    if not as_inserted:
        return None
    stills = {
        "all": "prompts of text and still images",
        "group": "prompts of text and one group of still images",
        "latest": "prompts of text and one still image",
    }[config.casa_image_history]
    native = config.casa_video_layout == "native" and config.video_timestamps == config.backbone.default_timestamps
    if not native or (config.casa_video_history == "latest" and not config.has_whole_videos):
        return stills
    if config.casa_image_history == config.casa_video_history == "all":
        return "prompts of text, still images and videos"
    return f"{stills}, or of text and one video,"


def _after_redesign(plan: ConversionPlan, kept: str) -> str:
    new = f"{plan.added_parameters:,} are new and untrained" if plan.added_parameters else "there are no new ones"
    return f"{kept}; {new}.{_active(plan)} {plan.note}"


def _active(plan: ConversionPlan) -> str:
    """A sentence on the parameters that compute a token; nothing where all do."""
    active = plan.active_parameters
    return "" if active == plan.source_parameters + plan.added_parameters else f" {active:,} are active per token."


def _after_conversion(config: CasaConfig, plan: ConversionPlan, kept: str, new_tokens: Sequence[str]) -> str:
    prompts = _equal_prompts(config)
    if prompts is not None:
        return (
            f"Nothing: {kept}, there are no new ones, and for {prompts} the model computes what the source "
            f"does.{_active(plan)}"
        )
    count = f"{plan.added_parameters:,} are new" if plan.added_parameters else "there are no new ones"
    sentences = [
        f"{kept}; {count}.{_active(plan)}",
        _untrained_layers(config),
        *_untrained_rest(config, plan.initialised, new_tokens),
        *(f"Left out: {kind}." for kind in plan.left_out),
    ]
    return " ".join(sentences) + f"\n\n{plan.note}"


def _untrained_layers(config: CasaConfig) -> str:
    blocks = f"The fusion layers of {len(config.fusion_layers)} blocks"
    if config.casa_share_projections:
        return f"{blocks} use the projections of self-attention, which have never been trained for this use."
    attending = config.backbone.fusable_blocks(config.text_config)
    of_others = " (of the next block's, where a block has none)" if set(config.fusion_layers) - set(attending) else ""
    return (
        f"{blocks} have projections and norms of their own, copies of the blocks' self-attention{of_others} and input "
        "norms, which have never been trained."
    )


def _untrained_rest(config: CasaConfig, initialised: Mapping[str, str], new_tokens: Sequence[str]) -> list[str]:
    sentences = []
    if new_tokens:
        tokens = ", ".join(f"`{token}`" for token in new_tokens)
        noise = ", with a little noise for gist tokens" if config.num_gist_tokens else ""
        sentences.append(
            f"New tokens: {tokens}; their rows start as the mean of all rows{noise}, also where the matrix had spare "
            "ones (which `source_rows.safetensors` then keeps)."
        )
    projector = [name for name in initialised if name.startswith(PROJECTOR)]
    if projector:
        sentences.append(
            f"The projector between vision tower and language model ({', '.join(projector)}) starts at random."
        )
    if config.backbone.text_only:
        sentences.append("The vision tower has never been used with this language model.")
    return sentences
