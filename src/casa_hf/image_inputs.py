# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a call is given as images: how large they are, where they stand in its new text, and their features.

Where the caller doesn't say where images stand, token types do, so that text which only looks like an image
placeholder, since the model wrote it or a user quoted it, stays text. Without types each token `config.image_token_id`
is a placeholder, by its id or else by its embedding. Types also say which text belongs to the delimiters: the time
before a frame is written in ordinary tokens. All that depends on sizes and places is computed on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from transformers.utils import logging

from .checks import counted
from .configuration_casa import CasaConfig
from .text_inputs import NewText
from .windows import ImagePlacement

logger = logging.get_logger(__name__)

# Values of `mm_token_type_ids` at the token that an image precedes, and at text that belongs to the delimiters.
IMAGE_TYPE = 1
FRAME_TYPE = 2
DELIMITER_TYPE = 3


def has_images(
    pixel_values: torch.Tensor | None,
    image_embeds: torch.Tensor | Sequence[torch.Tensor] | None,
    image_grid_thw: torch.Tensor | None,
) -> bool:
    """Whether a call has new images; a batch without any may carry empty tensors.

    Raises:
        ValueError: if pixels and features are given.
    """
    given = [content for content in (pixel_values, image_embeds) if content is not None]
    if image_grid_thw is not None and not len(image_grid_thw) and not any(map(len, given)):
        return False
    if len(given) == 2:
        raise ValueError("pixel_values and image_embeds were both given; pass only one of them.")
    return bool(given)


def check_grids(config: CasaConfig, image_grid_thw: torch.Tensor | None) -> torch.Tensor:
    """(num_images, 3) the sizes of images, on the CPU.

    Args:
        config: configuration with the number of patches that the tower merges.
        image_grid_thw: (num_images, 3) patches in time, height and width; in time 1, unless `config` has whole videos.

    Raises:
        ValueError: if there are none, or one isn't the size of an image.
    """
    if image_grid_thw is None:
        raise ValueError(
            "Images were given without image_grid_thw; pass it as the image processor returned it, of shape "
            "(num_images, 3)."
        )
    image_grid_thw = torch.as_tensor(image_grid_thw).cpu()
    if image_grid_thw.ndim != 2 or image_grid_thw.shape[1] != 3:
        raise ValueError(f"image_grid_thw has shape {tuple(image_grid_thw.shape)}; expected (num_images, 3).")
    merge = config.vision_config.spatial_merge_size
    grids = image_grid_thw.tolist()
    for index, (time, height, width) in enumerate(grids):
        if time != 1 and not config.has_whole_videos:
            raise ValueError(
                f"image_grid_thw[{index}] = {grids[index]} has {time} temporal patches; expected 1. Pass each "
                "video frame, or pair of frames, as an image of its own, as CasaProcessor does."
            )
        if time <= 0:
            raise ValueError(f"image_grid_thw[{index}] = {grids[index]} must have at least 1 temporal patch.")
        if height <= 0 or width <= 0 or height % merge or width % merge:
            raise ValueError(
                f"image_grid_thw[{index}] = {grids[index]} must have a height and width that are positive "
                f"multiples of spatial_merge_size={merge}."
            )
    return image_grid_thw.long()


def check_features(
    config: CasaConfig, image_embeds: torch.Tensor | Sequence[torch.Tensor] | None, grids: torch.Tensor
) -> torch.Tensor:
    """(num_image_tokens, `config.image_features_size`) features that were given in place of pixels.

    Args:
        config: configuration that says how wide features are.
        image_embeds: features of all images, or one tensor per image.
        grids: (num_images, 3) sizes as `check_grids` returns them.

    Raises:
        ValueError: if they don't fit the sizes.
    """
    features = image_embeds if isinstance(image_embeds, torch.Tensor) else torch.cat(list(image_embeds or ()))
    expected = int(grids.prod(-1).sum()) // config.vision_config.spatial_merge_size**2
    if features.shape != (expected, config.image_features_size):
        raise ValueError(
            f"image_embeds has shape {tuple(features.shape)}; image_grid_thw {grids.tolist()} needs ({expected}, "
            f"{config.image_features_size}). Pass get_image_features(...).pooler_output."
        )
    return features


def check_seconds(second_per_grid_ts: torch.Tensor | Sequence[float] | None, num_images: int) -> None:
    """Refuse times that aren't those of the images.

    Args:
        second_per_grid_ts: (num_images,) seconds from one temporal patch of each image to the next; None without any.
        num_images: number of images.

    Raises:
        ValueError: if there isn't one number per image.
    """
    if second_per_grid_ts is not None and len(second_per_grid_ts) != num_images:
        raise ValueError(
            f"second_per_grid_ts has {counted(len(second_per_grid_ts), 'number')} for "
            f"{counted(num_images, 'image')}; expected one for each row of image_grid_thw, as CasaProcessor returns "
            "them."
        )


def place_images(
    config: CasaConfig,
    text: NewText,
    grids: torch.Tensor,
    image_positions: torch.Tensor | None,
    mm_token_type_ids: torch.Tensor | None,
    second_per_grid_ts: torch.Tensor | Sequence[float] | None = None,
) -> ImagePlacement:
    """Where the new images of a call stand; all on the CPU.

    Args:
        config: configuration that names the image placeholder.
        text: new text, read by `NewText.on_host`; and so are these:
        grids: (num_images, 3) sizes as `check_grids` returns them.
        image_positions: (num_images, 2) row and index of the token that each image precedes; None to look for them.
        mm_token_type_ids: types of the new tokens or of all so far; None without any.
        second_per_grid_ts: (num_images,) seconds from one temporal patch of each image to the next; None for 1 second.

    Raises:
        ValueError: if images, types and positions don't fit each other and the text.
    """
    types, valid = _new_types(mm_token_type_ids, text), text.valid
    check_timestamps(config, mm_token_type_ids)
    if image_positions is None:
        image_positions = _find_places(config, text, types, len(grids))
    if image_positions.shape != (len(grids), 2):
        raise ValueError(
            f"image_positions has shape {tuple(image_positions.shape)}; expected ({len(grids)}, 2) for {len(grids)} "
            "images."
        )
    image_positions = image_positions.long()
    _check_places(image_positions.tolist(), text.shape, valid)
    if types is None:
        warn_of_untyped_frames(config, image_positions.tolist())

    rows, indices = image_positions.unbind(1)
    is_frame = torch.zeros_like(rows, dtype=torch.bool)
    if types is not None:
        is_frame = types[rows, indices] == FRAME_TYPE
    merge = config.vision_config.spatial_merge_size
    merged = grids // torch.tensor([1, merge, merge])
    per_row = torch.zeros(text.shape[0], dtype=torch.long).index_put((rows,), merged.prod(-1), accumulate=True)
    steps = _time_steps(config, grids, second_per_grid_ts)
    return ImagePlacement(rows, indices, merged, is_frame, int(per_row.sum()), int(per_row.max()), steps)


def delimiters(config: CasaConfig, text: NewText, mm_token_type_ids: torch.Tensor | None) -> torch.Tensor:
    """(batch, tokens) which new text doesn't close a group of images, on the device of the text.

    Args:
        config: configuration that names the delimiters.
        text: new text.
        mm_token_type_ids: types of the new tokens or of all so far; those of another length are ignored.
    """
    found = text.are(config.delimiter_token_ids)
    if mm_token_type_ids is None:
        return found
    batch_size, num_tokens = text.shape
    if mm_token_type_ids.shape[0] != batch_size or not _fits(mm_token_type_ids, text):
        return found
    types = mm_token_type_ids[:, -num_tokens:].to(found.device, non_blocking=True)
    return found | (types == DELIMITER_TYPE)


def check_timestamps(config: CasaConfig, mm_token_type_ids: torch.Tensor | None) -> None:
    """Refuse frames without their times, for a model whose frames have them.

    Args:
        config: configuration that says whether they do.
        mm_token_type_ids: (batch, tokens) types, or None.

    Raises:
        ValueError: if there are such.
    """
    if config.video_timestamps is None or mm_token_type_ids is None:
        return
    is_frame = mm_token_type_ids == FRAME_TYPE
    so_far = (mm_token_type_ids == DELIMITER_TYPE).cumsum(1)
    up_to_frame = torch.where(is_frame, so_far, 0).cummax(1).values
    before = torch.nn.functional.pad(up_to_frame[:, :-1], (1, 0))  # those before the last frame
    if bool((is_frame & (so_far == before)).any()):
        raise ValueError(
            f"mm_token_type_ids have video frames (2) with no timestamps before them (3), and this model reads frames "
            f"with their times (video_timestamps={config.video_timestamps!r}). Use its CasaProcessor with "
            f"video_timestamps={config.video_timestamps!r}, which writes them; in a later call pass the types of all "
            "tokens so far if the times stand in earlier text; or set model.config.video_timestamps to None."
        )


def check_no_images(
    config: CasaConfig,
    text: NewText,
    image_grid_thw: torch.Tensor | None,
    image_positions: torch.Tensor | None,
    mm_token_type_ids: torch.Tensor | None,
) -> None:
    """Refuse sizes or places in a call without images.

    Sizes beside a filled cache are those of the prompt's images, which callers pass again: they are ignored unless the
    new text has an image placeholder. A single token is a decoding step; a placeholder there was written by the model.

    Args:
        config: configuration that names the image placeholder.
        text: new text.
        image_grid_thw: (num_images, 3) sizes, or None.
        image_positions: (num_images, 2) places, or None.
        mm_token_type_ids: types of the new tokens or of all so far; those of another length are ignored.

    Raises:
        ValueError: naming what was given.
    """
    if not any(given is not None and len(given) for given in (image_positions, image_grid_thw)):
        return
    if image_positions is not None:
        raise without_images("image_positions")
    left_over = text.past > 0
    if left_over and text.shape[1] > 1:
        fits = mm_token_type_ids is not None and _fits(mm_token_type_ids, text)
        left_over = not image_placeholders(config, text, mm_token_type_ids if fits else None).any()
    if not left_over:
        raise without_images("image_grid_thw")


def without_images(names: str) -> ValueError:
    """The error for arguments that describe images, in a call that has none."""
    return ValueError(f"{names} was given without images; pass pixel_values or image_embeds too, or leave it out.")


def image_placeholders(config: CasaConfig, text: NewText, mm_token_type_ids: torch.Tensor | None) -> torch.Tensor:
    """(batch, tokens) whether an image stands before each token.

    Args:
        config: configuration that names the image placeholder.
        text: text to look in; its padding holds no placeholder.
        mm_token_type_ids: (batch, any number of the last tokens) types that decide about these; None without any.
    """
    found = text.are((config.image_token_id,))
    if mm_token_type_ids is not None:
        types = mm_token_type_ids[:, -found.shape[1] :].to(found.device)
        typed = (types == IMAGE_TYPE) | (types == FRAME_TYPE)
        found = torch.cat([found[:, : found.shape[1] - types.shape[1]], typed], dim=1)
    valid = text.valid
    return found if valid is None else found & valid.to(found.device, non_blocking=True)


def refuse_expanded_placeholders(config: CasaConfig, input_ids: torch.Tensor) -> None:
    """Refuse a prompt with images that was made by the source's processor.

    Args:
        config: configuration that names the expanded placeholders.
        input_ids: ids of any shape: the prompt's, or only those that `mm_token_type_ids` say images precede.

    Raises:
        ValueError: if `input_ids` contain the source's expanded placeholders.
    """
    expanded = config.placeholder_token_ids
    ids = torch.tensor(expanded, device=input_ids.device, dtype=input_ids.dtype)
    if torch.isin(input_ids, ids).any():
        raise ValueError(
            f"input_ids contain expanded placeholders of the source model (one of the ids {list(expanded)}). In CASA "
            f"an image takes no place in the text: it stands before the token {config.image_token_id}. Use "
            "CasaProcessor or remove the expanded placeholders."
        )


def warn_of_untyped_frames(config: CasaConfig, places: Sequence[Sequence[int]]) -> None:
    """Say once if images that follow each other would be seen otherwise as the frames of a video, and nothing says
    which they are.

    Args:
        config: configuration that says how stills and frames are seen.
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


def _fits(mm_token_type_ids: torch.Tensor, text: NewText) -> bool:
    """Whether there is a type for each new token, or for each so far."""
    length, num_tokens = mm_token_type_ids.shape[1], text.shape[1]
    return length == num_tokens or length == text.past + num_tokens


def _new_types(mm_token_type_ids: torch.Tensor | None, text: NewText) -> torch.Tensor | None:
    """(batch, tokens) the types of the new tokens; None without any."""
    if mm_token_type_ids is None or mm_token_type_ids.shape == text.shape:
        return mm_token_type_ids
    batch_size, num_tokens = text.shape
    if mm_token_type_ids.shape != (batch_size, text.past + num_tokens):
        given = tuple(mm_token_type_ids.shape)
        if text.ids is None and given[0] == batch_size and given[1] < num_tokens:
            raise ValueError(
                f"mm_token_type_ids have {given[1]} entries for {num_tokens} rows of inputs_embeds; expected one "
                "each. If PEFT has put a learned prompt before the text, images can't be placed: use prefix tuning or "
                "LoRA."
            )
        raise ValueError(
            f"mm_token_type_ids has shape {given}; expected {tuple(text.shape)}, one entry per new token."
        )
    return mm_token_type_ids[:, -num_tokens:]


def _find_places(config: CasaConfig, text: NewText, types: torch.Tensor | None, num_images: int) -> torch.Tensor:
    """(num_images, 2) row and index of the tokens that images precede."""
    found = image_placeholders(config, text, types)
    if text.ids is not None:
        refuse_expanded_placeholders(config, text.ids if types is None else text.ids[found])
    places = found.nonzero()
    if len(places) != num_images:
        raise ValueError(
            f"{_found_in_words(config, text, types, len(places))}; expected {num_images}, one per image. "
            f"{'Add them' if len(places) < num_images else 'Remove the others'}, or pass image_positions of shape "
            f"({num_images}, 2): row and index of the token that each image precedes."
        )
    return places


def _found_in_words(config: CasaConfig, text: NewText, types: torch.Tensor | None, number: int) -> str:
    if types is not None:
        return f"mm_token_type_ids have {counted(number, 'image placeholder')} (1 or 2)"
    if text.ids is not None:
        return f"The text has {counted(number, 'image placeholder')} (token {config.image_token_id})"
    return (
        "Without image_positions or mm_token_type_ids, images beside inputs_embeds stand where a row equals the "
        f"embedding of token {config.image_token_id}: there are {number} such rows"
    )


def _time_steps(
    config: CasaConfig, grids: torch.Tensor, second_per_grid_ts: torch.Tensor | Sequence[float] | None
) -> torch.Tensor | None:
    """(num_images,) by how many positions temporal patches are apart, on the CPU; None where each image has one."""
    check_seconds(second_per_grid_ts, len(grids))
    if not bool((grids[:, 0] > 1).any()):
        return None
    rate = config.tower.positions_per_second(config.vision_config)
    if rate is None:
        return torch.ones(len(grids))
    if second_per_grid_ts is None:
        return torch.full((len(grids),), float(rate))
    # In float32, as the source computes them: positions are what is below.
    return rate * torch.as_tensor(second_per_grid_ts).cpu().float()


def _check_places(places: list[list[int]], text_shape: torch.Size, valid: torch.Tensor | None) -> None:
    if places != sorted(places):
        raise ValueError(f"image_positions {places} must be in reading order: by row, then by index.")
    batch_size, num_tokens = text_shape
    is_text = None if valid is None else valid.tolist()
    for row, index in places:
        inside = 0 <= row < batch_size and 0 <= index < num_tokens
        if not inside or (is_text is not None and not is_text[row][index]):
            raise ValueError(
                f"image_positions contains ({row}, {index}), which is not a text token in {batch_size} rows of "
                f"{num_tokens} tokens (padding excluded)."
            )
