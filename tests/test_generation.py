# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Every way to generate gives what whole forwards, one per token, give; what doesn't work is refused by name."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
    TextIteratorStreamer,
)
from transformers.cache_utils import QuantizedCache

from casa_hf.transformers_versions import is_older_than
from examples.tiny_source import build_tokenizer
from tests.helpers_generation import (
    MAIN,
    VARIANTS,
    Image,
    Row,
    batch,
    embedded,
    greedy,
    image_inputs,
    images_of,
    new_model,
    one_shot,
    relative_error,
    shared_model,
    token_ids,
    words,
)
from tests.tiny import END, IMAGE_PAD, START, VOCABULARY

STEPS = 6
A, B, C, D = Image(2, 3, 1), Image(1, 2, 2), Image(3, 1, 3), Image(2, 2, 4)
ONE: Row = [*words(3, 1), A, *words(4, 2), B, C, *words(5, 3)]
# Several images of different sizes, two of them one group; none; an image first; images last.
ROWS: list[Row] = [ONE, words(6, 4), [B, *words(3, 5)], [*words(9, 6), C, A]]


def generate(model: Any, inputs: dict[str, Any], **settings: Any) -> torch.Tensor:
    """(rows, STEPS) new tokens."""
    sequences = model.generate(**inputs, **{"max_new_tokens": STEPS, "do_sample": False, **settings})
    return sequences[:, -settings.get("max_new_tokens", STEPS) :]


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def features(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    return model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output


# ------------------------------------------------------------------------------------ greedy, whatever the form

FORMS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "as it comes": lambda model: batch(*ROWS),
    "no cache": lambda model: {**batch(*ROWS), "use_cache": False},
    "no mask, padding is found by its id": lambda model: without(batch(*ROWS), "attention_mask"),
    "static": lambda model: {**batch(*ROWS), "cache_implementation": "static"},
    "static of the caller": lambda model: {
        **batch(*ROWS),
        "cache": StaticCache(config=model.config, max_cache_len=40),
    },
    "dynamic of the caller": lambda model: {**batch(*ROWS), "cache": DynamicCache(config=model.config)},
    "dynamic without a config": lambda model: {**batch(*ROWS), "cache": DynamicCache()},
    "embedded": lambda model: embedded(model, *ROWS),
    "embedded, static": lambda model: {**embedded(model, *ROWS), "cache_implementation": "static"},
    "embedded, no cache": lambda model: {**embedded(model, *ROWS), "use_cache": False},
    "places of the images given": lambda model: {
        **batch(*ROWS),
        "image_positions": (batch(*ROWS)["input_ids"] == END).nonzero(),
    },
    "one tensor of features": lambda model: {
        **without(batch(*ROWS), "pixel_values"),
        "image_embeds": torch.cat(features(model, batch(*ROWS))),
    },
    "one tensor of features per image": lambda model: {
        **without(batch(*ROWS), "pixel_values"),
        "image_embeds": list(features(model, batch(*ROWS))),
    },
    "positions given": lambda model: {
        **batch(*ROWS),
        "position_ids": (batch(*ROWS)["attention_mask"].cumsum(-1) - 1).clamp(min=0),
    },
    **{
        f"prefill in chunks of {size}": lambda model, size=size: {**batch(*ROWS), "prefill_chunk_size": size}
        for size in (1, 2, 3, 5, 64)
    },
    "features, prefill in chunks": lambda model: {
        **without(batch(*ROWS), "pixel_values"),
        "image_embeds": torch.cat(features(model, batch(*ROWS))),
        "prefill_chunk_size": 4,
    },
    "static, prefill in chunks": lambda model: {
        **batch(*ROWS),
        "cache_implementation": "static",
        "prefill_chunk_size": 4,
    },
}


@pytest.fixture(scope="module")
def truth() -> dict[str, list[list[int]]]:
    return {variant: [greedy(shared_model(variant), row, STEPS) for row in ROWS] for variant in VARIANTS}


def test_the_rows_tell_mistakes_apart(truth):
    """The answers depend on every image, so that the comparisons below can fail."""
    for variant in VARIANTS:
        model = shared_model(variant)
        assert len({tuple(answer) for answer in truth[variant]}) == len(ROWS)
        for changed in ([*words(3, 1), A, *words(4, 2), B, D, *words(5, 3)], [*ONE[:7], *ONE[8:]]):
            assert relative_error(one_shot(model, changed)[-1], one_shot(model, ONE)[-1]) > 1e-2
    assert len({str(answers) for answers in truth.values()}) == len(VARIANTS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", MAIN)
def test_greedy_in_a_padded_batch_equals_each_row_alone(variant, form, truth):
    model = shared_model(variant)
    assert generate(model, FORMS[form](model)).tolist() == truth[variant]


@pytest.mark.parametrize("history", ["latest", "group"])
def test_frames_keep_their_own_history(history):
    """Marks of kind 2 are frames: B and C, adjacent, are one window only if frames are seen as groups."""
    model = new_model("casa", casa_video_history=history)
    inputs = batch(ONE, [B, *words(3, 5)])
    types = 2 * (inputs["input_ids"] == END).long()
    alone = torch.tensor([[2 * (token == END) for token in token_ids(ONE)]])
    row = list(ONE)
    for _ in range(STEPS):
        padded = nn.functional.pad(alone, (0, len(row) - len(ONE)))
        row.append(int(one_shot(model, row, mm_token_type_ids=padded)[-1].argmax()))
    assert (row[-STEPS:] == greedy(model, ONE, STEPS)) == (history == "group")
    for settings in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}):
        assert generate(model, {**inputs, "mm_token_type_ids": types}, **settings)[0].tolist() == row[-STEPS:]


# ------------------------------------------------------------------------------------ sampling and beams


def repeated(times: int) -> list[Row]:
    return [row for row in ROWS for _ in range(times)]


@pytest.mark.parametrize("variant", MAIN)
def test_sampling_equals_sampling_without_a_cache(variant):
    model, samples = shared_model(variant), []
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}):
        torch.manual_seed(7)
        samples.append(generate(model, batch(*ROWS), do_sample=True, temperature=1.5, top_k=0, **settings))
    assert all(torch.equal(samples[0], other) for other in samples[1:])
    assert samples[0].tolist() != generate(model, batch(*ROWS)).tolist()


@pytest.mark.parametrize("form", ["pixels", "features", "embedded"])
def test_return_sequences_equal_rows_written_out(form):
    model = shared_model("casa")
    inputs = batch(*ROWS)
    if form == "features":
        inputs = {**without(inputs, "pixel_values"), "image_embeds": torch.cat(features(model, inputs))}
    if form == "embedded":
        inputs = embedded(model, *ROWS)
    torch.manual_seed(3)
    expanded = generate(model, inputs, do_sample=True, num_return_sequences=3)
    torch.manual_seed(3)
    assert torch.equal(expanded, generate(model, batch(*repeated(3)), do_sample=True))


def beam_search(model: Any, row: Row, beams: int) -> list[list[int]]:
    """Beam search without ends of sequence: hypotheses by falling log probability, each scored by `one_shot`."""
    hypotheses: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(STEPS):
        grown = []
        for score, tokens in hypotheses:
            steps = one_shot(model, [*row, *tokens])[-1].log_softmax(-1).tolist()
            grown += [(score + step, [*tokens, token]) for token, step in enumerate(steps)]
        hypotheses = sorted(grown, reverse=True)[:beams]
    return [tokens for _, tokens in hypotheses]


@pytest.mark.parametrize("variant", MAIN)
def test_beams_equal_a_search_by_hand(variant):
    model = shared_model(variant)
    expected = [tokens for row in ROWS for tokens in beam_search(model, row, 4)[:2]]
    beams = {"num_beams": 4, "num_return_sequences": 2}
    for inputs in (
        batch(*ROWS),
        {**batch(*ROWS), "prefill_chunk_size": 4},
        {**batch(*ROWS), "cache_implementation": "static"},
        embedded(model, *ROWS),
    ):
        assert generate(model, inputs, **beams).tolist() == expected


def test_sampled_beams_equal_those_without_a_cache():
    model, samples = shared_model("casa"), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        beams = {"num_beams": 3, "num_return_sequences": 3, "do_sample": True}
        samples.append(generate(model, batch(*ROWS), use_cache=use_cache, **beams))
    assert torch.equal(*samples)


# ------------------------------------------------------------------------------------ several tokens per step


class Script(LogitsProcessor):
    """Forces the tokens of some steps."""

    def __init__(self, prompt_length: int, forced: dict[int, int]):
        self.prompt_length, self.forced = prompt_length, forced

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.forced.get(input_ids.shape[1] - self.prompt_length)
        if token is None:
            return scores
        return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([token]), 0.0)


def fed_tokens(model: Any, inputs: dict[str, Any], **settings: Any) -> tuple[list[int], list[list[int]]]:
    """New tokens of a row, and the ids of each forward, less the prompt."""
    calls: list[list[int]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        produced = generate(model, inputs, **settings)
    finally:
        hook.remove()
    prompt_length = inputs["input_ids"].shape[1]
    return produced[0].tolist(), [calls[0][prompt_length:], *calls[1:]]


MARKS = {1: START, 2: END, 4: END, 5: START, 6: START, 7: END}


@pytest.mark.parametrize("variant", MAIN)
def test_generated_marks_are_text(variant):
    model, steps = shared_model(variant), 10
    expected = [greedy(model, row, steps, MARKS) for row in ROWS]
    inputs = batch(*ROWS)
    script = [Script(inputs["input_ids"].shape[1], MARKS)]
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}):
        produced = generate(model, inputs, max_new_tokens=steps, logits_processor=script, **settings)
        assert produced.tolist() == expected
    assert any(MARKS.get(step) != token for step, token in enumerate(expected[0]))


@pytest.mark.parametrize("variant", MAIN)
def test_lookup_may_propose_marks_and_they_are_text(variant):
    """The prompt repeats the words before an image, so the marks after them are proposed, rejected and accepted."""
    model, steps, before, after = shared_model(variant), 12, words(3, 1), words(3, 2)
    row: Row = [*before, A, *after, *before]
    inputs = batch(row)
    repeat = dict(enumerate([START, END, *after]))
    later = dict(enumerate([*words(2, 3), *before, START, END]))
    for forced in ({}, repeat, later):
        script = [Script(inputs["input_ids"].shape[1], forced)]
        settings = {"prompt_lookup_num_tokens": 4, "max_new_tokens": steps, "logits_processor": script}
        produced, calls = fed_tokens(model, inputs, **settings)
        assert produced == greedy(model, row, steps, forced)
        if forced == later:
            assert any(END in call and len(call) > 1 for call in calls[1:]), "a later call proposes marks"
        else:
            assert END in calls[0], "the first call proposes marks beside its image"
        if forced == repeat:
            assert len(calls) <= steps - 4


@pytest.mark.parametrize("variant", MAIN)
@pytest.mark.parametrize("seed", [0, 5, 6])
def test_assisted_decoding_with_a_casa_assistant(variant, seed):
    """Assistants that agree with the model (seed 0), or don't."""
    model, assistant, steps = shared_model(variant), new_model(variant, seed=seed), 12
    assistant.generation_config.assistant_confidence_threshold = 0
    produced, calls = fed_tokens(model, batch(ONE), assistant_model=assistant, max_new_tokens=steps)
    assert produced == greedy(model, ONE, steps)
    if seed == 0:
        assert len(calls) < steps / 2, "the assistant sees the images too, or its tokens would be rejected"


@pytest.mark.parametrize("seed", [5, 6])
def test_assisted_decoding_of_a_prompt_that_ends_with_an_image(seed):
    model, row = shared_model("casa"), [*words(3, 1), A]
    produced = generate(model, batch(row), assistant_model=new_model("casa", seed=seed))
    assert produced[0].tolist() == greedy(model, row, STEPS)


def test_assisted_decoding_with_a_text_only_assistant():
    model = shared_model("casa")
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    assistant = Qwen2ForCausalLM(config).double().eval()
    assistant.generation_config.eos_token_id = None
    produced = generate(model, batch(ONE), assistant_model=assistant)
    assert produced[0].tolist() == greedy(model, ONE, STEPS)


def test_speculative_sampling_accepts_what_an_equal_assistant_proposes():
    model = shared_model("casa")
    assistant = new_model("casa")
    assistant.generation_config.assistant_confidence_threshold = 0
    torch.manual_seed(0)
    settings = {"do_sample": True, "assistant_model": assistant, "max_new_tokens": 12}
    assert len(fed_tokens(model, batch(ONE), **settings)[1]) < 6


def test_source_placeholders_may_be_generated_and_proposed():
    """An id that is refused in a prompt is nothing but an unlucky word when the model itself produces it."""
    source = {"image_token_id": IMAGE_PAD}
    model = new_model("casa", source_config=source)
    assert model.config.placeholder_token_ids == (IMAGE_PAD,)
    truth_model = shared_model("casa")
    forced = {0: IMAGE_PAD, 2: IMAGE_PAD}
    script = [Script(len(token_ids(ONE)), forced)]
    expected = greedy(truth_model, ONE, STEPS, forced)
    for settings in ({}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": truth_model}):
        produced = generate(model, batch(ONE), logits_processor=script, **settings)
        assert produced[0].tolist() == expected


# ------------------------------------------------------------------------------------ other ways


def test_streamer_yields_the_text_as_it_comes():
    model, tokenizer = shared_model("casa"), build_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(target=generate, args=(model, batch(ONE)), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(greedy(model, ONE, STEPS))
    assert len(pieces) > 1


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_classifier_free_guidance(negative, use_cache):
    """Guidance contrasts the prompt with its last token, or with another prompt, which sees no image."""
    model, scale = shared_model("casa"), 1.7
    other = [*words(2, 8), START, END, *words(2, 9)] if negative else token_ids(ONE)[-1:]
    row, unconditional = list(ONE), list(other)
    for _ in range(STEPS):
        guided = one_shot(model, row)[-1].log_softmax(-1)
        base = one_shot(model, unconditional)[-1].log_softmax(-1)
        token = int((base + scale * (guided - base)).argmax())
        row.append(token)
        unconditional.append(token)
    assert row[-STEPS:] != greedy(model, ONE, STEPS)
    prompts = {"negative_prompt_ids": torch.tensor([other])} if negative else {}
    produced = generate(model, batch(ONE), guidance_scale=scale, use_cache=use_cache, **prompts)
    assert produced[0].tolist() == row[-STEPS:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantized_cache_rounds_text_and_leaves_images_exact(variant):
    """The same as rounding the text's keys/values by hand after each step, with the scales of the first."""
    model = shared_model(variant)
    try:
        cache = QuantizedCache(backend="fp8", config=model.config)
    except ValueError:
        pytest.skip("this version of Transformers has no quantized cache that runs here")

    scales: dict[tuple[int, str], torch.Tensor] = {}
    plain = DynamicCache(config=model.config)
    inputs, ids = without(batch(ONE), "attention_mask"), []
    with torch.no_grad():
        for step in range(STEPS):
            fed = inputs if step == 0 else {"input_ids": torch.tensor([ids[-1:]])}
            ids.append(int(model(**fed, cache=plain).logits[0, -1].argmax()))
            for index, layer in enumerate(plain.layers):
                for name in ("keys", "values"):
                    states = getattr(layer, name).float()
                    scale = scales.setdefault((index, name), states.abs().amax() / 448)
                    setattr(layer, name, ((states / scale).to(torch.float8_e4m3fn).float() * scale).double())
    assert generate(model, batch(ONE), cache=cache)[0].tolist() == ids
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    assert generate(model, batch(ONE), **settings)[0].tolist() == ids


def test_hidden_states_and_attentions_of_each_step():
    model = new_model("casa", attn_implementation="eager")
    settings = {"output_attentions": True, "output_hidden_states": True, "output_logits": True}
    output = model.generate(
        **without(batch(ONE), "attention_mask"),
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        **settings,
    )
    row = [*ONE, *output.sequences[0, -3:].tolist()]
    logits = one_shot(shared_model("casa"), row)
    assert relative_error(torch.stack(output.logits, 1)[0], logits[-4:-1]) < 1e-6
    assert [len(step) for step in output.hidden_states] == [4, 4, 4]
    assert [len(step) for step in output.attentions] == [3, 3, 3]
    assert [step[0].shape[-1] for step in output.attentions] == [len(token_ids(ONE)) + i for i in range(3)]


@pytest.mark.parametrize("variant", ["casa", "ca-shared", "casa-before", "exact", "insertion"])
def test_attentions_of_assisted_decoding_are_those_of_greedy_search(variant):
    """One tuple per token, each as if the token had been decoded alone."""
    model = new_model(variant, attn_implementation="eager")
    row = [*words(3, 1), A, *words(3, 2), *words(3, 1)]
    settings = {"max_new_tokens": 5, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    lookup = {"prompt_lookup_num_tokens": 2}
    plain, assisted = (model.generate(**batch(row), **settings, **way) for way in ({}, lookup))
    assert torch.equal(plain.sequences, assisted.sequences)
    assert len(plain.attentions) == len(assisted.attentions) == 5
    for step, other in zip(plain.attentions, assisted.attentions, strict=True):
        for weights, others in zip(step, other, strict=True):
            assert relative_error(others, weights) < 1e-9


def test_attentions_that_assisted_decoding_cannot_return_are_refused_by_name():
    settings = {"prompt_lookup_num_tokens": 2, "output_attentions": True, "return_dict_in_generate": True}
    with pytest.raises(ValueError, match=r"'sdpa' doesn't return.*set_attn_implementation\(\"eager\"\)"):
        shared_model("casa").generate(**batch(ONE), max_new_tokens=3, **settings)
    replaced = new_model("casa-replace", attn_implementation="eager")
    with pytest.raises(NotImplementedError, match=r"no self-attention.*Leave output_attentions out"):
        replaced.generate(**batch(ONE), max_new_tokens=3, **settings)
    tokens = generate(replaced, batch(ONE), output_attentions=True, return_dict_in_generate=False)
    assert tokens[0].tolist() == greedy(replaced, ONE, STEPS)


# ------------------------------------------------------------------------------------ no state outside the cache


def test_two_interleaved_generations_dont_touch_each_other():
    """Two streams of different batch sizes take turns on one model, one token at a time."""
    model = shared_model("casa")
    streams = [ROWS, [[*words(2, 30), D, *words(3, 31)]]]
    caches: list[Any] = [None, None]
    produced: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for step in range(STEPS):
            for index, rows in enumerate(streams):
                fed = batch(*rows) if step == 0 else {"input_ids": produced[index][-1]}
                output = model(**fed, cache=caches[index])
                caches[index] = output.cache
                produced[index].append(output.logits[:, -1:].argmax(-1))
    for rows, tokens in zip(streams, produced, strict=True):
        assert torch.cat(tokens, 1).tolist() == [greedy(model, row, STEPS) for row in rows]


def test_generations_in_threads_dont_touch_each_other(truth):
    model = shared_model("casa")
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(generate, model, batch(row)) for row in ROWS for _ in range(2)]
    for index, result in enumerate(results):
        assert result.result()[0].tolist() == truth["casa"][index // 2]


def test_a_large_batch_leaves_nothing_behind():
    model = new_model("casa")
    before = {name: value for name, value in vars(model.model.language_model).items() if name[0] != "_"}
    fresh = one_shot(model, ONE)
    generate(model, batch(*ROWS), num_beams=3)
    assert torch.equal(one_shot(model, ONE), fresh)
    with torch.no_grad():
        assert torch.equal(model(**without(batch(ONE), "attention_mask")).logits[0], fresh)
    assert before == {name: value for name, value in vars(model.model.language_model).items() if name[0] != "_"}


# ------------------------------------------------------------------------------------ several turns on one cache

TURNS: list[list[Row]] = [
    [[*words(3, 1), A, *words(2, 2)], words(4, 11)],
    [[B, C, *words(2, 3)], [D, *words(2, 13)]],
    [[*words(3, 4), D, *words(1, 5)], [*words(2, 14), A, B, *words(1, 15)]],
    [words(3, 6), [C, *words(3, 16)]],
]


# Transformers itself can't continue a filled cache in these ways: not at all, or not in its older versions.
REFUSABLE = {"lookup": "assisted|prompt_lookup"}
if is_older_than(5, 21):
    REFUSABLE["in chunks"] = "prefill_chunk_size"


@pytest.mark.parametrize("images", ["new", "all"])
@pytest.mark.parametrize("form", ["full ids", "new ids", "static", "embedded", "in chunks", "lookup"])
@pytest.mark.parametrize("variant", MAIN)
def test_a_later_call_continues_the_cache(variant, form, images):
    """Rows receive images at different turns; every turn equals the whole conversation without a cache."""
    model = shared_model(variant)
    width = 1 if form == "lookup" else 2
    cache = StaticCache(config=model.config, max_cache_len=90) if form == "static" else DynamicCache()
    history: list[list[Any]] = [[] for _ in range(width)]
    ids, mask = torch.zeros(width, 0, dtype=torch.long), torch.zeros(width, 0, dtype=torch.long)
    for turn in TURNS:
        new = batch(*turn[:width])
        for row, part in zip(history, turn, strict=False):
            row += part
        ids, mask = torch.cat([ids, new["input_ids"]], 1), torch.cat([mask, new["attention_mask"]], 1)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        inputs |= image_inputs(images_of(turn[:width] if images == "new" else history))
        fed = ids.shape[1] - int(cache.get_seq_length())
        if form == "new ids":
            inputs["input_ids"] = ids[:, -fed:]
            inputs |= image_inputs(images_of(turn[:width]))
        if form == "embedded":
            inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
            marks = (ids == END).nonzero()
            inputs |= image_inputs(images_of(history)) if images == "all" else {}
            kept = marks if images == "all" else marks[marks[:, 1] >= ids.shape[1] - fed]
            if len(kept) and "pixel_values" in inputs:
                inputs["image_positions"] = kept
        # What looks like a mark and isn't in the cache yet, a generated last token, would count as an image's.
        settings: dict[str, Any] = {"suppress_tokens": [END], "max_new_tokens": 3}
        if form == "lookup":
            settings["prompt_lookup_num_tokens"] = 2
        if form == "in chunks":
            settings["prefill_chunk_size"] = 3
        try:
            produced = generate(model, {**inputs, "cache": cache}, **settings)
        except NotImplementedError as error:
            assert form in REFUSABLE and re.search(REFUSABLE[form], str(error))
            return
        assert produced.tolist() == [greedy(model, row, 3, banned=[END]) for row in history]
        for row, tokens in zip(history, produced.tolist(), strict=True):
            row += tokens
        ids = torch.cat([ids, produced], 1)
        mask = torch.cat([mask, torch.ones_like(produced)], 1)
        assert int(cache.get_seq_length()) == ids.shape[1] - 1


def test_a_prompt_without_token_types_gets_them():
    """1 where an image stands: they also tell forward how many tokens the places of images were counted in."""
    model, seen = new_model("casa"), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("mm_token_type_ids")), with_kwargs=True
    )
    inputs = batch([A, *words(3, 1), B, 5], [*words(4, 2), C, 7])
    generate(model, inputs, max_new_tokens=2)
    assert seen[0].tolist() == (inputs["input_ids"] == END).long().tolist() and seen[1] is None


@pytest.mark.parametrize("variant", MAIN)
def test_lookup_on_a_static_cache(variant):
    """Rejected proposals are taken back from it too, with versions of Transformers that try."""
    model, row = shared_model(variant), [*words(3, 1), A, *words(3, 2), *words(3, 1)]
    cache = StaticCache(config=model.config, max_cache_len=60)
    settings = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12}
    if is_older_than(5, 24):
        with pytest.raises(ValueError, match="not supported with Static cache"):
            generate(model, batch(row), cache=cache, **settings)
        return
    tokens = generate(model, batch(row), cache=cache, **settings)[0].tolist()
    assert tokens == greedy(model, row, 12)
    later = [*row, *tokens, B, 5]
    expected = greedy(model, later, 3)
    assert generate(model, batch(later), cache=cache, max_new_tokens=3)[0].tolist() == expected


def test_a_cache_that_decoded_by_lookup_continues_in_beams():
    """Cropping leaves plain numbers behind, whatever type the count had."""
    model = shared_model("casa")
    row: Row = [*words(3, 1), A, *words(3, 2), *words(3, 1)]
    cache = DynamicCache()
    tokens = generate(model, batch(row), cache=cache, prompt_lookup_num_tokens=3)[0].tolist()
    assert isinstance(cache.layers[0].window_state.length, int)
    cache.batch_repeat_interleave(3)
    continued = [*row, *tokens, *words(2, 9)]
    ids = torch.tensor([token_ids(continued)] * 3)
    with torch.no_grad():
        logits = model(ids[:, int(cache.get_seq_length()) :], cache=cache).logits
    for copy_of_row in logits:
        assert relative_error(copy_of_row, one_shot(model, continued)[-logits.shape[1] :]) < 1e-9


def test_new_ids_without_the_whole_mask_are_refused():
    """`generate` reads the ids as the whole text; shorter than the cache, they can't be."""
    model, cache = shared_model("casa"), DynamicCache()
    generate(model, batch(ONE), cache=cache)
    later = without(batch([B, *words(2, 3)]), "attention_mask")
    with pytest.raises(ValueError, match=r"attention_mask.*cache|cache.*attention_mask"):
        generate(model, later, cache=cache)


# ------------------------------------------------------------------------------------ refused by name


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (
            {"compile_config": CompileConfig(), "prefill_chunk_size": 3, "cache_implementation": "static"},
            NotImplementedError,
            "compile_config and prefill_chunk_size",
        ),
        ({"penalty_alpha": 0.6, "top_k": 4}, NotImplementedError, "contrastive_search"),
        ({"dola_layers": "high"}, NotImplementedError, "dola_generation"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, NotImplementedError, "group_beam_search"),
        ({"num_beams": 4, "force_words_ids": [[5]]}, NotImplementedError, "constrained_beam_search"),
        ({"cache_implementation": "paged"}, NotImplementedError, "Continuous batching.*paged"),
        ({"cache_implementation": "offloaded"}, NotImplementedError, "Offloaded caches.*without offloading"),
        ({"assistant_early_exit": 1}, NotImplementedError, "assistant_early_exit"),
        ({"prefill_chunk_size": 3, "use_cache": False}, ValueError, "chunking without a cache"),
        ({"prompt_lookup_num_tokens": 3, "use_cache": False}, ValueError, "use_cache=True"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_ways_that_are_refused_by_name(settings, error, message):
    model = shared_model("casa")
    for inputs in (batch(ONE), batch(words(5, 1))):
        with pytest.raises(error, match=message):
            generate(model, inputs, **settings)


def test_continuous_batching_is_refused_by_name():
    model = shared_model("casa")
    for start in (
        lambda: model.generate_batch([[1, 2]]),
        lambda: model.init_continuous_batching(),
        lambda: model.continuous_batching_context_manager(),
    ):
        with pytest.raises(NotImplementedError, match=r"Continuous batching.*padded batch"):
            start()


def test_rejected_proposals_need_a_cache_that_can_be_cropped():
    model = shared_model("casa")
    try:
        QuantizedCache(backend="fp8", config=model.config)
    except ValueError:
        pytest.skip("this version of Transformers has no quantized cache that runs here")
    with pytest.raises((NotImplementedError, ValueError), match=r"(?i)quantized|static"):
        generate(
            model,
            batch([*words(3, 1), A, *words(3, 1)]),
            cache_implementation="quantized",
            cache_config={"backend": "fp8"},
            prompt_lookup_num_tokens=2,
            max_new_tokens=10,
        )


def test_chunks_of_embedded_prompts_work_or_are_refused_by_name():
    """Transformers splits ids into chunks, not embeddings."""
    model = shared_model("casa")
    with pytest.raises((NotImplementedError, ValueError), match="prefill_chunk_size"):
        generate(model, embedded(model, *ROWS), prefill_chunk_size=3)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"pixel_values": None, "image_grid_thw": None},
            "6 image placeholders .token 61. but 0 images.*remove the placeholders",
        ),
        ({"image_grid_thw": None}, "without image_grid_thw"),
        ({"pixel_values": None}, "image_grid_thw was given without images"),
        (image_inputs([A, B]), "6 image placeholders, 6 of them after the 0 cached tokens, but 2 images.*new images"),
        ({"pixel_values": None, "image_grid_thw": None, "image_positions": torch.tensor([[0, 4]])}, "image_positions"),
    ],
)
@pytest.mark.parametrize("beams", [1, 2])
def test_images_that_dont_fit_the_prompt(change, message, beams):
    model = shared_model("casa")
    inputs = {name: value for name, value in {**batch(*ROWS), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        generate(model, inputs, num_beams=beams)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_an_embedded_prompt_stand_where_their_embedding_does(variant, truth):
    model = shared_model(variant)
    inputs = without(embedded(model, *ROWS), "image_positions")
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert generate(model, inputs, **settings).tolist() == truth[variant]
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(model, inputs, **beams), generate(model, batch(*ROWS), **beams))


def test_an_embedded_prompt_may_come_beside_its_ids(truth):
    """The ids say where images stand, also if noise hides it in the embeddings."""
    model = shared_model("casa")
    inputs = without(embedded(model, *ROWS), "image_positions")
    noise = 1e-9 * torch.randn(inputs["inputs_embeds"].shape, generator=torch.Generator().manual_seed(0)).double()
    noisy = {**inputs, "inputs_embeds": inputs["inputs_embeds"] + noise}
    with pytest.raises(ValueError, match=r"0 image placeholders.*but 6 images.*image_positions"):
        generate(model, noisy)
    sequences = model.generate(**noisy, input_ids=batch(*ROWS)["input_ids"], max_new_tokens=1, do_sample=False)
    # Delimiters aren't recognised in it, so that only what follows single images is as it was.
    assert [sequences[row, -1] for row in (1, 2)] == [truth["casa"][row][0] for row in (1, 2)]


def test_the_cache_of_the_caller_is_as_before_after_a_refusal():
    model, cache = shared_model("casa"), DynamicCache()
    tokens = generate(model, batch(ONE), cache=cache)[0].tolist()
    untouched = copy.deepcopy(cache)
    later = batch([*ONE, *tokens, B, *words(2, 3)])
    with pytest.raises(ValueError, match="4 image placeholders, 1 of them after the 23 cached tokens, but 2 images"):
        generate(model, {**later, **image_inputs([A, B])}, cache=cache)
    answers = [generate(model, {**later, **image_inputs([B])}, cache=c) for c in (cache, untouched)]
    assert torch.equal(*answers)
    assert answers[0][0].tolist() == greedy(model, [*ONE, *tokens, B, *words(2, 3)], STEPS)
