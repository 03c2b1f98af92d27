# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The short ways of the tiny world are those of the package: batches, evaluation, the source as `insertion`."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.training import CasaDataCollator, generate_answers
from examples.tiny_world import __main__ as command
from examples.tiny_world import training
from examples.tiny_world.asking import Source
from examples.tiny_world.batches import Batcher
from examples.tiny_world.models import build_tokenizer, source_config, write_source
from examples.tiny_world.protocols import SOURCE, TEXT, Recipe, curriculum, train_source
from examples.tiny_world.training import answers_right, chance, cuts, trapezoid
from examples.tiny_world.world import KEYS, LESSONS, TASKS, examples, standard_questions

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A source of random weights."""
    tokenizer = build_tokenizer()
    model = Qwen2_5_VLForConditionalGeneration(source_config(tokenizer))
    return write_source(tmp_path_factory.mktemp("source"), model, tokenizer)


@pytest.fixture(scope="module")
def processor(source):
    return CasaProcessor.from_source(source)


@pytest.mark.parametrize("task", (TASKS | LESSONS).values(), ids=TASKS | LESSONS)
def test_batches_equal_those_of_the_collator(processor, task):
    found = [task.example(size, "train", index, turns=index + 1) for index in range(2) for size in task.standard]
    batch = Batcher(processor)(found)
    expected = CasaDataCollator(processor, always_image=False)([example.conversation for example in found])
    assert batch.keys() == expected.keys() - {"mm_token_type_ids"}
    for name in batch.keys() - {"pixel_values"}:
        assert torch.equal(batch[name], expected[name]), name
    if found[0].images:
        torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-5)
    assert (batch["labels"] != -100).any(1).all()


def test_conversations_without_images_have_no_pixels(processor):
    example = TASKS["frames"].example(2, "train", 0)
    batch = Batcher(processor)([example.blind])
    assert "pixel_values" not in batch
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert "Frame one:Frame two:What was" in text and "vision" not in text


def test_words_are_tokens():
    tokenizer = build_tokenizer()
    for key in KEYS:
        assert len(tokenizer.tokenize(f"Which pair has {key} in it?")) == 7
    answers = {answer for example in islice(examples("train"), 400) for _, answer in example.turns}
    for answer in answers:
        pair = len(answer) == 2
        assert len(tokenizer.tokenize(answer)) == (2 if pair else len(answer.split()))
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(build_tokenizer().backend_tokenizer.to_str())


def test_the_evaluation_says_what_generation_says(tmp_path):
    """Of a model that has learned a little, and so is sometimes right and sometimes wrong."""
    recipe = Recipe(steps=60, batch_size=32, lr=4e-3, names=1.0)
    source = train_source(tmp_path / "source", [recipe])
    model = CasaForConditionalGeneration.from_pretrained(source, casa_variant="insertion")
    processor = CasaProcessor.from_source(source)
    asked = [LESSONS["name"].example(1, "validation", index) for index in range(60)]
    right = answers_right(model, Batcher(processor), asked, batch_size=7)
    said = generate_answers(
        model, processor, [example.conversation for example in asked], max_new_tokens=6, do_sample=False
    )
    assert right == [answer == example.turns[0][1] for answer, example in zip(said, asked, strict=True)]
    assert any(right) and not all(right)


def test_the_curriculum_goes_from_one_object_to_the_tasks():
    recipe = Recipe(steps=50, batch_size=10, names=0.2, lessons=(0.6, 0.1))
    names = [example.task for example in curriculum(recipe, seed=0)]
    assert len(names) == 500
    assert set(names[:100]) == {"name"}
    lessons = [name in LESSONS for name in names[100:]]
    assert sum(lessons[:150]) > sum(lessons[-150:]) > 0
    assert set(names) == {*TASKS, *recipe.taught}


def test_batches_are_cut_where_they_need_least_padding():
    assert cuts([1, 1, 1, 9, 9, 20]) == (3, 5)
    assert cuts([7, 7]) in [(0, 0), (0, 2), (2, 2), (0, 1), (1, 2), (1, 1)]


def test_cut_batches_have_the_gradients_of_the_whole(source, processor):
    batcher = Batcher(processor)
    found = list(islice(examples("train", tasks=("pairs", "rule", "change", "recall")), 12))
    model = CasaForConditionalGeneration.from_pretrained(source, casa_variant="insertion")
    batch = batcher(found)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    answered, total = training._gradients(model, batcher, found)
    assert answered == int((batch["labels"] != -100).sum())
    assert total == pytest.approx(answered * loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_the_rate_rises_stays_and_falls():
    rates = [trapezoid(step, 100, warmup=0.1, decay=0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)


def test_training_learns_and_writes_a_stock_checkpoint(tmp_path):
    seen = []
    recipe = Recipe(steps=30, batch_size=16, lr=4e-3, names=1.0)
    folder = train_source(tmp_path / "source", [recipe], report=seen.append)
    assert [progress.step for progress in seen] == [30]
    again = train_source(tmp_path / "again", [recipe])
    first, second = (path.joinpath("model.safetensors").read_bytes() for path in (folder, again))
    assert first == second
    # The stock model and the variant that was trained are one: the same answer to the last bit that matters.
    example = LESSONS["name"].example(1, "train", 0)
    inputs = Source(folder).inputs(example.conversation)
    with torch.no_grad():
        stock = Source(folder).model(**inputs).logits[0, -1]
        model = CasaForConditionalGeneration.from_pretrained(folder, casa_variant="insertion")
        batch = Batcher(CasaProcessor.from_source(folder))([example])
        answer = int((batch["labels"][0] != -100).nonzero()[0])
        trained = model(**batch).logits[0, answer - 1]
    torch.testing.assert_close(trained, stock, rtol=1e-4, atol=1e-4)


def test_the_source_begins_with_the_text_model(tmp_path):
    recipe = Recipe(steps=2, batch_size=8, lr=4e-3)
    text = train_source(tmp_path / "text", [recipe], blind=True)
    still = Recipe(steps=1, batch_size=8, lr=0.0)
    source, scratch = (
        train_source(tmp_path / name, [still], text=start) for name, start in (("source", text), ("scratch", None))
    )
    weights, of_text, untrained = (load_file(path / "model.safetensors") for path in (source, text, scratch))
    moved = {name for name, tensor in of_text.items() if not torch.equal(tensor, untrained[name])}
    assert any(".layers.3." in name for name in moved) and not any(name.startswith("visual.") for name in moved)
    for name, tensor in weights.items():
        assert torch.equal(tensor, of_text[name]), name


@pytest.mark.slow
def test_the_command_trains_both_and_writes_their_scores(tmp_path, capfd):
    arguments = [str(tmp_path), "--scale", "0.0005", "--questions", "2"]
    command.main(arguments)
    shown = capfd.readouterr().out
    for name, stages in {"text": len(TEXT), "source": len(SOURCE), "casa": 1}.items():
        assert shown.count(f"{name}: step 1 of 1,") == stages
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    guessing = chance(standard_questions(1)).overall
    assert results["chance"]["overall"] == pytest.approx(guessing, abs=1e-4)
    assert results["questions"] == 2 * len(standard_questions(1))
    assert (tmp_path / "casa" / "model.safetensors").stat().st_size < 6_000_000
    # Only the fusion layers and the vision tower have moved.
    adapted = CasaForConditionalGeneration.from_pretrained(tmp_path / "casa").state_dict()
    source = CasaForConditionalGeneration.from_pretrained(tmp_path / "source", casa_variant="insertion").state_dict()
    moved = {name for name, tensor in source.items() if not torch.equal(tensor, adapted[name])}
    assert moved and all("visual.blocks" in name for name in moved)
