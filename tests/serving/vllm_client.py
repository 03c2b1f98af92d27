# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`vllm serve` and the client of OpenAI: `python -m tests.serving.vllm_client OUTPUT`."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
from openai import APIStatusError, BadRequestError, OpenAI
from PIL import Image

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from tests.serving.vllm_checkpoints import TINY_WORLD

CHECKPOINT = TINY_WORLD / "checkpoints" / "casa"
HELD_OUT = TINY_WORLD / "held_out"
NUM_TOKENS = 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Reference:
    """The answers of `casa_hf`."""

    def __init__(self) -> None:
        self.model = CasaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
        self.processor = CasaProcessor.from_pretrained(CHECKPOINT)

    def __call__(self, messages: list[dict[str, Any]], names: list[str]) -> tuple[str, int]:
        """The answer to a conversation with these pictures, and the number of tokens of its prompt."""
        images = [Image.open(HELD_OUT / name).convert("RGB") for name in names]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(text=prompt, images=images, return_tensors="pt")
        output = self.model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=-1)
        number = inputs["input_ids"].shape[1]
        return self.processor.decode(output[0, number:], skip_special_tokens=True), number


def main() -> None:
    port, file_port = free_port(), free_port()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(HELD_OUT))
    files = http.server.ThreadingHTTPServer(("127.0.0.1", file_port), handler)
    threading.Thread(target=files.serve_forever, daemon=True).start()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(CHECKPOINT), "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "1024"]
    command += ["--max-num-seqs", "4", "--additional-config", '{"casa_max_image_tokens": 20}']
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    server = subprocess.Popen(command, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        result = ask(OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-"), file_port)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    Path(sys.argv[1]).write_text(json.dumps(result))
    print("RESULT", result)


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Wait until the server answers."""
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            if server.poll() is not None:
                raise RuntimeError("the server has ended") from None
            time.sleep(2)
    raise RuntimeError("the server doesn't answer")


def ask(client: OpenAI, file_port: int) -> dict[str, Any]:
    """All that the client asks, with the answers of `casa_hf`."""
    reference = Reference()
    names = sorted(path.name for path in HELD_OUT.glob("*.png"))

    def picture(name: str, by_url: bool) -> dict[str, Any]:
        content = base64.b64encode((HELD_OUT / name).read_bytes()).decode()
        url = f"http://127.0.0.1:{file_port}/{name}" if by_url else f"data:image/png;base64,{content}"
        return {"type": "image_url", "image_url": {"url": url}}

    def complete(messages: list[dict[str, Any]], **options: Any) -> Any:
        extra = {"ignore_eos": True}
        return client.chat.completions.create(
            model=str(CHECKPOINT), messages=messages, max_tokens=NUM_TOKENS, temperature=0, extra_body=extra, **options
        )

    def user(*parts: dict[str, Any]) -> dict[str, Any]:
        return {"role": "user", "content": list(parts)}

    def said(text: str) -> dict[str, Any]:
        return {"type": "text", "text": text}

    image = {"type": "image"}
    answers: dict[str, tuple[str, str]] = {}
    for by_url in (True, False):
        answer = complete([user(picture(names[0], by_url), said("What is this?"))])
        expected, number = reference([user(image, said("What is this?"))], names[:1])
        answers["URL" if by_url else "base64"] = (answer.choices[0].message.content, expected)
    prompt_tokens = answer.usage.prompt_tokens
    for name in ("streamed", "turns"):
        first = {"role": "assistant", "content": [said(expected)]}
        given = [user(picture(names[0], False), said("What is this?")), first]
        given.append(user(picture(names[5], True), said("And this?")))
        written = [user(image, said("What is this?")), first, user(image, said("And this?"))]
        wanted, _ = reference(written, [names[0], names[5]])
        if name == "streamed":
            parts = [chunk.choices[0].delta.content or "" for chunk in complete(given, stream=True)]
            answers[name] = ("".join(parts), wanted)
        else:
            answers[name] = (complete(given).choices[0].message.content, wanted)
    many = [picture(name, False) for name in names[:8]]
    try:
        complete([user(*many, said("What changed?"))])
        refused = (200, "")
    except BadRequestError as error:
        refused = (error.status_code, str(error))
    # The front end, which has seen this picture before, leaves it to the engine to know its size.
    try:
        complete([user(*[picture(names[0], False)] * 320, said("What changed?"))])
        crowded = (200, "")
    except APIStatusError as error:
        crowded = (error.status_code, str(error))
    answers["after that"] = (
        complete([user(picture(names[0], False), said("What is this?"))]).choices[0].message.content,
        expected,
    )
    return {
        "crowded": crowded,
        "answers": answers,
        "prompt_tokens": prompt_tokens,
        "expected_prompt_tokens": number,
        "refused": refused,
    }


if __name__ == "__main__":
    main()
