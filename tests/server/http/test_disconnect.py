"""Clients that hang up, on real sockets: the engine stops working for them at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.fake_engine import FakeEngine
from tests.server.kit import chat_body, make_app, serving, speaking

PROMPT = 0.5
"""After so many seconds the engine must know that a client has hung up."""


async def until(condition: Callable[[], bool], seconds: float = PROMPT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        await asyncio.sleep(0.005)


async def connect(url: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        + f"content-length: {len(data)}\r\n\r\n".encode()
        + data
    )
    await writer.drain()
    return reader, writer


def aborted(engine: FakeEngine, count: int) -> bool:
    return len(engine.aborted) == count and not engine.finished


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
async def test_hanging_up_aborts_every_choice(stream: bool, n: int, waiting: bool) -> None:
    # Either the engine is silent, or it speaks all the time.
    times = {"first_delay": 60.0} if waiting else {"delay": 0.01}
    engine = speaking("x" * 200, **times)
    app = make_app(engine)
    async with serving(app) as url:
        _, writer = await connect(url, chat_body(stream=stream, n=n))
        await until(lambda: len(engine.submitted) == n, 5.0)
        await asyncio.sleep(0.05)
        assert not engine.aborted
        writer.close()
        await until(lambda: aborted(engine, n))
        assert app.state.lifecycle.active_requests == 0 or await app.state.lifecycle.wait_idle(PROMPT)
        assert app.state.services.admission.admitted == 0
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"{url}/metrics")).text
    samples = {
        sample.labels["outcome"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "dsa_requests_total"
    }
    assert samples == {"disconnected": 1}


async def test_hanging_up_within_a_stream() -> None:
    engine = speaking("x" * 200, delay=0.01)
    async with serving(make_app(engine)) as url, httpx.AsyncClient() as http:
        body = chat_body(stream=True)
        async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            lines = response.aiter_lines()
            for _ in range(5):
                await anext(lines)
        await until(lambda: aborted(engine, 1))


async def test_one_client_leaves_and_another_stays() -> None:
    engine = speaking("hello", first_delay=0.3)
    async with serving(make_app(engine)) as url, httpx.AsyncClient() as http:
        staying = asyncio.create_task(http.post(f"{url}/v1/chat/completions", json=chat_body()))
        _, writer = await connect(url, chat_body())
        await until(lambda: len(engine.submitted) == 2, 5.0)
        writer.close()
        await until(lambda: len(engine.aborted) == 1)
        assert (await staying).status_code == 200
        assert len(engine.finished) == 1


async def test_a_client_that_stops_within_its_body() -> None:
    engine = speaking()
    app = make_app(engine)
    async with serving(app) as url:
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b'content-length: 100\r\n\r\n{"mod'
        )
        await writer.drain()
        await until(lambda: app.state.lifecycle.active_requests == 1, 5.0)
        writer.close()
        await until(lambda: app.state.lifecycle.active_requests == 0)
    assert not engine.submitted


async def test_a_normal_end_aborts_nothing() -> None:
    engine = speaking()
    async with serving(make_app(engine)) as url, httpx.AsyncClient() as http:
        for stream in (False, True):
            response = await http.post(f"{url}/v1/chat/completions", json=chat_body(stream=stream, n=2))
            assert response.status_code == 200
    assert len(engine.finished) == 4
    assert not engine.aborted


@pytest.mark.alone
async def test_headers_come_before_the_first_token_and_comments_keep_the_stream_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.http.reply.KEEP_ALIVE_SECONDS", 0.02)
    engine = speaking("a", first_delay=2.0)
    async with serving(make_app(engine)) as url, httpx.AsyncClient() as http:
        started = time.monotonic()
        body = chat_body(stream=True)
        async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            assert time.monotonic() - started < 1.5
            text = (await response.aread()).decode()
    assert text.count(": keep-alive\n\n") >= 3
    assert text.endswith("data: [DONE]\n\n")
    assert text.index(": keep-alive") < text.index("data: ")


async def test_the_engine_lives_as_long_as_the_app() -> None:
    engine = speaking()
    async with serving(make_app(engine)):
        assert engine.started
        assert not engine.stopped
    assert engine.stopped
