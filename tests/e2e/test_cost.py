"""Answers, ledger and metrics agree to the nano-dollar, even if clients hang up and processes are killed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.e2e.serving import MODEL, Server, until
from tests.kit import ROOT
from tests.ledger import ledger_rows


def rows(server: Server) -> dict[str, dict[str, Any]]:
    return {row["request_id"]: row for row in ledger_rows(server.ledger)}


def nanos(server: Server, prefix: str) -> int:
    return sum(round(value * 10**9) for name, value in server.metrics().items() if name.startswith(prefix))


async def ask(
    server: Server, number: int, answers: dict[str, Any], ids: set[str], long_begun: asyncio.Event
) -> None:
    """Read one stream. Its kind is: long, read to its end, ended by a stop string, or closed half-way."""
    long = number % 4 == 0
    body: dict[str, Any] = {
        "model": MODEL, "prompt": f"Story {number}: once", "max_tokens": 240 if long else 24,
        "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, "dsa": {"top_k": 16 if number % 2 else "dense"},
    }  # fmt: skip
    if number % 4 == 1:
        body["stop"] = [" a", " the"]
    headers = {"authorization": f"Bearer secret-{number % 2}"}
    async with (
        httpx.AsyncClient(timeout=100) as http,
        http.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers) as response,
    ):
        if response.status_code != 200:
            return
        name = response.headers["x-request-id"]
        ids.add(name)
        seen = 0
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk.get("usage"):
                answers[name] = chunk["usage"]["cost_details"]
            seen += 1
            if long:
                long_begun.set()
            if number % 4 == 3 and seen == 4:
                return


@pytest.mark.timeout(300)
async def test_answers_ledger_and_metrics_agree(start: Callable[..., Server]) -> None:
    server = start(
        "--max-model-len", "512", "--kv-cache-memory", "64MiB", "--machine-price", "2.5"
    ).wait_ready()
    answers: dict[str, Any] = {}
    ids: set[str] = set()
    for kill in (True, True, False):
        long_begun = asyncio.Event()
        crowd = [asyncio.create_task(ask(server, i, answers, ids, long_begun)) for i in range(12)]
        if kill:
            # The long streams still have hundreds of tokens to come, so the engine dies before they end.
            await asyncio.wait_for(long_begun.wait(), 60)
            server.engine.kill()
        await asyncio.gather(*crowd)
        await asyncio.to_thread(until, lambda: server.ready, 60)
    await asyncio.to_thread(until, lambda: ids <= rows(server).keys(), 30)
    await asyncio.sleep(0.2)
    ledger = rows(server)
    outcomes = {row["outcome"] for row in ledger.values()}
    assert {"length", "cancelled", "failed"} <= outcomes
    for name, cost in answers.items():
        row = ledger[name]
        assert cost["amount"] == row["amount_nanos"] > 0
        assert cost["metered_amount"] == row["metered_nanos"]
        assert cost["dense_equivalent_amount"] == row["dense_equivalent_nanos"]
        assert cost["effective_top_k"] == (row["top_k"] or "dense")
    assert {name for name, row in ledger.items() if row["outcome"] in ("stop", "length")} == set(answers)
    assert all(row["amount_nanos"] == 0 for row in ledger.values() if row["outcome"] == "failed")
    total = sum(row["amount_nanos"] for row in ledger.values())
    assert nanos(server, "dsa_cost_usd_total") == total
    metered = sum(row["metered_nanos"] for row in ledger.values())
    assert nanos(server, 'dsa_metered_cost_usd_total{attention="actual"}') == metered
    busy = server.metrics()["dsa_engine_busy_seconds_total"]
    assert sum(row["device_ns"] for row in ledger.values()) / 1e9 == pytest.approx(busy, rel=0.01)
    assert len({row["key"] for row in ledger.values()}) == 2
    assert b"secret" not in server.ledger.read_bytes()
    run = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", "from server.cli.main import main; main()", "usage", "--ledger", str(server.ledger),
              "--by", "model", "--format", "json"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    (reported,) = json.loads(run.stdout)
    assert (reported["amount_nanos"], reported["requests"]) == (total, len(ledger))
    # A killed server leaves a row for every answer whose end a client saw. The next server uses the same ledger.
    answer = server.post("/v1/completions", prompt="last", max_tokens=2)
    server.process.kill()
    server.process.wait()
    assert (
        rows(server)[answer.headers["x-request-id"]]["amount_nanos"]
        == answer.json()["usage"]["cost_details"]["amount"]
    )
