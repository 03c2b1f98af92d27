# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where images stand: by token types, by ids, by embeddings; the same rules in `forward` and in `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from casa_hf import CasaForConditionalGeneration
from casa_hf.image_inputs import logger
from tests.helpers_generation import (
    MAIN,
    VARIANTS,
    Image,
    Row,
    batch,
    embedded,
    greedy,
    image_inputs,
    image_places,
    new_model,
    one_shot,
    relative_error,
    shared_model,
    token_ids,
    words,
)
from tests.tiny import END, IMAGE_PAD, START

A, B, C = Image(2, 3, 1), Image(1, 2, 2), Image(3, 1, 3)
MARK = [START, END]
# Placeholders that nobody gave an image for: written by the model, or quoted.
QUOTED: Row = [*words(2, 1), *MARK, 5, A, *words(2, 2), *MARK, B, *words(3, 3), *MARK, 6]
ROWS: list[Row] = [QUOTED, [*words(3, 4), END, *MARK, *words(2, 5)], [C, END, *words(4, 6)]]


def typed(*rows: Row, kind: int = 1) -> dict[str, torch.Tensor]:
    """`batch` with the types that the processor gives: `kind` at the tokens of images alone."""
    inputs = batch(*rows)
    types = torch.zeros_like(inputs["input_ids"])
    for index, row in enumerate(rows):
        padding = types.shape[1] - len(token_ids(row))
        types[index, [padding + place for place in image_places(row)]] = kind
    return {**inputs, "mm_token_type_ids": types}


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_types_say_where_images_stand(variant):
    model, inputs = shared_model(variant), typed(*ROWS)
    with torch.no_grad():
        logits = model(**inputs).logits
    for row, actual in zip(ROWS, logits, strict=True):
        expected = one_shot(model, row)
        assert relative_error(actual[-len(expected) :], expected) < 1e-9
    expected_tokens = [greedy(model, row, 4) for row in ROWS]
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, **settings)[:, -4:]
        assert tokens.tolist() == expected_tokens


def test_placeholders_in_a_completion_are_text_where_a_policy_is_trained():
    """As TRL scores what a policy has written: the prompt's types, and 0 for the completion."""
    model = new_model("casa")
    prompt, completion = typed([A, *words(3, 1)]), torch.tensor([[*words(2, 2), *MARK, END, 7]])
    inputs = {name: prompt[name] for name in ("pixel_values", "image_grid_thw")}
    for name, new in (
        ("input_ids", completion),
        ("attention_mask", torch.ones_like(completion)),
        ("mm_token_type_ids", torch.zeros_like(completion)),
    ):
        inputs[name] = torch.cat([prompt[name], new], dim=1)
    logits = model(**inputs, use_cache=False).logits
    assert relative_error(logits[0], one_shot(model, [A, *words(3, 1), *completion[0].tolist()])) < 1e-9
    logits.sum().backward()
    with pytest.raises(
        ValueError, match=r"The text has 3 image placeholders .token 61.; expected 1, .* Remove the others"
    ):
        model(**{name: value for name, value in inputs.items() if name != "mm_token_type_ids"})


def test_quoted_placeholders_need_no_images():
    model, row = shared_model("casa"), [*words(2, 1), *MARK, *words(2, 2)]
    tokens = model.generate(**typed(row), max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    assert tokens == greedy(model, row, 4)
    with pytest.raises(ValueError, match=r"1 image placeholders .token 61. but 0 images"):
        model.generate(**batch(row), max_new_tokens=4)


def test_placeholders_are_text_unless_types_say_that_images_stand_there():
    """The source's processor gives types too: 1 at each of its placeholders."""
    model = new_model("casa", source_config={"image_token_id": IMAGE_PAD})
    row: Row = [A, *words(2, 1), IMAGE_PAD, 5]
    inputs = typed(row)
    assert relative_error(model(**inputs).logits[0], one_shot(model, row)) < 1e-9
    expected = greedy(model, row, 3)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, -3:].tolist() == expected
    expanded = {**batch([START, *[IMAGE_PAD] * 6, END]), **image_inputs([A])}
    expanded["mm_token_type_ids"] = (expanded["input_ids"] == IMAGE_PAD).int()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"placeholders of the source model.*Use CasaProcessor"):
            call(**expanded)


def test_types_of_another_length_are_refused():
    """Such as those of a prompt to which the beginning of the answer has been added: the places would shift."""
    model, inputs = shared_model("casa"), typed([*words(2, 1), A, 5], words(3, 2))
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, 2), value=1)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"mm_token_type_ids has shape \(2, 5\); expected"):
            call(**inputs)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_types_that_fit_no_images_are_named(count):
    model, inputs = shared_model("casa"), typed(QUOTED)
    inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    inputs["mm_token_type_ids"][0, 3 : 3 + count] = 1
    with pytest.raises(
        ValueError, match=f"mm_token_type_ids have {count} image placeholders?.*; expected 2, one per image"
    ):
        model(**inputs)
    with pytest.raises(ValueError, match=f"{count} image placeholders.*but 2 images"):
        model.generate(**inputs, max_new_tokens=2)


def test_types_may_cover_the_cached_text_or_the_new_text():
    model = shared_model("casa")
    first, second = [A, *words(3, 1)], [*words(2, 2), *MARK, B, *words(2, 3)]
    whole = typed([*first, *second])["mm_token_type_ids"]
    expected, tokens = one_shot(model, [*first, *second]), greedy(model, [*first, *second], 3)
    new = {"input_ids": torch.tensor([token_ids(second)]), **image_inputs([B])}
    ids = torch.tensor([token_ids([*first, *second])])
    for types in (whole, whole[:, -len(token_ids(second)) :]):
        with torch.no_grad():
            cache = model(**typed(first)).cache
            logits = model(**new, cache=cache, mm_token_type_ids=types).logits[0]
            assert relative_error(logits, expected[-len(logits) :]) < 1e-9
            for given in (ids, new["input_ids"]):
                cache = model(**typed(first)).cache
                mask = torch.ones_like(ids)
                inputs = {**new, "input_ids": given, "attention_mask": mask, "mm_token_type_ids": types}
                produced = model.generate(**inputs, cache=cache, max_new_tokens=3, do_sample=False)
                assert produced[0, -3:].tolist() == tokens
    with pytest.raises(ValueError, match=r"mm_token_type_ids has shape \(1, 3\)"):
        model(**new, cache=cache, mm_token_type_ids=whole[:, :3])


# ------------------------------------------------------------------------------------ embedded text


@pytest.mark.parametrize("variant", MAIN)
def test_embedded_images_are_found(variant):
    model, rows = shared_model(variant), [[*words(3, 1), A, *words(2, 2), B, C], [B, 5]]
    inputs = embedded(model, *rows)
    places = inputs.pop("image_positions")
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(logits, model(**inputs, image_positions=places).logits)
        for row, actual in zip(rows, logits, strict=True):
            expected = one_shot(model, row)
            assert relative_error(actual[-len(expected) :], expected) < 1e-9


def test_types_place_images_in_embedded_text_too():
    """Also where placeholders are more than images."""
    model = shared_model("casa")
    inputs = typed(QUOTED)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with torch.no_grad():
        assert relative_error(model(**inputs).logits[0], one_shot(model, QUOTED)) < 1e-9
    produced = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert produced[0].tolist() == greedy(model, QUOTED, 3)
    del inputs["mm_token_type_ids"]
    with pytest.raises(ValueError, match=r"there are 5 such rows; expected 2, .*image_positions of shape .2, 2."):
        model(**inputs)
    with pytest.raises(ValueError, match=r"5 image placeholders.*but 2 images.*image_positions"):
        model.generate(**inputs, max_new_tokens=2)


def test_embedded_images_are_found_where_embeddings_are_on_disk(tmp_path: Path):
    pytest.importorskip("accelerate")
    model, rows = shared_model("casa"), [[*words(3, 1), A, 5], [B, C, *words(2, 2)]]
    model.save_pretrained(tmp_path / "model")
    language_model = "model.language_model"
    parts = ("model.visual", "lm_head", *(f"{language_model}.{part}" for part in ("layers", "norm", "rotary_emb")))
    spread = CasaForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        dtype=torch.float64,
        device_map={**dict.fromkeys(parts, "cpu"), f"{language_model}.embed_tokens": "disk"},
        offload_folder=tmp_path / "disk",
    )
    inputs = embedded(model, *rows)
    del inputs["image_positions"]
    with torch.no_grad():
        assert torch.equal(spread(**inputs).logits, model(**inputs).logits)
    settings = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    assert torch.equal(spread.generate(**inputs, **settings), model.generate(**inputs, **settings))


# ------------------------------------------------------------------------------------ left over, or empty


@pytest.mark.parametrize("variant", MAIN)
def test_grids_left_over_from_the_prompt_are_taken(variant):
    """As by the stock model, whose steps may be given all that the prompt was given, except for pixels."""
    model, inputs = shared_model(variant), typed([A, *words(3, 1)])
    with torch.no_grad():
        cache = model(**inputs).cache
        left_over = {name: inputs[name] for name in ("image_grid_thw", "mm_token_type_ids")}
        steps = [
            torch.tensor([[END]]),
            torch.tensor([words(2, 3)]),
        ]  # what looks like an image, and several tokens
        logits = [model(input_ids=step, cache=cache, **left_over).logits[0] for step in steps]
        row: Row = [A, *words(3, 1), END, *words(2, 3)]
        assert relative_error(torch.cat(logits), one_shot(model, row)[-3:]) < 1e-9
        # Types of all text say that there is no image among the new tokens either.
        types = torch.nn.functional.pad(left_over["mm_token_type_ids"], (0, 5))
        new = torch.tensor([[*MARK]])
        logits = model(input_ids=new, cache=cache, **{**left_over, "mm_token_type_ids": types}).logits[0]
        assert relative_error(logits, one_shot(model, [*row, *MARK])[-2:]) < 1e-9


def test_grids_left_over_are_taken_by_generate():
    model, row = shared_model("casa"), [A, *words(3, 1)]
    cache, inputs = DynamicCache(), typed(row)
    row += model.generate(**inputs, cache=cache, max_new_tokens=3, do_sample=False)[0, -3:].tolist() + words(2, 8)
    later: dict[str, Any] = {"image_grid_thw": inputs["image_grid_thw"], "input_ids": torch.tensor([token_ids(row)])}
    produced = model.generate(**later, cache=cache, max_new_tokens=3, do_sample=False)[0, -3:].tolist()
    assert produced == greedy(model, row, 3)
    row += [*produced, *MARK, 5]
    later["input_ids"] = torch.tensor([token_ids(row)])
    with pytest.raises(ValueError, match="image_grid_thw was given without images"):
        model.generate(**later, cache=cache, max_new_tokens=3)
    del later["image_grid_thw"]
    produced = model.generate(**later, cache=cache, max_new_tokens=3, do_sample=False)[0, -3:].tolist()
    assert produced == greedy(model, row, 3)


def test_no_images_may_be_empty_tensors():
    model, row = shared_model("casa"), words(5, 1)
    pixels = image_inputs([A])["pixel_values"]
    inputs = {**batch(row), "pixel_values": pixels[:0], "image_grid_thw": torch.zeros(0, 3, dtype=torch.long)}
    with torch.no_grad():
        for more in ({}, {"image_positions": torch.zeros(0, 2, dtype=torch.long)}):
            assert torch.equal(model(**inputs, **more).logits, model(**batch(row)).logits)
        only_grid = {name: value for name, value in inputs.items() if name != "pixel_values"}
        assert torch.equal(model(**only_grid).logits, model(**batch(row)).logits)
    for settings in ({}, {"num_beams": 2}, {"prefill_chunk_size": 2}):
        expected = model.generate(**batch(row), max_new_tokens=3, do_sample=False, **settings)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False, **settings), expected)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="pixel_values"):
            call(**{**inputs, "pixel_values": pixels})


def test_no_images_may_be_empty_in_both_forms():
    model = shared_model("casa")
    empty = {"pixel_values": torch.zeros(0, 96), "image_embeds": torch.zeros(0, 64)}
    grids = torch.zeros(0, 3, dtype=torch.long)
    ids = torch.tensor([words(3, 1)])
    assert torch.equal(model(ids, **empty, image_grid_thw=grids).logits, model(ids).logits)


# ------------------------------------------------------------------------------------ frames that nobody calls so


def test_frames_without_types_are_not_silently_taken_for_stills(said):
    model = shared_model("casa")
    frames = typed([A, B, *words(3, 1)], kind=2)
    untyped = {name: value for name, value in frames.items() if name != "mm_token_type_ids"}
    with torch.no_grad():
        assert relative_error(model(**frames).logits, model(**untyped).logits) > 1e-2, "they would be seen otherwise"
    [message] = said
    assert "taken as still images" in message and "pass the mm_token_type_ids" in message
    logger.warning_once.cache_clear()
    model.generate(**untyped, max_new_tokens=2)
    assert said == [message, message]


def test_nothing_is_said_where_it_makes_no_difference_or_is_known(said):
    """Apart, in different rows, with types, or with one history for both."""
    apart = [batch([A, 5, B]), batch([A, 5], [B, 5]), batch([A, *words(2, 1)]), typed([A, B, 5])]
    for inputs in apart:
        shared_model("casa")(**inputs)
        shared_model("casa").generate(**inputs, max_new_tokens=1)
    new_model("casa", casa_video_history="group")(**batch([A, B, 5]))
    assert not said
