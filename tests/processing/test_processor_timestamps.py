# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The times of frames in prompts: text and ids as the stock processor of Qwen3-VL has them, and the types that count
these tokens among the delimiters."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.training.samples import Dialogue, encode, measure
from examples.tiny_source import build_tiny_helium, build_tiny_source
from tests.clips import write_clip
from tests.processing.stock import stock_text

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
FRAME = "<|vision_start|><|vision_end|>"
SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_source(tmp_path_factory.mktemp("qwen3_vl"), family="qwen3_vl")


@pytest.fixture(scope="module")
def native(folder: Path) -> CasaProcessor:
    return CasaProcessor.from_source(folder, max_pixels=256**2, frame_max_pixels=256**2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 seconds, 60 frames."""
    pytest.importorskip("av")
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 60, 10)


def times(processor: CasaProcessor, inputs: Any, row: int = 0) -> list[str]:
    """What the tokens of the type 3 say, each run of them by itself."""
    ids, types = inputs["input_ids"][row], inputs["mm_token_type_ids"][row]
    runs, before = [], None
    for token, type in zip(ids, types, strict=True):
        if type == 3:
            runs = [*runs, []] if before != 3 else runs
            runs[-1].append(token)
        before = type
    return [processor.decode(run) for run in runs]


@pytest.mark.parametrize("before", ["", "See ", "See.", "See:\n", "<"])
@pytest.mark.parametrize("frames_per_image", [1, 2])
def test_text_and_ids_are_the_stock_processors(
    native: CasaProcessor, clip: Path, before: str, frames_per_image: int
) -> None:
    """Of two videos, of ten and of two frames a second. A frame that is an image of its own is one doubled there."""
    prompt = f"{before}{VIDEO} and {VIDEO}?"
    chosen = [list(range(60)), [0, 5, 10, 15, 20]]
    frames = [np.full((SIDE, SIDE, 3), 9 * index, np.uint8) for index in range(5)]
    inputs = native(
        text=prompt,
        videos=[[str(clip), frames]],
        video_metadata=[None, {"fps": 10.0, "frames_indices": chosen[1]}],
        do_sample_frames=False,
        frames_per_image=frames_per_image,
    )
    if frames_per_image == 1:
        chosen = [[index for index in indices for _ in range(2)] for indices in chosen]
    written = stock_text(native.tokenizer, prompt, list(zip([10.0, 10.0], chosen, strict=True)))
    assert inputs["input_ids"] == [native.tokenizer(written)["input_ids"]]
    types = inputs["mm_token_type_ids"][0]
    assert types.count(2) == (65 if frames_per_image == 1 else 33)
    said = times(native, inputs)
    assert said == (
        [f"<{index / 10:.1f} seconds>" for indices in chosen for index in indices[::2]]
        if frames_per_image == 1
        else [f"<{(index / 10 + (index + 1) / 10) / 2:.1f} seconds>" for index in range(0, 60, 2)]
        + ["<0.2 seconds>", "<1.2 seconds>", "<2.0 seconds>"]
    )
    # The token that ends an image is its frame's, but for those around each video.
    ends = [type for token, type in zip(inputs["input_ids"][0], types, strict=True) if token == native.image_token_id]
    assert ends.count(0) == 2 and ends[-1] == 0 and ends.count(2) == types.count(2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "variant"),
    [("qwen3_vl", "insertion"), ("qwen3_vl", "exact"), ("qwen3_5", "insertion")],
)
def test_a_file_is_the_sources_video(clip: Path, tmp_path: Path, family: str, variant: str) -> None:
    """The stock model on the ids that its processor makes, from the files of the checkpoint and the clip."""
    folder = build_tiny_source(tmp_path / "source", family=family)
    native = CasaProcessor.from_source(folder, max_pixels=256**2, frame_max_pixels=256**2)
    prompt = f"<|im_start|>user\nWatch.{VIDEO}What happens?<|im_end|>\n<|im_start|>assistant\n"
    history = "all" if variant == "insertion" else "group"
    model: Any = CasaForConditionalGeneration.from_pretrained(
        folder, casa_variant=variant, casa_video_history=history, dtype=torch.float64
    ).eval()
    assert model.config.video_timestamps == "native"
    inputs = native(text=prompt, videos=[str(clip)], num_frames=6, frames_per_image=2, return_tensors="pt")
    ours = model(**inputs | {"pixel_values": inputs["pixel_values"].double()}).logits[0]

    [grid] = {tuple(grid) for grid in inputs["image_grid_thw"].tolist()}
    text = stock_text(native.tokenizer, prompt, [(10.0, range(0, 60, 10))], grid=grid[1:], pads=True)
    ids = native.tokenizer(text, return_tensors="pt")["input_ids"]
    of_video = ids[0] == native.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    theirs = stock(
        input_ids=ids,
        mm_token_type_ids=2 * of_video[None].int(),
        pixel_values_videos=inputs["pixel_values"].double(),
        video_grid_thw=torch.tensor([[3, *grid[1:]]]),
    ).logits[0, ~of_video]
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-10


def test_a_source_of_another_family_has_none(source: Path, processor: CasaProcessor, clip: Path) -> None:
    assert processor.video_timestamps is None
    inputs = processor(text=VIDEO, videos=[str(clip)], fps=1)
    assert inputs["input_ids"] == [processor.tokenizer(FRAME * 6)["input_ids"]]
    assert 3 not in inputs["mm_token_type_ids"][0]


@pytest.mark.parametrize("make", ["qwen", "one delimiter", "two delimiters"])
def test_plain_text_for_families_without_a_form_of_their_own(
    source: Path, processor: CasaProcessor, clip: Path, tmp_path: Path, make: str
) -> None:
    if make != "qwen":
        delimiters = "<|image|>" if make == "one delimiter" else "<im>,</im>"
        processor = CasaProcessor.from_text_source(
            build_tiny_helium(tmp_path), source, image_delimiters=delimiters, max_pixels=140**2, num_gist_tokens=2
        )
    video = processor._notation.video
    written = "".join(
        f"[{second}.0 seconds]{processor.image_placeholder}{'<|gist_0|><|gist_1|>' if make != 'qwen' else ''}"
        for second in range(6)
    )
    inputs = processor(text=f"See {video}!", videos=[str(clip)], fps=1, video_timestamps="text")
    assert inputs["input_ids"] == [processor.tokenizer(f"See {written}!")["input_ids"]]
    said = times(processor, inputs)
    assert said[1:] == [f"[{second}.0 seconds]" for second in range(1, 6)]
    assert "[0.0 seconds]".endswith(said[0]) and "seconds" in said[0]
    unmarked = processor(text=f"See {video}!", videos=[str(clip)], fps=1)
    assert unmarked["mm_token_type_ids"][0].count(2) == 6 and 3 not in unmarked["mm_token_type_ids"][0]


def test_a_video_after_a_video_of_a_model_with_gists(folder: Path) -> None:
    """Gist tokens follow frames, but not the delimiters around a video."""
    processor = CasaProcessor.from_source(folder, max_pixels=256**2, num_gist_tokens=3)
    frames = [np.full((SIDE, SIDE, 3), 99, np.uint8)] * 2
    inputs = processor(text=VIDEO + VIDEO, videos=[[frames, frames]], video_metadata=[{"fps": 1.0}] * 2)
    assert times(processor, inputs) == ["<0.0 seconds>", "<1.0 seconds>"] * 2


def test_each_call_may_have_others_and_the_setting_is_saved(
    native: CasaProcessor, folder: Path, clip: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"text": VIDEO, "videos": [str(clip)], "fps": 1}
    without = native(**options, video_timestamps=None)
    assert without["input_ids"] == [native.tokenizer(FRAME * 6)["input_ids"]]
    assert times(native, native(**options, video_timestamps="text"))[2] == "[2.0 seconds]"
    assert times(native, native(**options))[2] == "<2.0 seconds>"
    native.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).video_timestamps == "native"
    changed = CasaProcessor.from_pretrained(tmp_path, video_timestamps="text")
    assert times(changed, changed(**options))[2] == "[2.0 seconds]"
    plain = CasaProcessor.from_pretrained(tmp_path, video_timestamps=None)
    assert plain(**options)["input_ids"] == without["input_ids"]
    for make in (
        lambda: native(**options, video_timestamps="seconds"),
        lambda: CasaProcessor.from_pretrained(tmp_path, video_timestamps="seconds"),
    ):
        with pytest.raises(ValueError, match=r"video_timestamps='seconds' is unknown; choose one of None, 'native'"):
            make()
    with pytest.raises(ValueError, match=r"'native' is for frames, but a whole video is one image"):
        native(**options, frames_per_image="all")


def test_what_a_prompt_takes_is_measured_with_its_times(native: CasaProcessor, clip: Path) -> None:
    for options in ({}, {"fps": 1}, {"frames_per_image": 2}, {"video_timestamps": None}):
        inputs = native(text=f"{VIDEO} What?", videos=[str(clip)], return_tensors="pt", **options)
        expected = inputs["input_ids"].shape[1], int(inputs["image_grid_thw"].prod(-1).sum()) // 4
        assert native.measure(f"{VIDEO} What?", videos=[str(clip)], **options) == expected


def test_frames_without_times_are_taken_for_24_a_second(native: CasaProcessor, caplog: Any) -> None:
    """As by the stock processor; a warning says it."""
    frames = [np.zeros((SIDE, SIDE, 3), np.uint8)] * 4
    with caplog.at_level(logging.WARNING):
        inputs = native(text=VIDEO, videos=[frames], frames_per_image=2)
    written = stock_text(native.tokenizer, VIDEO, [(None, [0, 1, 2, 3])])
    assert inputs["input_ids"] == [native.tokenizer(written)["input_ids"]]
    known = native(text=VIDEO, videos=[frames], video_metadata=VideoMetadata(4, fps=2.0))
    assert times(native, known) == ["<0.0 seconds>", "<0.5 seconds>", "<1.0 seconds>", "<1.5 seconds>"]
    for metadata, number in (([], 0), ([None, None], 2), ([[None], [None, None]], 3)):
        with pytest.raises(ValueError, match=rf"video_metadata has {number} elements? for 1 video; give one for each"):
            native(text=VIDEO, videos=[frames], video_metadata=metadata)


def test_rows_of_a_batch_stills_and_truncation(native: CasaProcessor, clip: Path, photos: dict[str, Any]) -> None:
    texts = [f"{FRAME}<1.0 seconds>{FRAME}", f"See {VIDEO}, {FRAME}.", "[1.0 seconds] Nothing."]
    inputs = native(text=texts, images=[photos["cat"]] * 3, videos=[None, str(clip), None], fps=0.5)
    assert times(native, inputs, 0) == times(native, inputs, 2) == []  # the user's own words are text
    assert times(native, inputs, 1) == ["<0.0 seconds>", "<2.0 seconds>", "<4.0 seconds>"]
    assert [type for type in inputs["mm_token_type_ids"][1] if type in (1, 2)] == [2, 2, 2, 1]
    for length in (5, 20):
        with pytest.raises(ValueError, match=r"Truncation leaves \d of the 3 images and frames of a prompt"):
            native(text=VIDEO, videos=[str(clip)], fps=0.5, truncation=True, max_length=length)


def test_no_loss_at_the_times_of_frames(native: CasaProcessor, clip: Path) -> None:
    """Also where a video stands in an answer, as frames do in live captions."""
    video = {"type": "video", "video": str(clip)}
    say = [{"type": "text", "text": "Say 0.5 seconds"}]
    messages = [
        {"role": "user", "content": [video, *say]},
        {"role": "assistant", "content": [*say, video, {"type": "text", "text": "<0.5 seconds>"}]},
    ]
    sample = encode(native, {"messages": messages})
    of_times = sample.mm_token_type_ids == 3
    assert of_times.sum() > 40
    assert bool((sample.labels[of_times] == -100).all())
    answer = native.decode(sample.labels[sample.labels >= 0])
    assert answer == "Say 0.5 seconds<0.5 seconds><|im_end|>"


def test_examples_tell_the_times_of_frames(native: CasaProcessor, clip: Path) -> None:
    """As live captions are trained on: frames between pieces of an answer."""
    frame = np.zeros((SIDE, SIDE, 3), np.uint8)
    video = {"type": "video"}
    say = {"type": "text", "text": "Yes."}
    messages = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": [video, say, video, say, video]}]
    known = [{"fps": 2.0, "frames_indices": [7]}, None, {"fps": 1, "frames_indices": [9, 10]}]
    example = {"messages": messages, "videos": [[frame], str(clip), [frame, frame]], "video_metadata": known}
    sample = encode(native, example)
    said = times(native, {"input_ids": [sample.input_ids], "mm_token_type_ids": [sample.mm_token_type_ids]})
    assert said == [
        "<3.5 seconds>",
        *(f"<{index * 3 / 10:.1f} seconds>" for index in range(20)),
        "<9.0 seconds>",
        "<10.0 seconds>",
    ]
    assert measure(native, example) == (sample.num_tokens, sample.num_image_tokens)
    with pytest.raises(ValueError, match="`video_metadata` of 1 element for 3 videos; give one for each"):
        encode(native, {**example, "video_metadata": known[0]})
    assert Dialogue.of({**example, "video_metadata": None}).video_metadata == [None] * 3


def test_assistant_masks_leave_the_times_out(native: CasaProcessor, clip: Path) -> None:
    template = (
        "{%- for message in messages -%}{{- message.role + ': ' -}}{%- generation -%}{%- for part in message.content "
        "-%}{{- '" + VIDEO + "' if part.type == 'video' else part.text -}}{%- endfor -%}{%- endgeneration -%}"
        "{%- endfor -%}"
    )
    content = [{"type": "text", "text": "Look"}, {"type": "video", "video": str(clip)}]
    for tensors in (None, "pt"):
        inputs = native.apply_chat_template(
            [{"role": "assistant", "content": content}],
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors=tensors,
        )
        mask, types = (torch.as_tensor(inputs[name])[0] for name in ("assistant_masks", "mm_token_type_ids"))
        assert (types == 3).sum() > 40 and not mask[types == 3].any() and mask.any()
