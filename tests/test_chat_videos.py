# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Videos in conversations: every turn on one cache answers as the processor and `generate` do in one shot, by hand,
with all that was said until then."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import pad

from casa_hf import CasaForConditionalGeneration, CasaProcessor, convert_checkpoint
from casa_hf.answers import Question, answer_batch
from casa_hf.cache_casa import cache_snapshot
from casa_hf.chat import Conversation
from casa_hf.samples import CAT, COFFEE, ROCKET
from casa_hf.video import load_frames
from examples.tiny_source import FAMILIES, build_tiny_source
from tests.clips import write_clip

pytest.importorskip("av")

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE, VIDEO = "<|vision_start|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
NEW_TOKENS = 5
# The delta rule of linear attention computes in float32.
TOLERANCES = {"qwen3_5_text": 1e-4}

# (family, settings of its conversion, settings of its processor).
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "frames": ("qwen2_5_vl", {}, {}),
    "pairs": ("qwen2_5_vl", {}, {"frames_per_image": 2}),
    "whole videos": ("qwen2_5_vl", {"variant": "insertion", "casa_video_layout": "native"}, {}),
    # A group ends with the first text that isn't one of the times.
    "times": ("qwen3_vl", {"casa_video_history": "group"}, {"min_pixels": 1}),
    "times, linear attention": ("qwen3_5", {"casa_video_history": "group"}, {"min_pixels": 1}),
}


class Chat(NamedTuple):
    """A model, its processor, and what its template writes before the first message."""

    model: CasaForConditionalGeneration
    processor: CasaProcessor
    opening: str


@pytest.fixture(scope="module", params=CHECKPOINTS)
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chat:
    family, design, settings = CHECKPOINTS[request.param]
    if family not in FAMILIES:
        pytest.skip(f"this version of Transformers has no {family}")
    folder = tmp_path_factory.mktemp(family)
    layers = {"num_hidden_layers": 4} if family == "qwen3_5" else {}
    build_tiny_source(folder / "source", family=family, **layers)
    convert_checkpoint(folder / "source", folder / "casa", **design)
    return Chat(
        CasaForConditionalGeneration.from_pretrained(folder / "casa", dtype=torch.float64).eval(),
        CasaProcessor.from_pretrained(folder / "casa", max_pixels=112**2, frame_max_pixels=84**2, **settings),
        SYSTEM if family == "qwen2_5_vl" else "",
    )


@pytest.fixture(scope="module")
def plain(casa_folder: Path) -> tuple[CasaForConditionalGeneration, CasaProcessor]:
    return (
        CasaForConditionalGeneration.from_pretrained(casa_folder, dtype=torch.float64).eval(),
        CasaProcessor.from_pretrained(casa_folder, max_pixels=112**2, frame_max_pixels=56**2),
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seconds of frames that tell their number, at 10 and at 5 frames per second, the second one wide."""
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / "a.mp4", 20, 10), write_clip(folder / "b.mkv", 10, 5, size=(96, 48))]


class ByHand:
    """All that was said until now, written, processed and generated from anew in every turn."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.shown: dict[str, torch.Tensor] = {}
        self.text = chat.opening

    def ask(self, text: str, images: list[Any], videos: list[Any], options: dict[str, Any], **settings: Any) -> str:
        model, processor, _ = self.chat
        marks = IMAGE * len(images) + VIDEO * len(videos)
        prompt = f"{self.text}<|im_start|>user\n{marks}{text}<|im_end|>\n{self._start_of_answer()}"
        new = dict(
            processor(
                text=prompt, images=images or None, videos=[videos] if videos else None, return_tensors="pt", **options
            )
        )
        new.pop("attention_mask")
        texts = ("input_ids", "mm_token_type_ids")
        for name, value in new.items():
            before = self.shown.get(name, value[:0] if name not in texts else value[:, :0])
            self.shown[name] = torch.cat([before, value], dim=1 if name in texts else 0)
        ids = self.shown["input_ids"]
        output = model.generate(**self.shown, max_new_tokens=NEW_TOKENS, **settings)[:, ids.shape[1] :]
        answer = processor.decode(output[0], skip_special_tokens=True)
        ends = model.generation_config.eos_token_id
        if output[0, -1] in torch.tensor(ends):
            output = output[:, :-1]
        self.shown["input_ids"] = torch.cat([ids, output], dim=1)
        self.shown["mm_token_type_ids"] = pad(self.shown["mm_token_type_ids"], (0, output.shape[1]))
        self.text = "<|im_end|>\n"
        return answer

    def _start_of_answer(self) -> str:
        """What the template writes after a question."""
        written = self.chat.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": "?"}]}], add_generation_prompt=True
        )
        return written.partition("?<|im_end|>\n")[2]

    def logits(self, token: int) -> torch.Tensor:
        """Those after one more token, without a cache."""
        ids, types = self.shown["input_ids"], self.shown["mm_token_type_ids"]
        shown = {**self.shown, "input_ids": pad(ids, (0, 1), value=token), "mm_token_type_ids": pad(types, (0, 1))}
        with torch.no_grad():
            return self.chat.model(**shown, use_cache=False).logits[0, -1]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_every_turn_is_one_shot_by_hand(chat: Chat, clips: list[Path], settings: dict[str, Any]) -> None:
    first, second = map(str, clips)
    turns: list[tuple[str, list[Any], list[Any], dict[str, Any]]] = [
        ("Hello!", [], [], {}),
        ("What happens?", [], [first], {"num_frames": 5}),
        ("Why?", [], [], {"fps": 1}),  # says nothing where there is no video
        ("And in these?", [CAT], [second, first], {"fps": 2}),
        ("This one?", [COFFEE], [], {}),
        ("And now?", [], [second], {"num_frames": 3}),
    ]
    conversation, by_hand = Conversation(chat.model, chat.processor), ByHand(chat)
    for text, images, videos, options in turns:
        answer = conversation.ask(text, images, videos, max_new_tokens=NEW_TOKENS, **options, **settings)
        assert answer == by_hand.ask(text, images, videos, options, **settings)
        assert torch.equal(conversation._ids, by_hand.shown["input_ids"])
        cache = cache_snapshot(conversation._cache)
        following = pad(conversation._ids, (0, 1), value=5)[:, cache.get_seq_length() :]
        with torch.no_grad():
            logits = chat.model(input_ids=following, cache=cache).logits[0, -1]
        tolerance = TOLERANCES.get(chat.model.config.text_config.model_type, 1e-9)
        torch.testing.assert_close(logits, by_hand.logits(5), rtol=tolerance, atol=tolerance)


def test_what_a_video_shows_and_when_changes_the_answer(chat: Chat, clips: list[Path]) -> None:
    """Otherwise the test above would prove little."""
    seen = []
    for videos, options in ([], {}), (clips[:1], {}), (clips[1:], {}), (clips[:1], {"num_frames": 4}):
        conversation = Conversation(chat.model, chat.processor)
        conversation.ask("What happens?", videos=videos, max_new_tokens=1, **options)
        with torch.no_grad():
            seen.append(chat.model(torch.tensor([[5]]), cache=conversation._cache).logits[0, -1])
    for index, logits in enumerate(seen):
        assert all((logits - other).abs().max() > 1e-3 for other in seen[:index])


def test_a_batch_answers_as_conversations_do(chat: Chat, clips: list[Path]) -> None:
    questions = [
        Question("What happens?", videos=clips[0]),
        Question("And in these two, and in the image before them?", CAT, clips),
        Question("Hello!"),
        Question("What is this?", [COFFEE, ROCKET]),
    ]
    answers = answer_batch(chat.model, chat.processor, questions, max_new_tokens=NEW_TOKENS, num_frames=4)
    for question, answer in zip(questions, answers, strict=True):
        alone = Conversation(chat.model, chat.processor)
        assert answer == alone.ask(*question, num_frames=4, max_new_tokens=NEW_TOKENS)


def test_one_video_of_any_form_needs_no_list(plain: Any, clips: list[Path], tmp_path: Path) -> None:
    def seen(videos: Any, **options: Any) -> torch.Tensor:
        conversation = Conversation(*plain)
        conversation.ask("What?", videos=videos, max_new_tokens=1, **options)
        with torch.no_grad():
            return plain[0](torch.tensor([[5]]), cache=conversation._cache).logits[0, -1]

    file = clips[0]
    frames = load_frames(file, num_frames=4)
    names = [tmp_path / f"{index}.png" for index in range(4)]
    for name, frame in zip(names, frames, strict=True):
        frame.save(name)
    expected = seen([str(file)], num_frames=4)
    for form in (file, str(file), file.read_bytes(), (file,)):
        assert torch.equal(seen(form, num_frames=4), expected)
    for form in (frames, tuple(frames), np.stack(frames), torch.tensor(np.stack(frames)), [frames], [names]):
        assert torch.equal(seen(form), expected)
    assert torch.equal(seen(None), seen([])) and not torch.equal(seen(None), expected)
    assert Conversation(*plain).ask("", videos=file, num_frames=4, max_new_tokens=1)  # the video is a message


@pytest.mark.parametrize(
    ("videos", "options", "message"),
    [
        ("nowhere.mp4", {}, r"The video 'nowhere\.mp4' can't be used: there is no such file"),
        (np.zeros((8, 8, 3), np.uint8), {}, r"The video .* can't be used; expected a path, .* Pass one of these"),
        ([None], {}, r"The video .* can't be used; expected a path"),
        (CAT, {"fps": 1, "num_frames": 2}, "can't be combined"),
        (None, {"fps": -1}, r"fps=-1 must be a positive number"),
        (CAT, {"pixel_values_videos": 0}, "pixel_values_videos"),
        (CAT, {"second_per_grid_ts": 0}, "second_per_grid_ts can't be given"),
        ([Image.new("RGB", (56, 56))], {"frames_per_image": 3}, "frames_per_image=3 is none of"),
        ([Image.new("RGB", (56, 56))] * 4, {"frames_per_image": "all"}, "2 temporal patches"),
    ],
)
def test_what_is_refused_leaves_the_conversation_as_it_was(
    plain: Any, clips: list[Path], videos: Any, options: dict[str, Any], message: str
) -> None:
    conversation, undisturbed = Conversation(*plain), Conversation(*plain)
    for each in (conversation, undisturbed):
        each.ask("What happens?", videos=clips[0], num_frames=3, max_new_tokens=NEW_TOKENS)
    with pytest.raises((ValueError, TypeError), match=message):
        conversation.ask("And now?", videos=videos, max_new_tokens=NEW_TOKENS, **options)
    expected = undisturbed.ask("And now?", max_new_tokens=NEW_TOKENS)
    assert conversation.ask("And now?", max_new_tokens=NEW_TOKENS) == expected
