# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Cutting self-attention: what is cut carries nothing of an image any more, what is left carries it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import ImageOps
from transformers import Qwen2_5_VLForConditionalGeneration

from casa_hf import CasaForConditionalGeneration, CasaProcessor, convert_checkpoint
from examples.tiny_world import cutting
from examples.tiny_world.batches import Batcher
from examples.tiny_world.cutting import cut_mask, memory, questions_of_memory, window_of
from examples.tiny_world.models import build_tokenizer, source_config, write_source
from examples.tiny_world.training import answers_right


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`casa` with two gists, and its batcher."""
    torch.manual_seed(0)
    source = write_source(
        tmp_path_factory.mktemp("source"),
        Qwen2_5_VLForConditionalGeneration(source_config(tokenizer := build_tokenizer())),
        tokenizer,
    )
    folder = convert_checkpoint(source, tmp_path_factory.mktemp("casa") / "model", "casa", num_gist_tokens=2).output
    model = CasaForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    return model, Batcher(CasaProcessor.from_pretrained(folder))


@torch.no_grad()
def logits_after(model, batcher, example, image, mask):
    batch = batcher([example])
    ids = batch["input_ids"][0].tolist()
    if mask is not None:
        floor = torch.finfo(model.dtype).min
        batch["attention_mask"] = torch.zeros(1, 1, len(ids), len(ids)).double().masked_fill(~mask, floor)
    batch.pop("labels")
    end = window_of(ids, model.config.image_token_id, image).stop
    return model(**{**batch, "pixel_values": batch["pixel_values"].double()}, use_cache=False).logits[0, end:]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("image", [0, 1])
def test_what_is_cut_carries_nothing(models, image, backend):
    model, batcher = models
    model.set_attn_implementation(backend)
    example, _ = questions_of_memory(1, 3, "train")[0]
    images = list(example.images)
    images[image] = ImageOps.invert(images[image])
    changed = replace(example, images=tuple(images))
    ids = batcher.encode(example)[0]

    def effect(what):
        mask = None if what is None else cut_mask(ids, model.config, image, what)
        before, after = (logits_after(model, batcher, one, image, mask) for one in (example, changed))
        return float((before - after).abs().max())

    assert effect("window") == 0
    assert effect("gists") > 1e-4  # other text of the window carries the image too
    assert effect(None) > 1e-4
    # Another image's memory stays.
    other = cut_mask(ids, model.config, 1 - image, "window")
    before, after = (logits_after(model, batcher, one, 1, other) for one in (example, changed))
    assert float((before - after).abs().max()) > 1e-4


def test_gists_are_the_placeholder_and_the_gist_tokens(models):
    model, batcher = models
    (example, _) = questions_of_memory(1, 3, "train")[0]
    ids = batcher.encode(example)[0]
    window = window_of(ids, model.config.image_token_id, 0)
    mask = cut_mask(ids, model.config, 0, "gists")
    last = mask[-1].tolist()
    hidden = [index for index, sees in enumerate(last) if not sees]
    assert hidden == [window.start, window.start + 1, window.start + 2]
    assert [ids[index] for index in hidden] == [model.config.image_token_id, *model.config.gist_token_ids]
    assert torch.equal(mask[: window.stop], torch.ones_like(mask).tril()[: window.stop])


def test_nothing_cut_is_the_usual_score(models):
    model, batcher = models
    model = model.float()
    questions = questions_of_memory(20, 2)
    assert all(asked == 0 for _, asked in questions)
    examples = [example for example, _ in questions]
    assert memory(model, batcher, questions, batch_size=7) == sum(answers_right(model, batcher, examples)) / 20


def test_what_a_cut_would_leave_is_refused(models):
    model, batcher = models
    ids = batcher.encode(questions_of_memory(1, 2, "train")[0][0])[0]
    with pytest.raises(ValueError, match="choose one of"):
        cut_mask(ids, model.config, 0, "everything")
    with pytest.raises(ValueError, match="image=1"):
        cut_mask(ids, model.config, 1, "window")
    config = type(model.config)(**{**model.config.to_dict(), "casa_image_updates": "full"})
    with pytest.raises(ValueError, match="full"):
        cut_mask(ids, config, 0, "window")


def test_the_table_of_the_bundled_model_says_what_is_cut(capsys: pytest.CaptureFixture[str]):
    cutting.main(["--questions", "60"])
    _, _, *rows = capsys.readouterr().out.splitlines()
    shares = [[float(cell) for cell in row.strip("| ").split(" | ")] for row in rows]
    assert [row[0] for row in shares] == [2, 3, 4]
    _, whole, gists, window, chance = shares[0]
    assert whole > 90 and window < 15 < gists < whole and chance == 3.3
