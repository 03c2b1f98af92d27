# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""A Hub on this machine: enough of its protocol for the real client to create, upload, commit, and download.

Repositories, branches, commits and large files are kept in memory. As on the Hub, a file is visible when a commit
names it, large files are stored once by their hash, and a private repository doesn't exist for those who may not read
it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

WRITER, READER = "hf_writer", "hf_reader"
# Tokens of the first user that may not write, and not read what is private.
READ_ONLY, BLIND = "hf_read_only", "hf_blind"
USERS = {WRITER: "me", READ_ONLY: "me", BLIND: "me", READER: "somebody"}


class Refused(Exception):
    """An answer that isn't a success."""

    def __init__(self, status: int, message: str, code: str | None = None, **details: Any):
        super().__init__(message)
        self.status, self.code, self.details = status, code, {"error": message, **details}


@dataclass
class Commit:
    """A state of a repository.

    Attributes:
        files: content by name.
        large: names of those that came through the large-file storage.
        message: of the commit.
    """

    files: dict[str, bytes]
    large: set[str]
    message: str

    @property
    def sha(self) -> str:
        described = json.dumps([self.message, sorted(self.files), sorted(map(git_hash, self.files.values()))])
        return hashlib.sha1(described.encode()).hexdigest()


@dataclass
class Repository:
    """Commits by branch, oldest first, and by tag."""

    private: bool
    branches: dict[str, list[Commit]]
    tags: dict[str, Commit] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        if revision in self.branches:
            return self.branches[revision][-1]
        if revision in self.tags:
            return self.tags[revision]
        for commit in (commit for history in self.branches.values() for commit in history):
            if commit.sha == revision:
                return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass
class Hub:
    """The server's state, for tests to look at and to disturb.

    Attributes:
        repositories: by id.
        stored: large files by SHA-256.
        large: patterns of the names of files that go to the large-file storage.
        requests: "METHOD path" of every request, in order.
        uploaded: SHA-256 of every large file that arrived completely, in order.
        on_upload: called with the handler and the size of a large file before its content is read; may break the
            connection, or refuse.
        before_commit, after_commit: called before a commit is taken, and before it is answered; may break the
            connection, or refuse.
        before_info: the same before a repository is described.
        on_request: called with "METHOD path" of every request before it is answered; may wait.
    """

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    large: tuple[str, ...] = ("*.safetensors",)
    requests: list[str] = field(default_factory=list)
    uploaded: list[str] = field(default_factory=list)
    on_upload: Callable[[Any, int], None] | None = None
    before_commit: Callable[[], None] | None = None
    after_commit: Callable[[], None] | None = None
    before_info: Callable[[], None] | None = None
    on_request: Callable[[str], None] | None = None

    def commits(self, repository: str, branch: str = "main") -> list[Commit]:
        """Those after the one that creation makes."""
        return self.repositories[repository].branches[branch][1:]

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repository].at(revision).files

    def create(self, repository: str, private: bool = False, files: dict[str, bytes] | None = None) -> None:
        first = Commit({".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}, set(), "initial commit")
        self.repositories[repository] = Repository(private, {"main": [first]})

    def edit(self, repository: str, branch: str = "main", **files: str) -> None:
        """A commit that somebody makes on the website; names are without ".md"."""
        history = self.repositories[repository].branches[branch]
        written = {f"{name}.md": text.encode() for name, text in files.items()}
        history.append(Commit({**history[-1].files, **written}, set(history[-1].large), f"Edit {len(history)}"))


def break_connection(handler: Any, size: int) -> None:
    """Read half of what is sent, and hang up."""
    handler.rfile.read(size // 2)
    handler.connection.close()
    raise ConnectionAbortedError


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # small answers would wait 40 ms for the client
    hub: Hub

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        path = urlsplit(self.path).path
        request = f"{self.command} {unquote(path)}"
        self.hub.requests.append(request)
        if self.hub.on_request is not None:
            self.hub.on_request(request)
        try:
            for method, pattern, handle in ROUTES:
                # A "/" in the name of a branch is quoted, those between the parts of the path are not.
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return handle(self, **{name: unquote(part) for name, part in match.groupdict().items()})
            raise Refused(404, f"There is no {self.command} {unquote(path)}.")
        except Refused as refused:
            self.drain()
            headers = {"X-Error-Message": str(refused)}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self.send(json.dumps(refused.details).encode(), refused.status, headers)
        except ConnectionError:
            self.close_connection = True

    # ------------------------------------------------------------ who may what

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    @property
    def user(self) -> str | None:
        if self.token and self.token not in USERS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return USERS.get(self.token)

    def readable(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        is_mine = name.split("/")[0] == self.user
        if repository is None or (repository.private and (not is_mine or self.token == BLIND)):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, name: str) -> Repository:
        repository = self.readable(name)
        if name.split("/")[0] != self.user or self.token == READ_ONLY:
            raise Refused(403, f"You don't have the rights to write to {name}")
        return repository

    def proposable(self, name: str) -> Repository:
        """One for a pull request, which who may read it may open, or for a commit."""
        return self.readable(name) if self.is_proposal else self.writable(name)

    @property
    def is_proposal(self) -> bool:
        return "create_pr" in parse_qs(urlsplit(self.path).query)

    # ------------------------------------------------------------ routes

    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        self.send_json({"type": "user", "name": self.user, "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked = json.loads(self.body())
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if name.split("/")[0] != self.user or self.token == READ_ONLY:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        if name in self.hub.repositories:
            raise Refused(409, "You already created this model repo", url=f"{self.hub.address}/{name}")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.create(name, private)
        self.send_json({"url": f"{self.hub.address}/{name}", "name": name})

    def info(self, name: str, revision: str | None = None) -> None:
        if self.hub.before_info is not None:
            self.hub.before_info()
        repository = self.readable(name)
        commit = repository.at(revision or "main")

        def sibling(file: str, content: bytes) -> dict[str, Any]:
            blob = {"rfilename": file, "size": len(content), "blobId": git_hash(content)}
            if file not in commit.large:
                return blob
            return {**blob, "lfs": {"sha256": sha256(content), "size": len(content), "pointerSize": 130}}

        with_blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = [sibling(*file) if with_blobs else {"rfilename": file[0]} for file in commit.files.items()]
        self.send_json(
            {"id": name, "sha": commit.sha, "private": repository.private, "tags": [], "siblings": siblings}
        )

    def tree(self, name: str, revision: str) -> None:
        commit = self.readable(name).at(revision)
        self.send_json(
            [
                {"type": "file", "path": file, "size": len(content), "oid": git_hash(content)}
                for file, content in commit.files.items()
            ]
        )

    def branch(self, name: str, revision: str) -> None:
        start = json.loads(self.body() or b"{}").get("startingPoint", "main")
        repository = self.writable(name)
        if revision in repository.branches:
            raise Refused(409, "Reference already exists")
        first = repository.at(start)
        history = next(history for history in repository.branches.values() if first in history)
        repository.branches[revision] = history[: history.index(first) + 1]
        self.send_json({})

    def delete_branch(self, name: str, revision: str) -> None:
        if revision not in self.writable(name).branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        del self.hub.repositories[name].branches[revision]
        self.send_json({})

    def refs(self, name: str) -> None:
        repository = self.readable(name)
        heads = {
            branch: history[-1] for branch, history in repository.branches.items() if not branch.startswith("refs/pr/")
        }
        named = {"branches": ("heads", heads), "tags": ("tags", repository.tags)}
        self.send_json(
            {"converts": []}
            | {
                kind: [
                    {"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": commit.sha}
                    for ref, commit in commits.items()
                ]
                for kind, (folder, commits) in named.items()
            }
        )

    def validate(self) -> None:
        text = json.loads(self.body())["content"]
        stated = ModelCard(text).data.get("base_model") if text.startswith("---") else None
        for name in [stated] if isinstance(stated, str) else stated or []:
            try:
                validate_repo_id(name)
            except HFValidationError:
                said = f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
                raise Refused(400, said, errors=[{"message": said}]) from None
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self.body())["files"]
        present = self.proposable(name).at(revision)

        def answer(file: dict[str, Any]) -> dict[str, Any]:
            path, content = file["path"], present.files.get(file["path"])
            large = any(fnmatch(path, pattern) for pattern in self.hub.large)
            hashed = sha256 if large else git_hash
            known = {} if content is None else {"oid": hashed(content)}
            return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known}

        self.send_json({"files": [answer(file) for file in asked]})

    def batch(self, name: str) -> None:
        body = json.loads(self.body())
        asked = body["objects"]
        # Without a branch they are for a pull request.
        (self.writable if "ref" in body else self.readable)(name)

        def answer(wanted: dict[str, Any]) -> dict[str, Any]:
            if wanted["oid"] in self.hub.stored:
                return wanted
            upload = {"href": f"{self.hub.address}/storage/{wanted['oid']}"}
            verify = {"href": f"{self.hub.address}/{name}.git/info/lfs/objects/verify"}
            return {**wanted, "actions": {"upload": upload, "verify": verify}}

        self.send_json({"transfer": "basic", "objects": [answer(wanted) for wanted in asked]})

    def store(self, oid: str) -> None:
        if self.hub.on_upload is not None:
            self.hub.on_upload(self, int(self.headers["Content-Length"]))
        content = self.body()
        if sha256(content) != oid:
            raise Refused(400, "The content has another hash")
        self.hub.stored[oid] = content
        self.hub.uploaded.append(oid)
        self.send_json({})

    def verify(self, name: str) -> None:
        asked = json.loads(self.body())
        if len(self.hub.stored.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "No such object")
        self.send_json({})

    def commit(self, name: str, revision: str) -> None:
        if self.hub.before_commit is not None:
            self.hub.before_commit()
        lines = [json.loads(line) for line in self.body().splitlines()]
        repository = self.proposable(name)
        history = repository.branches[revision]
        proposal = f"refs/pr/{1 + sum(branch.startswith('refs/pr/') for branch in repository.branches)}"
        if self.is_proposal:
            history = repository.branches[proposal] = list(history)
        files, large, message = dict(history[-1].files), set(history[-1].large), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", history[-1].sha) != history[-1].sha:
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
                large.add(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        history.append(Commit(files, large, message))
        if self.hub.after_commit is not None:
            self.hub.after_commit()
        sha = history[-1].sha
        answer = {"commitUrl": f"{self.hub.address}/{name}/commit/{sha}", "commitOid": sha}
        if self.is_proposal:
            answer["pullRequestUrl"] = f"{self.hub.address}/{name}/discussions/{proposal.rpartition('/')[2]}"
        self.send_json(answer)

    def resolve(self, name: str, revision: str, file: str) -> None:
        commit = self.readable(name).at(revision)
        if file not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = commit.files[file]
        oid = sha256(content) if file in commit.large else git_hash(content)
        self.send(content, 200, {"X-Repo-Commit": commit.sha, "ETag": f'"{oid}"'})

    # ------------------------------------------------------------ bytes

    def body(self) -> bytes:
        self.drained = True
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def drain(self) -> None:
        """Read what a refused request has sent, so that the connection can be used on."""
        if not getattr(self, "drained", False):
            self.body()

    def handle_one_request(self) -> None:
        self.drained = False
        super().handle_one_request()

    def send_json(self, content: Any) -> None:
        self.send(json.dumps(content).encode())

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


_NAME = r"(?P<name>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", Handler.commit),
    ("POST", f"/api/models/{_NAME}/branch/{_REVISION}", Handler.branch),
    ("DELETE", f"/api/models/{_NAME}/branch/{_REVISION}", Handler.delete_branch),
    ("GET", f"/api/models/{_NAME}/refs", Handler.refs),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}", Handler.tree),
    ("GET", f"/api/models/{_NAME}/revision/{_REVISION}", Handler.info),
    ("GET", f"/api/models/{_NAME}", Handler.info),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/verify", Handler.verify),
    ("PUT", r"/storage/(?P<oid>\w+)", Handler.store),
    ("GET HEAD", f"/{_NAME}/resolve/{_REVISION}/(?P<file>.+)", Handler.resolve),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve an empty Hub."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
