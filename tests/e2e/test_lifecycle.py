"""Real processes that are killed or stopped: the engine, the server, and both together."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai import AsyncOpenAI

from tests.e2e.serving import MODEL, Server, until

ENDLESS: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True}


@contextmanager
def streaming(server: Server, **body: Any) -> Iterator[list[str]]:
    """Read a stream in another thread; yields the list of its events once the first has come."""
    events: list[str] = []
    begun = threading.Event()

    def read() -> None:
        body_ = {"model": MODEL, "stream": True} | body
        try:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body_, timeout=100) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        events.append(line.removeprefix("data: "))
                        begun.set()
        except httpx.HTTPError as error:
            events.append(repr(error))
        begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        assert begun.wait(60)
        yield events
    finally:
        thread.join()


@pytest.mark.timeout(300)
async def test_killing_the_engine_is_8_clean_errors_and_a_new_engine(mortal: Server) -> None:
    restarts = mortal.metrics()["dsa_engine_restarts_total"]
    engine = mortal.engine
    errors: list[tuple[str | None, str]] = []

    async def watch(sdk: AsyncOpenAI, number: int, begun: asyncio.Event) -> float:
        stream = await sdk.completions.create(
            model=MODEL, prompt=f"Story number {number}: once", max_tokens=2000, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        try:
            async for _ in stream:
                begun.set()
        except openai.APIError as error:
            errors.append((error.code, error.message))
        return time.monotonic()

    async with mortal.async_sdk() as sdk:
        begun = [asyncio.Event() for _ in range(8)]
        watchers = [asyncio.create_task(watch(sdk, i, event)) for i, event in enumerate(begun)]
        await asyncio.gather(*(event.wait() for event in begun))
        engine.kill()
        killed = time.monotonic()
        ends = await asyncio.gather(*watchers)
        readiness = mortal.get("/health/ready")
        refused = mortal.post("/v1/completions", prompt="hello", max_tokens=1)
    assert [code for code, _ in errors] == ["engine_died"] * 8
    assert all("the engine process ended while this request was running" in said for _, said in errors)
    assert max(ends) - killed < 5
    assert readiness.status_code == 503
    assert "new one is starting" in readiness.json()["reason"]
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_unavailable"
    assert mortal.get("/health/live").status_code == 200
    assert mortal.metrics()["dsa_engine_up"] == 0
    await asyncio.to_thread(until, lambda: mortal.ready, 30)
    assert time.monotonic() - killed < 30
    assert mortal.engine.pid != engine.pid
    metrics = mortal.metrics()
    assert metrics["dsa_engine_restarts_total"] == restarts + 1
    assert metrics["dsa_engine_up"] == 1
    assert metrics["dsa_requests_running"] == 0
    answer = mortal.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=40,
    )
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]
    said = mortal.errors
    assert "the engine process ended with signal 9; a new one is starting" in said
    assert "the engine is ready again" in said
    assert "Traceback" not in said


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["TERM", "INT"]
)
def test_a_signal_lets_streams_finish_and_refuses_new_work(mortal: Server, number: int) -> None:
    assert mortal.engine.is_running()
    began = time.monotonic()
    mortal.post("/v1/completions", prompt="Once upon a time", max_tokens=20, ignore_eos=True)
    some_seconds = int(6 * 20 / (time.monotonic() - began))  # in tokens: the processor may be slow
    with streaming(mortal, prompt="Once upon a time", max_tokens=some_seconds, ignore_eos=True) as events:
        mortal.process.send_signal(number)
        until(lambda: mortal.get("/health/ready").status_code == 503)
        assert mortal.get("/health/ready").json()["state"] == "draining"
        refused = mortal.post("/v1/completions", prompt="hello", max_tokens=1)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert mortal.get("/health/live").status_code == 200
        assert events[-1] != "[DONE]", "the stream ended before anything could be seen"
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert mortal.end() == 0
    assert "stopping: 1 request has up to 30 s to finish" in mortal.errors


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT], ids=["TERM", "INT"]
)
def test_a_second_signal_ends_at_once(mortal: Server, number: int) -> None:
    with streaming(mortal, **ENDLESS) as events:
        mortal.process.send_signal(number)
        until(lambda: "stopping" in mortal.errors)
        started = time.monotonic()
        assert mortal.end(number) == 0
        assert time.monotonic() - started < 10  # and not the 30 s of a drain
    error = json.loads(events[-1])["error"]
    assert error["code"] == "aborted"
    assert "Traceback" not in mortal.errors


@pytest.mark.timeout(300)
def test_an_engine_does_not_outlive_its_server(mortal: Server) -> None:
    family = mortal.children()
    assert len(family) == 1
    with streaming(mortal, **ENDLESS) as events:
        mortal.process.kill()
        _, left = psutil.wait_procs(family, 10)
        assert not left
    assert "[DONE]" not in events


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_an_engine_that_is_still_loading_does_not_outlive_its_server(start: Callable[..., Server]) -> None:
    server = start()
    until(lambda: bool(server.children()), 60)
    family = server.children()
    server.process.kill()
    _, left = psutil.wait_procs(family, 60)
    assert not left


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
@pytest.mark.slow
def test_a_signal_while_the_model_loads(start: Callable[..., Server], number: int) -> None:
    server = start()
    until(lambda: "loading weights" in server.errors, 100)
    started = time.monotonic()
    assert server.end(number) == 0
    assert time.monotonic() - started < 10
    assert "Traceback" not in server.errors


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_an_engine_that_dies_again_and_again(start: Callable[..., Server]) -> None:
    server = start("--max-model-len", "256", "--kv-cache-memory", "64MiB").wait_ready()
    assert server.post("/v1/completions", prompt="hello", max_tokens=1).status_code == 200
    before = server.resources()
    for restarts in (1, 2):
        server.engine.kill()
        until(lambda: not server.ready)
        until(lambda: server.ready, 60)
        assert server.metrics()["dsa_engine_restarts_total"] == restarts
        assert server.post("/v1/completions", prompt="hello", max_tokens=1).status_code == 200
    until(lambda: server.resources() == before)
    assert server.end(signal.SIGTERM) == 0


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_an_engine_that_stands_still_is_killed_with_its_server(start: Callable[..., Server]) -> None:
    server = start("--max-model-len", "256", "--kv-cache-memory", "64MiB").wait_ready()
    server.engine.suspend()  # like an engine that hangs in a device driver
    assert server.end(signal.SIGTERM) == 0


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_an_engine_that_stands_still_is_replaced_within_a_minute(start: Callable[..., Server]) -> None:
    server = start("--max-model-len", "256", "--kv-cache-memory", "64MiB").wait_ready()
    engine = server.engine
    with streaming(server, prompt="Once upon a time", max_tokens=200, ignore_eos=True) as events:
        engine.suspend()
        stopped = time.monotonic()
    assert "made no progress" in json.loads(events[-1])["error"]["message"]
    until(lambda: server.ready, 60)
    assert time.monotonic() - stopped < 60
    assert not engine.is_running()
    assert server.post("/v1/completions", prompt="hello", max_tokens=1).status_code == 200
    assert server.metrics()["dsa_engine_hangs_total"] == 1
    assert "T (stopped)" in server.errors
    assert server.end(signal.SIGTERM) == 0


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_an_engine_that_stands_still_does_not_outlive_its_server(start: Callable[..., Server]) -> None:
    server = start("--max-model-len", "256", "--kv-cache-memory", "64MiB").wait_ready()
    engine = server.engine
    engine.suspend()
    server.process.kill()
    _, left = psutil.wait_procs([engine], 10)
    assert not left
