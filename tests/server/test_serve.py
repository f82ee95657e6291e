"""The life of a server process: it binds first, drains on a signal and exits with 0."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.http.hosts import is_local
from server.listen import ServeError, bind
from server.serve import greeting
from tests.kit import ROOT

pytestmark = pytest.mark.process

SERVER = """
import asyncio, sys
import msgspec
from engine.client import EngineState
from server.config import ServerConfig
from server.listen import ServeError, bind
from server.serve import run
from tests.server.kit import TEXT, PlainChat, ids
from tests.server.fake_engine import FakeEngine, Script

mode, drain = sys.argv[1], float(sys.argv[2])

class Engine(FakeEngine):
    async def start(self):
        if mode == "fails":
            self.set_status(state=EngineState.FAILED, message="the weights are damaged")
        if mode == "later":
            asyncio.get_running_loop().call_later(0.5, lambda: self.set_status(
                state=EngineState.FAILED, message="the engine died too often"))

engine = Engine(script=lambda submit: Script(token_ids=ids('a') * submit.sampling.max_tokens, delay=0.05))
config = ServerConfig(model_name="tiny", host="127.0.0.1", port=0, drain_seconds=drain)
try:
    with bind(config.host, config.port) as listener:
        code = asyncio.run(run(config, engine, TEXT, PlainChat(), listener))
except ServeError as error:
    print("error:", error, file=sys.stderr)
    code = 1
sys.exit(code)
"""


class Server:
    """A server process with a scripted engine: a token takes 50 ms."""

    def __init__(self, mode: str = "serves", drain: float = 30) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, mode, str(drain)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.url = ""

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.match(r"ready at (\S+) ", line)
        assert match, line
        self.url = match[1]

    def ask(self, **more: object) -> httpx.Response:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 20} | more
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)

    def end(self, number: int | None = None) -> tuple[int, str]:
        if number is not None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    started: list[Server] = []
    yield started
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def in_thread(server: Server, tokens: int = 20) -> tuple[threading.Thread, list[httpx.Response | Exception]]:
    answers: list[httpx.Response | Exception] = []

    def work() -> None:
        try:
            answers.append(server.ask(max_tokens=tokens))
        except httpx.HTTPError as error:
            answers.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)  # it is being answered now
    return thread, answers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_with_0(servers: list[Server], number: int) -> None:
    servers.append(server := Server())
    server.wait_ready()
    assert server.ask(max_tokens=1).status_code == 200
    assert server.end(number) == (0, "")


def test_running_requests_finish_and_new_ones_get_503(servers: list[Server]) -> None:
    servers.append(server := Server())
    server.wait_ready()
    thread, answers = in_thread(server)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    refused = server.ask()
    assert refused.status_code == 503
    assert "error" in refused.json()
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    assert httpx.get(f"{server.url}/health/ready").status_code == 503
    thread.join()
    (answer,) = answers
    assert isinstance(answer, httpx.Response)
    assert answer.json()["choices"][0]["text"] == "a" * 20
    code, errors = server.end()
    assert code == 0
    assert errors.startswith("stopping: 1 request has up to 30 s to finish")


def test_a_second_signal_ends_at_once(servers: list[Server]) -> None:
    servers.append(server := Server())
    server.wait_ready()
    thread, _ = in_thread(server, tokens=200)  # ten seconds
    start = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert server.end(signal.SIGINT)[0] == 0
    assert time.monotonic() - start < 5
    thread.join()


def test_the_drain_has_an_end(servers: list[Server]) -> None:
    servers.append(server := Server(drain=0.1))
    server.wait_ready()
    thread, _ = in_thread(server, tokens=200)
    start = time.monotonic()
    assert server.end(signal.SIGTERM)[0] == 0
    assert time.monotonic() - start < 5
    thread.join()


@pytest.mark.parametrize(
    ("mode", "sentence"), [("fails", "the weights are damaged"), ("later", "the engine died too often")]
)
def test_an_engine_that_failed_ends_the_server_with_1(
    servers: list[Server], mode: str, sentence: str
) -> None:
    servers.append(server := Server(mode))
    assert server.end() == (1, f"error: {sentence}\n")


def test_a_taken_port_is_a_sentence() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port} of 127.0.0.1 is in use by another process"):
            bind("127.0.0.1", port)


def test_a_name_that_is_no_address_is_a_sentence() -> None:
    with pytest.raises(ServeError, match="cannot listen on no.such.host.invalid port 80"):
        bind("no.such.host.invalid", 80)


def test_the_greeting_can_be_pasted() -> None:
    line = greeting("it's", "0.0.0.0", 8000)
    assert line.startswith("ready at http://127.0.0.1:8000 ")
    assert "\n" not in line
    command = line.partition("try: ")[2].replace("curl", "printf '%s\\n'", 1)
    said = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert said[0] == "http://127.0.0.1:8000/v1/chat/completions"
    assert (
        said[-1]
        == '{"model": "it\'s", "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'
    )
    assert greeting("m", "::1", 1).startswith("ready at http://[::1]:1 ")
    assert "/v1/completions" in greeting("m", "::1", 1, random_weights=True)
    assert "-H 'authorization: Bearer KEY'" in greeting("m", "::1", 1, asks_key=True)


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("server.example", False)],
)  # fmt: skip
def test_who_can_reach_an_address(host: str, local: bool) -> None:
    assert is_local(host) is local


@pytest.mark.skipif(not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")
def test_ipv6() -> None:
    try:
        with bind("::1", 0) as listener:
            assert listener.family is socket.AF_INET6
    except ServeError:
        pytest.skip("no IPv6 address here")


@pytest.mark.slow
def test_the_real_thing_from_start_to_end(default_model: Path, tmp_path: Path) -> None:
    code = "import sys; from server.cli.main import main; sys.argv[0] = 'dsa'; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "serve", "--port", "0", "--max-model-len", "256", "--ledger", "none", "--kv-cache-memory", "64MiB"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            match = re.match(r"ready at (\S+) ", process.stdout.readline())
            assert match, process.communicate()[1]
            chat = [sys.executable, "-c", code, "chat", "--url", match[1], "--temperature", "0"]
            said = subprocess.run(
                chat,
                cwd=ROOT,
                input="What is the capital of France?\n",
                capture_output=True,
                text=True,
                timeout=90,
                check=True,
            )
            assert "Paris" in said.stdout
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
