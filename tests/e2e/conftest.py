"""Servers for the end-to-end tests. A start takes seconds, so tests share them where they can."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import Server


@pytest.fixture(scope="session")
def server(default_model: Path) -> Iterator[Server]:
    """A server with its defaults, except that its queue is no longer than the tests' largest crowd."""
    yield from _shared("--max-queue", "64")


@pytest.fixture(scope="session")
def small_server(default_model: Path) -> Iterator[Server]:
    """A server in float32, so that texts can be compared, with 10 pages and short steps."""
    yield from _shared(
        *("--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory", "34MiB"),
        *("--token-budget", "64", "--max-running", "16", "--threads", "1"),
    )


@pytest.fixture(scope="session")
def _mortals() -> Iterator[list[Server]]:
    servers: list[Server] = []
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def start(default_model: Path, _mortals: list[Server]) -> Callable[..., Server]:
    """A function that starts a server for one test only."""

    def _start(*flags: str) -> Server:
        _mortals.append(server := Server(*flags))
        return server

    return _start


@pytest.fixture
def mortal(start: Callable[..., Server], _mortals: list[Server]) -> Server:
    """A server that a test may kill. If it survives the test, the next test uses it too."""
    alive = [server for server in _mortals if not server.flags and server.url and server.ready]
    return alive[0] if alive else start().wait_ready()


def _shared(*flags: str) -> Iterator[Server]:
    server = Server(*flags)
    try:
        yield server.wait_ready()
        # Whatever the tests did, the server is idle now: it exits at once, without a line about running requests.
        assert server.end(signal.SIGTERM) == 0
        for sign in ("stopping", "Traceback", "destroyed", "never retrieved"):
            assert sign not in server.errors, server.errors
    finally:
        server.close()
