# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of CASA models: a backbone and a point of the design space."""

import copy
import json
from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .backbone import Backbone, VisionTower
from .backbones import BACKBONES, SOURCE_BACKBONES, VISION_TOWERS, supported_sources
from .design_space import CHOICES, DESIGN_FIELDS, FIELDS, SETTINGS, VARIANTS, unknown_value
from .timestamps_casa import check_video_timestamps

# Before towers had a type of their own, checkpoints gave them the type of the whole model.
_VISION_SOURCES = tuple(name for name, backbone in SOURCE_BACKBONES.items() if not backbone.text_only)

# What `source_config` calls the source's `model_type`. A stock configuration class that is given another type's
# checkpoint takes a dictionary in it that has its own `model_type` for the whole, and defaults for what isn't there.
SOURCE_MODEL_TYPE = "source_model_type"

# (field, value of a checkpoint, value under which it has more tensors and misses none of those it had).
_ADDITIONS = (
    ("casa_share_projections", True, False),
    ("casa_gate", None, "tanh"),
    ("casa_image_norm", "none", "input"),
    ("casa_placement", "parallel", "before"),
    ("casa_placement", "parallel", "after"),
)


@strict
class CasaConfig(PreTrainedConfig):
    r"""
    Configuration of [`CasaModel`] and [`CasaForConditionalGeneration`] (arXiv 2512.19535).

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the language model, of one of the supported families.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the vision tower.
        image_token_id (`int`, *optional*):
            Id of the text token immediately before which an image stands.
        vision_start_token_id (`int`, *optional*):
            Id of the token that opens an image's delimiters.
        vision_end_token_id (`int`, *optional*):
            Id of the token that closes an image's delimiters.
        num_gist_tokens (`int`, *optional*):
            Number of gist tokens after each image; they see image tokens only.
        gist_token_ids (`list[int]`, *optional*):
            Ids of the gist tokens, in order; as many as `num_gist_tokens`.
        new_tokens (`dict[str, int]`, *optional*):
            Ids, by token, of those that conversion has added to the source's vocabulary. None, as in checkpoints of
            earlier versions, for the gist tokens and, with a text-only source, the image token.
        casa_share_projections (`bool`, *optional*):
            Whether fusion layers use the query, key, value and output projections of self-attention.
        casa_keys (`str`, *optional*):
            What a text token attends to in a fusion layer: "image" (visible image tokens, no positional embedding),
            "window" (visible image tokens and the text of the window, one softmax) or "context" (visible image tokens
            and all text, one softmax that is also the self-attention).
        casa_layers (`list[int]`, *optional*):
            Indices of the decoder blocks that have a fusion layer; None for all of full attention.
        casa_placement (`str`, *optional*):
            Where the fusion layer stands: "parallel" to self-attention, "replace", "before" or "after" it.
        casa_image_updates (`str`, *optional*):
            What happens to image states from block to block: "none", "ffn" or "full".
        casa_image_history (`str`, *optional*):
            Which still images a token sees: "latest", its "group" (images with only delimiters between them) or "all".
        casa_video_history (`str`, *optional*):
            Which video frames a token sees: "latest", its "group" or "all".
        casa_positions (`str`, *optional*):
            Positions of text: "contiguous" (images don't advance them) or "insertion" (as the source assigns them).
        casa_image_positions (`str`, *optional*):
            Positions of images with contiguous text positions: "at" the token that the image precedes, or "before" it.
        casa_video_layout (`str`, *optional*):
            Layout of videos: None, one pair of delimiters per frame or per two frames; or "native", the source's.
        casa_text_windows (`bool`, *optional*):
            Whether text before the first image attends to itself in fusion layers.
        casa_image_norm (`str`, *optional*):
            What image states pass before fusion layers make keys and values of them: "input" (the block's input norm,
            or a copy of it that belongs to the fusion layer) or "none".
        casa_gate (`str`, *optional*):
            Gate of each fusion layer: None, or "tanh" for the tanh of one learned number, which starts at 0.
        video_timestamps (`str`, *optional*):
            Time of each video frame, written before it: None for none, "native" as the source writes it, or "text". A
            model that has them refuses frames without.
        image_mean (`list[float]`, *optional*):
            Mean, by channel, by which the model normalises 8-bit pixels (values from 0 to 1), as the source's image
            processor does; None for that of the tower's published checkpoints.
        image_std (`list[float]`, *optional*):
            Standard deviation likewise.
        casa_static_image_tokens (`int`, *optional*):
            Image tokens that a `StaticCache` has room for in each row: those of the largest window to come. A larger
            window takes a multiple of it, at the price of one more compilation.
        tie_word_embeddings (`bool`, *optional*):
            Whether the output head shares the embedding matrix.
        source_config (`dict`, *optional*):
            Top-level settings of the source checkpoint that CASA itself doesn't use, kept for converting back. Its
            `image_token_id` and `video_token_id` are the ids of the source's expanded placeholders, its
            `source_model_type` is the source's `model_type`.
        source_origins (`list[dict]`, *optional*):
            Where the source comes from and what it states about its licence, one entry per checkpoint, for the model
            card of whatever becomes of this model; see `casa_hf.hub.card.origin_records`.

    Raises:
        ValueError: for an unknown value, or for a combination that has no meaning; the message names the field.
    """

    model_type = "casa"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "image_outputs",
        "router_logits",
        "image_router_logits",
        "aux_loss",
    ]

    # Any: checked in `_build_sub_config`, which also builds them from dictionaries.
    text_config: Any = None
    vision_config: Any = None
    image_token_id: int = 151653
    vision_start_token_id: int | None = 151652
    vision_end_token_id: int | None = 151653
    num_gist_tokens: int = 0
    gist_token_ids: list[int] | None = None
    new_tokens: dict[str, int] | None = None
    casa_share_projections: bool = False
    casa_keys: str = "window"
    casa_layers: list[int] | tuple[int, ...] | range | set[int] | None = None
    casa_placement: str = "parallel"
    casa_image_updates: str = "none"
    casa_image_history: str = "group"
    casa_video_history: str = "latest"
    casa_positions: str = "contiguous"
    casa_image_positions: str = "at"
    casa_video_layout: str | None = None
    casa_text_windows: bool = False
    casa_image_norm: str = "input"
    casa_gate: str | None = None
    video_timestamps: str | None = None
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None
    casa_static_image_tokens: int = 1156
    tie_word_embeddings: bool = False
    source_config: dict | None = None
    source_origins: list[dict] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.source_config and "model_type" in self.source_config:  # written by an earlier version
            kept = dict(self.source_config)
            self.source_config = {SOURCE_MODEL_TYPE: kept.pop("model_type"), **kept}
        self.text_config = _build_sub_config("text_config", self.text_config, "qwen2_5_vl_text")
        if self.vision_config is None:
            tower = self.backbone.vision
            self.vision_config = {
                "model_type": tower.model_type,
                tower.hidden_size_field: self.text_config.hidden_size,
            }
        self.vision_config = _build_sub_config("vision_config", self.vision_config, self.backbone.vision.model_type)
        if self.backbone.text_ties_head and getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        if isinstance(self.casa_layers, list | tuple | range | set):
            self.casa_layers = sorted(self.casa_layers)
        super().__post_init__(**kwargs)
        self.validate_design()

    # ---------------------------------------------------------------- what the fields amount to

    @property
    def backbone(self) -> Backbone:
        """The family of the text configuration.

        Raises:
            ValueError: if the family isn't supported.
        """
        return _backbone_of(self.text_config)

    @property
    def tower(self) -> VisionTower:
        """The family of the vision configuration."""
        return VISION_TOWERS[self.vision_config.model_type]

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation, by channel, by which images are normalised."""
        mean = self.tower.image_mean if self.image_mean is None else self.image_mean
        std = self.tower.image_std if self.image_std is None else self.image_std
        return tuple(mean), tuple(std)

    @property
    def needs_projector(self) -> bool:
        """Whether features of the vision tower have another width than the language model."""
        return self.tower.hidden_size(self.vision_config) != self.text_config.hidden_size

    @property
    def num_deepstack(self) -> int:
        """Number of features per token that are added after the first decoder blocks: none in a text model that was
        given a tower, since its blocks were never trained to take them."""
        return 0 if self.backbone.text_only else self.tower.num_deepstack(self.vision_config)

    @property
    def image_features_size(self) -> int:
        """Width of `image_embeds`: an image state and the features that are added to it after the first blocks."""
        return self.text_config.hidden_size * (1 + self.num_deepstack)

    @property
    def has_whole_videos(self) -> bool:
        """Whether a whole video is one image, with several temporal patches."""
        return self.casa_video_layout == "native" and self.backbone.native_video == "video"

    @property
    def fusion_layers(self) -> tuple[int, ...]:
        """Indices of the decoder blocks with a fusion layer."""
        if self.casa_layers is None:
            return self.backbone.fusable_blocks(self.text_config)
        return tuple(self.casa_layers)

    def origin_of_fusion(self, index: int) -> int:
        """The block whose self-attention the fusion layer of a block starts as a copy of: its own or, for a block of
        linear attention, that of the next block that has any, or else of the last one."""
        blocks = self.backbone.fusable_blocks(self.text_config)
        return next((block for block in blocks if block >= index), blocks[-1])

    @property
    def delimiter_token_ids(self) -> tuple[int, ...]:
        """Ids that don't close a group of images when they stand between two of them."""
        ids = [self.vision_start_token_id, self.vision_end_token_id, self.image_token_id, *(self.gist_token_ids or [])]
        return tuple(sorted({i for i in ids if i is not None}))

    @property
    def new_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that conversion has added to the source's vocabulary, whose rows are untrained."""
        if self.new_tokens is not None:
            return tuple(sorted(self.new_tokens.values()))  # files sort them by name
        added = [self.image_token_id] if self.backbone.text_only else []
        return (*added, *(self.gist_token_ids or []))

    @property
    def placeholder_token_ids(self) -> tuple[int, ...]:
        """Ids of the source's expanded image and video placeholders; they never belong in a CASA prompt."""
        source = self.source_config or {}
        ids = {source.get(field) for field in self.backbone.placeholder_id_fields}
        return tuple(sorted(i for i in ids if isinstance(i, int) and i not in self.delimiter_token_ids))

    @property
    def variant(self) -> str | None:
        """Name of the variant that these settings are, or None if they have no name."""
        own = {field: getattr(self, field) for field in FIELDS}
        own["casa_layers"] = list(self.fusion_layers)
        for name in VARIANTS:
            if own == _variant_fields(name, self.backbone.fusable_blocks(self.text_config)):
                return name
        return None

    # ---------------------------------------------------------------- construction

    @classmethod
    def from_variant(
        cls,
        name: str,
        *,
        text_config: dict | PreTrainedConfig | None = None,
        vision_config: dict | PreTrainedConfig | None = None,
        **overrides: Any,
    ) -> "CasaConfig":
        """Configuration of a named variant.

        Args:
            name: a key of `VARIANTS`, such as "casa" or "ca-shared".
            text_config: configuration of the language model; None for the default backbone.
            vision_config: configuration of the vision tower; None for the default of the text's family.
            **overrides: further configuration fields; they win over the variant's.

        Raises:
            ValueError: for an unknown name or invalid overrides.
        """
        text: Any = _build_sub_config("text_config", text_config, "qwen2_5_vl_text")
        return cls(
            text_config=text,
            vision_config=vision_config,
            **{**variant_overrides(name, _backbone_of(text).fusable_blocks(text)), **overrides},
        )

    @classmethod
    def from_source(cls, source: Any, variant: str = "casa", **overrides: Any) -> "CasaConfig":
        """Configuration for the CASA form of a token-insertion checkpoint.

        Args:
            source: `PreTrainedConfig` of the source checkpoint, or the content of its config.json as a dict.
            variant: name of the variant.
            **overrides: further configuration fields. A text-only source needs `vision_config` and `image_token_id`,
                and has no `vision_start_token_id` and `vision_end_token_id` unless they are given.

        Raises:
            ValueError: if the source's family isn't supported, or a text-only source is given no vision tower.
        """
        if isinstance(source, dict):
            source_type = source.get("model_type")
            if source_type in SOURCE_BACKBONES:
                source = CONFIG_MAPPING[source_type](**{k: v for k, v in source.items() if k != "model_type"})
        else:
            # A model that uses this configuration must not see what loading a CASA model settles in it.
            source, source_type = copy.deepcopy(source), source.model_type
        if source_type not in SOURCE_BACKBONES:
            if is_released(source if isinstance(source, dict) else source.to_dict()):
                raise ValueError(
                    f"A checkpoint with model_type {source_type!r} is in the format of the method's authors. Convert "
                    "it first: `casa-hf convert SOURCE OUTPUT`."
                )
            raise ValueError(
                f"Checkpoints with model_type {source_type!r} can't be converted to CASA models. Supported: "
                f"{supported_sources()}."
            )
        generic = PreTrainedConfig().to_dict().keys() | {"text_config", "vision_config", "torch_dtype"}
        kept = {k: v for k, v in source.to_dict().items() if k not in generic}
        kept |= {SOURCE_MODEL_TYPE: source_type, "architectures": source.architectures}
        fields: dict[str, Any] = {
            "tie_word_embeddings": source.tie_word_embeddings,
            "source_config": kept,
            "dtype": source.dtype,
        }
        if SOURCE_BACKBONES[source_type].text_only:
            missing = [field for field in ("vision_config", "image_token_id") if overrides.get(field) is None]
            if missing:
                raise ValueError(
                    f"{SOURCE_BACKBONES[source_type].display_name} has no vision tower, so "
                    f"{' and '.join(missing)} must be given. `casa-hf convert SOURCE OUTPUT --vision-from "
                    "CHECKPOINT` takes the tower of another checkpoint."
                )
            fields |= {"vision_start_token_id": None, "vision_end_token_id": None}
            return cls.from_variant(variant, text_config=source, **{**fields, **overrides})
        fields |= {
            "vision_config": source.vision_config,
            "image_token_id": source.vision_end_token_id,
            "vision_start_token_id": source.vision_start_token_id,
            "vision_end_token_id": source.vision_end_token_id,
            "video_timestamps": SOURCE_BACKBONES[source_type].default_timestamps,
        }
        return cls.from_variant(variant, text_config=source.text_config, **{**fields, **overrides})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in Transformers; the dictionary of an unconverted source checkpoint becomes that of its CASA form.

        `casa_variant` and the design fields among `kwargs` say which form; without them it is "casa".
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls._adopt_source(config_dict, kwargs), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "CasaConfig":
        """As in Transformers, and from the dictionary of a source checkpoint too (see `get_config_dict`).

        `auto_map`, which names the code that a checkpoint carries, is left out unless this class is of that code: what
        the installed classes save doesn't come with it.
        """
        config_dict = cls._adopt_source(config_dict, kwargs)
        if cls._auto_class is None:
            config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _adopt_source(cls, config_dict: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        if config_dict.get("model_type", cls.model_type) == cls.model_type:
            given = [setting.field for setting in SETTINGS if setting.changes_tensors and setting.field in kwargs]
            asked = ["casa_variant"] if "casa_variant" in kwargs else []
            asked += [field for field in given if _loses(config_dict, field, kwargs[field])]
            if asked:
                options = ", ".join(f"{field}={kwargs[field]!r}" for field in asked)
                raise ValueError(
                    f"{options} would change which tensors this CASA checkpoint has. To change its design, "
                    "convert it: `casa-hf convert CHECKPOINT OUTPUT` with these options."
                )
            return config_dict
        overrides = {field: kwargs.pop(field) for field in DESIGN_FIELDS if field in kwargs}
        return cls.from_source(config_dict, kwargs.pop("casa_variant", "casa"), **overrides).to_dict()

    # ---------------------------------------------------------------- validation

    def validate_design(self) -> None:
        """Check every field and every combination of the design axes.

        Raises:
            ValueError: naming the field, its value and the way out.
        """
        for field, choices in CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field}={value!r} is unknown; {unknown_value(value, choices)}")
        if self.casa_static_image_tokens < 1:
            raise ValueError(
                f"casa_static_image_tokens={self.casa_static_image_tokens} must be positive: the number of image "
                "tokens of the largest window, such as 1156 for one image of 952 x 952 pixels."
            )
        check_video_timestamps(self.video_timestamps)
        if self.video_timestamps == "native" and not self.backbone.native_timestamps:
            raise ValueError(
                f"video_timestamps='native' is for sources that write the time of each video frame, which "
                f"{self.backbone.display_name} doesn't; use 'text', or no timestamps."
            )
        if self.video_timestamps is not None and self.has_whole_videos:
            raise ValueError(
                f"video_timestamps={self.video_timestamps!r} is for frames, but casa_video_layout='native' makes a "
                f"whole video of {self.backbone.display_name} one image, whose positions tell the times; choose "
                "no timestamps, or leave casa_video_layout out."
            )
        self._validate_tokens()
        self._validate_layers()
        self._validate_combinations()
        self._validate_backbone()
        self._validate_normalization()

    def _validate_normalization(self) -> None:
        for field, values in zip(("image_mean", "image_std"), self.normalization, strict=True):
            if len(values) != 3 or (field == "image_std" and min(values) <= 0):
                raise ValueError(
                    f"{field}={list(values)} must be three {'positive ' if field == 'image_std' else ''}numbers, for "
                    "red, green and blue, as in the source's preprocessor_config.json."
                )

    def _validate_tokens(self) -> None:
        if self.num_gist_tokens < 0:
            raise ValueError(f"num_gist_tokens={self.num_gist_tokens} must not be negative; use 0 for none.")
        given = len(self.gist_token_ids or [])
        if given != self.num_gist_tokens or given != len(set(self.gist_token_ids or [])):
            raise ValueError(
                f"num_gist_tokens={self.num_gist_tokens} needs as many distinct gist_token_ids, got "
                f"{self.gist_token_ids!r}. `casa-hf convert --gist-tokens N` adds the tokens and sets both."
            )
        named = {self.image_token_id, self.vision_start_token_id, self.vision_end_token_id}
        for gist in self.gist_token_ids or ():
            if gist in named or not 0 <= gist < self.text_config.vocab_size:
                raise ValueError(
                    f"gist_token_ids has {gist}, which is outside the vocabulary of {self.text_config.vocab_size} "
                    "tokens or an image's delimiter; give each gist token an id of its own."
                )
        vocab_size = self.text_config.vocab_size
        for field in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < vocab_size:
                raise ValueError(
                    f"{field}={value} is outside the vocabulary of {vocab_size} tokens; set it to the id that the "
                    "tokenizer gives this token."
                )
        for token, index in (self.new_tokens or {}).items():
            if type(index) is not int or not 0 <= index < vocab_size:
                raise ValueError(
                    f"new_tokens has {token!r}: {index!r}, which is outside the vocabulary of {vocab_size} tokens; "
                    "give the id that the tokenizer gives this token."
                )

    def _validate_layers(self) -> None:
        depth = self.text_config.num_hidden_layers
        blocks = self.backbone.fusable_blocks(self.text_config)
        if not blocks:
            raise ValueError(
                f"None of the {depth} blocks has full attention, where fusion layers stand: layer_types "
                "name other kinds only. Give a model with at least one such block."
            )
        if self.casa_layers is None:
            return
        own, gated = not self.casa_share_projections, self.casa_gate is not None
        allowed = range(depth) if own and gated else blocks
        wrong = [i for i in self.casa_layers if i not in allowed]
        if not self.casa_layers or wrong or len(set(self.casa_layers)) != len(self.casa_layers):
            fault = f"names block {wrong[0]}" if wrong else "names a block twice" if self.casa_layers else "is empty"
            others = ""
            if len(allowed) < depth:
                others = (
                    f" (of these, blocks {blocks} can have a fusion layer; those of linear attention only as an "
                    'experiment, with casa_gate="tanh" and casa_share_projections=False)'
                )
            raise ValueError(
                f"casa_layers={self.casa_layers} {fault}; expected block numbers from 0 to {depth - 1}, each "
                f"once{others}. Choose among them, or leave casa_layers out for all."
            )

    def _validate_combinations(self) -> None:
        shared, keys, placement = self.casa_share_projections, self.casa_keys, self.casa_placement
        every_block = len(self.fusion_layers) == self.text_config.num_hidden_layers
        refusals = [
            (
                keys == "context" and not shared,
                "casa_keys='context' computes fusion and self-attention in one softmax and needs "
                "casa_share_projections=True",
            ),
            (keys == "context" and self.casa_gate, "casa_keys='context' can't be gated; set casa_gate=None"),
            (
                keys == "context" and placement != "parallel",
                f"casa_keys='context' needs casa_placement='parallel', got {placement!r}",
            ),
            (
                placement == "replace" and shared,
                "casa_placement='replace' has no self-attention to share with; set casa_share_projections=False",
            ),
            (
                placement == "replace" and self.casa_image_updates == "full",
                "casa_placement='replace' has no self-attention for casa_image_updates='full'; use 'none' or 'ffn'",
            ),
            (
                placement == "replace" and self.casa_gate,
                "casa_placement='replace' can't be gated, because nothing else in these blocks mixes tokens; "
                "set casa_gate=None",
            ),
            (
                placement == "replace" and keys == "image" and every_block,
                "casa_placement='replace' with casa_keys='image' in all blocks leaves no attention between text "
                "tokens; give casa_layers a part of the blocks, or use casa_keys='window'",
            ),
            (
                placement == "replace" and keys == "window" and not self.casa_text_windows,
                "casa_placement='replace' with casa_keys='window' would leave text before the first image without "
                "attention; set casa_text_windows=True",
            ),
            (
                self.casa_video_layout == "native" and self.backbone.native_video is None,
                f"casa_video_layout='native' is the source's own layout of a video, and {self.backbone.display_name} "
                "knows no videos; leave casa_video_layout out",
            ),
            (
                self.has_whole_videos and self.casa_positions != "insertion",
                f"casa_video_layout='native' of {self.backbone.display_name} has positions in time, which only "
                f"casa_positions='insertion' gives, got casa_positions={self.casa_positions!r}; use the variant "
                "'exact' or 'insertion', or leave casa_video_layout out",
            ),
            (
                self.casa_image_norm == "none" and (keys == "context" or self.casa_image_updates == "full"),
                "casa_image_norm='none' is for fusion layers alone, but with casa_keys='context' or "
                "casa_image_updates='full' image states pass self-attention; set casa_image_norm='input'",
            ),
            (
                self.casa_text_windows and keys != "window",
                f"casa_text_windows=True is for casa_keys='window', got casa_keys={keys!r}",
            ),
        ]
        for refused, message in refusals:
            if refused:
                raise ValueError(f"{message}.")

    def _validate_backbone(self) -> None:
        text, vision = self.text_config, self.vision_config
        towers = self.backbone.towers
        if vision.model_type not in towers:
            raise ValueError(
                f"vision_config.model_type is {vision.model_type!r}; a {self.backbone.display_name} text model needs "
                f"{' or '.join(map(repr, towers))}."
            )
        layer_types = getattr(text, "layer_types", None) or []
        # Some families have a switch beside the size of the window.
        slides = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
        if slides or "sliding_attention" in layer_types:
            raise ValueError(
                "text_config has sliding-window attention switched on, which CASA doesn't support; set "
                "sliding_window=None (or use_sliding_window=False where there is one) and layer_types=None."
            )
        tower = self.tower
        if self.needs_projector and not self.backbone.text_only:
            raise ValueError(
                f"vision_config.{tower.hidden_size_field}={tower.hidden_size(vision)} must equal "
                f"text_config.hidden_size={text.hidden_size}."
            )


def is_released(content: dict[str, Any]) -> bool:
    """Whether a checkpoint is in the format of the method's authors, by the content of its config.json.

    By its name, or that of its code; the authors' insertion baseline has no CASA in it.
    """
    if content.get("model_type") == CasaConfig.model_type:
        return False
    names = json.dumps([content.get(field) for field in ("model_type", "architectures", "auto_map")]).lower()
    return "casa" in names or "helium1_vl" in names or {"pre_image_tokens", "post_image_tokens"} <= content.keys()


def _loses(checkpoint: dict[str, Any], field: str, value: Any) -> bool:
    """Whether another value of a field leaves no place for tensors of a CASA checkpoint, or needs some that nothing in
    it is like; fusion layers and gates that are added start as a conversion starts them."""
    before = checkpoint.get(field, getattr(CasaConfig, field))
    if field == "casa_layers":
        fewer = isinstance(value, list | tuple | range | set) and (before is None or not set(before) <= set(value))
        return before != value and fewer
    return before != value and (field, before, value) not in _ADDITIONS


def _backbone_of(text_config: PreTrainedConfig) -> Backbone:
    if text_config.model_type not in BACKBONES:
        raise ValueError(
            f"text_config.model_type is {text_config.model_type!r}, which isn't supported. Use a text "
            f"configuration of: {supported_sources()}."
        )
    return BACKBONES[text_config.model_type]


def variant_overrides(name: str, fusable_blocks: Sequence[int]) -> dict[str, Any]:
    """The configuration fields that make the named variant of a model whose `fusable_blocks` are these."""
    if name not in VARIANTS:
        raise ValueError(f"variant {name!r} is unknown; {unknown_value(name, VARIANTS)}")
    variant = VARIANTS[name]
    layers = {} if variant.layers is None else {"casa_layers": variant.layers(fusable_blocks)}
    return {**variant.overrides, **layers}


def _variant_fields(name: str, fusable_blocks: Sequence[int]) -> dict[str, Any]:
    defaults = {field: getattr(CasaConfig, field) for field in FIELDS}
    fields = {**defaults, **variant_overrides(name, fusable_blocks)}
    if fields["casa_layers"] is None:
        fields["casa_layers"] = list(fusable_blocks)
    return fields


def _build_sub_config(field: str, value: dict | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    legacy = field == "vision_config" and getattr(value, "model_type", None) in _VISION_SOURCES
    if isinstance(value, PreTrainedConfig):
        if not legacy:
            return value
        value = value.to_dict()
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ValueError(f"{field} must be a dict or a PreTrainedConfig, got {type(value).__name__}.")
    model_type = value.get("model_type", default_type)
    if field == "vision_config" and model_type in _VISION_SOURCES:
        model_type = SOURCE_BACKBONES[model_type].vision.model_type
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{field}.model_type is {model_type!r}, which this version of Transformers doesn't know. Use one of: "
            f"{supported_sources()}."
        )
    return CONFIG_MAPPING[model_type](**{k: v for k, v in value.items() if k != "model_type"})


__all__ = ["CasaConfig"]
