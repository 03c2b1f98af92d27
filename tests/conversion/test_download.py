# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Sources on the Hub: a small server speaks as much of its protocol as a download needs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import metadata_load

from casa_hf.conversion import convert_checkpoint
from tests.conversion.helpers import altered, assert_refused, assert_same, converted, load_weights

REPOSITORY = "someone/tiny-vl"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as REPOSITORY; its address, and the names of the files that were fetched."""
    fetched: list[str] = []
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_content=False)

        def do_GET(self) -> None:
            self.answer(with_content=True)

        def answer(self, with_content: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "0" * 40}
                    for name in names
                ]
                return self.send(json.dumps(entries).encode(), with_content)
            if path.startswith(f"/api/models/{REPOSITORY}"):
                info = {"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                return self.send(json.dumps(info).encode(), with_content)
            for revision in ("main", COMMIT):
                prefix = f"/{REPOSITORY}/resolve/{revision}/"
                if path.startswith(prefix) and path.removeprefix(prefix) in names:
                    name = path.removeprefix(prefix)
                    if with_content:
                        fetched.append(name)
                    return self.send((folder / name).read_bytes(), with_content, etag=name)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, content: bytes, with_content: bool, etag: str = "api") -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{etag.replace("/", "-")}"')
            self.end_headers()
            if with_content:
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def source(source_folder, tmp_path):
    """A repository with more in it than a conversion needs."""
    folder = altered(source_folder, tmp_path / "source")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "original").mkdir()
    for name in ("consolidated.safetensors", "params.json"):
        (folder / "original" / name).write_bytes(b"{}")
    return folder


def test_convert_from_the_hub(source, use_hub, tmp_path):
    output = tmp_path / "outputs" / "casa"
    with hub(source) as (address, fetched):
        use_hub(address)
        convert_checkpoint(REPOSITORY, output, revision="main")
    assert_same(load_weights(output), converted(load_weights(source), [0, 1, 2]))
    # The weights come last, when everything else is known to be right; pickles and subfolders never.
    assert fetched[-1] == "model.safetensors"
    assert set(fetched) == {file.name for file in source.iterdir() if file.suffix != ".bin" and file.is_file()}
    metadata = metadata_load(output / "README.md")
    assert metadata["base_model"] == REPOSITORY and metadata["license"] == "apache-2.0"
    card = (output / "README.md").read_text()
    assert f"casa-hf convert {REPOSITORY} {output} --variant casa --revision main\n" in card
    assert COMMIT in card


def test_a_repository_of_another_kind_is_refused_before_its_weights_are_fetched(source, use_hub, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    with hub(source) as (address, fetched):
        use_hub(address)
        assert_refused(REPOSITORY, tmp_path / "outputs" / "casa", "'gemma'")
    assert "config.json" in fetched and "model.safetensors" not in fetched


def test_a_repository_without_safetensors(source, use_hub, tmp_path):
    (source / "model.safetensors").unlink()
    with hub(source) as (address, fetched):
        use_hub(address)
        assert_refused(REPOSITORY, tmp_path / "outputs" / "casa", "has no safetensors weights")
    assert "pytorch_model.bin" not in fetched


def test_no_such_repository(source, use_hub, tmp_path):
    with hub(source) as (address, _):
        use_hub(address)
        assert_refused("someone/else", tmp_path / "outputs" / "casa", "'someone/else' is not a local folder", "login")


def test_without_a_connection(use_hub, tmp_path):
    use_hub("http://127.0.0.1:9")
    message = assert_refused(REPOSITORY, tmp_path / "outputs" / "casa", REPOSITORY, "connection", "local folder")
    assert len(message) < 600
