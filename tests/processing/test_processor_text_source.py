# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`CasaProcessor.from_text_source`: a text-only tokenizer with delimiters of images, another's image processor."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from casa_hf import CasaConfig, CasaForConditionalGeneration, CasaProcessor
from casa_hf.chat import Conversation
from examples.tiny_source import build_tiny_helium

SIDE = 140
# By the delimiters that are asked for: an image, a video, and one image or frame as it is tokenized.
FORMS = {
    "<|vision_start|>,<|vision_end|>": (
        "<|vision_start|><|vision_end|>",
        "<|vision_start|><|video_pad|><|vision_end|>",
    ),
    "<|image|>": ("<|image|>", "<|video|>"),
}
IMAGE, VIDEO = FORMS["<|vision_start|>,<|vision_end|>"]
ALL = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


@pytest.fixture(scope="module")
def helium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_helium(tmp_path_factory.mktemp("helium"))


@pytest.fixture(scope="module")
def processors(helium: Path, source: Path) -> dict[str, CasaProcessor]:
    limits = {"max_pixels": SIDE**2, "frame_max_pixels": SIDE**2 // 4}
    return {form: CasaProcessor.from_text_source(helium, source, image_delimiters=form, **limits) for form in FORMS}


@pytest.fixture(scope="module")
def processor(processors: dict[str, CasaProcessor]) -> CasaProcessor:
    """With the delimiters of the default."""
    return processors["<|vision_start|>,<|vision_end|>"]


@pytest.fixture(scope="module", params=FORMS)
def formed(request: pytest.FixtureRequest, processors: dict[str, CasaProcessor]) -> tuple[CasaProcessor, str, str]:
    """A processor, and how it writes an image and a video."""
    return (processors[request.param], *FORMS[request.param])


@pytest.fixture(scope="module")
def tokenizer(helium: Path) -> Any:
    return AutoTokenizer.from_pretrained(helium)


def conversation(photos: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": photos["cat"]}, {"type": "text", "text": "Hm?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And "}, {"type": "video", "video": [photos["coffee"]]}],
        },
    ]


def test_delimiters_follow_the_vocabulary_and_change_no_other_token(processors, tokenizer):
    pair, single = processors.values()
    start, end = len(tokenizer), len(tokenizer) + 1
    assert (pair.vision_start_token_id, pair.image_token_id) == (start, end) and len(pair.tokenizer) == end + 1
    assert pair.new_tokens == {"<|vision_start|>": start, "<|vision_end|>": end}
    assert (single.vision_start_token_id, single.image_token_id) == (None, start) and len(single.tokenizer) == end
    assert single.new_tokens == {"<|image|>": start}
    text = "What is in this picture? Größe 42 µm\n\n <s>"
    for processor in (pair, single):
        assert processor(text=text)["input_ids"] == [tokenizer(text)["input_ids"]]
        assert processor.decode([*processor.new_tokens.values()], skip_special_tokens=True) == ""


def test_a_pair_that_the_vocabulary_has_is_used(source, helium, photos):
    """Qwen's text tokenizers have these tokens; and any others can be named, of which only those that lack are new."""
    stock = AutoTokenizer.from_pretrained(source)
    processor = CasaProcessor.from_text_source(source, source, max_pixels=SIDE**2)
    assert processor.new_tokens == {} and processor.tokenizer.get_vocab() == stock.get_vocab()
    ids = [stock.convert_tokens_to_ids(token) for token in ("<|vision_start|>", "<|vision_end|>")]
    assert [processor.vision_start_token_id, processor.image_token_id] == ids
    assert processor(text=f"See {IMAGE}", images=photos["cat"])["input_ids"][0][-2:] == ids

    named = CasaProcessor.from_text_source(source, source, image_delimiters=["<|box_start|>", "<|crop|>"])
    assert named.new_tokens == {"<|crop|>": len(stock)}
    assert named.vision_start_token_id == stock.convert_tokens_to_ids("<|box_start|>")
    written = "<|box_start|><|crop|>"
    inputs = named(text="<|box_start|><|image_pad|><|crop|>.", images=photos["cat"])
    assert named.decode(inputs["input_ids"][0]) == f"{written}."
    messages = [{"role": "user", "content": [{"type": "image", "image": photos["cat"]}]}]
    assert written in named.apply_chat_template(messages)

    # A piece that the model already has becomes a control token; it isn't new.
    piece = max((each for each in AutoTokenizer.from_pretrained(helium).get_vocab() if each.isalpha()), key=len)
    plain = CasaProcessor.from_text_source(helium, source, image_delimiters=piece)
    assert plain.new_tokens == {}
    assert plain(text=f"x{piece}x", images=photos["cat"])["input_ids"][0].count(plain.image_token_id) == 1


@pytest.mark.parametrize(
    "given", ["", "a,b,c", "a,", "a,a", [], ["a", "b", "c"], ["a", 1], " a", "<|video|>", "a,<|image_pad|>"]
)
def test_what_are_no_delimiters(helium, source, given):
    with pytest.raises(ValueError, match=r"image_delimiters=.* must name the token before an image and the one after"):
        CasaProcessor.from_text_source(helium, source, image_delimiters=given)


@pytest.mark.parametrize("given", ["<s>", "<|box_start|>,</s>", "<|turn|>", "<|turn|>,<|box_end|>"])
def test_delimiters_that_prompts_without_images_have_are_refused(helium, source, tmp_path, given):
    tokenizer = AutoTokenizer.from_pretrained(helium)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>", "<|box_end|>"]})
    turns = "{% for message in messages %}{{ '<|turn|>' + message.content }}{% endfor %}"
    tokenizer.chat_template = {"default": "{{ raise_exception('needs documents') }}", "turns": turns}
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{re.escape(repr(given))} names .*, which prompts without images have too"):
        CasaProcessor.from_text_source(tmp_path, source, image_delimiters=given)
    processor = CasaProcessor.from_text_source(tmp_path, source, image_delimiters="<|box_end|>")
    assert processor.new_tokens == {}


@pytest.mark.parametrize("named", [False, True])
def test_a_template_of_the_source_that_reads_parts_gets_them(helium, source, tmp_path, photos, named):
    tokenizer = AutoTokenizer.from_pretrained(helium)
    parts = "{% for m in messages %}<{% for part in m.content %}{{ part.text }}{% endfor %}>{% endfor %}"
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "parts": parts} if named else parts
    tokenizer.save_pretrained(tmp_path)
    processor = CasaProcessor.from_text_source(tmp_path, source)
    template = processor.chat_template["parts"] if named else processor.chat_template
    messages = [
        {"role": "user", "content": [{"type": "image", "image": photos["cat"]}, {"type": "text", "text": "Hm?"}]}
    ]
    assert processor.apply_chat_template(messages, chat_template=template) == f"<{IMAGE}Hm?>"


def test_an_image_precedes_its_token_and_a_video_becomes_one_token_per_frame(formed, helium, photos):
    processor, image, video = formed
    inputs = processor(
        text=f"See {image}, then {video}.",
        images=photos["cat"],
        videos=[[photos["rocket"], photos["coffee"]]],
        return_tensors="pt",
    )
    tokenizer = AutoTokenizer.from_pretrained(helium)
    tokenizer.add_tokens([*processor.new_tokens], special_tokens=True)
    expected = tokenizer(f"See {image}, then {image}{image}.")["input_ids"]
    assert inputs["input_ids"].tolist() == [expected]
    types = iter([1, 2, 2])
    assert inputs["mm_token_type_ids"].tolist() == [
        [next(types) if token == processor.image_token_id else 0 for token in expected]
    ]


def test_pixels_are_those_of_the_vision_checkpoint(processor, stock_pixels, photos):
    inputs = processor(text=VIDEO + IMAGE, images=photos["cat"], videos=[[photos["rocket"]]], return_tensors="pt")
    expected = [stock_pixels([photos["rocket"]], SIDE**2 // 4), stock_pixels([photos["cat"]])]
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(inputs[name], torch.cat([part[name] for part in expected]))


def test_a_conversation(formed, photos):
    processor, image, video = formed
    messages = conversation(photos)
    prompt = f"<s>System: Be brief.\nUser: {image}Hm?\nAssistant: A cat.</s>\nUser: And {video}\n"
    assert processor.apply_chat_template(messages) == prompt
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == f"{prompt}Assistant:"
    inputs = processor.apply_chat_template(messages, **ALL)
    assert processor.decode(inputs["input_ids"][0]) == f"{prompt}Assistant:".replace(video, image)
    assert inputs["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) == 1
    assert [kind for kind in inputs["mm_token_type_ids"][0].tolist() if kind] == [1, 2]


def test_a_batch_is_padded_on_the_left_and_equals_its_prompts_one_by_one(processor, photos):
    conversations = [conversation(photos), [{"role": "user", "content": "No image."}]]
    batch = processor.apply_chat_template(conversations, **ALL)
    for row, messages in enumerate(conversations):
        single = processor.apply_chat_template(messages, **ALL)
        padding = batch["input_ids"].shape[1] - single["input_ids"].shape[1]
        for key, value in (("input_ids", processor.tokenizer.pad_token_id), ("attention_mask", 0)):
            assert batch[key][row].tolist() == [value] * padding + single[key][0].tolist()
    assert padding > 0


def test_offsets_refer_to_the_text_as_it_was_given(formed, photos):
    processor, image, video = formed
    text = f"See {image}, then {video}."
    inputs = processor(text=text, images=photos["cat"], videos=[[photos["rocket"]] * 3], return_offsets_mapping=True)
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    delimiters = processor.tokenizer.tokenize(image)
    assert tokens[-1 - 3 * len(delimiters) :] == [*delimiters * 3, "."]
    spans = [text[slice(*span)] for span in inputs["offset_mapping"][0]]
    assert spans[-1] == "." and spans[-1 - 3 * len(delimiters) : -1] == [video] * 3 * len(delimiters)
    first = tokens.index(delimiters[0])
    assert spans[first : first + len(delimiters)] == delimiters


def test_what_the_tokenizer_adds_is_nowhere_in_the_text(processor, photos):
    inputs = processor(
        text=[VIDEO, "A much longer prompt."], videos=[[[photos["cat"]]], []], return_offsets_mapping=True
    )
    padding = inputs["attention_mask"][0].count(0)
    assert padding > 0
    assert inputs["offset_mapping"][0] == [(0, 0)] * padding + [(0, 0), *[(0, len(VIDEO))] * 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": IMAGE}, r"number of images \(0\) must be .* in the text \(1\); write <\|vision_start\|><\|vis"),
        (
            {"text": "none", "images": 1},
            r"number of images \(1\) must be .* in the text \(0\); write <\|vision_start\|><\|vision_end\|> once",
        ),
        ({"text": VIDEO}, r"number of videos \(0\) must be .* \(1\); write <\|vision_start\|><\|video_pad\|>"),
        ({"text": [IMAGE * 2, ""], "images": [1, 1]}, r"number of images in prompt 0 \(1\) must be .* \(2\)"),
        ({"text": "<|image_pad|>", "images": 1}, r"Write an image as <\|vision_start\|><\|vision_end\|> and a vid"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said(processor, photos, arguments, message):
    def fill(images: Any) -> Any:
        return [fill(row) for row in images] if isinstance(images, list) else [photos["cat"]] * images

    given = {name: fill(value) if name == "images" else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        processor(**given)


@pytest.mark.skipif(
    "sanitize_control_tokens" not in inspect.signature(ProcessorMixin.apply_chat_template).parameters,
    reason="this version of Transformers doesn't have the option",
)
def test_marks_that_a_user_typed_can_be_kept_as_text(formed, photos):
    processor, image, _ = formed
    messages = conversation(photos)
    messages[-1]["content"].append({"type": "text", "text": f"Is {image} an image?"})
    inputs = processor.apply_chat_template(messages, **ALL, sanitize_control_tokens=True)
    assert inputs["mm_token_type_ids"][0].count_nonzero() == len(inputs["image_grid_thw"]) == 2
    assert f"Is {image} an image?" in processor.decode(inputs["input_ids"][0])
    with pytest.raises(ValueError, match=r"number of images \(1\) must be .* placeholders in the text \(2\)"):
        processor.apply_chat_template(messages, **ALL)


@pytest.mark.parametrize("load", [AutoProcessor.from_pretrained, CasaProcessor.from_pretrained])
def test_saving_and_loading(formed, source, photos, tmp_path, load):
    processor, *_ = formed
    processor.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is CasaProcessor
    assert loaded.to_dict() == processor.to_dict()
    settings = json.loads((source / "preprocessor_config.json").read_text())
    assert loaded.source_config == {"preprocessor_config.json": settings}
    inputs, expected = (each.apply_chat_template(conversation(photos), **ALL) for each in (loaded, processor))
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


def test_files_of_earlier_versions(formed, photos, tmp_path):
    """These know `image_token` alone."""
    processor, image, video = formed
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    del settings["vision_start_token"]
    file.write_text(json.dumps(settings))
    loaded = CasaProcessor.from_pretrained(tmp_path)
    assert loaded.vision_start_token_id == processor.vision_start_token_id
    given = {"text": f"{image} and {video}", "images": photos["cat"], "videos": [[photos["rocket"]] * 2]}
    assert loaded(**given)["input_ids"] == processor(**given)["input_ids"]


def test_a_template_of_text_takes_images_and_a_missing_padding_token_is_made_up_for(
    helium, source, processor, tmp_path
):
    copy = Path(shutil.copytree(helium, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text("{{ messages[0].content + '!' }}")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(copy).pad_token is None
    made = CasaProcessor.from_text_source(copy, source)
    assert made.chat_template == made.tokenizer.chat_template != processor.chat_template
    assert made.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}]) == f"{IMAGE}!"
    batch = made(text=["Short.", "A longer prompt."], return_tensors="pt")
    assert batch["input_ids"][0, 0] == made.tokenizer.eos_token_id and batch["attention_mask"][0, 0] == 0


def test_a_tokenizer_without_the_image_token(processor, tokenizer):
    with pytest.raises(ValueError, match=r"no <\|image\|>, which.*from_text_source"):
        CasaProcessor(processor.image_processor, tokenizer, image_token="<|image|>")
    with pytest.raises(ValueError, match=r"no <\|vision_start\|>, .*Qwen vision-language"):
        CasaProcessor(processor.image_processor, tokenizer)


@pytest.fixture(scope="module")
def model(helium: Path, source: Path, processor: CasaProcessor) -> CasaForConditionalGeneration:
    text = AutoConfig.from_pretrained(helium)
    text.vocab_size = len(processor.tokenizer)
    config = CasaConfig.from_source(
        text,
        vision_config=AutoConfig.from_pretrained(source).vision_config,
        image_token_id=processor.image_token_id,
        vision_start_token_id=processor.vision_start_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CasaForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.2)
    return model


@torch.no_grad()
def test_the_model_takes_what_the_processor_makes(model, processor, photos):
    logits = []
    for name in ("cat", "coffee"):
        messages = conversation({**photos, "cat": photos[name]})
        logits.append(model(**processor.apply_chat_template(messages, **ALL)).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_a_conversation_on_one_cache_repeats_no_token(model, processor, photos):
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    talk = Conversation(model, processor)
    talk.ask("What?", [photos["cat"]], max_new_tokens=4, do_sample=False)
    talk.ask("And this?", [photos["coffee"]], max_new_tokens=1, do_sample=False)
    said = processor.decode(talk._ids[0])
    assert said.startswith(f"<s>User: {IMAGE}What?\nAssistant:")
    assert said.count(f"</s>\nUser: {IMAGE}And this?\nAssistant:") == 1
