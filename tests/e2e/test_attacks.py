"""What has hurt other callers once, done again to a live server: probes are answered and streams go on meanwhile.

Bounds are those of a quiet machine. What the machine itself adds, busy with other work, is measured just before each attack.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from tests.e2e.serving import MODEL, Server, until
from tests.ledger import ledger_rows

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(300)]

LIVE_SECONDS, GAP_SECONDS = 0.1, 0.5
QUIET_SECONDS = 4.0


class LateError(AssertionError):
    """Others felt what was done: the message says how long."""


@dataclass
class Felt:
    """What others feel."""

    live: list[float] = field(default_factory=list)  # seconds of each answer of /health/live
    times: list[float] = field(default_factory=list)  # when each event of a stream came
    failed: list[str] = field(default_factory=list)

    def worst(self) -> tuple[float, float]:
        """The longest answer, and the longest gap."""
        return max(self.live), max((b - a for a, b in pairwise(self.times)), default=0.0)


class Watch:
    """Asks /health/live all the time, over one connection, and reads streams, one after another."""

    def __init__(self, server: Server, *, stream: bool = True) -> None:
        self._server = server
        self._over = threading.Event()
        self.felt = Felt()
        acts = [self._probe, self._read] if stream else [self._probe]
        self._threads = [threading.Thread(target=act) for act in acts]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def renew(self) -> Felt:
        """What was felt so far; begin anew."""
        felt, self.felt = self.felt, Felt()
        return felt

    def _probe(self) -> None:
        connection = http.client.HTTPConnection(self._server.url.removeprefix("http://"), timeout=30)
        with contextlib.closing(connection):
            while not self._over.wait(0.05):
                began = time.monotonic()
                try:
                    connection.request("GET", "/health/live")
                    response = connection.getresponse()
                    response.read()
                except (OSError, http.client.HTTPException) as error:
                    self.felt.failed.append(repr(error))
                    continue
                self.felt.live.append(time.monotonic() - began)
                if response.status != 200:
                    self.felt.failed.append(f"live {response.status}")

    def _read(self) -> None:
        body = {"model": MODEL, "prompt": "Once", "max_tokens": 2000, "stream": True, "ignore_eos": True}
        with httpx.Client(timeout=60) as client:
            while not self._over.is_set():
                with client.stream("POST", f"{self._server.url}/v1/completions", json=body) as response:
                    for line in response.iter_lines():
                        if line.startswith("data: "):
                            self.felt.times.append(time.monotonic())
                        if '"error"' in line:
                            self.felt.failed.append(line)
                        if self._over.is_set():
                            return


@contextmanager
def unharmed(server: Server, *, stream: bool = True) -> Iterator[None]:
    """Nobody else feels what is done in the block."""
    with Watch(server, stream=stream) as watch:
        if stream:
            until(lambda: len(watch.felt.times) > 3, 60)
        watch.renew()
        time.sleep(QUIET_SECONDS)
        quiet_live, quiet_gap = watch.renew().worst()
        yield
        time.sleep(0.5)
        felt = watch.renew()
    live, gap = felt.worst()
    assert felt.failed == []
    if live >= LIVE_SECONDS + quiet_live:
        raise LateError(f"live took {live:.3f} s, and {quiet_live:.3f} s before")
    if gap >= GAP_SECONDS + quiet_gap:
        raise LateError(f"a gap was {gap:.3f} s, and {quiet_gap:.3f} s before")


def post(server: Server, path: str, content: bytes, headers: dict[str, str] | None = None) -> int:
    """The status of an answer; 0: the connection was closed without one."""
    more = {"content-type": "application/json"} | (headers or {})
    try:
        return httpx.post(server.url + path, content=content, headers=more, timeout=100).status_code
    except httpx.TransportError:
        return 0


def completion(server: Server, prompt: str) -> int:
    return post(server, "/v1/completions", f'{{"model": "{MODEL}", "prompt": {prompt}}}'.encode())


def strings_for_tokens(server: Server) -> None:
    assert completion(server, "[1, " + '"", ' * 1_700_000 + '""]') in (400, 413)


def empty_lists(server: Server) -> None:
    assert completion(server, "[" + "[], " * 1_700_000 + "[]]") in (400, 413)


def control_tokens(server: Server) -> None:
    messages = [{"role": "user", "content": "<|im_start|>" * 600_000}]
    content = json.dumps({"model": MODEL, "messages": messages}).encode()
    assert post(server, "/v1/chat/completions", content) in (400, 413)


def unknown_fields(server: Server) -> None:
    message = {"role": "user", "content": "x"} | {f"field{i}": i for i in range(100)}
    content = json.dumps({"model": MODEL, "messages": [message] * 4096}).encode()
    assert post(server, "/v1/chat/completions", content) in (400, 413)


def digits(server: Server) -> None:
    """Four at once, of 4 MB each."""
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(completion(server, f'"{"1" * 4_000_000}"'))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {400, 413, 429}


def a_large_header(server: Server) -> None:
    """64 MB of headers; the server closes long before it has all."""
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0), 30) as sock:
        with suppress(OSError):
            sock.sendall(b"GET /health/live HTTP/1.1\r\nhost: 127.0.0.1\r\nx: ")
            for _ in range(64):
                sock.sendall(b"y" * (1 << 20))
        with suppress(OSError):
            assert not sock.recv(100).startswith(b"HTTP/1.1 200")


def a_large_body(server: Server) -> None:
    """Ten times what is allowed: refused, and the refusal can be read."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0), 30) as sock:
        sock.sendall(head + b"content-length: 80000000\r\n\r\n")
        with suppress(OSError):
            for _ in range(80):
                sock.sendall(b" " * 1_000_000)
        assert sock.recv(100).startswith(b"HTTP/1.1 413")


def slow_connections(server: Server) -> None:
    """200 clients that send half of their headers, or half of a body, and nothing more."""
    halves = [b"GET /v1/models HT", b"POST /v1/completions HTTP/1.1\r\ncontent-length: 1000\r\n\r\n{"]
    with ExitStack() as stack:
        for number in range(200):
            sock = socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0), 30)
            stack.enter_context(contextlib.closing(sock))
            sock.sendall(halves[number % 2])
        assert server.get("/v1/models").status_code == 200
        time.sleep(2)


ATTACKS = [
    strings_for_tokens, empty_lists, control_tokens, unknown_fields, digits, a_large_header, a_large_body,
    slow_connections,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_others_feel_nothing(server: Server, attack: Callable[[Server], None]) -> None:
    """Once in three times: what an attack does it does each time, and what a busy machine does comes and goes."""
    for left in (2, 1, 0):
        try:
            with unharmed(server):
                attack(server)
        except LateError:
            if not left:
                raise
        else:
            return


def test_a_locked_ledger_holds_no_answer(start: Callable[..., Server]) -> None:
    server = start().wait_ready()
    server.post("/v1/completions", prompt="hello", max_tokens=1)
    with (
        unharmed(server),
        contextlib.closing(sqlite3.connect(server.ledger, isolation_level=None)) as database,
    ):
        database.execute("BEGIN EXCLUSIVE")
        for _ in range(3):
            began = time.monotonic()
            assert server.post("/v1/completions", prompt="hello", max_tokens=1).status_code == 200
            assert time.monotonic() - began < 5
        database.execute("ROLLBACK")
    assert server.end(signal.SIGTERM) == 0


def test_a_ledger_that_is_removed_is_noticed_and_goes_on_when_it_is_back(
    start: Callable[..., Server],
) -> None:
    server = start().wait_ready()
    server.post("/v1/completions", prompt="hello", max_tokens=1)
    away = server.ledger.with_name("away")
    with unharmed(server, stream=False):
        server.ledger.rename(away)
        until(lambda: not server.ready, 10)
        told = server.get("/health/ready").json()
        assert told["state"] == "ledger"
        assert "was removed while the server runs" in told["reason"]
        assert server.metrics()["dsa_ledger_files_lost_total"] == 1
        assert server.post("/v1/completions", prompt="hello", max_tokens=1).status_code == 200
        assert not server.ledger.exists()
        away.rename(server.ledger)
        until(lambda: server.ready, 10)
    assert server.end(signal.SIGTERM) == 0
    assert len(ledger_rows(server.ledger)) == 2


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A disk of its own; only an administrator can make one."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tmpfs is Linux's")
def test_a_full_disk_is_told_and_ends_when_there_is_room(
    start: Callable[..., Server], tmp_path: Path
) -> None:
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        server = start("--ledger", str(disk / "usage.sqlite")).wait_ready()
        assert server.post("/v1/completions", prompt="hello", max_tokens=1).status_code == 200
        until(lambda: server.get("/health/ready").json()["warnings"] == [])
        with unharmed(server, stream=False):
            with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
                while filler.write(b"x" * 4096):
                    pass
            answer = server.post("/v1/completions", prompt="hello", max_tokens=1)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
            told = server.get("/health/ready")
            assert (told.status_code, told.json()["state"]) == (503, "ledger")
            assert "full" in told.json()["reason"]
            (disk / "filler").unlink()
            until(lambda: server.ready, 20)  # nobody has to send a request for that
        assert server.post("/v1/completions", prompt="hello", max_tokens=1).status_code == 200
        assert server.end(signal.SIGTERM) == 0
        assert len(ledger_rows(disk / "usage.sqlite")) == 2


def test_half_a_body_does_not_hold_a_drain(start: Callable[..., Server]) -> None:
    server = start("--client-seconds", "100").wait_ready()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0), 30) as sock:
        sock.sendall(head)
        time.sleep(1)  # until the server reads it
        began = time.monotonic()
        assert server.end(signal.SIGTERM) == 0
        assert time.monotonic() - began < 15  # and not the 30 s of a drain
        assert sock.recv(100).startswith(b"HTTP/1.1 503")


def test_a_page_that_points_its_name_here_reads_nothing(server: Server) -> None:
    for path in ("/docs", "/openapi.json", "/v1/models", "/metrics"):
        for name in ("evil.example", f"evil.example:{httpx.URL(server.url).port}", "127.0.0.1.evil.example"):
            answer = httpx.get(server.url + path, headers={"host": name}, timeout=30)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "host_not_allowed")
    page = server.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'none'")


def test_clients_that_never_read_hold_no_place(start: Callable[..., Server]) -> None:
    server = start("--max-queue", "3").wait_ready()
    body = {
        "model": MODEL,
        "prompt": "Once",
        "max_tokens": 300,
        "stream": True,
        "ignore_eos": True,
        "logprobs": 5,
    }
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    with ExitStack() as stack, unharmed(server, stream=False):
        for _ in range(3):
            sock = socket.socket()
            stack.enter_context(contextlib.closing(sock))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            sock.connect(("127.0.0.1", httpx.URL(server.url).port or 0))
            sock.sendall(head.encode() + content)
        until(lambda: server.metrics()["dsa_engine_decode_tokens_total"] > 3, 60)
        until(lambda: server.metrics()["dsa_requests_running"] == 0, 100)
        assert server.post("/v1/completions", prompt="hello", max_tokens=1).status_code == 200
    assert server.end(signal.SIGTERM) == 0


def test_a_stopped_engine_leaves_probes_alone(start: Callable[..., Server]) -> None:
    server = start("--hang-seconds", "5").wait_ready()
    with unharmed(server, stream=False):
        engine = server.engine
        engine.suspend()
        answer = server.post("/v1/completions", prompt="hello", max_tokens=1)
        assert answer.status_code == 503
        until(lambda: server.ready, 60)
    assert not engine.is_running()
    assert server.end(signal.SIGTERM) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of other processes are Linux's")
def test_an_engine_that_dies_while_descriptors_are_used_up_comes_back(start: Callable[..., Server]) -> None:
    server = start().wait_ready()
    pid = server.process.pid
    with unharmed(server, stream=False):
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, limits[1]))  # fewer than are open
        server.engine.kill()
        until(lambda: "could not be started" in server.errors)
        time.sleep(3)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        until(lambda: server.ready, 60)
    assert server.post("/v1/completions", prompt="hello", max_tokens=1).status_code == 200
    assert server.end(signal.SIGTERM) == 0
