# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The times of frames, in tokens of the vocabulary that token types count among the delimiters: through the model and
`generate`. tests/test_reference.py has them in every design, batch and split into calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from casa_hf import CasaConfig
from casa_hf.backbones import BACKBONES
from casa_hf.timestamps_casa import VIDEO_TIMESTAMPS, timestamp_text
from tests.helpers_generation import PATCH_DIM, new_model, relative_error
from tests.sources import make_case
from tests.tiny import END, FAMILIES, IMAGE_PAD, PAD, START, VIDEO_PAD, random_tensor

STEPS = 5
FRAME, STAMP = 2, 3
# Two videos around text, and one at the end of a shorter row; a number of tokens before a frame is its time.
ROWS: list[list[Any]] = [
    [5, 6, (3, (2, 3)), (2, (1, 2)), 7, 8, (2, (2, 2)), (3, (1, 1)), 9],
    [10, 11, 12, (2, (2, 1)), (1, (3, 1)), 13],
]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def video_batch(rows: list[list[Any]], closing: int = STAMP) -> dict[str, Any]:
    """Inputs for rows padded on the left; times have the type `closing`."""
    ids, types, grids = [], [], []
    for row in rows:
        ids.append([])
        types.append([])
        for part in row:
            if isinstance(part, int):
                ids[-1].append(part)
                types[-1].append(0)
                continue
            number, (height, width) = part
            ids[-1] += [*range(20, 20 + number), START, END]
            types[-1] += [closing] * number + [0, FRAME]
            grids.append([1, 2 * height, 2 * width])
    longest = max(map(len, ids))
    thw = torch.tensor(grids)
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
        "mm_token_type_ids": torch.tensor([[0] * (longest - len(row)) + row for row in types]),
        "pixel_values": random_tensor("pixels", (int(thw.prod(-1).sum()), PATCH_DIM)),
        "image_grid_thw": thw,
    }


@pytest.fixture(scope="module")
def model() -> Any:
    """All frames of a video are seen together, so that it shows whether their times close the group."""
    return new_model("casa", casa_video_history="group", video_timestamps="text")


def logits_of_wholes(model: Any, inputs: dict[str, Any], steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, (rows, steps), one forward of everything for each, and the logits of the last."""
    inputs = dict(inputs)
    for _ in range(steps):
        logits = model(**inputs, use_cache=False).logits[:, -1]
        new = logits.argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1), value=value)
    return inputs["input_ids"][:, -steps:], logits


def generated(model: Any, inputs: dict[str, Any], **settings: Any) -> tuple[Tensor, Tensor]:
    output = model.generate(
        **inputs,
        **{"max_new_tokens": STEPS, "do_sample": False, **settings},
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, -STEPS:], output.logits[-1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        *({"prefill_chunk_size": size} for size in (1, 2, 3, 7)),
        {"cache_implementation": "static", "prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_generation_is_that_of_whole_forwards(model: Any, settings: dict[str, Any]) -> None:
    """Also where a chunk of the prefill holds a part of a time, or a time without its frame."""
    inputs = video_batch(ROWS)
    tokens, logits = logits_of_wholes(model, inputs)
    new, last = generated(model, inputs, **settings)
    assert torch.equal(new, tokens) and relative_error(last, logits) < 1e-6  # in float32, as `generate` gives them
    closed = generated(new_model("casa", casa_video_history="group"), video_batch(ROWS, closing=0), **settings)[1]
    assert relative_error(closed, logits) > 1e-3  # text like any other would close the groups


def test_beams_and_an_assistant(model: Any) -> None:
    options = {"max_new_tokens": STEPS, "num_beams": 3, "do_sample": False}
    one = video_batch(ROWS[:1])
    beams = [model.generate(**one, **options, use_cache=use_cache)[0, -STEPS:] for use_cache in (True, False)]
    assert torch.equal(*beams)
    assert torch.equal(model.generate(**video_batch(ROWS), **options)[0, -STEPS:], beams[0])
    assisted = generated(model, one, assistant_model=new_model("ca", video_timestamps="text", seed=1))
    assert torch.equal(assisted[0], logits_of_wholes(model, one)[0])


@pytest.mark.parametrize("types", ["of all tokens", "of the new ones"])
def test_a_later_call_continues_a_video(model: Any, types: str) -> None:
    """The second call begins with a time, whose frame joins the group that the first call has left open."""
    row: list[Any] = [5, 6, (3, (2, 3)), (2, (1, 2)), (1, (2, 2)), 7]
    whole, first = video_batch([row]), video_batch([row[:4]])
    split, patches = first["input_ids"].shape[1], len(first["pixel_values"])
    tokens, logits = logits_of_wholes(model, whole)
    cache = DynamicCache(config=model.config.get_text_config())
    model(**first, cache=cache)
    later = {
        **whole,
        "pixel_values": whole["pixel_values"][patches:],
        "image_grid_thw": whole["image_grid_thw"][2:],
        "cache": cache,
    }
    if types == "of the new ones":
        later["mm_token_type_ids"] = later["mm_token_type_ids"][:, split:]
    new, last = generated(model, later)
    assert torch.equal(new, tokens) and relative_error(last, logits) < 1e-6  # in float32, as `generate` gives them


def test_a_time_alone_leaves_the_group_open(model: Any) -> None:
    """As a call of its own, without any image: by its types, in the cached form and in `generate`."""
    row: list[Any] = [5, 6, (3, (2, 3)), (2, (1, 2)), 7]
    whole = video_batch([row])
    expected = model(**whole).logits
    ends = [7, 9, 10, 12]  # behind the first frame, its time, the start of the second, the end of all
    cache, outputs, images = DynamicCache(config=model.config.get_text_config()), [], [24, 8]
    pixels = iter(whole["pixel_values"].split(images))
    grids = iter(whole["image_grid_thw"].split(1))
    for begin, end in zip([0, *ends], ends, strict=False):
        types = whole["mm_token_type_ids"][:, :end]
        call = {"input_ids": whole["input_ids"][:, begin:end], "mm_token_type_ids": types}
        if bool((types[:, begin:] == FRAME).any()):
            call |= {"pixel_values": next(pixels), "image_grid_thw": next(grids)}
        outputs.append(model(**call, cache=cache).logits)
    assert relative_error(torch.cat(outputs, dim=1), expected) < 1e-9


# ------------------------------------------------------------------------------------ what is refused


def test_a_model_with_timestamps_refuses_frames_without(model: Any) -> None:
    inputs = video_batch(ROWS, closing=0)
    with pytest.raises(ValueError, match=r"video frames \(2\) with no timestamps.*video_timestamps='text'.*to None"):
        model(**inputs)
    with pytest.raises(ValueError, match="no timestamps before them"):  # before the tower has done anything
        model.generate(**{**inputs, "pixel_values": inputs["pixel_values"][:1]}, num_beams=2, max_new_tokens=1)
    one_row = video_batch(ROWS)
    one_row["mm_token_type_ids"][1][one_row["mm_token_type_ids"][1] == STAMP] = 0
    with pytest.raises(ValueError, match="no timestamps before them"):
        model(**one_row)
    one_frame = video_batch([[5, (3, (2, 3)), (0, (1, 2)), 6, (2, (2, 2)), 7]])  # beside others that have theirs
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="no timestamps before them"):
            call(**one_frame)
    new_model("casa", casa_video_history="group")(**inputs)  # without timestamps
    stills = dict(inputs, mm_token_type_ids=(inputs["mm_token_type_ids"] == FRAME).long())
    model(**stills), model.generate(**stills, max_new_tokens=1)


def test_settings() -> None:
    family, other = FAMILIES["qwen3_vl_text"], FAMILIES["qwen2_5_vl_text"]
    assert CasaConfig.from_source(family.source_config()).video_timestamps == "native"
    assert CasaConfig.from_source(family.source_config(), video_timestamps=None).video_timestamps is None
    assert CasaConfig.from_source(other.source_config()).video_timestamps is None
    assert CasaConfig.from_source(other.source_config(), video_timestamps="text").video_timestamps == "text"
    assert CasaConfig.from_source(family.source_config()).variant == "casa"  # no part of the design
    with pytest.raises(ValueError, match=r"'native' is for sources that write .*Qwen2.5-VL doesn't; use 'text'"):
        CasaConfig.from_source(other.source_config(), video_timestamps="native")
    with pytest.raises(ValueError, match=r"video_timestamps='text' is for frames, but .* whole video of Qwen2.5-VL"):
        other.casa_config("insertion", casa_video_layout="native", video_timestamps="text")
    with pytest.raises(ValueError, match=r"video_timestamps='seconds' is unknown; choose one of None, 'nativ"):
        CasaConfig(video_timestamps="seconds")
    assert [timestamp_text(kind, 0.25) for kind in VIDEO_TIMESTAMPS] == ["", "<0.2 seconds>", "[0.2 seconds]"]


# ------------------------------------------------------------------------------------ the source


def test_the_families_that_have_them_are_those_whose_stock_processor_writes_them() -> None:
    for family in BACKBONES.values():
        writes = PROCESSOR_MAPPING_NAMES.get(family.source_model_type) == "Qwen3VLProcessor"
        assert family.native_timestamps == writes, family.display_name


NATIVE = [name for name, family in BACKBONES.items() if family.native_timestamps]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("variant", ["insertion", "exact"])
@pytest.mark.parametrize("family", NATIVE)
def test_a_video_is_the_sources(family: str, variant: str, nested: bool) -> None:
    """The stock model on ids as its processor writes them: a time before each temporal patch of two frames, all of a
    video within a further pair of delimiters (`nested`), or not, as up to Transformers 5.9."""
    case = make_case(family, variant, casa_video_history="all" if variant == "insertion" else "group")
    case.model.config.video_timestamps = "native"
    grid, times = (3, 2), [(20, 21), (22,), (23, 24, 25)]
    merged = grid[0] * grid[1]
    source_ids, ids, types = [5, 6], [5, 6], [0, 0]

    def write(tokens: list[int], type: int = 0) -> None:
        source_ids.extend(tokens)
        ids.extend(tokens)
        types.extend([type] * len(tokens))

    write([START] * nested)
    for time in times:
        write(list(time), STAMP)
        write([START])
        source_ids.extend([VIDEO_PAD] * merged)
        write([END], FRAME)
    write([END] * nested)
    write([7, 8, 9])
    pixels = random_tensor("video", (4 * merged * len(times), PATCH_DIM))
    is_text = torch.tensor(source_ids) != VIDEO_PAD
    theirs = case.source(
        input_ids=torch.tensor([source_ids]),
        mm_token_type_ids=2 * (~is_text)[None].int(),
        pixel_values_videos=pixels,
        video_grid_thw=torch.tensor([[len(times), 2 * grid[0], 2 * grid[1]]]),
    ).logits[0, is_text]
    inputs = {
        "input_ids": torch.tensor([ids]),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 2 * grid[0], 2 * grid[1]]] * len(times)),
    }
    ours = case.model(**inputs, mm_token_type_ids=torch.tensor([types])).logits[0]
    assert relative_error(ours, theirs) < 1e-10
    assert IMAGE_PAD not in ids
    case.model.config.video_timestamps = None
    as_text = torch.tensor([[0 if type == STAMP else type for type in types]])
    error = relative_error(case.model(**inputs, mm_token_type_ids=as_text).logits[0], theirs)
    assert error < 1e-10 if variant == "insertion" else error > 1e-2  # times that close a group hide earlier frames
