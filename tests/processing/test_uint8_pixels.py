# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`uint8_pixels=True`: the patches are those of the stock processor before it normalises, resized as torchvision does
it, in an eighth of the bytes; and a model says the same to them."""

from __future__ import annotations

import json
import shutil
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from casa_hf import CasaConfig, CasaForConditionalGeneration, CasaProcessor, convert_checkpoint
from casa_hf.media_casa import MediaPolicy, rgb_image, rgb_pixels
from casa_hf.patches_casa import level_patches
from casa_hf.samples import CAT

IMAGE = "<|vision_start|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
LIMITS = {"shortest_edge": 56 * 56, "longest_edge": 10**6}
CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_world" / "checkpoints" / "casa"


def levels_of(made: Any, processor: Any) -> torch.Tensor:
    """What normalised patches were before: pixels from 0 to 255."""
    images = processor.image_processor
    values = made["pixel_values"].double().unflatten(1, (3, -1))
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (images.image_mean, images.image_std))
    return (255 * (values * std + mean)).flatten(1).round().to(torch.uint8)


def doubled(levels: torch.Tensor) -> torch.Tensor:
    return levels.unflatten(1, (3, 1, -1)).expand(-1, -1, 2, -1).flatten(1)


def cubic(x: np.ndarray) -> np.ndarray:
    """The bicubic kernel of Pillow and torch's antialiased resizing, a = -1/2."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resizing(source: int, target: int) -> np.ndarray:
    """(target, source) weights; the kernel is stretched where the image gets smaller."""
    scale = source / target
    reach = max(scale, 1.0)
    centres = (np.arange(target)[:, None] + 0.5) * scale
    weights = cubic((np.arange(source)[None] + 0.5 - centres) / reach)
    return weights / weights.sum(1, keepdims=True)


def exactly_resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Along rows and then along columns; what lies beyond the range is cut off after each."""
    rows, columns = resizing(image.shape[0], height), resizing(image.shape[1], width)
    narrow = np.tensordot(image.astype(np.float64), columns, (1, 1)).clip(0, 255)  # (rows, channels, width)
    return np.tensordot(rows, narrow, (1, 0)).transpose(0, 2, 1).clip(0, 255)


def uncut(patches: torch.Tensor, grid: Any, merge: int = 2) -> np.ndarray:
    """The (height, width, 3) image that patches with one frame are of; cut pixel by pixel."""
    _, rows, columns = (int(number) for number in grid)
    patch = int((patches.shape[1] // 3) ** 0.5)
    image = np.zeros((rows * patch, columns * patch, 3), np.uint8)
    number = 0
    for top in range(0, rows, merge):
        for left in range(0, columns, merge):
            for row in range(top, top + merge):
                for column in range(left, left + merge):
                    one = patches[number].view(3, patch, patch).permute(1, 2, 0).numpy()
                    image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = one
                    number += 1
    return image


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.array(Image.open(CAT).convert("RGB").resize((448, 280)))


def test_pixels_are_those_that_the_stock_processor_normalises(processor: CasaProcessor, photos: Any) -> None:
    """Images, a video of single frames, and their order; none of them is resized."""
    stills = [photos["cat"].resize((112, 56)), photos["coffee"].resize((84, 84))]
    clip = [photos["rocket"].resize((56, 56)).rotate(90 * turn) for turn in range(3)]
    prompt = {"text": f"{IMAGE}a{VIDEO}b{IMAGE}", "images": stills, "videos": [clip], "return_tensors": "pt"}
    stock, ours = processor(**prompt), processor(**prompt, uint8_pixels=True)
    assert ours["pixel_values"].dtype == torch.uint8
    assert torch.equal(doubled(ours["pixel_values"]), levels_of(stock, processor))
    assert 8 * ours["pixel_values"].nbytes == stock["pixel_values"].nbytes
    for name in stock.keys() - {"pixel_values"}:
        assert torch.equal(ours[name], stock[name])


@pytest.mark.parametrize("frames_per_image", [2, "all"])
def test_frames_that_share_an_image(processor: CasaProcessor, photos: Any, frames_per_image: Any) -> None:
    """Beside a still, which is doubled then, and an odd frame at the end, which is so too."""
    clip = [photos["rocket"].resize((56, 84)).rotate(180 * (turn % 2)) for turn in range(3)]
    prompt = {
        "text": f"{IMAGE}a{VIDEO}",
        "images": [photos["cat"].resize((56, 56))],
        "videos": [clip],
        "frames_per_image": frames_per_image,
        "video_metadata": {"fps": 2.0},
        "return_tensors": "pt",
    }
    stock, ours = processor(**prompt), processor(**prompt, uint8_pixels=True)
    assert torch.equal(ours["pixel_values"], levels_of(stock, processor))
    assert torch.equal(ours["image_grid_thw"], stock["image_grid_thw"])


@pytest.mark.parametrize("size", [(500, 300), (150, 700), (61, 70)], ids=str)
def test_resizing_is_antialiased_bicubic_within_a_step(photo: np.ndarray, size: tuple[int, int]) -> None:
    """Of 255, against its formula in float64, to smaller and larger images, of a photograph and of noise, in which
    every pixel has sharp edges. Pillow's, of the photograph, differs in more than a step almost nowhere."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for image in (np.array(Image.fromarray(photo).resize(size)), noise):
        for longest in (100_000, 300_000):
            limits = {**LIMITS, "longest_edge": longest}
            [patches], [grid] = level_patches([image], limits, Qwen2VLImageProcessorPil())
            ours = uncut(patches, grid).astype(int)
            exact = exactly_resized(image, *ours.shape[:2])
            assert np.abs(ours - exact.round()).max() <= 1
            pillow = np.array(Image.fromarray(image).resize(ours.shape[1::-1], Image.Resampling.BICUBIC)).astype(int)
            assert image is noise or (np.abs(ours - pillow) > 1).mean() < 1e-4


def test_resizing_is_torchvisions(photo: np.ndarray) -> None:
    """Where that is installed: to the last bit."""
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    [patches], [grid] = level_patches([photo], {**LIMITS, "longest_edge": 50_000}, Qwen2VLImageProcessorPil())
    ours = uncut(patches, grid)
    pixels = torch.from_numpy(photo).permute(2, 0, 1)
    bicubic = functional.InterpolationMode.BICUBIC
    theirs = functional.resize(pixels, list(ours.shape[:2]), interpolation=bicubic, antialias=True)
    assert torch.equal(torch.from_numpy(ours).permute(2, 0, 1), theirs)


def test_another_image_processor_makes_its_patches_itself(photo: np.ndarray) -> None:
    """One that resizes otherwise, and a class of someone else's."""

    class Darker(Qwen2VLImageProcessorPil):
        def resize(self, image: np.ndarray, **kwargs: Any) -> np.ndarray:
            return super().resize(image, **kwargs) // 2

    limits = {**LIMITS, "longest_edge": 50_000}
    [usual], [grid] = level_patches([photo], limits, Qwen2VLImageProcessorPil())
    linear = Qwen2VLImageProcessorPil(resample=Image.Resampling.BILINEAR)
    for other in (linear, Darker()):
        [patches], grids = level_patches([photo], limits, other)
        stock = other(images=[Image.fromarray(photo)], size=limits, return_tensors="pt")
        assert torch.equal(doubled(patches), levels_of(stock, SimpleNamespace(image_processor=other)))
        assert torch.equal(grids, stock["image_grid_thw"]) and grids[0].equal(grid)
        assert not torch.equal(patches, usual)


def test_what_the_model_could_not_know_is_refused(processor: CasaProcessor, photos: Any) -> None:
    for option in ({"image_mean": [0.0] * 3}, {"do_normalize": False}, {"rescale_factor": 1.0}):
        [name] = option
        with pytest.raises(ValueError, match=f"{name} can't be combined with uint8_pixels=True"):
            processor(images=photos["cat"], uint8_pixels=True, **option)
    unusual = Qwen2VLImageProcessorPil(rescale_factor=1 / 127.5)
    with pytest.raises(ValueError, match=r"rescale_factor=0.0078.*Leave uint8_pixels out"):
        level_patches([np.zeros((56, 56, 3), np.uint8)], LIMITS, unusual)


def test_a_prompt_without_images_has_empty_patches(processor: CasaProcessor) -> None:
    inputs = processor(text="nothing", uint8_pixels=True, return_tensors="pt")
    assert inputs["pixel_values"].dtype == torch.uint8 and inputs["pixel_values"].shape == (0, 588)


def test_one_frame_is_made_as_in_a_call(processor: CasaProcessor, photos: Any) -> None:
    """From pixels, a PIL image and a file; with the limit of frames."""
    buffer = BytesIO()
    photos["coffee"].save(buffer, "PNG")
    expected = processor(videos=[[[photos["coffee"]]]], uint8_pixels=True, return_tensors="pt")
    assert expected["image_grid_thw"].prod() * 14 * 14 <= processor.frame_max_pixels
    for form in (photos["coffee"], np.array(photos["coffee"]), buffer.getvalue()):
        made = processor.frame_pixels(form)
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], expected[name]) for name in made)
    with pytest.raises(ValueError, match="max_decoded_pixels=10"):
        processor.frame_pixels(photos["coffee"], MediaPolicy(max_decoded_pixels=10))
    with pytest.raises(ValueError, match="aspect ratio"):
        processor.frame_pixels(np.zeros((5, 2000, 3), np.uint8))


def forms_of(photo: np.ndarray) -> dict[str, Any]:
    turned, opaque = BytesIO(), Image.fromarray(photo).convert("RGBA")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(photo).save(turned, "PNG", exif=exif)
    opaque.putalpha(100)
    return {
        "array": photo,
        "array of channels": np.ascontiguousarray(photo.transpose(2, 0, 1)),
        "array that isn't contiguous": photo[::2, ::-1],
        "tensor": torch.from_numpy(photo),
        "floating-point tensor": torch.from_numpy(photo).permute(2, 0, 1) / 255,
        "grey": photo[..., 0],
        "opacity": np.array(opaque),
        "PIL image": Image.fromarray(photo),
        "palette": Image.fromarray(photo).quantize(16),
        "turned file": turned.getvalue(),
        "path": CAT,
    }


@pytest.mark.parametrize("form", forms_of(np.zeros((4, 4, 3), np.uint8)))
def test_pixels_are_those_of_the_image(photo: np.ndarray, form: str) -> None:
    image = forms_of(photo)[form]
    assert np.array_equal(rgb_pixels(image), np.array(rgb_image(image)))
    if form == "turned file":
        upright = ImageOps.exif_transpose(Image.open(BytesIO(image)))
        assert np.array_equal(rgb_pixels(image), np.array(upright))


def test_decoded_pixels_are_not_copied(photo: np.ndarray) -> None:
    assert rgb_pixels(photo) is photo or np.shares_memory(rgb_pixels(photo), photo)
    tensor = torch.from_numpy(photo)
    assert np.shares_memory(rgb_pixels(tensor), photo)
    with pytest.raises(ValueError, match="values are"):
        rgb_pixels(photo.astype(np.uint16))


def test_arrays_that_torch_does_not_take_are_copied(photo: np.ndarray) -> None:
    """Read-only ones, and views that run backwards."""
    fixed = photo.copy()
    fixed.flags.writeable = False
    backwards = photo[:, ::-1].copy()[:, ::-1]
    for longest in (10**6, 50_000):
        limits = {**LIMITS, "longest_edge": longest}
        expected, *others = (
            level_patches([image], limits, Qwen2VLImageProcessorPil())[0][0] for image in (photo, fixed, backwards)
        )
        assert all(torch.equal(other, expected) for other in others)


def test_a_trained_model_answers_the_same() -> None:
    """The checkpoint that ships, on photographs, as they are and folded; in a conversation's inputs."""
    processor = CasaProcessor.from_pretrained(CHECKPOINT)
    model = CasaForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in the image?"}]}],
        add_generation_prompt=True,
    )
    answers = []
    for folded, options in ((False, {}), (False, {"uint8_pixels": True}), (True, {"uint8_pixels": True})):
        if folded:
            model.fold_patch_embedding()
        inputs = processor(text=text, images=[CAT], return_tensors="pt", **options)
        answers.append(model.generate(**inputs, max_new_tokens=12, do_sample=False))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_a_conversion_keeps_how_the_source_normalises(source: Path, tmp_path: Path) -> None:
    """Only where that isn't what its family's published checkpoints do."""
    convert_checkpoint(source, tmp_path / "usual")
    assert CasaConfig.from_pretrained(tmp_path / "usual").image_mean is None
    shutil.copytree(source, tmp_path / "source")
    file = tmp_path / "source" / "preprocessor_config.json"
    stated = json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    file.write_text(json.dumps(stated))
    convert_checkpoint(tmp_path / "source", tmp_path / "casa")
    convert_checkpoint(tmp_path / "casa", tmp_path / "again", variant="ca")
    for name in ("casa", "again"):
        model = CasaForConditionalGeneration.from_pretrained(tmp_path / name).eval()
        processor = CasaProcessor.from_pretrained(tmp_path / name)
        assert model.config.normalization == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        made = [processor(images=[CAT], size=LIMITS, return_tensors="pt", uint8_pixels=ours) for ours in (False, True)]
        with torch.no_grad():
            plain, levels = (model.model.visual.patch_embed(inputs["pixel_values"]) for inputs in made)
        assert plain.shape == levels.shape and (plain - levels).abs().max() < 0.05 * plain.abs().max()
