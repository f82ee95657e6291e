"""A scrape with every set of labels stays small and quick, however many requests were served."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from engine.protocol import BATCH_BOUNDS, Submit, Work
from server.app import create_app
from server.telemetry.metrics.cost import CONTEXT_BOUNDS
from server.telemetry.metrics.registry import REJECTIONS
from tests.server.fake_engine import FakeEngine, Script
from tests.server.kit import (
    TEXT,
    PlainChat,
    chat_body,
    client,
    completion_body,
    make_config,
    say,
)

MOST_BYTES = 300_000
MOST_SECONDS = 0.020
MOST_TIMES = 2.0
REQUESTS, AT_ONCE = 10_000, 25
OUTCOMES = "stop length ok disconnected rejected unavailable client_error server_error other".split()


def answer(submit: Submit) -> Script:
    """Give each request different work, so that the sums have as many digits as in real use."""
    chance = random.Random(submit.request_id)
    first = submit.prompt_token_ids[0]
    work = Work(
        rows=len(submit.prompt_token_ids), flops=chance.getrandbits(40), cache_bytes=chance.getrandbits(30),
        prefill_seconds=chance.random(), decode_seconds=chance.random(),
        dense_prefill_seconds=chance.random(), dense_decode_seconds=chance.random(),
    )  # fmt: skip
    faults = {11: "error", 12: "abort", 13: "die", 14: "refuse", 15: "crash"}
    return say("ok", work=work, cached=first % 2, fault=faults.get(first), group=3 if first < 11 else 1)


async def every_label(http: Any, app: Any) -> None:
    """Each endpoint, outcome, context bucket and reason of rejection at least once."""
    for bound in (10, *CONTEXT_BOUNDS):  # a prompt of a bound's length, and an answer
        assert (await http.post("/v1/completions", json=completion_body([1] * bound))).status_code == 200
    for first in (11, 12, 13, 14, 15):
        for stream in (False, True):
            await http.post("/v1/completions", json=completion_body([first, 2], stream=stream))
    await http.post("/v1/completions", json=completion_body([1, 2], max_tokens=1))
    for path in (
        "/v1/models",
        "/v1/models/fake-model",
        "/v1/models/none",
        "/health/live",
        "/health/ready",
        "/none",
    ):
        await http.get(path)
        await http.delete(path)
    for path in app.openapi()["paths"]:
        await http.put(path)
        for outcome in OUTCOMES:  # every possible outcome, more than these endpoints give
            app.state.services.metrics.request_ended(path, outcome)
    for content in ("x" * (2 << 20), ""):
        await http.post("/v1/chat/completions", content=content)
    for reason in (*REJECTIONS, "something else"):
        app.state.services.metrics.rejected(reason)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncGenerator[tuple[Any, Any], None]:
    engine = FakeEngine(answer, max_model_len=200_000)
    engine.set_stats(
        **{name: 10**11 + i for i, name in enumerate(("steps_total", "flops_total", "cache_bytes_total"))},
        busy_seconds_total=123456.789,
        batch_size_counts_total=(10**9,) * (len(BATCH_BOUNDS) + 1),
        draft_lengths_total=(10**9,) * 17,
    )
    config = make_config(max_body_bytes=1 << 20, ledger=str(tmp_path / "usage.sqlite"), machine_price="2.5")
    app = create_app(config, engine, TEXT, PlainChat())
    async with app.router.lifespan_context(app), client(app) as http:
        await every_label(http, app)
        yield app, http


async def scrapes(http: Any, count: int = 15) -> tuple[int, float, float]:
    """(bytes of a scrape, the least of its CPU seconds, the least that the library takes for as many plain lines).

    Other processes do not lengthen CPU seconds, but a busy core does: both are measured in turn, in one run.
    """
    lines = (await http.get("/metrics")).text.count("\n")
    registry = CollectorRegistry()
    plain = Gauge(
        "plain", "Lines without a collector of our own.", ["endpoint", "outcome"], registry=registry
    )
    for i in range(lines):
        plain.labels(f"/v1/{i}", "ok").set(i * 1.5)
    own, library = [], []
    for _ in range(count):
        began = time.process_time()
        response = await http.get("/metrics")
        own.append(time.process_time() - began)
        assert response.status_code == 200
        began = time.process_time()
        generate_latest(registry)
        library.append(time.process_time() - began)
    return len(response.content), min(own), min(library)


async def check(http: Any) -> None:
    """A scrape is small, and quick: in seconds, or on a slow core against the library's own time."""
    size, seconds, library = await scrapes(http)
    print(f"{size} bytes, {seconds * 1e3:.1f} ms; as many plain lines {library * 1e3:.1f} ms")
    assert size < MOST_BYTES
    assert seconds < max(MOST_SECONDS, MOST_TIMES * library)


async def test_every_label_at_once(served: tuple[Any, Any]) -> None:
    _, http = served
    await check(http)
    text = (await http.get("/metrics")).text
    for reason in REJECTIONS:
        assert f'reason="{reason}"' in text
    for bound in CONTEXT_BOUNDS:
        assert f'context="le_{bound}"' in text
    assert f'context="gt_{CONTEXT_BOUNDS[-1]}"' in text
    for outcome in OUTCOMES:
        assert f'outcome="{outcome}"' in text, outcome


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_ten_thousand_requests(served: tuple[Any, Any]) -> None:
    _, http = served

    async def ask(i: int) -> None:
        if i % 2:
            response = await http.post("/v1/chat/completions", json=chat_body(stream=i % 4 == 1))
        else:
            response = await http.post("/v1/completions", json=completion_body([1, 2, 3]))
        assert response.status_code == 200

    for start in range(0, REQUESTS, AT_ONCE):
        await asyncio.gather(*(ask(i) for i in range(start, start + AT_ONCE)))
    await check(http)
