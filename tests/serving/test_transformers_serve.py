# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`casa-hf serve` as a process, asked by the client of OpenAI: its answers are those of `generate`."""

from __future__ import annotations

import base64
import copy
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.samples import PHOTOGRAPHS
from casa_hf.serving.transformers_serve import create_app

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
TOKENS = 8
NAMES = ("cat", "coffee", "rocket")


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "casa_hf", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        said: list[str] = []
        assert done.stderr is not None and done.stdout is not None
        try:
            for line in done.stderr:
                said.append(line)
                if found := re.search(r"at (http://\S+/v1) until", line):
                    break
            else:
                raise AssertionError("".join(said))
            with ThreadPoolExecutor(1) as reader:  # or the server would wait for room to write
                reader.submit(done.stderr.read)
                try:
                    yield found[1]
                finally:
                    done.terminate()  # or the reader would wait for more, also where a test fails
        finally:
            done.kill()
        assert done.stdout.read() == ""


@pytest.fixture(scope="module")
def address(casa_folder: Path) -> Iterator[str]:
    with serving(casa_folder, "--max-decoded-pixels", "400000", "--max-bytes", "600000") as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=address, api_key="-", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def parts(casa_folder: Path) -> tuple[CasaForConditionalGeneration, CasaProcessor]:
    return CasaForConditionalGeneration.from_pretrained(casa_folder), CasaProcessor.from_pretrained(casa_folder)


def as_url(name: str) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode((PHOTOGRAPHS / f'{name}.jpg').read_bytes()).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def generated(parts: Any, *turns: tuple[str, ...], **options: Any) -> str:
    """The answer of `generate` to turns of the user (names of photographs, and the text at the end) and answers."""
    model, processor = parts
    messages: list[dict[str, Any]] = []
    for index, (*names, text) in enumerate(turns):
        images = [{"type": "image", "path": str(PHOTOGRAPHS / f"{name}.jpg")} for name in names]
        messages.append({"role": "assistant" if index % 2 else "user", "content": [*images, text_part(text)]})
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    return answer_of(model, processor, inputs, **options)


def answer_of(model: CasaForConditionalGeneration, processor: CasaProcessor, inputs: Any, **options: Any) -> str:
    output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, **options)
    return plain(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def plain(answer: str) -> str:
    """An answer without what Transformers' parser leaves out, or lets through, if it is asked to stream: blanks around
    it, and special tokens that don't belong there."""
    return re.sub(r"<\|\w+\|>", "", answer).strip()


def asked(client: Any, folder: Path, messages: list[Any], **options: Any) -> str:
    options = {"temperature": 0, "max_tokens": TOKENS, **options}
    answer = client.chat.completions.create(model=str(folder), messages=messages, **options)
    if options.get("stream"):
        return plain("".join(chunk.choices[0].delta.content or "" for chunk in answer))
    assert answer.model == str(folder)
    return plain(answer.choices[0].message.content)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_chat_completions(client: Any, casa_folder: Path, parts: Any, serve: Any, stream: bool) -> None:
    """An image as a data URL, as base64 and as a URL is the same image, and another one gives another answer."""
    expected = {name: generated(parts, (name, "What is it?")) for name in NAMES}
    assert len(set(expected.values())) == len(NAMES)
    urls = [(name, as_url(name)) for name in NAMES]
    urls += [("cat", f"{serve(PHOTOGRAPHS)}/cat.jpg"), ("cat", as_url("cat").partition(",")[2])]
    for name, url in urls:
        messages = [user(image_part(url), text_part("What is it?"))]
        assert asked(client, casa_folder, messages, stream=stream) == expected[name]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stop_sequences(client: Any, casa_folder: Path, parts: Any, stream: bool) -> None:
    """An answer ends where `stop` is in it, as that of `generate` with `stop_strings`."""
    whole = generated(parts, ("cat", "What is it?"))
    stop = whole[len(whole) // 2 :][:2]
    messages = [user(image_part(as_url("cat")), text_part("What is it?"))]
    answer = asked(client, casa_folder, messages, stream=stream, stop=[stop])
    assert answer == generated(parts, ("cat", "What is it?"), stop_strings=[stop], tokenizer=parts[1])
    assert stop in answer and len(answer) < len(whole)


def test_videos(client: Any, casa_folder: Path, parts: Any) -> None:
    """A file by its contents, of which Transformers' server takes 32 frames."""
    pytest.importorskip("av")
    clip = ROOT / "examples" / "assets" / "bunny.mp4"
    url = f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"
    found = asked(client, casa_folder, [user({"type": "video_url", "video_url": {"url": url}}, text_part("What?"))])
    model, processor = parts
    inputs = processor.apply_chat_template(
        [user({"type": "video", "path": str(clip)}, text_part("What?"))],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"num_frames": 32},
    )
    assert len(inputs["image_grid_thw"]) == 32
    assert found == answer_of(model, processor, inputs)


def test_responses(client: Any, casa_folder: Path, parts: Any) -> None:
    expected = generated(parts, ("coffee", "What is it?"))
    content = [{"type": "input_image", "image_url": as_url("coffee")}, {"type": "input_text", "text": "What is it?"}]
    for given in (content, [{"role": "user", "content": content}]):
        options = {"model": str(casa_folder), "input": given, "temperature": 0, "max_output_tokens": TOKENS}
        assert client.responses.create(stream=False, **options).output_text == expected
        events = list(client.responses.create(stream=True, **options))
        deltas = [each.delta for each in events if each.type == "response.output_text.delta"]
        assert len(deltas) > 1 and plain("".join(deltas)) == expected
        assert events[-1].type == "response.completed"
        assert plain(events[-1].response.output[0].content[0].text) == expected
    texts = client.responses.create(
        model=str(casa_folder), input="Hello?", stream=False, temperature=0, max_output_tokens=TOKENS
    )
    assert texts.output_text == generated(parts, ("Hello?",))


def test_turns_with_new_images(client: Any, casa_folder: Path, parts: Any) -> None:
    messages: list[Any] = []
    turns: list[tuple[str, ...]] = []
    for names, text in ((["cat"], "What is it?"), (["coffee", "rocket"], "And these?"), ([], "Which was first?")):
        messages.append(user(*(image_part(as_url(name)) for name in names), text_part(text)))
        turns.append((*names, text))
        answer = asked(client, casa_folder, messages)
        assert answer == generated(parts, *turns)
        messages.append({"role": "assistant", "content": answer})
        turns.append((answer,))
    assert len({turn[0] for turn in turns[1::2]}) > 1


def test_requests_at_the_same_time(client: Any, casa_folder: Path, parts: Any) -> None:
    """Each gets the answer to its own images, streamed or not."""
    texts = [(name, f"What is in picture {number}?") for number in range(3) for name in NAMES]
    expected = [generated(parts, text) for text in texts]
    assert len(set(expected)) > 3

    def ask(index: int) -> str:
        name, text = texts[index]
        return asked(client, casa_folder, [user(image_part(as_url(name)), text_part(text))], stream=index % 2 == 0)

    with ThreadPoolExecutor(len(texts)) as pool:
        assert list(pool.map(ask, range(len(texts)))) == expected


def test_nobody_waits_for_the_address_of_another(client: Any, casa_folder: Path, parts: Any) -> None:
    """An image from a server that doesn't answer keeps its own request waiting alone."""
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/cat.jpg"
        late = pool.submit(asked, client, casa_folder, [user(image_part(url), text_part("What is it?"))])
        connection, _ = silent.accept()
        messages = [user(image_part(as_url("cat")), text_part("What is it?"))]
        expected = generated(parts, ("cat", "What is it?"))
        assert asked(client, casa_folder, messages) == expected
        assert not late.done()
        content = (PHOTOGRAPHS / "cat.jpg").read_bytes()
        with connection:
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        assert late.result() == expected


def test_what_is_refused(client: Any, casa_folder: Path, parts: Any, tmp_path: Path) -> None:
    """By its reason, and the server answers the next request."""
    file = PHOTOGRAPHS / "cat.jpg"
    large = tmp_path / "large.png"
    Image.new("RGB", (1000, 1000)).save(large)
    too_large = base64.b64encode(large.read_bytes()).decode()
    words = {
        str(file): "paths aren't read",
        f"file://{file}": "paths aren't read",
        "http://127.0.0.1:1/cat.jpg": "can't be fetched",
        "data:image/png;base64,aGVsbG8=": "its format isn't known",
        f"data:image/png;base64,{too_large}": "1000 x 1000 pixels, more than max_decoded_pixels=400000",
    }
    for url, reason in words.items():
        with pytest.raises(openai.BadRequestError, match=reason):
            asked(client, casa_folder, [user(image_part(url))])
        with pytest.raises(openai.BadRequestError, match=reason):
            client.responses.create(model=str(casa_folder), input=[{"type": "input_image", "image_url": url}])
    audio = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
    refused = {
        "whose type is one of": [user(audio)],
        "expected a URL": [user({"type": "image_url"})],
        "expected an object with a role": ["What is it?"],
        "must be the number of image placeholders": [user(text_part("<|vision_start|><|vision_end|>"))],
        "The video 'clip.mp4' can't be used: paths": [user({"type": "video_url", "video_url": {"url": "clip.mp4"}})],
    }
    for reason, messages in refused.items():
        with pytest.raises(openai.BadRequestError, match=re.escape(reason)):
            asked(client, casa_folder, messages)
    with pytest.raises(openai.BadRequestError, match="Server is pinned to"):
        asked(client, Path("another/model"), [user(text_part("What?"))])
    with pytest.raises(openai.APIStatusError) as found:
        asked(client, casa_folder, [user(text_part("a" * 2_000_000))])
    assert found.value.status_code == 413
    assert asked(client, casa_folder, [user(text_part("Hello?"))]) == generated(parts, ("Hello?",))


def test_the_model_stays(client: Any, address: str, casa_folder: Path) -> None:
    """It is the only one, under the name that it was given, and no request loads or unloads any."""
    assert [each.id for each in client.models.list()] == [str(casa_folder)]

    def post(path: str, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address.removesuffix('v1')}{path}", body, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()

    assert '"ok"' in post("reset", b"{}")
    assert '"ready"' in post("load_model", b'{"model": "%s"}' % str(casa_folder).encode())
    assert "This server has the model" in post("load_model", b'{"model": "another/model"}')
    with pytest.raises(urllib.error.HTTPError) as found:
        post("v1/audio/transcriptions", b"{}")
    assert found.value.code == 404
    assert asked(client, casa_folder, [user(text_part("Hello?"))])


def test_transformers_chat(address: str, casa_folder: Path, parts: Any) -> None:
    """The chat of Transformers talks to the server, in several turns."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(casa_folder), address]
    options = ["do_sample=False", f"max_new_tokens={TOKENS}"]
    done = subprocess.run(
        [*command, *options],
        env={**ENVIRONMENT, "HF_HUB_DISABLE_UPDATE_CHECK": "1", "COLUMNS": "200"},
        input="Hello?\nn\nWhat is it?\nn\n!exit\n!exit\n",  # no to more tokens, where an answer has not ended
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.sub(r"\W", "", generated(parts, ("Hello?",))) in re.sub(r"\W", "", done.stdout), done.stdout
    assert done.stdout.count("tok/s") > 1  # more than one answer


def test_the_document(
    address: str, casa_folder: Path, parts: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its client, with this server's address and name."""
    document = (ROOT / "docs" / "serving.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", document, flags=re.MULTILINE | re.DOTALL)
    assert "http://localhost:8000/v1" in code and '"qwen-casa"' in code
    code = code.replace("http://localhost:8000/v1", address).replace("qwen-casa", str(casa_folder))
    code = code.replace("max_tokens=64", f"max_tokens={TOKENS}")
    monkeypatch.chdir(PHOTOGRAPHS)
    exec(compile(code, "serving.md", "exec"), {})
    assert plain(capsys.readouterr().out) == generated(parts, ("cat", "What is in this image?"))


def test_variables_of_the_chat_template(parts: Any) -> None:
    """Those of a request win over those of the server; what the template doesn't have reaches no processor."""
    from starlette.testclient import TestClient

    model, processor = parts[0], copy.deepcopy(parts[1])
    processor.chat_template += "{% if thinking is defined and not thinking %}Well: {% endif %}"
    server = TestClient(create_app(model, processor, "casa", {"thinking": False}))
    shown = user(image_part(as_url("cat")), text_part("What is it?"))

    def ask(path: str = "chat/completions", **variables: Any) -> Any:
        asked = {"messages": [shown]} if path == "chat/completions" else {"input": [shown]}
        body = {"model": "casa", **asked, "max_tokens": TOKENS, "temperature": 0, "stream": False, **variables}
        return server.post(f"/v1/{path}", json=body)

    lengths = [
        ask(**variables).json()["usage"]["prompt_tokens"]
        for variables in ({}, {"chat_template_kwargs": {"thinking": True}})
    ]
    assert lengths[0] - lengths[1] == len(processor.tokenizer("Well: ")["input_ids"])
    for given, reason in (
        ({"min_pixels": 10**9}, "has 'min_pixels', which the chat template"),
        ({"processor_kwargs": {"min_pixels": 10**9}}, "has 'processor_kwargs', which the chat template"),
        ({"chat_template": "{{ messages }}"}, "has 'chat_template', which is given"),
        ({"messages": []}, "has 'messages', which is given"),
        ({"tools": []}, "Give them as `tools`"),
        (None, "chat_template_kwargs is null; expected an object"),
    ):
        for path in ("chat/completions", "responses"):
            answer = ask(path, chat_template_kwargs=given)
            assert answer.status_code == 400 and reason in answer.json()["error"]["message"]
    with pytest.raises(ValueError, match="has 'thinkin'"):
        create_app(model, processor, "casa", {"thinkin": False})


def test_thoughts_and_calls_of_tools_are_found(parts: Any) -> None:
    """As for the source: its type is known to Transformers' server, that of CASA models isn't."""
    from transformers.cli.serving.utils import parse_assistant_message

    model, processor = parts
    create_app(model, processor, "casa")
    said = 'Hm.</think>A cat.<tool_call>\n{"name": "feed", "arguments": {"grams": 40}}\n</tool_call><|im_end|>'
    ids = processor.tokenizer("<think>" + said)["input_ids"]
    prompt = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    content, thought, calls = parse_assistant_message(processor, model, ids, prompt)
    assert (content, thought) == ("A cat.", "Hm.")
    assert [(call.name, call.arguments) for call in calls or ()] == [("feed", '{"grams": 40}')]
