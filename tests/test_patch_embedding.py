# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""8-bit patches: embedded as the stock convolution embeds what the stock processors make of the same pixels, with the
weights as they are and folded; folding follows the weights, and changes nothing that is saved or trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from casa_hf import CasaForConditionalGeneration
from casa_hf.patch_embedding import PatchEmbedding
from tests.helpers_generation import relative_error
from tests.sources import SEVERAL, Case, make_case
from tests.tiny import FAMILIES

TOWERS = [name for name, family in FAMILIES.items() if not family.text_only]
# Of the published checkpoints' preprocessor_config.json.
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PIXELS = 3 * 4 * 4


def statistics(case: Case) -> tuple[Any, Any]:
    return CLIP if case.family in (FAMILIES["qwen2_vl_text"], FAMILIES["qwen2_5_vl_text"]) else HALF


def random_levels(patches: int, frames: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(patches)
    return torch.randint(0, 256, (patches, frames * PIXELS), generator=generator, dtype=torch.uint8)


def normalized(levels: Tensor, mean: Any, std: Any) -> Tensor:
    """What a stock processor makes of these pixels: (patches, 2 frames), in float64."""
    pixels = levels.numpy().reshape(len(levels), 3, -1, 4, 4) / 255.0
    pixels = (pixels - np.reshape(mean, (3, 1, 1, 1))) / np.reshape(std, (3, 1, 1, 1))
    return torch.from_numpy(np.repeat(pixels, 2 // pixels.shape[2], axis=2).reshape(len(levels), -1))


def with_levels(case: Case, frames: int = 1) -> Tensor:
    """8-bit patches for the images of a case, whose pixels become the same ones, normalised."""
    levels = random_levels(len(case.pixels), frames)
    case.pixels = normalized(levels, *statistics(case))
    return levels


@pytest.mark.parametrize("folded", [False, True], ids=["as they are", "folded"])
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("family", TOWERS)
def test_8_bit_patches_are_embedded_as_normalised_ones(family: str, frames: int, folded: bool) -> None:
    """Of one frame twice, and of two; by the stock convolution, in the numbers of the family's published processor."""
    case = make_case(family, "casa")
    levels = with_levels(case, frames)
    if folded:
        case.model.fold_patch_embedding()
    with torch.no_grad():
        expected = case.source.model.visual.patch_embed(case.pixels)
        actual = case.model.model.visual.patch_embed(levels)
        single = case.model.float().model.visual.patch_embed(levels)
    assert relative_error(actual, expected) < 1e-13
    assert single.dtype == torch.float32 and relative_error(single.double(), expected) < 2e-6


@pytest.mark.parametrize("folded", [False, True], ids=["as they are", "folded"])
@pytest.mark.parametrize("family", ["qwen2_5_vl_text", "qwen3_vl_text"])
def test_a_model_says_the_same_to_8_bit_patches(family: str, folded: bool) -> None:
    """Logits and generated tokens; several images, in groups and not."""
    case = make_case(family, "casa")
    levels = with_levels(case)
    if folded:
        case.model.fold_patch_embedding()
    prompt = {"input_ids": torch.tensor([SEVERAL]), "image_grid_thw": case.grids}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        expected, actual = (case.model(**prompt, pixel_values=pixels).logits for pixels in (case.pixels, levels))
        texts = [case.model.generate(**prompt, pixel_values=pixels, **options) for pixels in (case.pixels, levels)]
    assert relative_error(actual, expected) < 1e-10
    assert torch.equal(*texts) and texts[0].shape[1] == len(SEVERAL) + 6


def test_8_bit_patches_take_an_eighth_of_the_bytes() -> None:
    levels = random_levels(10)
    stock = normalized(levels, *CLIP).float()
    assert 8 * levels.nbytes == stock.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_folding_rounds_no_more_than_half_precision_does(dtype: torch.dtype) -> None:
    """On patches that are bright and even, as those of photographs are, and with a bias: constants cancel there."""
    generator = torch.Generator().manual_seed(3)
    stock = nn.Conv3d(3, 64, (2, 14, 14), stride=(2, 14, 14))
    with torch.no_grad():
        stock.weight.copy_(0.02 * torch.randn(stock.weight.shape, generator=generator))
        stock.weight.add_(0.02 * torch.randn(64, 3, 1, 1, 1, generator=generator))
    stock = stock.to(dtype)
    brightness = torch.randint(20, 236, (400, 1), generator=generator)
    levels = (brightness + torch.randint(-20, 21, (400, 588), generator=generator)).to(torch.uint8)
    pixels = levels.numpy().reshape(400, 3, 1, 14, 14) / 255.0
    pixels = (pixels - np.reshape(CLIP[0], (3, 1, 1, 1))) / np.reshape(CLIP[1], (3, 1, 1, 1))
    patches = torch.from_numpy(np.repeat(pixels, 2, axis=2))
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(patches).flatten(1)
        plain = stock(patches.to(dtype)).flatten(1)
        embedding = PatchEmbedding(stock, *CLIP).eval()
        embedding.fold()
        folded = embedding(levels)
    assert folded.dtype == dtype

    def rms(actual: Tensor) -> float:
        return float((actual.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    assert rms(folded) < 1.25 * rms(plain) < 0.01


class Kernels(TorchDispatchMode):
    """Names of the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_folded_patches_take_a_cast_a_difference_and_a_product() -> None:
    model = make_case("qwen3_vl_text", "casa").model
    model.fold_patch_embedding()
    levels = random_levels(6)
    with torch.no_grad(), Kernels() as kernels:
        model.model.visual.patch_embed(levels)
    assert kernels.names == ["_to_copy", "sub_", "addmm"]


@pytest.mark.parametrize("frames", [1, 2])
def test_training_reaches_the_weights_themselves(frames: int) -> None:
    """Folded or not, in training mode or not: the gradients are those of the normalised patches."""
    case = make_case("qwen3_vl_text", "casa")
    levels = with_levels(case, frames)
    embedding = case.model.model.visual.patch_embed
    embedding.fold()
    gradients = []
    for training, patches in ((True, case.pixels), (True, levels), (False, levels)):
        embedding.train(training).zero_grad()
        output = embedding(patches)
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in embedding.parameters()])
    expected, *others = gradients
    for other in others:
        for actual, own in zip(other, expected, strict=True):
            assert relative_error(actual, own) < 1e-12


def test_training_the_bias_alone_reaches_it() -> None:
    case = make_case("qwen3_vl_text", "casa")
    levels = with_levels(case)
    embedding = case.model.model.visual.patch_embed
    embedding.fold()
    embedding.proj.weight.requires_grad_(False)
    embedding(levels).sum().backward()
    assert torch.allclose(embedding.proj.bias.grad, torch.full_like(embedding.proj.bias, len(levels)))


def test_folding_in_inference_mode_leaves_weights_that_can_be_trained() -> None:
    model = make_case("qwen2_5_vl_text", "casa").model
    embedding = model.model.visual.patch_embed
    with torch.inference_mode():
        embedding.fold()
    changed_in_place(model)
    with torch.no_grad():
        assert embedding(random_levels(3)).isfinite().all()


def changed_in_place(model: Any) -> Any:
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight.mul_(1.5)
    return model


def with_another_bias(model: Any) -> Any:
    with torch.no_grad():
        model.model.visual.patch_embed.proj.bias.add_(1)
    return model


def with_other_numbers(model: Any) -> Any:
    model.model.visual.patch_embed.proj.weight.data = 2 * model.model.visual.patch_embed.proj.weight.data
    return model


def loaded_again(model: Any) -> Any:
    weights = {name: 2 * tensor for name, tensor in model.state_dict().items() if "patch_embed" in name}
    model.load_state_dict(weights, strict=False)
    return model


def assigned(model: Any) -> Any:
    weights = {name: 2 * tensor for name, tensor in model.state_dict().items() if "patch_embed" in name}
    model.load_state_dict(weights, strict=False, assign=True)
    return model


def trained_behind_its_back(model: Any) -> Any:
    model.train()
    model.model.visual.patch_embed.proj.weight.data.mul_(1.5)
    return model.eval()


def moved(model: Any) -> Any:
    return model.to(torch.float32).to(torch.float64)


def copied(model: Any) -> Any:
    return changed_in_place(copy.deepcopy(model))


CHANGES = [
    changed_in_place,
    with_another_bias,
    with_other_numbers,
    loaded_again,
    assigned,
    trained_behind_its_back,
    moved,
    copied,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_folded_weights_follow_the_weights(change: Any) -> None:
    case = make_case("qwen3_vl_text", "casa")
    levels = with_levels(case)
    case.model.fold_patch_embedding()
    with torch.no_grad():
        before = case.model.model.visual.patch_embed(levels)
        embedding = change(case.model).model.visual.patch_embed
        actual, expected = embedding(levels), embedding(case.pixels)
    assert relative_error(actual, expected) < 1e-13
    assert change is moved or relative_error(before, expected) > 0.1


def test_recorded_kernels_find_weights_that_were_folded_again() -> None:
    model = make_case("qwen2_5_vl_text", "casa").model
    embedding = model.model.visual.patch_embed
    embedding.fold()
    held = embedding.folded_frame.data_ptr()
    with torch.no_grad():
        changed_in_place(model)
        embedding(random_levels(3))
    assert embedding.folded_frame.data_ptr() == held


def test_a_folded_model_saves_its_weights(tmp_path: Path) -> None:
    """Names and values; what is loaded again can be folded at once."""
    case = make_case("qwen2_5_vl_text", "casa")
    levels = with_levels(case)
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    case.model.fold_patch_embedding()
    case.model.save_pretrained(tmp_path)
    plain = CasaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    folded = CasaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64, fold_patch_embedding=True)
    for model in (case.model, plain, folded):
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert plain.model.visual.patch_embed.folded_frame is None
    assert folded.model.visual.patch_embed.folded_frame is not None
    with torch.no_grad():
        texts = [model.model.visual.patch_embed(levels) for model in (case.model, plain, folded)]
    assert torch.equal(texts[0], texts[2]) and relative_error(texts[1], texts[0]) < 1e-13
    folded.unfold_patch_embedding()
    assert folded.model.visual.patch_embed.folded_frame is None
    with torch.no_grad():
        assert torch.equal(folded.model.visual.patch_embed(levels), texts[1])


def test_a_configuration_says_how_images_are_normalised() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    case = make_case("qwen2_5_vl_text", "casa", image_mean=list(mean), image_std=list(std))
    levels = random_levels(5)
    embedding = case.model.model.visual.patch_embed
    with torch.no_grad():
        expected = embedding(normalized(levels, mean, std))
        assert relative_error(embedding(levels), expected) < 1e-13
    again = type(case.model.config).from_dict(case.model.config.to_dict())
    assert again.normalization == (mean, std)
    for wrong in ({"image_mean": [0.5, 0.5]}, {"image_std": [0.5, 0.0, 0.5]}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*preprocessor_config.json"):
            make_case("qwen2_5_vl_text", "casa", **wrong)


@pytest.mark.parametrize(
    "pixels, message",
    [
        (torch.zeros(60, 95, dtype=torch.uint8), r"shape \(60, 95\).*expected \(patches, 96 or 48\)"),
        (torch.zeros(60, 48), r"shape \(60, 48\) and dtype torch.float32; expected \(patches, 96\)"),
        (torch.zeros(60, 96, dtype=torch.long), "dtype torch.int64; expected normalised patches"),
        (torch.zeros(60, 3, 32), r"shape \(60, 3, 32\)"),
    ],
    ids=["8-bit width", "floating-point frame", "integers", "dimensions"],
)
def test_patches_of_another_form_are_refused(pixels: Tensor, message: str) -> None:
    model = make_case("qwen2_5_vl_text", "casa").model
    with pytest.raises(ValueError, match=message):
        model.get_image_features(pixels, torch.tensor([[1, 6, 10]]))


def test_weights_that_are_not_at_hand_are_not_folded() -> None:
    """On the meta device, and behind an adapter, by which 8-bit patches go all the same."""
    with torch.device("meta"):
        empty = CasaForConditionalGeneration(FAMILIES["qwen2_5_vl_text"].casa_config())
    with pytest.raises(ValueError, match="can't be folded"):
        empty.fold_patch_embedding()

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module):
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, patches: Tensor) -> Tensor:
            return 3 * self.base(patches)

    case = make_case("qwen2_5_vl_text", "casa")
    levels = with_levels(case)
    embedding = case.model.model.visual.patch_embed
    embedding.fold()
    embedding.proj = Adapter(embedding.proj)
    assert embedding(levels).requires_grad
    with torch.no_grad():
        assert relative_error(embedding(levels), embedding(case.pixels)) < 1e-13
    with pytest.raises(ValueError, match="adapter"):
        embedding.fold()


def test_a_folded_embedding_compiles_to_one_graph(fresh_compiler: None) -> None:
    case = make_case("qwen2_5_vl_text", "casa")
    levels = with_levels(case)
    case.model.fold_patch_embedding()
    embedding = case.model.model.visual.patch_embed
    compiled = torch.compile(embedding, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(levels), embedding(levels))
        assert torch.equal(compiled(levels[:7]), embedding(levels[:7]))
