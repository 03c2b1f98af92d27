# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Several frames in one image: real pairs, an odd frame at the end, whole videos; beside stills, and saved.

Patches are compared with a patchify of this file's own, in the order in which the towers read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from casa_hf import CasaForConditionalGeneration, CasaProcessor, convert_checkpoint, processing_casa
from casa_hf.training import CasaDataCollator
from casa_hf.video import load_frames
from examples.tiny_source import build_tiny_source
from tests.clips import write_clip
from tests.conftest import KeptMessages

pytest.importorskip("av")

IMAGE, VIDEO = "<|vision_start|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
WIDTH, HEIGHT = 84, 56  # multiples of 28 within the limits, so that nothing is resized
PATCH, MERGE = 14, 2


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 seconds, 120 frames."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 120, 10)


@pytest.fixture(scope="module")
def frames() -> list[Image.Image]:
    """Seven frames that differ everywhere."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)) for _ in range(7)]


def patchified(frames: list[Image.Image], processor: CasaProcessor) -> Tensor:
    """The patches of a video of frames, in pairs, as a source's video processor orders them."""
    images = processor.image_processor
    pixels = np.stack([np.asarray(frame, dtype=np.float64) / 255 for frame in frames])
    pixels = (pixels - np.array(images.image_mean)) / np.array(images.image_std)
    if len(frames) % 2:
        pixels = np.concatenate([pixels, pixels[-1:]])
    rows = []
    for time in range(0, len(pixels), 2):
        for block_row in range(0, HEIGHT, MERGE * PATCH):
            for block_column in range(0, WIDTH, MERGE * PATCH):
                for row in range(block_row, block_row + MERGE * PATCH, PATCH):
                    for column in range(block_column, block_column + MERGE * PATCH, PATCH):
                        patch = pixels[time : time + 2, row : row + PATCH, column : column + PATCH]
                        rows.append(patch.transpose(3, 0, 1, 2).ravel())
    return torch.tensor(np.stack(rows), dtype=torch.float32)


@pytest.mark.parametrize("number", [1, 2, 3, 6, 7])
def test_pairs_of_frames(processor: CasaProcessor, frames: list[Image.Image], number: int) -> None:
    inputs = processor(text=f"Now {VIDEO}?", videos=[[frames[:number]]], frames_per_image=2, return_tensors="pt")
    images = -(-number // 2)
    assert inputs["image_grid_thw"].tolist() == [[1, HEIGHT // PATCH, WIDTH // PATCH]] * images
    assert inputs["input_ids"][0].tolist().count(processor.image_token_id) == images
    assert (inputs["mm_token_type_ids"] == 2).sum() == images
    assert "second_per_grid_ts" not in inputs
    torch.testing.assert_close(inputs["pixel_values"], patchified(frames[:number], processor), rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [1, 2, 5, 6])
def test_a_whole_video(processor: CasaProcessor, frames: list[Image.Image], number: int) -> None:
    inputs = processor(text=f"Now {VIDEO}?", videos=[[frames[:number]]], frames_per_image="all", return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[-(-number // 2), HEIGHT // PATCH, WIDTH // PATCH]]
    assert inputs["input_ids"][0].tolist().count(processor.image_token_id) == 1
    torch.testing.assert_close(inputs["pixel_values"], patchified(frames[:number], processor), rtol=0, atol=1e-5)


def test_stills_and_videos_of_a_batch(processor: CasaProcessor, frames: list[Image.Image], photos: Any) -> None:
    """Stills stay what they are, and each video has an odd frame of its own."""
    texts = [f"{IMAGE} and {VIDEO}", f"{VIDEO} then {IMAGE}{IMAGE}"]
    stills = [photos["cat"], frames[0], photos["rocket"]]
    inputs = processor(
        text=texts, images=stills, videos=[frames[:3], frames[3:]], frames_per_image=2, return_tensors="pt"
    )
    alone = processor(images=stills, return_tensors="pt")
    first, *rest = alone["pixel_values"].split(alone["image_grid_thw"].prod(-1).tolist())
    expected = [first, patchified(frames[:3], processor), patchified(frames[3:], processor), *rest]
    torch.testing.assert_close(inputs["pixel_values"], torch.cat(expected), rtol=0, atol=1e-5)
    assert [row[row > 0].tolist() for row in inputs["mm_token_type_ids"]] == [[1, 2, 2], [2, 2, 1, 1]]


@pytest.mark.parametrize("options", [{}, {"fps": 1}, {"num_frames": 7}, {"frame_max_pixels": 56 * 56}], ids=str)
def test_a_file_gives_the_frames_that_it_gives_one_by_one(
    processor: CasaProcessor, stock_pixels: Any, clip: Path, options: dict[str, Any]
) -> None:
    """`fps` and `num_frames` count frames, and `frame_max_pixels` the pixels of one, as for frames of their own."""
    sampling = {name: value for name, value in options.items() if name != "frame_max_pixels"}
    frames = load_frames(clip, **sampling)
    stock = stock_pixels(frames, options.get("frame_max_pixels", 140**2 // 4))
    halves = stock["pixel_values"].unflatten(1, (3, 2, -1))[:, :, 0].chunk(len(frames))
    halves = [*halves, halves[-1]] if len(frames) % 2 else list(halves)
    pairs = [torch.stack(pair, dim=2).flatten(1) for pair in zip(halves[::2], halves[1::2], strict=True)]
    inputs = processor(text=VIDEO, videos=str(clip), frames_per_image=2, return_tensors="pt", **options)
    assert torch.equal(inputs["pixel_values"], torch.cat(pairs))
    assert torch.equal(inputs["image_grid_thw"], stock["image_grid_thw"][::2])


@pytest.mark.parametrize("frames_per_image", [1, 2, "all"])
@pytest.mark.parametrize("options", [{}, {"num_frames": 7}], ids=str)
def test_what_they_take_is_told_beforehand(
    processor: CasaProcessor, clip: Path, options: dict[str, Any], frames_per_image: Any
) -> None:
    options = {**options, "frames_per_image": frames_per_image}
    inputs = processor(text=VIDEO, videos=[str(clip)], return_tensors="pt", **options)
    tokens = int(inputs["image_grid_thw"].prod(-1).sum()) // 4
    assert processor.measure(VIDEO, videos=[str(clip)], **options) == (inputs["input_ids"].shape[1], tokens)
    frames = load_frames(clip, **{name: value for name, value in options.items() if name == "num_frames"})
    size = (len(frames), frames[0].height, frames[0].width)
    told = processor._get_num_multimodal_tokens(video_sizes=[size], frames_per_image=frames_per_image)
    assert told["num_video_tokens"] == [tokens]


@pytest.mark.parametrize("frames_per_image", [2, "all"])
def test_it_is_a_setting(source: Path, tmp_path: Path, clip: Path, frames_per_image: Any) -> None:
    saved = CasaProcessor.from_source(source, frames_per_image=frames_per_image, frame_max_pixels=56 * 56)
    saved.save_pretrained(tmp_path)
    loaded = CasaProcessor.from_pretrained(tmp_path)
    assert loaded.frames_per_image == frames_per_image
    options: dict[str, Any] = {"text": VIDEO, "videos": [str(clip)], "return_tensors": "pt"}
    grids = loaded(**options)["image_grid_thw"]
    assert grids.tolist() == ([[12, 4, 4]] if frames_per_image == "all" else [[1, 4, 4]] * 12)
    assert len(loaded(**options, frames_per_image=1)["image_grid_thw"]) == 24
    assert CasaProcessor.from_pretrained(tmp_path, frames_per_image=1).frames_per_image == 1


def test_processors_without_the_setting_take_frames_one_by_one(source: Path, tmp_path: Path) -> None:
    CasaProcessor.from_source(source, frames_per_image=2).save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    text = file.read_text("utf-8")
    assert text.count('"frames_per_image": 2,') == 1
    file.write_text(text.replace('"frames_per_image": 2,', ""), "utf-8")
    assert CasaProcessor.from_pretrained(tmp_path).frames_per_image == 1


@pytest.mark.parametrize("value", [0, 3, True, "both", 2.5, 2.0])
def test_other_numbers_are_refused(source: Path, processor: CasaProcessor, tmp_path: Path, value: Any) -> None:
    message = rf"frames_per_image={value!r} is none of 1, 2, 'all'\. Use 1"
    with pytest.raises(ValueError, match=message):
        processor(text=VIDEO, videos=["missing.mp4"], frames_per_image=value)
    with pytest.raises(ValueError, match=message):
        CasaProcessor.from_source(source, frames_per_image=value)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        CasaProcessor.from_pretrained(tmp_path, frames_per_image=value)


@pytest.mark.parametrize("frames_per_image", [2, "all"])
def test_frames_of_different_sizes_share_no_image(
    processor: CasaProcessor, frames: list[Image.Image], frames_per_image: Any
) -> None:
    video = [frames[0], frames[1], frames[2], frames[3].resize((56, 84))]
    message = r"frames of 84 x 56 and of 56 x 84 pixels in one image \(frames_per_image=.*pass frames_per_image=1"
    for call in (processor, processor.measure):
        with pytest.raises(ValueError, match=message):
            call(text=VIDEO, videos=[[video]], frames_per_image=frames_per_image)
    separate = processor(text=VIDEO, videos=[[video]], frames_per_image=1, return_tensors="pt")
    assert len(separate["image_grid_thw"]) == 4


# -------------------------------------------------------------------- whole videos and their time


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({}, 1.0),  # 2 frames per second
        ({"fps": 1}, 2.0),
        ({"fps": 3}, 2 / 3),
        ({"num_frames": 7}, 2 * 12 / 7),
        ({"fps": 1000}, 0.2),  # of which there are 10
        ({"do_sample_frames": False}, 0.2),
    ],
    ids=str,
)
def test_the_seconds_of_temporal_patches(
    processor: CasaProcessor, clip: Path, options: dict[str, Any], seconds: float
) -> None:
    """As by the stock processor: frames per temporal patch by frames per second of what was sampled."""
    inputs = processor(text=VIDEO, videos=str(clip), frames_per_image="all", return_tensors="pt", **options)
    torch.testing.assert_close(inputs["second_per_grid_ts"], torch.tensor([seconds]), rtol=1e-6, atol=0)


def test_seconds_beside_stills_and_of_frames_without_times(
    processor: CasaProcessor, frames: list[Image.Image], clip: Path, tmp_path: Path
) -> None:
    short = write_clip(tmp_path / "short.mp4", 60, 20)  # 3 seconds, of which 20 frames are taken
    inputs = processor(
        text=[f"{VIDEO} {IMAGE} {VIDEO}", VIDEO, IMAGE],
        images=[frames[0], frames[1]],
        videos=[str(clip), str(short), frames],
        frames_per_image="all",
        return_tensors="pt",
    )
    assert inputs["image_grid_thw"][:, 0].tolist() == [12, 1, 10, 4, 1]
    torch.testing.assert_close(inputs["second_per_grid_ts"], torch.tensor([1.0, 0.0, 2 * 3 / 20, 2 / 24, 0.0]))
    assert processor(text="None.", frames_per_image="all", return_tensors="pt")["second_per_grid_ts"].shape == (0,)


def test_whole_videos_without_times_are_taken_for_24_frames_a_second_with_a_warning(
    processor: CasaProcessor, frames: list[Image.Image]
) -> None:
    kept = KeptMessages()
    processing_casa.logger.warning_once.cache_clear()
    processing_casa.logger.addHandler(kept)
    for options in ({"frames_per_image": 2}, {"frames_per_image": "all", "video_metadata": {"fps": 2}}):
        processor(text=VIDEO, videos=[frames], **options)
    assert not kept.messages
    processor(text=VIDEO, videos=[frames], frames_per_image="all")
    processing_casa.logger.removeHandler(kept)
    [message] = kept.messages
    assert "(frames_per_image='all'); they are taken for 24 frames per second" in message


def test_a_file_is_to_the_model_what_it_is_to_the_source(source: Path, clip: Path, frames: list[Image.Image]) -> None:
    """From the file to the logits, alone, in a batch and in `generate`; the stock model is given the same pixels."""
    processor = CasaProcessor.from_source(source, frames_per_image="all", frame_max_pixels=56 * 56)
    assert "second_per_grid_ts" in processor.model_input_names
    stock = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float64).eval()
    model = CasaForConditionalGeneration.from_pretrained(
        source, casa_variant="insertion", casa_video_layout="native", dtype=torch.float64
    ).eval()
    text = f"First {VIDEO} and then {VIDEO} what?"
    inputs = processor(text=text, videos=[str(clip), frames[:4]], return_tensors="pt")
    pad = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    ids: list[int] = []
    counts = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    for token in inputs["input_ids"][0].tolist():
        ids += [pad] * counts.pop(0) if token == processor.image_token_id else []
        ids.append(token)
    is_video = torch.tensor([ids]) == pad
    videos = {"video_grid_thw": inputs["image_grid_thw"], "second_per_grid_ts": inputs["second_per_grid_ts"]}
    with torch.no_grad():
        positions, _ = stock.model.get_rope_index(torch.tensor([ids]), 2 * is_video.int(), **videos)
        expected = stock(
            torch.tensor([ids]),
            position_ids=positions,
            mm_token_type_ids=2 * is_video.int(),
            pixel_values_videos=inputs["pixel_values"].double(),
            **videos,
        ).logits[~is_video]
        torch.testing.assert_close(model(**inputs).logits[0], expected, rtol=0, atol=1e-10)
        batch = processor(text=[text, "None."], videos=[str(clip), frames[:4]], return_tensors="pt")
        torch.testing.assert_close(model(**batch).logits[0], expected, rtol=0, atol=1e-10)
        token = model.generate(**batch, max_new_tokens=1, do_sample=False)[0, -1]
    assert token == expected[-1].argmax()


@pytest.mark.parametrize("packing", [False, True])
def test_training_batches_have_the_seconds(source: Path, clip: Path, frames: list[Image.Image], packing: bool) -> None:
    processor = CasaProcessor.from_source(source, frames_per_image="all", frame_max_pixels=56 * 56)

    def example(question: list[dict[str, Any]]) -> dict[str, Any]:
        answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
        return {"messages": [{"role": "user", "content": [*question, {"type": "text", "text": "So?"}]}, answer]}

    examples = [
        example([{"type": "video", "video": str(clip)}]),
        example([]),
        example([{"type": "image", "image": frames[0]}, {"type": "video", "video": frames[:3]}]),
    ]
    collator = CasaDataCollator(processor, packing=packing)
    batch = collator(examples)
    assert batch["image_grid_thw"][:, 0].tolist() == [12, 1, 2]
    torch.testing.assert_close(batch["second_per_grid_ts"], torch.tensor([1.0, 0.0, 2 / 24]))
    assert len(batch["input_ids"]) == (1 if packing else 3)
    assert CasaDataCollator(processor)(examples[1:2])["second_per_grid_ts"].tolist() == [0.0]  # of the unseen image
    assert "second_per_grid_ts" not in CasaDataCollator(CasaProcessor.from_source(source))(examples[1:2])


@pytest.mark.parametrize(
    ("variant", "history", "equals"),
    [
        ("insertion", "all", "text, still images and videos it"),
        ("exact", "group", "one group of still images, or of text and one video, it"),
        ("exact", "latest", "one group of still images it"),  # of a video, only the last temporal patch
    ],
)
def test_temporal_patches_with_their_times_are_to_the_model_what_they_are_to_the_source(
    tmp_path: Path, clip: Path, variant: str, history: str, equals: str
) -> None:
    """Qwen3-VL, from its checkpoint and a file to the logits."""
    build_tiny_source(tmp_path / "source", family="qwen3_vl")
    report = convert_checkpoint(
        tmp_path / "source",
        tmp_path / "casa",
        variant,
        dtype="float64",
        casa_video_layout="native",
        casa_video_history=history,
    )
    assert equals in report.note
    processor = CasaProcessor.from_pretrained(tmp_path / "casa", min_pixels=64**2, frame_max_pixels=96**2)
    assert processor.frames_per_image == 2 and processor.video_timestamps == "native"
    model = CasaForConditionalGeneration.from_pretrained(tmp_path / "casa").eval()
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "source", dtype=torch.float64).eval()
    inputs = processor(text=f"First {VIDEO} and then what?", videos=[str(clip)], return_tensors="pt", num_frames=6)
    grids, (ids, types) = inputs["image_grid_thw"], (inputs[name][0] for name in ("input_ids", "mm_token_type_ids"))
    assert len(grids) == 3
    pad = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    expanded: list[int] = []
    for token, type in zip(ids.tolist(), types.tolist(), strict=True):
        expanded += [pad] * (int(grids[0].prod()) // 4) if type == 2 else []
        expanded.append(token)
    assert "<1.0 seconds>" in processor.decode(ids), "the mean of 0 and 2"
    is_video = torch.tensor([expanded]) == pad
    video_grid = torch.tensor([[3, *grids[0, 1:].tolist()]])
    with torch.no_grad():
        positions, _ = stock.model.get_rope_index(
            torch.tensor([expanded]), 2 * is_video.int(), video_grid_thw=video_grid
        )
        expected = stock(
            torch.tensor([expanded]),
            position_ids=positions,
            mm_token_type_ids=2 * is_video.int(),
            pixel_values_videos=inputs["pixel_values"].double(),
            video_grid_thw=video_grid,
        ).logits[~is_video]
        difference = (model(**inputs).logits[0] - expected).abs().max()
    assert difference > 1e-3 if history == "latest" else difference < 1e-10
