# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where images stand in a text, if the caller doesn't give their positions.

Token types say it where there are any, so that text which only looks like an image's token, since the model wrote it
or a user quoted it, stays text. Without them it is the tokens `config.image_token_id`, or their embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers.utils import logging

from .configuration_casa import CasaConfig

logger = logging.get_logger(__name__)

# Values of `mm_token_type_ids` at the token that an image precedes.
IMAGE_TYPE = 1
FRAME_TYPE = 2


def are_tokens(
    token_ids: Sequence[int], input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, embedding: Any
) -> torch.Tensor:
    """(batch, tokens) whether each token is one of `token_ids`.

    Args:
        token_ids: the ids, at least one.
        input_ids: (batch, tokens); None where only embeddings are known.
        inputs_embeds: (batch, tokens, hidden), compared with the ids' own embeddings where `input_ids` is None.
        embedding: the input embedding.
    """
    if input_ids is not None:
        # Compared one by one: a tensor of ids would have to be copied to the device in every step.
        found = input_ids == token_ids[0]
        for token_id in token_ids[1:]:
            found = found | (input_ids == token_id)
        return found
    assert inputs_embeds is not None
    # Not where the weights are, which may be nowhere: hooks of placement bring the ids there.
    ids = torch.tensor(token_ids, device=inputs_embeds.device)
    embedded = embedding(ids).to(inputs_embeds.device)
    return (inputs_embeds[:, :, None] == embedded).all(-1).any(-1)


def image_tokens(
    config: CasaConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    embedding: Any,
    mm_token_type_ids: torch.Tensor | None,
) -> torch.Tensor:
    """(batch, tokens) whether an image stands before each token.

    Args:
        config: names the token that an image precedes.
        input_ids, inputs_embeds, embedding: as in `are_tokens`.
        mm_token_type_ids: (batch, any number of the last tokens); they decide about these. None without any.
    """
    found = are_tokens((config.image_token_id,), input_ids, inputs_embeds, embedding)
    if mm_token_type_ids is None:
        return found
    types = mm_token_type_ids[:, -found.shape[1] :].to(found.device)
    typed = (types == IMAGE_TYPE) | (types == FRAME_TYPE)
    return torch.cat([found[:, : found.shape[1] - types.shape[1]], typed], dim=1)


def refuse_placeholders(config: CasaConfig, input_ids: torch.Tensor) -> None:
    """Refuse a prompt with images that was made by the source's processor.

    Args:
        config: names the placeholders.
        input_ids: ids of any shape: the prompt's, or only those that `mm_token_type_ids` say images precede.

    Raises:
        ValueError: if `input_ids` contain the source's expanded placeholders.
    """
    placeholders = config.placeholder_token_ids
    ids = torch.tensor(placeholders, device=input_ids.device, dtype=input_ids.dtype)
    if torch.isin(input_ids, ids).any():
        raise ValueError(
            f"input_ids contain placeholders of the source model (one of the ids {list(placeholders)}). In CASA an "
            f"image takes no place in the text: it stands before the token {config.image_token_id}. Use CasaProcessor "
            "or remove the placeholders."
        )


def warn_of_untyped_frames(config: CasaConfig, places: Sequence[Sequence[int]]) -> None:
    """Say once if images that follow each other would be seen otherwise as the frames of a video, and nobody has said
    which they are.

    Args:
        config: says how stills and frames are seen.
        places: (row, index) of each image's token, in reading order.
    """
    if config.casa_image_history == config.casa_video_history:
        return
    step = 1 + config.num_gist_tokens + (config.vision_start_token_id is not None)
    if any(
        row == next_row and next_index - index <= step for (row, index), (next_row, next_index) in pairwise(places)
    ):
        logger.warning_once(
            "Images follow each other without text in between, and mm_token_type_ids weren't given: they are taken as "
            f"still images, of which a token sees {config.casa_image_history!r} (casa_image_history). If they are the "
            f"frames of a video (casa_video_history={config.casa_video_history!r}), pass the mm_token_type_ids of "
            "CasaProcessor, which are 2 at frames and 1 at images."
        )
