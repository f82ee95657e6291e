"""A request's time: one clear end when it is over, whatever the request waits for then, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from engine.protocol import Work
from tests.ledger import ledger_rows
from tests.server.fake_engine import FakeEngine
from tests.server.kit import (
    chat_body,
    client,
    completion_body,
    error_of,
    events,
    make_app,
    say,
    speaking,
)

RESPONSE = {"model": "fake-model", "input": "hi"}
MESSAGE = {"model": "fake-model", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    "engine", [speaking("a" * 200, delay=0.05), FakeEngine(lambda submit: say("x", first_delay=30.0))]
)
@pytest.mark.parametrize("how", ["field", "header", "server"])
async def test_a_request_ends_when_its_time_is_over(engine: FakeEngine, how: str) -> None:
    app = make_app(engine, **({"request_seconds": 0.3} if how == "server" else {}))
    headers = {"x-request-timeout": "0.3"} if how == "header" else {}
    fields: dict[str, Any] = {"timeout": 0.3} if how == "field" else {}
    async with app.router.lifespan_context(app), client(app) as http:
        for path, body in (
            ("/v1/completions", completion_body(max_tokens=200, **fields)),
            ("/v1/chat/completions", chat_body(max_tokens=200, **fields)),
        ):
            begun = time.monotonic()
            error = error_of(await http.post(path, json=body, headers=headers), 408, "deadline_exceeded")
            assert "within the request's 0.3 s" in error["message"]
            assert error["type"] == "timeout_error"
            stream = await http.post(path, json=body | {"stream": True}, headers=headers)
            assert time.monotonic() - begun < 5
            last = events(stream)
            assert last[-1]["error"]["code"] == "deadline_exceeded"
            assert sum("error" in event for event in last) == 1
        metrics = (await http.get("/metrics")).text
    services = app.state.services
    assert (services.admission.admitted, services.admission.tokens, services.books.open_accounts) == (
        0,
        0,
        set(),
    )
    assert len(engine.aborted) >= 4
    engine.aborted.clear()
    assert 'outcome="deadline"} 2.0' in metrics


async def test_the_other_forms_end_too() -> None:
    app = make_app(speaking("a" * 200, delay=0.05))
    headers = {"x-request-timeout": "0.2"}
    async with app.router.lifespan_context(app), client(app) as http:
        refused = await http.post("/v1/messages", json=MESSAGE, headers=headers)
        assert (refused.status_code, refused.json()["error"]["type"]) == (408, "timeout_error")
        streamed = (await http.post("/v1/messages", json=MESSAGE | {"stream": True}, headers=headers)).text
        assert streamed.count("event: error") == 1
        error_of(await http.post("/v1/responses", json=RESPONSE, headers=headers), 408, "deadline_exceeded")
        streamed = (await http.post("/v1/responses", json=RESPONSE | {"stream": True}, headers=headers)).text
        kinds = [json.loads(line[6:])["type"] for line in streamed.splitlines() if line.startswith("data: {")]
        assert kinds[-1] in ("response.failed", "error")
        assert "response.completed" not in kinds


async def test_the_earliest_time_counts_and_enough_time_changes_nothing() -> None:
    app = make_app(speaking("aaaa", delay=0.05), request_seconds=20)
    async with app.router.lifespan_context(app), client(app) as http:
        body, wait = completion_body(timeout=0.05), {"x-request-timeout": "9"}
        error_of(await http.post("/v1/completions", json=body, headers=wait), 408, "deadline_exceeded")
        for fields in ({}, {"timeout": 10}, {"timeout": 1e9, "stream": True}):
            answer = await http.post("/v1/completions", json=completion_body(**fields), headers=wait)
            assert (answer.status_code, "error" in answer.text) == (200, False)


@pytest.mark.parametrize("said", ["", "soon", "0", "-1", "nan", "inf", "1e400"])
async def test_a_header_that_is_no_time(said: str) -> None:
    app = make_app(speaking())
    async with app.router.lifespan_context(app), client(app) as http:
        refused = await http.post(
            "/v1/completions", json=completion_body(), headers={"x-request-timeout": said}
        )
        assert error_of(refused, 400)["param"] == "x-request-timeout"
    assert app.state.services.books.open_accounts == set()


@pytest.mark.parametrize("said", [0, -1, "soon"])
async def test_a_field_that_is_no_time(said: Any) -> None:
    app = make_app(speaking())
    async with app.router.lifespan_context(app), client(app) as http:
        assert (
            error_of(await http.post("/v1/completions", json=completion_body(timeout=said)), 400)["param"]
            == "timeout"
        )


async def test_what_was_computed_is_paid(tmp_path: Path) -> None:
    engine = speaking("a" * 200, delay=0.02, work=Work(rows=5, decode_seconds=0.1))
    app = make_app(engine, ledger=str(tmp_path / "usage.sqlite"), model_name="deepseek-v3.2")
    body = completion_body(timeout=0.4, max_tokens=200) | {"model": "deepseek-v3.2"}
    async with app.router.lifespan_context(app), client(app) as http:
        assert (await http.post("/v1/completions", json=body)).status_code == 408
        async with asyncio.timeout(5):
            while app.state.services.books.open_accounts:  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0.01)
    row = ledger_rows(tmp_path / "usage.sqlite")[0]
    assert row["outcome"] == "deadline"
    assert row["amount_nanos"] > 0
