# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The programs of examples/clients, and what docs/clients.md says of the libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.samples import PHOTOGRAPHS

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # where there is no GPU
]

LEARNED = "model.language_model.layers.0.casa_attn.q_proj.weight"


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "rloo"])
def test_trl(casa_folder: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("trl")
    from examples.clients import trl_rewards

    before = CasaForConditionalGeneration.from_pretrained(casa_folder, dtype=torch.float32).state_dict()
    trl_rewards.main([kind, str(casa_folder), str(tmp_path), "--steps", "2"])
    after = CasaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not torch.equal(before[LEARNED], after[LEARNED])


def test_a_reward_looks_at_the_image() -> None:
    pytest.importorskip("trl")
    from examples.clients.trl_rewards import names_the_colour

    images = [[Image.new("RGB", (8, 8), colour)] for colour in ("red", "blue", "blue")]
    said: list[Any] = [[{"content": text}] for text in ("Red.", "Red.", "Blue.")]
    first, second, third = names_the_colour(said, images=images)
    assert first == third == 1.0 and second < 0.5


def test_peft(casa_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from examples.clients import peft_adapters

    losses = peft_adapters.main([str(casa_folder), str(tmp_path), "--steps", "5"])
    assert losses[-1] < losses[0]
    merged = CasaForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    source = CasaForConditionalGeneration.from_pretrained(casa_folder, dtype=torch.float32)
    assert not torch.equal(merged.state_dict()[LEARNED], source.state_dict()[LEARNED])
    adapted = peft.PeftModel.from_pretrained(source, tmp_path / "adapter").eval()
    inputs = CasaProcessor.from_pretrained(tmp_path / "merged")(
        text="<|vision_start|><|vision_end|>What?", images=PHOTOGRAPHS / "cat.jpg", return_tensors="pt"
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_accelerate(casa_folder: Path, tmp_path: Path) -> None:
    """Parts on the disk, and the answer that the whole model gives."""
    pytest.importorskip("accelerate")
    from examples.clients import accelerate_maps

    options = [str(casa_folder), str(tmp_path), "--max-new-tokens", "6", "--cpu"]
    whole, everything = accelerate_maps.main([*options, "1GiB"])
    assert set(map(str, everything.values())) == {"cpu"}
    answer, places = accelerate_maps.main([*options, "400KiB"])
    assert set(map(str, places.values())) == {"cpu", "disk"}
    assert answer == whole


@pytest.mark.filterwarnings("ignore")  # of smolagents, about itself
def test_smolagents_with_a_server(casa_folder: Path) -> None:
    """Answers about an image are those of `generate`; agents ask with it, with texts to stop at, and as a stream."""
    smolagents = pytest.importorskip("smolagents")
    pytest.importorskip("fastapi")
    from examples.clients import smolagents_pictures
    from tests.serving.test_transformers_serve import plain, serving

    image = Image.open(PHOTOGRAPHS / "cat.jpg")
    asked = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}]
    expected = plain(answer(casa_folder, [["cat.jpg", "What is it?"]]))
    with serving(casa_folder, "--no-network") as server:
        model = smolagents.OpenAIModel(str(casa_folder), api_base=server, api_key="-", temperature=0, max_tokens=8)
        assert plain(model.generate(asked).content) == expected
        assert plain("".join(piece.content or "" for piece in model.generate_stream(asked))) == expected

        options = ["--server", server, "--steps", "1", "--max-tokens", "8"]
        agent = smolagents_pictures.main([str(casa_folder), *options])
        step, *_ = [each for each in agent.memory.steps if isinstance(each, smolagents.ActionStep)]
        assert step.observations_images is not None and step.model_output  # a random model's, which is no program
        for kind in (smolagents.CodeAgent, smolagents.ToolCallingAgent):
            tools = [smolagents.FinalAnswerTool()]
            kind(tools=tools, model=model, max_steps=1, stream_outputs=True).run("What is it?", images=[image])


def test_smolagents_in_the_same_process(casa_folder: Path) -> None:
    """`TransformersModel` answers as `generate` does, but takes no image's pixels along."""
    smolagents = pytest.importorskip("smolagents")
    model = smolagents.TransformersModel(str(casa_folder), max_new_tokens=8, do_sample=False)
    text = {"type": "text", "text": "What is it?"}
    asked = [{"role": "user", "content": [text]}]
    assert model.generate(asked).content == answer(casa_folder, [["What is it?"]])
    assert "".join(piece.content for piece in model.generate_stream(asked)) == answer(casa_folder, [["What is it?"]])
    image = {"type": "image", "image": Image.open(PHOTOGRAPHS / "cat.jpg")}
    with pytest.raises(ValueError, match=r"1 image placeholders .* but 0 images were given"):
        model.generate([{"role": "user", "content": [image, text]}])


@pytest.mark.filterwarnings("ignore")  # of Gradio, about pandas
def test_gradio(casa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation with images through a running page, whose answers are those of `generate`, piece by piece."""
    gradio = pytest.importorskip("gradio")
    client_of = pytest.importorskip("gradio_client")
    from examples.clients import gradio_chat

    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    (damaged := tmp_path / "damaged.jpg").write_bytes(b"no image")
    model = CasaForConditionalGeneration.from_pretrained(casa_folder).eval()
    page = gradio_chat.chat(model, CasaProcessor.from_pretrained(casa_folder), max_new_tokens=8)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, show_error=True)
    try:
        client = client_of.Client(url, verbose=False)
        turns: list[list[str]] = []
        for name, text in (("cat.jpg", "What is it?"), ("coffee.jpg", "And this?")):
            turns.append([name, text])
            files = [client_of.handle_file(str(PHOTOGRAPHS / name))]
            asked = client.submit({"text": text, "files": files}, api_name="/chat")
            turns.append([expected := answer(casa_folder, turns)])
            assert asked.result() == expected
            pieces = asked.outputs()
            assert len(pieces) > 1 and all(map(str.startswith, pieces[1:], pieces))
        with pytest.raises(client_of.exceptions.AppError, match="can't be used"):
            client.predict({"text": "?", "files": [client_of.handle_file(str(damaged))]}, api_name="/chat")
    finally:
        page.close()
    # What the browser sends for the same conversation.
    shown = [{"role": "user", "content": gradio.FileData(path=str(PHOTOGRAPHS / "cat.jpg"))}]
    shown += [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    history = page.chatbot.preprocess(page.chatbot.postprocess(shown))
    image, text, said = map(gradio_chat.as_message, history)
    assert image["content"][0]["type"] == "image" and text["content"] == [{"type": "text", "text": "What is it?"}]
    assert said == {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    assert gradio_chat.visual("clip.mp4")["type"] == "video"


def answer(folder: Path, turns: list[list[str]]) -> str:
    """What `generate` says to turns of a user, images first, and of an assistant."""
    processor = CasaProcessor.from_pretrained(folder)
    messages = []
    for index, (*names, text) in enumerate(turns):
        images = [{"type": "image", "path": str(PHOTOGRAPHS / name)} for name in names]
        content = [*images, {"type": "text", "text": text}]
        messages.append({"role": "assistant" if index % 2 else "user", "content": content})
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    model = CasaForConditionalGeneration.from_pretrained(folder).eval()
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
