"""Faults of the engine and of the server, and servers that are full, still loading or shutting down."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from engine.client import EngineState
from engine.protocol import Loading
from tests.server.fake_engine import FakeEngine
from tests.server.kit import chat_body, client, error_of, make_app, say, speaking

CHAT = "/v1/chat/completions"


async def chat(fields: dict[str, Any], engine: FakeEngine, **config: Any) -> httpx.Response:
    async with client(make_app(engine, **config)) as http:
        return await http.post(CHAT, json=chat_body() | fields)


async def test_while_the_engine_loads() -> None:
    engine = FakeEngine(ready=False)
    response = await chat({}, engine)
    error = error_of(response, 503, "engine_unavailable")
    assert "weights 1 of 4" in error["message"]
    assert int(response.headers["retry-after"]) > 0
    async with client(make_app(engine)) as http:
        ready = await http.get("/health/ready")
        assert ready.status_code == 503
        assert ready.json() == {
            "ready": False,
            "state": "starting",
            "model": "fake-model",
            "reason": "the engine is loading the model (loading: weights 1 of 4)",
            "loading": {"stage": "weights", "done": 1, "total": 4},
            "warnings": [],
        }
        assert (await http.get("/health/live")).status_code == 200
        assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] is None


async def test_validation_comes_before_readiness() -> None:
    error_of(await chat({"n": 0}, FakeEngine(ready=False)), 400)


async def test_while_the_engine_is_down() -> None:
    engine = speaking()
    engine.set_status(
        state=EngineState.DOWN, message="the engine died", loading=Loading(stage="start", done=0, total=0)
    )
    assert "the engine died (loading: start)" in error_of(await chat({}, engine), 503)["message"]
    engine.set_status(
        message="the engine is starting: weights", loading=Loading(stage="weights", done=1, total=4)
    )
    assert "the engine is starting: weights (1 of 4)" in error_of(await chat({}, engine), 503)["message"]


async def test_while_the_engine_makes_no_progress() -> None:
    engine = speaking()
    engine.set_status(quiet_seconds=6.0)
    async with client(make_app(engine)) as http:
        assert (await http.get("/health/ready")).status_code == 200
        engine.set_status(quiet_seconds=12.3)
        response = await http.get("/health/ready")
        assert response.status_code == 503
        assert response.json()["state"] == "stalled"
        assert response.json()["reason"] == "the engine has made no progress for 12 s"
        assert (await http.get("/health/live")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_refuses(stream: bool) -> None:
    response = await chat({"stream": stream}, speaking(fault="refuse"))
    assert error_of(response, 503, "engine_unavailable")["type"] == "engine_error"
    assert "retry-after" in response.headers


FAULTS = [
    ("die", 503, "engine_died", "the engine died"),
    ("abort", 503, "aborted", "server is stopping"),
    ("error", 500, "generation_failed", "NaN logits"),
    ("crash", 500, "internal_error", "unexpected fault"),
]


@pytest.mark.parametrize(("fault", "status", "code", "words"), FAULTS)
@pytest.mark.parametrize("n", [1, 3])
async def test_faults_on_the_way(fault: str, status: int, code: str, words: str, n: int, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "server.requests")
    engine = speaking("hello", fault=fault, fault_after=2)
    response = await chat({"n": n}, engine)
    error = error_of(response, status, code)
    assert words in error["message"]
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in caplog.text
    await asyncio.sleep(0.01)
    assert len(engine.aborted) + len(engine.finished) == len(engine.submitted)


@pytest.mark.parametrize(("fault", "status", "code", "words"), FAULTS)
async def test_faults_in_a_stream(fault: str, status: int, code: str, words: str) -> None:
    engine = speaking("hello", fault=fault, fault_after=2)
    response = await chat({"stream": True}, engine)
    assert response.status_code == 200
    *chunks, last = response.text.removesuffix("\n\n").split("\n\n")
    assert len(chunks) == 2
    assert "[DONE]" not in response.text
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == code
    assert words in error["message"]
    assert "secret" not in response.text


async def test_a_fault_is_one_requests_own() -> None:
    engine = FakeEngine(lambda submit: say("ok", fault="error" if submit.sampling.seed == 1 else None))
    async with client(make_app(engine)) as http:
        bad, good = await asyncio.gather(
            http.post(CHAT, json=chat_body(seed=1)), http.post(CHAT, json=chat_body(seed=2))
        )
    assert (bad.status_code, good.status_code) == (500, 200)


async def test_a_fault_of_the_server_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(speaking())

    def broken(accept: str) -> tuple[bytes, str]:
        raise RuntimeError("a secret")

    monkeypatch.setattr(app.state.services.metrics, "expose", broken)
    async with client(app) as http:
        response = await http.get("/metrics")
    error = error_of(response, 500, "internal_error")
    assert "secret" not in error["message"]
    assert response.headers["x-request-id"]


async def test_a_full_server() -> None:
    engine = speaking("hello", first_delay=0.2)
    async with client(make_app(engine, max_queue=2)) as http:
        running = asyncio.create_task(http.post(CHAT, json=chat_body(n=2)))
        await asyncio.sleep(0.05)
        response = await http.post(CHAT, json=chat_body())
        assert error_of(response, 429, "queue_full")["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) > 0
        assert (await running).status_code == 200
        assert (await http.post(CHAT, json=chat_body())).status_code == 200
        error_of(await http.post(CHAT, json=chat_body(n=3)), 400, "too_many_choices")


async def test_draining() -> None:
    engine = speaking("hello", first_delay=1.0)
    app = make_app(engine)
    lifecycle = app.state.lifecycle
    assert await lifecycle.wait_idle(0)
    async with client(app) as http:
        running = asyncio.create_task(http.post(CHAT, json=chat_body()))
        await asyncio.sleep(0.05)
        assert lifecycle.active_requests == 1
        lifecycle.begin_drain()
        assert lifecycle.draining
        error = error_of(await http.post(CHAT, json=chat_body()), 503, "draining")
        assert "shutting down" in error["message"]
        ready = await http.get("/health/ready")
        assert (ready.status_code, ready.json()["state"]) == (503, "draining")
        assert (await http.get("/health/live")).status_code == 200
        assert not await lifecycle.wait_idle(0.01)
        assert await lifecycle.wait_idle(5)
        assert (await running).status_code == 200
    assert lifecycle.active_requests == 0


async def test_request_ids_are_the_servers_own() -> None:
    async with client(make_app(speaking())) as http:
        responses = [
            await http.post(CHAT, json=chat_body(), headers={"x-request-id": "mine"}),
            await http.post(CHAT, json={}),
            await http.get("/nowhere"),
            await http.get("/metrics"),
        ]
    ids = [response.headers["x-request-id"] for response in responses]
    assert len(set(ids)) == 4
    assert "mine" not in ids
    assert responses[0].json()["id"] == f"chatcmpl-{ids[0]}"


async def test_no_cross_origin_access() -> None:
    async with client(make_app(speaking())) as http:
        response = await http.post(CHAT, json=chat_body(), headers={"origin": "http://evil"})
        assert not [name for name in response.headers if name.startswith("access-control")]
        error_of(await http.options(CHAT, headers={"origin": "http://evil"}), 405)
