# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A chat with images and videos in the browser, with Gradio: python -m examples.clients.gradio_chat my-casa-model"""

from __future__ import annotations

import argparse
import mimetypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import gradio as gr
from transformers import TextIteratorStreamer

from casa_hf import CasaForConditionalGeneration, CasaProcessor


def chat(model: CasaForConditionalGeneration, processor: CasaProcessor, max_new_tokens: int = 256) -> gr.ChatInterface:
    """The page: each answer is generated from the whole conversation, and shown while it is."""

    def answer(message: dict[str, Any], history: list[dict[str, Any]]) -> Iterator[str]:
        parts = [*map(visual, message["files"]), as_part(message["text"])]
        try:
            inputs = processor.apply_chat_template(
                [*map(as_message, history), {"role": "user", "content": parts}],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
            ).to(model.device)
        except ValueError as error:  # such as an image that can't be read
            raise gr.Error(str(error)) from error
        streamer, stopped = TextIteratorStreamer(processor.tokenizer, True, skip_special_tokens=True), Event()

        def generate() -> None:
            try:
                model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                    stopping_criteria=[lambda *_, **__: stopped.is_set()],
                )
            finally:
                streamer.end()

        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(generate)
            try:
                said = ""
                for piece in filter(None, streamer):
                    said += piece
                    yield said
            finally:
                stopped.set()  # also where nobody waits for the rest
            done.result()

    files = gr.MultimodalTextbox(file_types=["image", "video"], file_count="multiple")
    return gr.ChatInterface(answer, multimodal=True, textbox=files, title="CASA", api_name="chat")


def as_message(said: dict[str, Any]) -> dict[str, Any]:
    """A message of Gradio's history as chat templates take it."""
    content = [said["content"]] if isinstance(said["content"], str) else said["content"]
    return {"role": said["role"], "content": [*map(as_part, content)]}


def as_part(part: str | dict[str, Any]) -> dict[str, str]:
    """A part of a message: pages and programs that ask them write it differently."""
    if isinstance(part, str) or "text" in part:
        return {"type": "text", "text": part if isinstance(part, str) else part["text"]}
    return visual((part.get("file") or part)["path"])


def visual(path: str) -> dict[str, str]:
    """An image or a video as chat templates take it."""
    kind = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
    return {"type": "video" if kind == "video" else "image", "path": path}


def main(arguments: Sequence[str] | None = None) -> None:
    """Show the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a CASA checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="any but this machine's own lets others in")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    options = parser.parse_args(arguments)
    model = CasaForConditionalGeneration.from_pretrained(options.model).eval()
    page = chat(model, CasaProcessor.from_pretrained(options.model), options.max_new_tokens)
    page.launch(server_name=options.host, server_port=options.port, show_error=True)


if __name__ == "__main__":
    main()
