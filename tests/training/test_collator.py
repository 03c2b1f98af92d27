# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Batches: packed equals padded equals one by one, budgets, batches without images."""

from __future__ import annotations

import math

import pytest
import torch

from casa_hf import CasaProcessor, convert_checkpoint
from casa_hf.design_space import VARIANTS
from casa_hf.training import CasaDataCollator, PackedDataset
from casa_hf.training.collator import Budget, pack
from casa_hf.training.samples import measure
from examples.tiny_source import build_tiny_helium, build_tiny_source
from tests.clips import picture
from tests.training.helpers import CONVERSATIONS, ask, assert_close, load_model, load_processor, loss_and_gradients

TEXT_ONLY = [ask("How many people are there?", "There are three."), ask("What is it?", "It's either a book or a box.")]


def one_by_one(model, processor, examples):
    """Loss and gradients by the definition: the mean over all answer tokens, each conversation alone."""
    collator = CasaDataCollator(processor, always_image=False)
    total, count, sums = 0.0, 0, {}
    for example in examples:
        batch = collator([example])
        tokens = int((batch["labels"] != -100).sum())
        loss, gradients = loss_and_gradients(model, batch)
        total, count = total + tokens * loss, count + tokens
        for name, gradient in gradients.items():
            sums[name] = sums.get(name, 0) + tokens * (torch.zeros(1) if gradient is None else gradient)
    return total / count, {name: gradient / count for name, gradient in sums.items()}


def check_batches(model, processor, conversations=CONVERSATIONS):
    expected_loss, expected = one_by_one(model, processor, conversations)
    padded = CasaDataCollator(processor)(conversations)
    packed = CasaDataCollator(processor, packing=True)(conversations)
    planned = CasaDataCollator(processor)([conversations[:3], conversations[3:]])
    assert len(padded["input_ids"]) == 4 and "position_ids" not in padded
    assert len(packed["input_ids"]) == 1 and (packed["position_ids"] == 0).sum() == 4
    assert len(planned["input_ids"]) == 2 and (planned["attention_mask"] == 0).any()
    for batch in (padded, packed, planned):
        loss, gradients = loss_and_gradients(model, batch)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert_close(gradients, expected)  # norms and the vision tower compute in float32


@pytest.mark.parametrize("variant", ["casa", "exact"])
def test_packed_padded_and_one_by_one_are_equal(converted, variant):
    folder = converted(variant)
    check_batches(load_model(folder), load_processor(folder))


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_packed_padded_and_one_by_one_are_equal_in_every_variant(converted, variant):
    folder = converted(variant)
    check_batches(load_model(folder), load_processor(folder))


def test_packed_padded_and_one_by_one_are_equal_with_one_axis_of_positions(source_folder, tmp_path):
    helium = build_tiny_helium(tmp_path / "helium")
    folder = convert_checkpoint(helium, tmp_path / "casa", vision_from=source_folder).output
    check_batches(load_model(folder), load_processor(folder))


def test_packed_padded_and_one_by_one_are_equal_with_the_times_of_frames(tmp_path):
    """In prompts and within answers; frames of a video are seen together, over the times between them."""
    source = build_tiny_source(tmp_path / "source", family="qwen3_vl")
    folder = convert_checkpoint(source, tmp_path / "casa", casa_video_history="group").output
    processor = CasaProcessor.from_pretrained(folder, max_pixels=256**2, frame_max_pixels=256**2)
    frames = [picture(number) for number in (5, 90, 200)]
    shown, words = {"type": "video"}, {"type": "text", "text": "A cat at 0.5 seconds."}
    conversations = [
        {
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}],
            "videos": [frames[first:]],
            "video_metadata": {"fps": 2, "frames_indices": list(range(3 - first))},
        }
        for asked, answered, first in (
            ([shown, words], [words], 0),
            ([words], [words, shown, words], 1),
            ([words, shown], [words, words], 1),
            ([shown], [words], 2),
        )
    ]
    check_batches(load_model(folder), processor, conversations)
    batch = CasaDataCollator(processor, packing=True)(conversations)
    of_times = batch["mm_token_type_ids"] == 3
    assert of_times.sum() > 50 and bool((batch["labels"][of_times] == -100).all())


def test_the_text_index_stands_for_four_rows_of_positions(processor, casa_folder):
    model = load_model(casa_folder)
    batch = CasaDataCollator(processor, packing=True)(CONVERSATIONS)
    four_rows = batch["position_ids"].expand(4, -1, -1)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**{**batch, "position_ids": four_rows}).logits)


def test_one_packed_row_anywhere_in_a_batch_is_enough_for_an_index(processor):
    batch = CasaDataCollator(processor, always_image=False)([TEXT_ONLY[:1], TEXT_ONLY])
    own = [len(CasaDataCollator(processor, always_image=False)([example])["input_ids"][0]) for example in TEXT_ONLY]
    assert batch["position_ids"][1].tolist() == [*range(own[0]), *range(own[1])]


def test_the_unseen_image_goes_to_the_shortest_row(processor):
    """Its tokens make the batch no longer."""
    long = ask("What do you see? Say all of it, in as many words as you can find, and then say it again.", "Nothing.")
    plain = CasaDataCollator(processor, always_image=False)([long, *TEXT_ONLY])
    batch = CasaDataCollator(processor)([long, *TEXT_ONLY])
    assert len(batch["image_grid_thw"]) == 1 and batch["input_ids"].shape == plain["input_ids"].shape
    added = (batch["attention_mask"] - plain["attention_mask"]).sum(1)
    assert (added > 0).tolist() == [False, True, False]


@pytest.mark.parametrize("multiple", [1, 7, 8, 64])
def test_the_length_of_a_batch_is_a_multiple(processor, multiple):
    plain = CasaDataCollator(processor, always_image=False)(TEXT_ONLY)["input_ids"]
    padded = CasaDataCollator(processor, always_image=False, pad_to_multiple_of=multiple)(TEXT_ONLY)["input_ids"]
    assert padded.shape[1] == math.ceil(plain.shape[1] / multiple) * multiple
    assert torch.equal(padded[:, : plain.shape[1]], plain)


# ---------------------------------------------------------------- batches without images


@pytest.mark.parametrize(
    ("variant", "packing"),
    [
        ("casa", False),
        ("casa", True),
        ("exact", True),
        ("casa-before", False),
        ("ca-ffn", False),
        ("ca-replace", True),
    ],
)
def test_every_parameter_has_a_gradient_without_any_image(converted, variant, packing):
    folder = converted(variant)
    model, processor = load_model(folder), load_processor(folder)
    plain = CasaDataCollator(processor, packing=packing, always_image=False)(TEXT_ONLY)
    expected_loss, expected = loss_and_gradients(model, plain)
    assert any(gradient is None for gradient in expected.values())  # what this is about
    batch = CasaDataCollator(processor, packing=packing)(TEXT_ONLY)
    assert (batch["labels"] != -100).sum() == (plain["labels"] != -100).sum()
    loss, gradients = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        if expected[name] is None:
            assert not gradient.any(), name
        else:
            assert (gradient - expected[name]).abs().max() <= 1e-12 * expected[name].abs().max(), name


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_every_parameter_has_a_gradient_in_every_family(family, tmp_path):
    from examples.tiny_source import build_tiny_source

    source = build_tiny_source(tmp_path / "source", family=family)
    folder = convert_checkpoint(source, tmp_path / "casa").output
    model, processor = load_model(folder), load_processor(folder)
    for examples in (TEXT_ONLY, CONVERSATIONS):
        _, gradients = loss_and_gradients(model, CasaDataCollator(processor)(examples))
        assert not [name for name, gradient in gradients.items() if gradient is None]


def test_a_batch_with_an_image_gets_no_other(processor):
    batch = CasaDataCollator(processor)(CONVERSATIONS[:2])
    assert len(batch["image_grid_thw"]) == 1


# ---------------------------------------------------------------- budgets


def test_rows_keep_to_both_budgets_and_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.stack(
        [torch.randint(1, 60, (300,), generator=generator), torch.randint(0, 200, (300,), generator=generator)], dim=1
    ).tolist()
    rows = pack(sizes, Budget(100, 250))
    assert sorted(index for row in rows for index in row) == list(range(300))
    for row in rows:
        assert sum(sizes[i][0] for i in row) <= 100 and sum(sizes[i][1] for i in row) <= 250
    lower_bound = max(sum(text for text, _ in sizes) / 100, sum(image for _, image in sizes) / 250)
    assert len(rows) <= 1.35 * lower_bound


def test_each_budget_alone_opens_a_new_row(processor):
    sizes = [measure(processor, example) for example in CONVERSATIONS]
    text = sum(size[0] for size in sizes) - 1
    images = sum(size[1] for size in sizes) - 1
    for budget, rows in (((None, None), 1), ((text, None), 2), ((None, images), 2)):
        collator = CasaDataCollator(processor, True, *budget)
        batch = collator(CONVERSATIONS)
        assert len(batch["input_ids"]) == rows


def test_planned_rows_hold_every_conversation_once(processor):
    sizes = [measure(processor, example) for example in CONVERSATIONS]
    limit = max(text for text, _ in sizes)
    planned = PackedDataset(CONVERSATIONS, processor, max_text_tokens=limit, max_image_tokens=None)
    assert [example for row in planned for example in row] == CONVERSATIONS
    assert (planned.num_text_tokens, planned.num_image_tokens) == tuple(map(sum, zip(*sizes, strict=True)))
    assert len(PackedDataset(CONVERSATIONS, processor)) == 1


def test_conversations_over_the_budget_are_refused_or_dropped_with_a_count(processor, caplog):
    sizes = [measure(processor, example) for example in CONVERSATIONS]
    limit = sizes[3][1] - 1
    fitting = [example for example, (_, images) in zip(CONVERSATIONS, sizes, strict=True) if images <= limit]
    assert 0 < len(fitting) < len(CONVERSATIONS)
    options = {"max_image_tokens": limit, "max_text_tokens": None}
    over = next(size for size in sizes if size[1] > limit)
    with pytest.raises(ValueError, match=f"has {over[1]} image tokens; .* {limit} \\(max_image_tokens\\).*max_pixels"):
        PackedDataset(CONVERSATIONS, processor, **options)
    with pytest.raises(ValueError, match=f"{over[1]} image tokens"):
        CasaDataCollator(processor, **options)(CONVERSATIONS)

    planned = PackedDataset(CONVERSATIONS, processor, over_long="drop", **options)
    assert planned.num_dropped == len(CONVERSATIONS) - len(fitting)
    assert [example for row in planned for example in row] == fitting
    dropping = CasaDataCollator(processor, over_long="drop", **options)
    batch = dropping(CONVERSATIONS)
    expected = CasaDataCollator(processor)(fitting)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert f"Dropped {planned.num_dropped} of 4" in caplog.text


def test_nothing_left_is_an_error(processor):
    with pytest.raises(ValueError, match="None of the 4"):
        PackedDataset(CONVERSATIONS, processor, max_text_tokens=3, over_long="drop")
    with pytest.raises(ValueError, match="PackedDataset"):
        CasaDataCollator(processor, max_text_tokens=3, over_long="drop")(CONVERSATIONS)


def test_wrong_settings_are_refused(processor):
    with pytest.raises(ValueError, match="over_long='cut'"):
        CasaDataCollator(processor, over_long="cut")
    with pytest.raises(ValueError, match="max_text_tokens=0"):
        PackedDataset(CONVERSATIONS, processor, max_text_tokens=0)


def test_an_iterable_has_no_rows_to_plan(processor):
    with pytest.raises(ValueError, match=r"are an iterable, a list_iterator.*list of them.*packing=True"):
        PackedDataset(iter(CONVERSATIONS), processor)
