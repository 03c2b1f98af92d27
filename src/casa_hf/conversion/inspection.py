# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a CASA checkpoint is made of, and what it will cost at run time, from its configuration and file headers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..backbone import LINEAR_ATTENTION
from ..checkpoint_files.config import read_casa_config
from ..checkpoint_files.headers import WithoutWeights
from ..checkpoint_files.shards import DTYPES
from ..configuration_casa import CasaConfig
from ..folder_files import CheckpointError, own_file, read_json
from .mapping import ADDED, TOKEN_ROWS


@dataclass(frozen=True)
class CheckpointSummary:
    """What is known of a CASA checkpoint without its weights.

    With L decoder blocks of full attention, F of them with a fusion layer, R of these in place of self-attention, K
    key/value heads of d channels and e bytes per number, one token's keys and values in one attention take b = 2 K d e
    bytes.

    Attributes:
        variant: Name of the variant; None if the settings have no name.
        backbone: Family of the source, such as "Qwen2.5-VL".
        dtype: Number format of most weights, such as "bfloat16"; e is its size.
        num_layers: Number of decoder blocks, L and those of linear attention.
        fusion_layers: Indices of the F blocks.
        source_parameters: Number of parameters taken over from the source, tied ones counted once.
        added_parameters: Number of parameters of fusion layers, projector and embeddings of new tokens.
        active_parameters: Number of all parameters without those of experts that a token isn't sent to; all of them in
            families without experts.
        num_bytes: Size of all weights.
        image_tokens: Number of tokens, N, of the largest image that the processor makes.
        image_bytes: Size of the image keys/values of a window with one such image: F N b. Where self-attention
            updates image states it keeps theirs too: L N b if fusion layers use the same keys, (F + L) N b if not.
        text_token_bytes: Size of what one more text token adds to the KV cache for good: (L - R) b.
        window_text_bytes: Size of what it adds besides while its window is the current one: F b; 0 where fusion layers
            have no text keys or those of self-attention.
        recurrent_bytes: Size of the recurrent states of linear attention for one sequence, however long it is; 0 in
            families without.
        image_history: Value "latest" or "group" where a new window frees the images before it, "all" where none is
            freed.
        video_history: Same value for video frames.
        video_layout: Layout of videos: "native" for the source's own, None for an image per frame or per two.
        whole_videos: Whether a whole video is one image in it.
        video_timestamps: Kind of the times that stand before video frames; None for none.
    """

    variant: str | None
    backbone: str
    dtype: str
    num_layers: int
    fusion_layers: tuple[int, ...]
    source_parameters: int
    added_parameters: int
    active_parameters: int
    num_bytes: int
    image_tokens: int
    image_bytes: int
    text_token_bytes: int
    window_text_bytes: int
    recurrent_bytes: int
    image_history: str
    video_history: str
    video_layout: str | None
    whole_videos: bool
    video_timestamps: str | None


def inspect_checkpoint(path: str | Path, revision: str | None = None) -> CheckpointSummary:
    """Summarise a CASA checkpoint without loading its weights.

    Args:
        path: Folder or Hub id of the checkpoint; of a Hub id the weights aren't downloaded.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: if there is no CASA checkpoint, or its files are broken.
    """
    checkpoint = WithoutWeights.open(path, revision)
    folder = checkpoint.folder
    config = read_casa_config(folder, str(path))
    tensors = checkpoint.headers()
    parameters: Counter[str] = Counter()
    added = 0
    for name, tensor in tensors.items():
        parameters[tensor.dtype] += tensor.numel
        added += tensor.numel if ADDED.search(name) else 0
        added += len(config.new_token_ids) * tensor.shape[-1] if name in TOKEN_ROWS else 0
    dtype = DTYPES[parameters.most_common(1)[0][0]]
    sizes = {name: tensor.numel for name, tensor in tensors.items()}
    image_tokens = _largest_image(folder, config)
    image_token_bytes, text_token_bytes, window_text_bytes = _token_bytes(config, dtype.itemsize)
    return CheckpointSummary(
        variant=config.variant,
        backbone=config.backbone.display_name,
        dtype=str(dtype).removeprefix("torch."),
        num_layers=config.text_config.num_hidden_layers,
        fusion_layers=config.fusion_layers,
        source_parameters=parameters.total() - added,
        added_parameters=added,
        active_parameters=config.backbone.active_parameters(config.text_config, sizes),
        num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        image_tokens=image_tokens,
        image_bytes=image_tokens * image_token_bytes,
        text_token_bytes=text_token_bytes,
        window_text_bytes=window_text_bytes,
        recurrent_bytes=_recurrent_bytes(config, dtype.itemsize),
        image_history=config.casa_image_history,
        video_history=config.casa_video_history,
        video_layout=config.casa_video_layout,
        whole_videos=config.has_whole_videos,
        video_timestamps=config.video_timestamps,
    )


def _token_bytes(config: CasaConfig, number_bytes: int) -> tuple[int, int, int]:
    """Bytes of keys and values of a token in all blocks: an image token, a text token, a text token of the window."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = 2 * text.num_key_value_heads * head_dim * number_bytes
    num_layers, num_fused = len(config.backbone.fusable_blocks(text)), len(config.fusion_layers)
    one_computation = config.casa_share_projections and config.casa_placement == "parallel"
    image_layers = num_fused
    if config.casa_image_updates == "full":
        image_layers = num_layers if one_computation and config.casa_keys != "image" else num_fused + num_layers
    text_layers = num_layers - num_fused if config.casa_placement == "replace" else num_layers
    window_layers = num_fused if config.casa_keys == "window" and not one_computation else 0
    return image_layers * token_bytes, text_layers * token_bytes, window_layers * token_bytes


def _recurrent_bytes(config: CasaConfig, number_bytes: int) -> int:
    """Bytes of the recurrent states of all blocks for one sequence."""
    adapter = config.backbone.block
    num_blocks = adapter.kinds(config.text_config).count(LINEAR_ATTENTION)
    return num_blocks * adapter.recurrent_bytes(config.text_config, number_bytes)


def _largest_image(folder: Path, config: CasaConfig) -> int:
    """Tokens of the largest image that the checkpoint's processor makes."""
    file = folder / "processor_config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no processor_config.json. Add the one that belongs to the checkpoint.")
    token_side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    try:
        settings = read_json(own_file(folder, file.name))
        return settings["image_processor"]["size"]["longest_edge"] // token_side**2
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} has no image_processor.size.longest_edge, the pixels of the largest image. Write it again with "
            "CasaProcessor.save_pretrained, or add the one that belongs to the checkpoint."
        ) from error
