# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Every supported Transformers: the cache by both of its names, and arguments that nobody reads."""

from __future__ import annotations

import inspect
import logging
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Picture
from transformers import StaticCache
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from casa_hf import CasaForConditionalGeneration, CasaProcessor, Conversation, foreign_arguments, transformers_versions
from casa_hf.transformers_versions import CACHE, NEWEST_TESTED, TESTED
from tests.conftest import KeptMessages
from tests.helpers_generation import (
    Image,
    Row,
    batch,
    greedy,
    new_model,
    one_shot,
    relative_error,
    shared_model,
    token_ids,
    words,
)

ROOT = Path(__file__).parents[1]
NAMES = ("cache", "past_key_values")
A, B = Image(2, 3, 1), Image(1, 2, 2)
START: Row = [*words(3, 1), A, *words(4, 2)]
REST: Row = [*words(2, 3), B, *words(2, 4)]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What is logged once, from here on as if nothing had been logged before."""
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    handler, loggers = KeptMessages(), (foreign_arguments.logger, transformers_versions.logger)
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.messages
    for logger in loggers:
        logger.removeHandler(handler)
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------ both names


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", [True, False], ids=["with head", "without"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_forward_takes_the_cache_by_both_names(name: str, head: bool, kind: type) -> None:
    whole = shared_model("casa")
    model = whole if head else whole.model
    cache = DynamicCache() if kind is DynamicCache else StaticCache(config=whole.config, max_cache_len=40)
    model(**batch(START), **{name: cache})
    output = model(**batch(REST), **{name: cache})
    assert output.cache is cache
    logits = output.logits if head else whole.lm_head(output.last_hidden_state)
    assert relative_error(logits[0], one_shot(whole, [*START, *REST])[-6:]) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_the_cache_by_both_names(name: str, recwarn: pytest.WarningsRecorder) -> None:
    model, row = shared_model("casa"), START
    cache = DynamicCache()
    for new in ([], REST):
        row = [*row, *new]
        produced = model.generate(**batch(row), **{name: cache}, max_new_tokens=5, do_sample=False)
        expected = greedy(model, row, 5)
        assert produced[0, -5:].tolist() == expected
        row = [*row, *expected]
    assert int(cache.get_seq_length()) == len(token_ids(row)) - 1
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_a_conversation_remembers(casa_folder: Path) -> None:
    """Its answers are those of the whole conversation in one go."""
    model = CasaForConditionalGeneration.from_pretrained(casa_folder, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".casa_attn." in name:
                parameter.mul_(3)
    processor = CasaProcessor.from_pretrained(casa_folder)
    pictures = [Picture.effect_noise((84, 56), 60 + n).convert("RGB") for n in range(2)]
    chat = Conversation(model, processor)
    for picture in pictures:
        before, held = chat._ids, chat._cache
        chat.ask("What?", [picture], max_new_tokens=6, do_sample=False)
    assert chat._cache is held and before.shape[1] > 0
    ids = chat._ids
    inputs = processor.image_processor(images=pictures, return_tensors="pt")
    produced = (ids == model.config.image_token_id).nonzero()
    logits = model(input_ids=ids, **inputs, image_positions=produced, use_cache=False).logits
    assert logits[0, -7:-1].argmax(-1).tolist() == ids[0, -6:].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_takes_no_cache(casa_folder: Path, name: str) -> None:
    """It has its own, and stays as it is."""
    processor = CasaProcessor.from_pretrained(casa_folder)
    chat = Conversation(CasaForConditionalGeneration.from_pretrained(casa_folder), processor)
    for _ in range(2):
        before, cache = chat._ids, chat._cache
        with pytest.raises(TypeError, match=f"^{name} can't be given .* a cache of its own"):
            chat.ask("And now?", max_new_tokens=3, **{name: DynamicCache()})
        assert torch.equal(chat._ids, before) and chat._cache is cache
        chat.ask("What?", max_new_tokens=3)


def test_a_cache_by_position() -> None:
    cache, inputs = DynamicCache(), batch(START)
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    shared_model("casa")(inputs["input_ids"], None, None, cache, **images, past_key_values=None)
    assert cache.get_seq_length() == len(token_ids(START))
    with pytest.raises(TypeError, match="multiple values for argument 'cache'"):
        shared_model("casa")(inputs["input_ids"], None, None, cache, **images, past_key_values=DynamicCache())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", [True, False], ids=["with head", "language model"])
def test_text_is_evicted_from_a_cache_by_both_names(name: str, head: bool) -> None:
    model, cache = shared_model("casa"), DynamicCache()
    model(**batch([A, *words(20, 2)]), cache=cache)
    (model if head else model.model.language_model).evict_text(**{name: cache}, keep=12)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("name", NAMES)
def test_the_language_model_takes_both_names(name: str) -> None:
    """Whatever calls it: its own catch-all would swallow the other one."""
    model, cache = shared_model("casa").model.language_model, DynamicCache()
    embedded = model.embed_tokens(torch.tensor([words(4, 1)]))
    everything = torch.ones(1, 4, dtype=torch.bool)
    model(inputs_embeds=embedded, closes_window=everything, token_mask=everything, **{name: cache})
    assert cache.get_seq_length() == 4


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")  # the call's name on 5.17
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_blocks_leave_the_cache_alone(name: str, reentrant: bool) -> None:
    """A block that is run again in the backward pass would fill it twice; Transformers takes it out of each call."""

    def gradients(**cache: Any) -> list[torch.Tensor]:
        model = new_model("casa").train()
        if cache:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with torch.enable_grad():
            inputs = batch(START)
            model(**inputs, labels=inputs["input_ids"], **cache).loss.backward()
        return [parameter.grad for parameter in model.model.language_model.parameters()]

    cache = DynamicCache()
    actual = gradients(**{name: cache})
    assert cache.get_seq_length() == 0
    for one, other in zip(actual, gradients(), strict=True):
        assert relative_error(one, other) < 1e-9
    model = new_model("casa")
    model(**batch(START), cache=cache)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    with torch.enable_grad(), pytest.raises(ValueError, match=r"cache holds text.*model\.eval\(\)"):
        model(torch.tensor([[7]]), **{name: cache})
    assert (
        relative_error(model.eval()(torch.tensor([[7]]), cache=cache).logits[0], one_shot(model, [*START, 7])[-1:])
        < 1e-9
    )


@pytest.mark.parametrize("which", [CasaForConditionalGeneration, "base"])
def test_signatures_show_the_name_that_transformers_looks_for(which: Any) -> None:
    model = shared_model("casa")
    functions = [model.forward, model.prepare_inputs_for_generation] if which != "base" else [model.model.forward]
    for function in functions:
        parameters = inspect.signature(function).parameters
        assert [name for name in NAMES if name in parameters] == [CACHE]
        assert "kwargs" in parameters


CALLS: dict[str, Callable[..., Any]] = {
    "forward": lambda model, **kwargs: model(**batch(START), **kwargs),
    "base": lambda model, **kwargs: model.model(**batch(START), **kwargs),
    "generate": lambda model, **kwargs: model.generate(**batch(START), max_new_tokens=2, **kwargs),
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return CALLS[request.param]


def test_both_names_at_once_are_refused(call: Callable[..., Any]) -> None:
    first, second = DynamicCache(), DynamicCache()
    with pytest.raises(ValueError, match=r"cache and past_key_values were both given.*Pass one of them"):
        call(shared_model("casa"), cache=first, past_key_values=second)
    assert first.get_seq_length() == second.get_seq_length() == 0
    call(shared_model("casa"), cache=first, past_key_values=None)
    call(shared_model("casa"), cache=None, past_key_values=second)
    assert first.get_seq_length() == second.get_seq_length() >= len(token_ids(START))


# ------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("head", [True, False], ids=["with head", "without"])
def test_outputs_answer_to_both_names(head: bool) -> None:
    whole = new_model("casa", attn_implementation="eager")
    model = whole if head else whole.model
    output = model(**batch(START), output_attentions=True)
    assert isinstance(output.cache, DynamicCache)
    for name in NAMES:
        assert getattr(output, name) is output[name] is output.get(name) is output.cache
        assert name in output
    assert len(output.cross_attentions) == len(output.attentions) == len(whole.model.language_model.layers)
    assert [key for key in output if key in NAMES] == [CACHE], "one entry"
    assert output.get("no such thing", 5) == 5 and "no such thing" not in output
    other = DynamicCache()
    output["cache"] = other
    assert output.past_key_values is other
    output.cache = None
    assert output.past_key_values is None
    without = model(**batch(START), use_cache=False)
    assert without.cache is without.past_key_values is None and not any(name in without for name in NAMES)
    assert torch.equal(pickle.loads(pickle.dumps(without))[0], without[0])
    assert isinstance(model(**batch(START), return_dict=False), tuple)


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_outputs_of_generate_have_both_names(settings: dict[str, Any]) -> None:
    output = shared_model("casa").generate(
        **batch(START), max_new_tokens=2, return_dict_in_generate=True, output_logits=True, **settings
    )
    assert int(output.cache.get_seq_length()) == len(token_ids(START)) + 1
    for copy in (output, pickle.loads(pickle.dumps(output)), replace(output), type(output)(**output)):
        for name in NAMES:
            assert getattr(copy, name) is copy[name] is copy.get(name) is copy.cache
            assert name in copy
        assert copy.cache is not None and len(copy.logits) == 2 and torch.equal(copy.sequences, output.sequences)
    output.cache = None
    assert output.past_key_values is None
    uncached = shared_model("casa").generate(
        **batch(START), max_new_tokens=2, return_dict_in_generate=True, use_cache=False
    )
    assert uncached.cache is uncached.past_key_values is None


def test_a_compiled_step_gives_such_an_output() -> None:
    model = new_model("casa", dtype=torch.float32)
    step = torch.compile(model, backend="eager", fullgraph=True)
    for name in NAMES:
        cache = StaticCache(config=model.config, max_cache_len=40)
        model(**batch(START), cache=cache)
        output = step(input_ids=torch.tensor([[7]]), **{name: cache})
        assert output.cache is output.past_key_values
        assert relative_error(output.logits[0], one_shot(model, [*START, 7])[-1:]) < 1e-5


def test_placement_and_evaluation_leave_the_cache_out() -> None:
    model = shared_model("casa")
    assert set(NAMES) <= set(model.config.keys_to_ignore_at_inference)
    for module in (model, model.model, model.model.language_model):
        assert set(NAMES) <= set(module._skip_keys_device_placement)


# ------------------------------------------------------------------------------------ refused by meaning


@pytest.mark.parametrize("name", ["cache_params", "past", "layer_past", "memory"])
@pytest.mark.parametrize(
    "cache",
    [
        DynamicCache(),
        StaticCache(config=shared_model("casa").config, max_cache_len=40),
        PagedAttentionCache.__new__(PagedAttentionCache),
        [DynamicCache(), DynamicCache()],
    ],
    ids=["dynamic", "static", "paged", "several"],
)
def test_a_cache_by_an_unknown_name_is_refused(call: Callable[..., Any], name: str, cache: Any) -> None:
    """It would be swallowed, and every step would start without memory."""
    with pytest.raises(TypeError, match=rf"{name} is a {type(cache).__name__}.*`cache` or `past_key_values`"):
        call(shared_model("casa"), **{name: cache})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "cache",
    [
        PagedAttentionCache.__new__(PagedAttentionCache),
        EncoderDecoderCache(DynamicCache(), DynamicCache()),
        {"keys": torch.zeros(1)},
    ],
    ids=["paged", "encoder-decoder", "dictionary"],
)
def test_what_is_no_cache_of_a_decoder_is_refused(call: Callable[..., Any], name: str, cache: Any) -> None:
    with pytest.raises(TypeError, match=rf"is a {type(cache).__name__}.*DynamicCache.*continuous batching"):
        call(shared_model("casa"), **{name: cache})


@pytest.mark.parametrize(
    "name, way_out",
    [
        ("pixel_values_videos", "frames are images.*CasaProcessor"),
        ("video_grid_thw", "frames are images.*CasaProcessor"),
        ("encoder_hidden_states", "image_embeds"),
        ("mm_encoder_outputs", "image_embeds=output.pooler_output"),
    ],
)
def test_inputs_in_the_form_of_other_models_are_refused(call: Callable[..., Any], name: str, way_out: str) -> None:
    with pytest.raises(ValueError, match=rf"don't take {name}.*{way_out}"):
        call(shared_model("casa"), **{name: torch.ones(1, 3)})
    if call is not CALLS["generate"]:  # which drops no argument, None or not
        call(shared_model("casa"), **{name: None})
    inputs = batch(START)
    with pytest.raises(ValueError, match=rf"don't take {name}"):
        shared_model("casa").get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], **{name: torch.ones(1, 3)}
        )


# ------------------------------------------------------------------------------------ what nobody reads


@pytest.mark.parametrize("head", [True, False], ids=["with head", "without"])
def test_an_argument_that_nobody_reads_is_named_once(logged: list[str], head: bool) -> None:
    model = shared_model("casa") if head else shared_model("casa").model
    for _ in range(3):
        model(**batch(START), pixel_value=1, colour="red")
    assert len(logged) == 2
    assert "'colour'" in logged[0] and "'pixel_value'" in logged[1] and "no effect" in logged[0]
    model(**batch(START), pixel_value=2, shape="round")
    assert len(logged) == 3 and "'shape'" in logged[2]


def test_a_base_model_has_no_loss(logged: list[str]) -> None:
    """Nor logits to keep, which TRL's distillation asks it for too: that changes nothing, so it isn't named."""
    shared_model("casa").model(**batch(START), labels=batch(START)["input_ids"], logits_to_keep=1)
    assert len(logged) == 1 and "'labels'" in logged[0]


def test_what_trainers_adapters_and_attention_pass_is_not_named(logged: list[str]) -> None:
    inputs = batch(START)
    ids = inputs["input_ids"]
    passed = {
        "Trainer": {"num_items_in_batch": torch.tensor(3), "shift_labels": ids.roll(-1)},
        "TRL": {
            "token_type_ids": torch.zeros_like(ids),
            "image_sizes": torch.ones(1, 2),
            "use_cache": False,
            "output_hidden_states": True,
            "return_dict": True,
        },
        "PEFT": {"task_ids": torch.zeros(1)},
        "attention": {"is_causal": True, "softcap": None},
        "packing": {"cu_seq_lens_q": None, "cu_seq_lens_k": None, "max_length_q": None, "max_length_k": None},
    }
    expected = shared_model("casa")(**inputs, labels=ids)
    for arguments in passed.values():
        output = shared_model("casa")(**inputs, labels=ids, **arguments)
        assert torch.equal(output.logits, expected.logits)
    assert logged == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_read_depends_on_the_backend(logged: list[str], attention: str) -> None:
    model = new_model("casa", attn_implementation=attention)
    arguments = {"block_table": torch.zeros(1), "deterministic": True, "pixel_attention_mask": torch.ones(1, 2)}
    model(**batch(START), **arguments)
    assert len(logged) == 3
    for message, name in zip(logged, arguments, strict=True):
        assert repr(name) in message and repr(attention) in message
    flash = foreign_arguments._read_by("flash_attention_2")
    assert {"cu_seq_lens_q", "deterministic", "softcap", "s_aux", "shift_labels"} <= flash
    assert not {"labels", "pixel_attention_mask"} & flash


def test_a_compiled_call_with_an_unknown_argument_is_one_graph() -> None:
    model = new_model("casa", dtype=torch.float32)
    cache = StaticCache(config=model.config, max_cache_len=40)
    model(**batch(START), cache=cache)
    step = torch.compile(model, backend="eager", fullgraph=True)
    logits = step(input_ids=torch.tensor([[7]]), cache=cache, colour=1).logits
    assert relative_error(logits[0], one_shot(model, [*START, 7])[-1:]) < 1e-5


def test_trainers_find_that_the_loss_takes_arguments() -> None:
    """Trainer and TRL look for a catch-all before they pass the number of items."""
    for model in (shared_model("casa"), shared_model("casa").model):
        kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD in kinds


# ------------------------------------------------------------------------------------ versions


@pytest.mark.parametrize("version, older", [((5, 17), True), (NEWEST_TESTED, True), ((5, 99), False), ((6, 0), False)])
def test_a_newer_transformers_is_named_once(
    monkeypatch: pytest.MonkeyPatch, logged: list[str], version: tuple[int, int], older: bool
) -> None:
    monkeypatch.setattr(transformers_versions, "_INSTALLED", version)
    monkeypatch.setattr(transformers_versions.transformers, "__version__", f"{version[0]}.{version[1]}.0.dev0")
    for _ in range(2):
        CasaForConditionalGeneration(new_model("casa").config)
    assert len(logged) == (0 if older else 1)
    if not older:
        newest = f"{NEWEST_TESTED[0]}.{NEWEST_TESTED[1]}"
        assert f"up to {newest}" in logged[0] and f"{version[0]}.{version[1]}.0.dev0 is installed" in logged[0]


@pytest.mark.integration
def test_a_user_sees_the_warning_once_where_a_model_is_made() -> None:
    program = (
        "import sys, casa_hf\n"
        "from tests.tiny import casa_config\n"
        "casa_hf.transformers_versions._INSTALLED = (5, 99)\n"
        "print('made', file=sys.stderr)\n"
        "for _ in range(2): casa_hf.CasaForConditionalGeneration(casa_config('casa'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    before, _, after = done.stderr.partition("made")
    assert "casa_hf was tested" not in before and after.count("casa_hf was tested with Transformers up to") == 1


def test_what_is_tested_is_what_is_stated() -> None:
    """The newest tested version is the pinned one, the oldest the one that setup.cfg and the documents name."""
    pinned = re.search(r"^transformers==(\d+)\.(\d+)\.", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    assert pinned is not None and tuple(map(int, pinned.groups())) == NEWEST_TESTED
    assert f"transformers=={TESTED[-1]}\n" in (ROOT / "constraints.txt").read_text("utf-8")
    oldest = re.search(r"transformers >= (\d+\.\d+),", (ROOT / "setup.cfg").read_text("utf-8"))
    assert oldest is not None and f"{oldest[1]}.0" == TESTED[0]
    assert f"transformers=={oldest[1]}.0" in (ROOT / "Makefile").read_text("utf-8")
    newest = ".".join(map(str, NEWEST_TESTED))
    assert f"Transformers {oldest[1]} to {newest}" in (ROOT / "README.md").read_text("utf-8")
