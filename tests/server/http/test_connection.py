"""Clients that are slow or hostile, on real sockets: they are cut off, and nobody else is held up."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from server.http.connection import HEADER_BYTES
from tests.server.fake_engine import FakeEngine
from tests.server.http.test_disconnect import connect, until
from tests.server.http.test_outlet import lazy_client
from tests.server.kit import chat_body, completion_body, make_app, say, serving, speaking

POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


async def opened(url: str, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    return reader, writer


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    """The status and the error code of an answer, read to the end of the connection."""
    head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


async def test_clients_that_never_read_hold_no_place_and_are_cut_off() -> None:
    engine = FakeEngine(
        lambda submit: say("x" * min(submit.sampling.max_tokens, 150_000), group=1000, end=False),
        max_model_len=1_000_000,
    )
    app = make_app(engine, max_queue=3)
    lifecycle, admission = app.state.lifecycle, app.state.services.admission
    async with serving(app, buffer=8192, seconds=8) as url, AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(lazy_client(url, chat_body(stream=True, max_tokens=150_000)))
        await until(lambda: len(engine.finished) == 3, 30)  # the engine has done its work
        await until(lambda: admission.admitted == 0, 1)
        assert lifecycle.active_requests == 3
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:
            assert (await http.post("/v1/chat/completions", json=chat_body(max_tokens=1))).status_code == 200
        await until(lambda: lifecycle.active_requests == 0, 15)


async def test_a_slow_reader_that_reads_gets_everything() -> None:
    engine = FakeEngine(lambda submit: say("x" * 20_000, group=1000), max_model_len=100_000)
    async with serving(make_app(engine), buffer=4096, seconds=0.6) as url:
        reader, writer = await connect(url, chat_body(stream=True, max_tokens=20_000, logprobs=True))
        size, tail = 0, b""
        while data := await reader.read(60_000):
            size, tail = size + len(data), (tail + data)[-100:]
            if b"[DONE]" in tail:
                break
            await asyncio.sleep(0.02)
        writer.close()
        assert b"[DONE]" in tail
        assert size > 1_000_000


@pytest.mark.parametrize("size", [70_000, 250_000, 1_000_000])
async def test_the_end_of_a_long_body_is_not_read_as_headers(size: int) -> None:
    body = json.dumps(chat_body("x" * size, max_tokens=1)).encode()
    engine = FakeEngine(lambda submit: say("a"), max_model_len=2_000_000)
    async with serving(make_app(engine, max_body_bytes=4 << 20)) as url:
        head = b"%sconnection: close\r\ncontent-length: %d\r\n\r\n" % (POST, len(body))
        reader, writer = await opened(url, head)
        await asyncio.sleep(0.05)
        writer.write(body)
        assert (await asyncio.wait_for(reader.read(), 20)).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_headers_have_a_limit() -> None:
    async with serving(make_app(speaking())) as url:
        reader, writer = await opened(url, b"GET /health/live HTTP/1.1\r\nhost: x\r\nx-long: ")
        began = time.monotonic()
        for _ in range(64):
            writer.write(b"a" * (1 << 20))
            await asyncio.sleep(0)
        status, error = await answer(reader)
        assert (status, error["code"]) == (431, "headers_too_large")
        assert time.monotonic() - began < 2
        writer.close()
        reader, writer = await opened(
            url, b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-long: "
        )
        writer.write(b"a" * (HEADER_BYTES // 2) + b"\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"GET /health/live HT", 408),
        (POST + b"content-length: 1000\r\n", 408),
        (POST + b"content-length: 1000\r\n\r\n{", 408),
    ],
    ids=["nothing", "half a line", "half the headers", "half a body"],
)
async def test_what_does_not_come_is_not_waited_for(sent: bytes, status: int | None) -> None:
    app = make_app(speaking())
    async with serving(app, seconds=0.5) as url:
        reader, writer = await opened(url, sent)
        if status is None:
            assert await asyncio.wait_for(reader.read(), 10) == b""
        else:
            got, error = await answer(reader)
            assert (got, error["code"]) == (status, "request_timeout")
        await until(lambda: app.state.lifecycle.active_requests == 0, 1)
        writer.close()


async def test_a_trickle_is_cut_off_and_a_steady_body_is_not() -> None:
    engine = FakeEngine(lambda submit: say("hello"), max_model_len=10_000)
    async with serving(make_app(engine), seconds=0.6) as url:
        body = json.dumps(chat_body("y" * 3000)).encode()
        for piece, ends in ((10, 408), (len(body) // 12, 200)):
            reader, writer = await opened(
                url, POST + f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            )
            for start in range(0, len(body), piece):
                writer.write(body[start : start + piece])
                await asyncio.sleep(0.15)
                if reader.at_eof() or reader._buffer:  # type: ignore[attr-defined]
                    break
            assert int((await asyncio.wait_for(reader.read(), 10)).split()[1]) == ends
            writer.close()


async def test_a_refusal_before_the_end_of_a_body_arrives() -> None:
    async with serving(make_app(speaking())) as url:
        size = 32 << 20
        for header in (f"content-length: {size}\r\n", "transfer-encoding: chunked\r\n"):
            reader, writer = await opened(url, POST + header.encode() + b"\r\n")
            for _ in range(size >> 20):
                data = b"x" * (1 << 20)
                writer.write(data if "length" in header else b"100000\r\n" + data + b"\r\n")
                await writer.drain()  # a reset would raise here
            status, error = await answer(reader)
            assert (status, error["code"]) == (413, "body_too_large")
            writer.close()


async def test_half_a_body_does_not_hold_a_drain() -> None:
    app = make_app(speaking())
    async with serving(app) as url:
        reader, writer = await opened(url, POST + b"content-length: 1000\r\n\r\n{")
        await until(lambda: app.state.lifecycle.active_requests == 1)
        app.state.lifecycle.begin_drain()
        assert await app.state.lifecycle.wait_idle(3)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        writer.close()


async def test_beyond_the_most_connections_only_probes_are_answered() -> None:
    app = make_app(speaking())
    async with app.router.lifespan_context(app), serving(app, limit=3) as url:
        host, port = url.removeprefix("http://").split(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        await asyncio.sleep(0.1)
        async with httpx.AsyncClient(base_url=url) as http:
            for path in ("/health/live", "/health/ready?x=1", "/ping"):
                assert (await http.get(path)).status_code == 200
            for method, path in (
                ("POST", "/v1/completions"),
                ("GET", "/v1/models"),
                ("GET", "/health/live/x"),
            ):
                refused = await http.request(method, path, json=completion_body())
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
                assert refused.headers["retry-after"] == "5"
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()
        await asyncio.sleep(0.1)
        async with httpx.AsyncClient(base_url=url) as http:
            assert (await http.post("/v1/completions", json=completion_body())).status_code == 200
