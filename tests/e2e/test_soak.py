"""The long proofs: what they count and judge, and short runs of both against a live server."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.overload import judge
from tests.e2e.serving import Resources
from tests.e2e.soak import Sample, grown, lives, slope
from tests.e2e.soak_clients import Tally
from tests.e2e.wire import Answer, HungUpError, ask, encoded, quantile
from tests.kit import ROOT


def answered(*parts: bytes) -> Answer:
    """What the client makes of these bytes of a server, sent one after another."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()

    async def both() -> Answer:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await ask(f"http://127.0.0.1:{port}", encoded("/x", {}))

    return asyncio.run(both())


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize(
    ("parts", "terminal"),
    [
        ([STREAM, b'data: {"choices"', b': []}\n\ndata: [DONE]\n\n', b"0\r\n\r\n"], 1),
        ([STREAM, b'data: {"error": {"code": "engine_died"}}\n\n'], 1),
        ([STREAM, b'data: {"choices": []}\n\n'], 0),
        ([STREAM, b'data: {"error": {"code": "aborted"}}\n\ndata: [DONE]\n\n'], 2),
        ([STREAM, b"data: [DONE]\n\ndata: [DONE]\n\n"], 2),
        ([b"HTTP/1.1 429 No\r\ncontent-length: 2\r\nRetry-After: 3\r\n\r\n{}"], 1),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}"], 0),
        ([b"HTTP/1.1 200"], 0),
        ([], 0),
    ],
)  # fmt: skip
def test_ends_of_a_request_are_counted(parts: list[bytes], terminal: int) -> None:
    answer = answered(*parts)
    assert answer.terminal == terminal
    tally = Tally()
    tally.add("kind", answer)
    assert (tally.requests, len(tally.wrong)) == (1, int(terminal != 1))


def test_a_client_that_leaves_is_not_judged() -> None:
    tally = Tally()
    tally.add("kind", Answer(0.0, status=200, lost=str(HungUpError())), left=True)
    assert (tally.requests, tally.wrong) == (1, [])


def test_memory_that_grows_is_told_from_memory_that_is_warm() -> None:
    def sample(at: float, server: float, pid: int) -> Sample:
        return Sample(at, server, 100.0 if pid > 0 else -1.0, pid, 1, 1, 1, 0.0, 0)

    growing = [sample(2.0 * i, 50 + i / 30, 7 if i < 300 else 8) for i in range(310)]
    found = {life.name: life for life in lives(growing, 100)}
    assert found.keys() == {"server", "engine 7"}  # the other engine has lived too short
    assert found["server"].slope == pytest.approx(1.0)
    assert found["engine 7"].slope == 0
    filling = [sample(2.0 * i, 50 + min(i, 50), 7) for i in range(300)]
    assert {life.slope for life in lives(filling, 100)} == {0.0}
    assert slope([(0, 1.0), (60, 2.0), (120, 3.0)]) == pytest.approx(1.0)
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_what_is_left_behind_is_named() -> None:
    before = Resources(["a", "b"], 20, 6, 9, 5, 0, 0)
    assert grown(before, before) == grown(before, before._replace(server_threads=7)) == []
    assert grown(before, before._replace(server_threads=60)) == ["server_threads"]
    assert grown(before, before._replace(tasks=["a", "b", "c"], pages_used=1)) == ["tasks", "pages_used"]


def test_each_promise_about_overload_can_be_broken() -> None:
    good: dict[str, Any] = {
        "capacity": 1.0, "bound_seconds": 2.0, "alone": [0.5] * 10, "seconds": 100.0, "probes": [0.01] * 10,
        "accepted": [(float(i), 2.5, 1) for i in range(100)], "refused": [(float(i), 0.01, 3) for i in range(300)],
        "others": [], "crowd": {"attempts": [1, 2, 3], "seconds": 3.5},
    }  # fmt: skip
    assert all(line.kept for line in judge(good))
    changes: list[dict[str, Any]] = [
        {"accepted": [(0.0, 3.5, 1)] * 100},
        {"refused": [(0.0, 0.06, 1)] * 100},
        {"accepted": [(0.0, 2.5, 1)] * 80},
        {"others": [(500, None)]},
        {"crowd": {"attempts": [9, 9], "seconds": 2.0}},
        {"probes": [0.2] * 10},
    ]
    for place, change in enumerate(changes):
        assert [line.kept for line in judge(good | change)] == [other != place for other in range(6)]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_a_short_soak_leaves_nothing_behind(default_model: Path) -> None:
    command = [sys.executable, "-P", "-m", "tests.e2e.soak", "--minutes=2.5", "--kills=1", "--stops=1"]
    own = os.environ | {"PYTHONPATH": str(ROOT)}  # `-P` leaves the folder out
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
