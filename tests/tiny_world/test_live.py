# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The captioner: its clips, its training batches, and that it says what has changed, when it has changed."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import pytest
import torch

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.streaming import LiveCaptions
from casa_hf.video import open_video
from examples.tiny_world import live
from examples.tiny_world.world import split_of
from tests.tiny_world.reader import areas

pytestmark = pytest.mark.integration

av = pytest.importorskip("av")

FRAME_SECONDS = 0.5
RATE = 10  # frames per second of the encoded video


@cache
def captioner():
    model = CasaForConditionalGeneration.from_pretrained(live.CHECKPOINT).eval()
    return model, CasaProcessor.from_pretrained(live.CHECKPOINT)


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_are_what_pixels_show(split):
    before = None
    for index in range(5):
        one = live.clip(index, 8, split)
        for number, (frame, caption) in enumerate(zip(one.frames, one.captions, strict=True)):
            (area,) = areas(frame)
            name = f"{area.colour} {area.shape}"
            assert caption == (name if number == 0 or name != before else "")
            assert split_of(frame) == split
            before = name
    assert live.clip(0, 8, split) == live.clip(0, 8, split) != live.clip(1, 8, split)


def test_a_batch_is_what_a_stream_reads():
    """Token for token, as recorded by a hook; and what is trained on is what the stream is to say."""
    model, processor = captioner()
    seen: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    one = live.clip(0, 6)
    with hook, live.new_stream(model, processor) as stream:
        said = [list(stream.push(frame))[-1] for frame in one.frames]
    assert [event.text.strip() for event in said] == list(one.captions)
    batch = live.StreamBatcher(processor)([one, live.clip(1, 3)])
    length = int(batch["attention_mask"][0].sum())
    assert batch["input_ids"][0, :length].tolist() == [*seen, said[-1].token_ids[-1]]
    labels = batch["labels"][0]
    assert labels[labels != -100].tolist() == [token for event in said for token in event.token_ids]
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    answered = (labels != -100).nonzero()[:, 0]
    assert torch.equal(logits[0, answered - 1].argmax(-1), labels[answered])


def test_the_captioner_sees_changes():
    found = live.scores(*captioner(), 20, 16)
    assert found["frames"] >= 0.95 and found["changes"] >= 0.93 and found["false"] <= 0.04


def test_short_training_writes_a_captioner(tmp_path, capsys):
    folder = live.train(tmp_path / "live", steps=2, frames=4, lengths=(2, 4))
    assert "step 2 of 2" in capsys.readouterr().out
    trained, start = (
        dict(CasaForConditionalGeneration.from_pretrained(f).named_parameters()) for f in (folder, live._START)
    )
    moved = {name for name in trained if not torch.equal(trained[name], start[name])}
    assert not any(name.startswith("model.visual.") for name in moved)
    assert any("casa_attn" in name for name in moved) and any("mlp" in name for name in moved)


def encoded(one: live.Clip, path) -> list[float]:
    """A video of the clip, each frame shown for half a second; when what it shows becomes something else."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "12"})
        stream.width, stream.height = one.frames[0].size
        stream.pix_fmt = "yuv444p"
        for frame in one.frames:
            for _ in range(int(RATE * FRAME_SECONDS)):
                image = av.VideoFrame.from_image(frame)
                container.mux(stream.encode(image))
        container.mux(stream.encode())
    return [index * FRAME_SECONDS for index, caption in enumerate(one.captions) if caption]


def test_videos_of_known_content_are_captioned_in_time(tmp_path):
    """What changed and when, within one frame: from a file that is encoded with losses, by way of its clock."""
    model, processor = captioner()
    changes = right = 0
    for index in range(6):
        one = live.clip(100 + index, 12)
        times = encoded(one, tmp_path / f"{index}.mp4")
        with live.new_stream(model, processor, fps=2) as stream:
            events = list(LiveCaptions(stream, open_video(tmp_path / f"{index}.mp4", fps=2)))
        ends = [event for event in events if event.kind == "end"]
        assert [event.start for event in ends] == [float(Fraction(step, 2)) for step in range(12)]
        said = [(event.start, event.text.strip()) for event in ends if event.text]
        expected = list(zip(times, filter(None, one.captions), strict=True))
        changes += len(expected)
        right += sum(
            any(name == other and abs(moment - time) <= FRAME_SECONDS for time, other in said)
            for moment, name in expected
        )
        assert len(said) <= len(expected) + 1
    assert changes >= 20 and right >= 0.9 * changes
