# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Videos in the sources' own layout, and real pairs of frames, are what the stock models make of them.

A prompt is a list of token ids, `Still` images and `Video`s. The stock model is given it with placeholders, grids and
pixels of stills and videos apart, and says itself where everything stands (`get_rope_index`). Everything is float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from casa_hf import CasaConfig
from casa_hf.image_inputs import DELIMITER_TYPE, FRAME_TYPE, IMAGE_TYPE
from casa_hf.transformers_versions import CACHE, is_older_than
from tests.helpers_generation import relative_error
from tests.reference import Image, Sample, reference_logits
from tests.sources import Case, make_case
from tests.tiny import END, FAMILIES, IMAGE_PAD, PAD, START, VIDEO_PAD, random_tensor

TOLERANCE = 1e-10
NOTICED = 1e-3
PATCH_DIM = 3 * 2 * 4 * 4

WHOLE = ("qwen2_vl_text", "qwen2_5_vl_text")  # a whole video between one pair of delimiters
# Each temporal patch, with text before it.
PAIRED = ("qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_5_text", "qwen3_5_moe_text")
TEXT_ONLY = [family for family, made in FAMILIES.items() if made.text_only]

whole = pytest.mark.parametrize("family", WHOLE)
every_layout = pytest.mark.parametrize("family", [*WHOLE, *PAIRED])


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Still:
    """A still image: height and width after merging, and the seed of its pixels."""

    height: int
    width: int
    seed: int

    @property
    def grid(self) -> list[int]:
        return [1, 2 * self.height, 2 * self.width]

    @property
    def pixels(self) -> Tensor:
        """Both halves of a temporal patch are the same frame."""
        frames = random_tensor(f"still {self.seed}", (4 * self.height * self.width, 3, 1, 4, 4))
        return frames.expand(-1, -1, 2, -1, -1).flatten(1)


@dataclass(frozen=True)
class Video:
    """A video: temporal patches, height and width after merging, seconds per temporal patch, seed of its pixels."""

    time: int
    height: int
    width: int
    seed: int
    seconds: float = 1.0

    @property
    def grid(self) -> list[int]:
        return [self.time, 2 * self.height, 2 * self.width]

    @property
    def pixels(self) -> Tensor:
        """The frames of a temporal patch differ."""
        return random_tensor(f"video {self.seed}", (4 * self.time * self.height * self.width, PATCH_DIM))


Prompt = list[Any]


def stamp(time: int) -> list[int]:
    """What stands for the timestamp of a temporal patch."""
    return [20 + time, 30]


def casa_inputs(family: str, prompts: list[Prompt], left: bool = True) -> dict[str, Tensor]:
    """The prompts as a CASA model takes them, padded."""
    rows, types, grids, pixels, seconds = [], [], [], [], []
    for prompt in prompts:
        ids: list[int] = []
        of_row: list[int] = []
        for item in prompt:
            if isinstance(item, int):
                ids.append(item), of_row.append(0)
                continue
            patches = [item]
            if isinstance(item, Video) and family in PAIRED:
                parts = item.pixels.chunk(item.time)
                patches = list(range(item.time))
                grids += [[1, *item.grid[1:]]] * item.time
                pixels += parts
                seconds += [0.0] * item.time
            else:
                grids.append(item.grid), pixels.append(item.pixels)
                seconds.append(item.seconds if isinstance(item, Video) else 0.0)
            for number in range(len(patches)):
                before = stamp(number) if isinstance(item, Video) and family in PAIRED else []
                ids += [*before, START, END]
                of_row += [DELIMITER_TYPE] * len(before) + [0, FRAME_TYPE if isinstance(item, Video) else IMAGE_TYPE]
        rows.append(ids), types.append(of_row)
    inputs = {
        "input_ids": padded(rows, PAD, left),
        "attention_mask": padded([[1] * len(row) for row in rows], 0, left),
        "mm_token_type_ids": padded(types, 0, left),
    }
    if grids:
        inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
    if any(isinstance(item, Video) for prompt in prompts for item in prompt) and family in WHOLE:
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return inputs


def padded(rows: list[list[int]], value: int, left: bool) -> Tensor:
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for f, row in zip(fill, rows, strict=True)])


def source_logits(case: Case, prompt: Prompt) -> Tensor:
    """Logits of the stock model at the text tokens of a prompt."""
    family = case.model.config.text_config.model_type
    ids: list[int] = []
    types: list[int] = []
    for item in prompt:
        if isinstance(item, int):
            ids.append(item), types.append(0)
            continue
        video = isinstance(item, Video)
        pad, type = (VIDEO_PAD, 2) if video else (IMAGE_PAD, 1)
        time = item.time if video else 1
        one_by_one = video and family in PAIRED
        for number in range(time if one_by_one else 1):
            tokens = (1 if one_by_one else time) * item.height * item.width
            before = stamp(number) if one_by_one else []
            ids += [*before, START, *[pad] * tokens, END]
            types += [0] * len(before) + [0, *[type] * tokens, 0]
    stills = [item for item in prompt if isinstance(item, Still)]
    videos = [item for item in prompt if isinstance(item, Video)]
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor([types])}
    timed: dict[str, Any] = {}
    if stills:
        inputs["image_grid_thw"] = torch.tensor([still.grid for still in stills])
    if videos:
        inputs["video_grid_thw"] = torch.tensor([video.grid for video in videos])
        if family == "qwen2_5_vl_text":
            timed["second_per_grid_ts"] = torch.tensor([video.seconds for video in videos])
    positions, _ = case.source.model.get_rope_index(**inputs, **timed)
    if stills:
        inputs["pixel_values"] = torch.cat([still.pixels for still in stills])
    if videos:
        inputs["pixel_values_videos"] = torch.cat([video.pixels for video in videos])
    logits = case.source(**inputs, **timed, position_ids=positions).logits[0]
    return logits[torch.tensor(types) == 0]


def casa_logits(case: Case, prompt: Prompt) -> Tensor:
    family = case.model.config.text_config.model_type
    return case.model(**casa_inputs(family, [prompt])).logits[0]


def native(family: str, variant: str, **fields: Any) -> Case:
    return make_case(family, variant, casa_video_layout="native", **fields)


# Videos of 2, 4 and 8 frames; in positions, one lasts longer than it is wide.
VIDEOS = [Video(1, 2, 3, 1), Video(2, 3, 2, 2), Video(4, 1, 2, 3)]
SEVERAL: Prompt = [5, 6, Video(2, 2, 3, 4), 7, Still(3, 2, 5), 8, 9, Video(3, 1, 2, 6), Video(1, 2, 2, 7), 10, 11]


# ------------------------------------------------------------------------------------- the sources' own layout


@every_layout
@pytest.mark.parametrize("video", VIDEOS, ids=lambda video: f"{2 * video.time} frames")
@pytest.mark.parametrize("variant", ["insertion", "exact"])
def test_a_video_is_the_source(family: str, variant: str, video: Video) -> None:
    # In `exact` the temporal patches of Qwen3-VL are one group, which timestamps don't close.
    case = native(family, variant, casa_video_history="all" if variant == "insertion" else "group")
    prompt = [5, 6, 7, video, 8, 9, 10]
    expected = source_logits(case, prompt)
    assert relative_error(casa_logits(case, prompt), expected) < TOLERANCE
    if video.time > 1:  # what time says is seen
        still = [5, 6, 7, replace(video, seed=99), 8, 9, 10]
        assert relative_error(casa_logits(case, still), expected) > NOTICED


@every_layout
def test_text_stills_and_several_videos_are_the_source(family: str) -> None:
    case = native(family, "insertion")
    expected = source_logits(case, SEVERAL)
    assert relative_error(casa_logits(case, SEVERAL), expected) < TOLERANCE
    # In `exact`, where earlier groups are hidden, it differs, so that the test can fail.
    assert relative_error(casa_logits(native(family, "exact"), SEVERAL), expected) > NOTICED


@whole
def test_a_video_beside_stills_is_one_group(family: str) -> None:
    case = native(family, "exact", casa_video_history="group")
    prompt = [5, 6, Still(2, 1, 1), Video(3, 2, 2, 2), Still(1, 2, 3), 7, 8]
    assert relative_error(casa_logits(case, prompt), source_logits(case, prompt)) < TOLERANCE


@pytest.mark.skipif(is_older_than(5, 24), reason="older versions cut the seconds of a temporal patch to an integer")
@pytest.mark.parametrize("seconds", [0.3, 1.0, 1.7, 10 / 3])
def test_positions_in_time_follow_the_seconds(seconds: float) -> None:
    """Also beyond the positions of the text that follows: of 5 temporal patches of one row the last is at 4 * 13."""
    case = native("qwen2_5_vl_text", "insertion")
    prompt = [5, 6, Video(5, 1, 2, 3, seconds), 7, 8, Video(3, 2, 1, 4, 2 * seconds), 9]
    expected = source_logits(case, prompt)
    assert relative_error(casa_logits(case, prompt), expected) < TOLERANCE
    inputs = casa_inputs("qwen2_5_vl_text", [prompt])
    inputs["second_per_grid_ts"] = inputs["second_per_grid_ts"] + 0.5
    assert relative_error(case.model(**inputs).logits[0], expected) > NOTICED


@whole
def test_without_seconds_there_is_one_per_temporal_patch(family: str) -> None:
    case = native(family, "insertion")
    prompt = [5, 6, Video(4, 2, 2, 3), 7, 8]
    inputs = casa_inputs(family, [prompt])
    del inputs["second_per_grid_ts"]
    assert relative_error(case.model(**inputs).logits[0], source_logits(case, prompt)) < TOLERANCE


def test_a_family_that_counts_temporal_patches_ignores_seconds() -> None:
    case = native("qwen2_vl_text", "insertion")
    prompt = [5, 6, Video(4, 2, 2, 3, seconds=7.0), 7, 8]
    assert relative_error(casa_logits(case, prompt), source_logits(case, prompt)) < TOLERANCE


@whole
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [True, False])
def test_rows_of_a_padded_batch_are_the_source(family: str, left: bool, attn: str) -> None:
    case = native(family, "insertion")
    case.model.set_attn_implementation(attn)
    prompts = [SEVERAL, [5, Video(4, 2, 1, 8), 6], [5, 6, 7, 8]]
    inputs = casa_inputs(family, prompts, left)
    logits = case.model(**inputs).logits
    for row, prompt in enumerate(prompts):
        own = logits[row, inputs["attention_mask"][row].bool()]
        # "eager" takes the softmax in float32.
        assert relative_error(own, source_logits(case, prompt)) < (TOLERANCE if attn == "sdpa" else 1e-5)


@whole
@pytest.mark.parametrize("variant", ["insertion", "exact"])
def test_pieces_of_a_prompt_are_the_whole(family: str, variant: str) -> None:
    """Wherever a call ends, also where later text has smaller positions than the end of a video in time."""
    case = native(family, variant)
    prompt = [5, 6, Video(4, 1, 2, 3), 7, 8, 9] if variant == "exact" else SEVERAL
    inputs, expected = casa_inputs(family, [prompt]), source_logits(case, prompt)
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    places = types[0].nonzero()[:, 0]
    patches = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(-1).tolist())
    for split in range(1, ids.shape[1]):
        cache = DynamicCache(config=case.model.config.get_text_config())
        logits = []
        for start, end in ((0, split), (split, split + 1), (split + 1, ids.shape[1])):
            if start >= end:
                continue
            inside = [i for i, place in enumerate(places.tolist()) if start <= place < end]
            images = {}
            if inside:
                images = {name: inputs[name][inside] for name in ("image_grid_thw", "second_per_grid_ts")}
                images["pixel_values"] = torch.cat([patches[i] for i in inside])
                images["mm_token_type_ids"] = types[:, start:end]
            logits.append(case.model(ids[:, start:end], **images, **{CACHE: cache}).logits[0])
        assert relative_error(torch.cat(logits), expected) < TOLERANCE


@whole
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}], ids=str
)
def test_generate_continues_a_video(family: str, options: dict[str, int]) -> None:
    """Every token that is chosen, by the scores that the source gives the prompt and the answer so far."""
    case = native(family, "insertion")
    prompts = [SEVERAL, [5, Video(4, 2, 1, 8), 6]]
    if "prefill_chunk_size" in options:
        prompts = prompts[:1]  # Transformers chunks one row at a time
    inputs = casa_inputs(family, prompts)
    output = case.model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=-1,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]
    for row, prompt in enumerate(prompts):
        answer = answers[row].tolist()
        scores = source_logits(case, [*prompt, *answer])[-len(answer) - 1 : -1].log_softmax(-1)
        if "num_beams" in options:
            chosen = scores.gather(1, answers[row][:, None]).sum() / len(answer)
            assert relative_error(output.sequences_scores[row], chosen) < 1e-6
        else:
            assert scores.argmax(-1).tolist() == answer


@whole
def test_packed_samples_are_themselves(family: str) -> None:
    case = native(family, "insertion")
    prompts = [[5, Video(4, 1, 2, 3), 6, 7], [8, Still(2, 2, 1), Video(2, 2, 3, 4), 9]]
    rows = [casa_inputs(family, [prompt]) for prompt in prompts]
    packed = {
        name: torch.cat([row[name] for row in rows], dim=1 if name in ("input_ids", "mm_token_type_ids") else 0)
        for name in rows[0]
        if name != "attention_mask"
    }
    packed["position_ids"] = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None]
    expected = torch.cat([source_logits(case, prompt) for prompt in prompts])
    assert relative_error(case.model(**packed).logits[0], expected) < TOLERANCE


@whole
def test_features_in_place_of_pixels(family: str) -> None:
    case, inputs = native(family, "insertion"), casa_inputs(family, [SEVERAL])
    features = case.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    assert [len(part) for part in features] == [2 * 2 * 3, 3 * 2, 3 * 1 * 2, 1 * 2 * 2]
    del inputs["pixel_values"]
    logits = case.model(**inputs, image_embeds=features).logits[0]
    assert relative_error(logits, source_logits(case, SEVERAL)) < TOLERANCE


# ------------------------------------------------------------------------------------- pairs of frames


@every_layout
@pytest.mark.parametrize("variant", ["insertion", "exact"])
def test_a_pair_of_frames_is_the_source_video_of_two(family: str, variant: str) -> None:
    case, prompt = make_case(family, variant), [5, 6, Video(1, 3, 2, 1), 7, 8]
    assert relative_error(casa_logits(case, prompt), source_logits(case, prompt)) < TOLERANCE
    doubled = casa_inputs(family, [prompt])
    frames = doubled["pixel_values"].view(-1, 3, 2, 16)
    frames[:, :, 1] = frames[:, :, 0]
    assert relative_error(case.model(**doubled).logits[0], source_logits(case, prompt)) > NOTICED


@every_layout
def test_pairs_are_the_source_videos_of_two_frames_each(family: str) -> None:
    """In the layout of CASA, a pair of delimiters for each."""
    case = make_case(family, "insertion")
    prompt = [5, Video(1, 2, 2, 1), Video(1, 2, 2, 2), 6, Still(1, 2, 3), 7, Video(1, 2, 2, 4), 8]
    assert relative_error(casa_logits(case, prompt), source_logits(case, prompt)) < TOLERANCE


@every_layout
@pytest.mark.parametrize("variant", ["casa", "ca-shared", "casa-before"])
def test_pairs_are_what_the_dense_reference_makes_of_them(family: str, variant: str) -> None:
    """With the features that the stock tower has for videos of two frames, seen as the frames of a video are."""
    case = make_case(family, variant)
    items = [Video(1, 2, 2, 1), Video(1, 3, 2, 2), Still(1, 2, 3), Video(1, 2, 1, 4)]
    ids = [5, START, END, START, END, 6, START, END, 7, START, END, 8, 9]
    grids = torch.tensor([item.grid for item in items])
    output = case.source.model.visual(torch.cat([item.pixels for item in items]), grid_thw=grids)
    sizes = [item.height * item.width for item in items]
    levels = [level.split(sizes) for level in getattr(output, "deepstack_features", None) or ()]
    images = [
        Image(
            place,
            (item.height, item.width),
            output.pooler_output.split(sizes)[number],
            isinstance(item, Video),
            tuple(level[number] for level in levels),
        )
        for number, (place, item) in enumerate(zip((2, 4, 7, 10), items, strict=True))
    ]
    block = FAMILIES[family].block
    [expected] = reference_logits(case.model.config, dict(case.model.named_parameters()), [Sample(ids, images)], block)
    types = torch.tensor([[0, 0, 2, 0, 2, 0, 0, 1, 0, 0, 2, 0, 0]])
    inputs = {"pixel_values": torch.cat([item.pixels for item in items]), "image_grid_thw": grids}
    logits = case.model(torch.tensor([ids]), mm_token_type_ids=types, **inputs).logits[0]
    assert relative_error(logits, expected) < 1e-5
    inputs["pixel_values"] = inputs["pixel_values"].unflatten(1, (3, 2, 16))[:, :, [0, 0]].flatten(1)
    logits = case.model(torch.tensor([ids]), mm_token_type_ids=types, **inputs).logits[0]
    assert relative_error(logits, expected) > NOTICED


# ------------------------------------------------------------------------------------- refusals


@whole
@pytest.mark.parametrize("variant", ["casa", "ca", "casa-shared"])
def test_whole_videos_need_insertion_positions(family: str, variant: str) -> None:
    with pytest.raises(ValueError, match=r"casa_video_layout='native'.*casa_positions='insertion'.*'contiguous'"):
        FAMILIES[family].casa_config(variant, casa_video_layout="native")
    assert FAMILIES[family].casa_config(variant, casa_positions="insertion", casa_video_layout="native")


@pytest.mark.parametrize("variant", ["casa", "exact"])
def test_temporal_patches_between_delimiters_take_any_positions(variant: str) -> None:
    config = FAMILIES["qwen3_vl_text"].casa_config(variant, casa_video_layout="native")
    assert not config.has_whole_videos


@pytest.mark.parametrize("family", TEXT_ONLY)
def test_a_text_model_has_no_layout_of_its_own(family: str) -> None:
    with pytest.raises(ValueError, match=r"casa_video_layout='native'.*knows no videos"):
        FAMILIES[family].casa_config("insertion", casa_video_layout="native")


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"casa_video_layout='whole' is unknown.*'native'"):
        CasaConfig(casa_video_layout="whole")


@every_layout
def test_whole_videos_are_refused_where_the_layout_has_none(family: str) -> None:
    case = make_case(family, "insertion") if family in WHOLE else native(family, "insertion")
    inputs = casa_inputs(WHOLE[0], [[5, Video(2, 2, 2, 1), 6]])
    with pytest.raises(ValueError, match=r"\[2, 4, 4\] has 2 temporal patches; expected 1"):
        case.model(**inputs)


@whole
def test_seconds_of_other_images_are_refused(family: str) -> None:
    case, inputs = native(family, "insertion"), casa_inputs(family, [SEVERAL])
    inputs["second_per_grid_ts"] = torch.ones(3)
    with pytest.raises(ValueError, match="second_per_grid_ts has 3 numbers for 4 images; expected one for each"):
        case.model(**inputs)
    with pytest.raises(ValueError, match="second_per_grid_ts has 3 numbers for 4 images"):
        case.model.generate(**inputs, max_new_tokens=1)
    inputs["image_grid_thw"][0, 0] = 0
    with pytest.raises(ValueError, match=r"\[0, 4, 6\] must have at least 1 temporal patch"):
        case.model(**inputs)
