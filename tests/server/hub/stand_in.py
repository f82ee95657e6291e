"""A small stand-in of the Hugging Face hub on loopback: listings, redirects, hashes, ranges, and its troubles on demand.

What it answers is what https://huggingface.co/docs/hub/api and the client `huggingface_hub` describe. Large files are on
another origin, as on the hub, where the token must not be sent.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

LARGE = 1000
"""Files of so many bytes and more are in large storage (LFS)."""


class Asked(NamedTuple):
    """One request that the hub has got."""

    method: str
    path: str
    range: str | None
    token: str | None


class StandIn:
    """The hub, while it is entered.

    Attributes:
        asked: every request so far.
        sent: the names of the files whose content was sent, or begun, in their order.
        cut: name of a file -> how many bytes of it are sent before the connection breaks; each is used once a number.
        spoilt: names of files that come with a wrong byte.
        gated: the repositories that only `token` lets in.
        silent: names of files of which a few bytes are sent, and then nothing.
        down: every request is answered with 503.
    """

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.sent: list[str] = []
        self.cut: dict[str, list[int]] = {}
        self.spoilt: set[str] = set()
        self.gated: set[str] = set()
        self.silent: set[str] = set()
        self._leave = threading.Event()
        self.token = "hf_good"
        self.down = False
        self.ignores_ranges = False
        self._commits: dict[tuple[str, str], Mapping[str, bytes]] = {}
        self._refs: dict[tuple[str, str], str] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def put(
        self, repository: str, files: Mapping[str, bytes], *, revision: str = "main", **facts: Any
    ) -> str:
        """Make a commit of these files and let the revision be it; return the commit."""
        text = json.dumps({name: hashlib.sha1(content).hexdigest() for name, content in files.items()})
        commit = hashlib.sha1(f"{repository}{text}".encode()).hexdigest()
        self._commits[repository, commit] = dict(files)
        self._refs[repository, revision] = self._refs[repository, commit] = commit
        self._facts[repository] = facts
        return commit

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StandIn:
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        token = request.headers.get("Authorization")
        self.asked.append(Asked(request.command, path, request.headers.get("Range"), token))
        parts = path.strip("/").split("/")
        if self.down:
            _send(request, 503, b"busy")
        elif parts[0] == "storage":
            assert token is None, "the token was sent to another origin"
            self._content(request, parts[-1], self._find(parts[1], parts[-1]), {})
        elif parts[:2] == ["api", "models"]:
            revision = "/".join(parts[5:]) or "main"
            self._list(request, "/".join(parts[2:4]), revision)
        elif "resolve" not in parts:  # what the client asks besides
            _send(request, 404, b"")
        else:
            at = parts.index("resolve")
            self._file(request, "/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]))

    def _commit(
        self, request: http.server.BaseHTTPRequestHandler, repository: str, revision: str
    ) -> str | None:
        if repository not in self._facts:
            # The hub does not tell a stranger whether a private repository exists.
            _send(request, 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif (commit := self._refs.get((repository, revision))) is None:
            _send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return commit
        return None

    def _list(self, request: http.server.BaseHTTPRequestHandler, repository: str, revision: str) -> None:
        if (commit := self._commit(request, repository, revision)) is None:
            return
        siblings: list[dict[str, Any]] = []
        for name, content in self._commits[repository, commit].items():
            one: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": _git(content)}
            if len(content) >= LARGE:
                one["lfs"] = {
                    "sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134
                }  # fmt: skip
            siblings.append(one)
        answer = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings}
        _send(request, 200, json.dumps(answer | self._facts[repository]).encode())

    def _file(
        self, request: http.server.BaseHTTPRequestHandler, repository: str, revision: str, name: str
    ) -> None:
        if (commit := self._commit(request, repository, revision)) is None:
            return
        if repository in self.gated and request.headers.get("Authorization") != f"Bearer {self.token}":
            _send(
                request, 401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
            )
            return
        content = self._commits[repository, commit].get(name)
        facts = {"X-Repo-Commit": commit}
        if content is None:
            _send(request, 404, b"", facts | {"X-Error-Code": "EntryNotFound"})
        elif len(content) < LARGE:
            self._content(request, name, content, facts | {"ETag": f'"{_git(content)}"'})
        else:
            digest = hashlib.sha256(content).hexdigest()
            place = f"http://localhost:{self._server.server_port}/storage/{digest}/{name}"
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)), "Location": place}
            _send(request, 302, b"", facts | linked)

    def _find(self, digest: str, name: str) -> bytes:
        return next(
            content
            for files in self._commits.values()
            for path, content in files.items()
            if path.endswith(name) and hashlib.sha256(content).hexdigest() == digest
        )

    def _content(
        self, request: http.server.BaseHTTPRequestHandler, name: str, content: bytes, headers: dict[str, str]
    ) -> None:
        whole, status = len(content), 200
        if name in self.spoilt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = request.headers.get("Range")
        if asked and not self.ignores_ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            content, status = content[start:], 206
            headers = headers | {"Content-Range": f"bytes {start}-{whole - 1}/{whole}"}
        if request.command == "GET":
            self.sent.append(name)
        if request.command == "GET" and name in self.silent:
            _send(request, status, content, headers, sent=5)
            self._leave.wait(60)
        elif request.command == "GET" and self.cut.get(name):
            _send(request, status, content, headers, sent=self.cut[name].pop(0))
        else:
            _send(request, status, content, headers)


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _send(
    request: http.server.BaseHTTPRequestHandler,
    status: int,
    content: bytes,
    headers: Mapping[str, str] | None = None,
    sent: int | None = None,
) -> None:
    """Answer; with `sent`, break the connection after so many bytes."""
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(content[:sent])
        request.wfile.flush()
    if sent is not None:
        request.close_connection = True
