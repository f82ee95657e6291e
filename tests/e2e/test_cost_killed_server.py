"""The whole server is killed under load. The ledger has each answer that a client received, exactly once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.serving import MODEL, Server, until
from tests.ledger import ledger_rows


async def lines(response: httpx.Response) -> AsyncIterator[str]:
    """Yield the lines that end with a newline. (httpx's lines also end at U+2028, which a model may write.)"""
    rest = b""
    async for chunk in response.aiter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode().rstrip("\r")


async def ask(url: str, number: int, answers: dict[str, int]) -> None:
    """Send requests until the server is gone. Record the charge of each answer that was complete."""
    body = {"model": MODEL, "prompt": f"Story {number}: once", "max_tokens": 2 + number, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=60) as http:
        while True:
            try:
                if number % 2:
                    response = await http.post(f"{url}/v1/completions", json=body)
                    assert response.status_code == 200
                    answers[response.headers["x-request-id"]] = response.json()["usage"]["cost_details"][
                        "amount"
                    ]
                    continue
                streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
                async with http.stream("POST", f"{url}/v1/completions", json=streamed) as response:
                    amount: int | None = None
                    async for line in lines(response):
                        if line.startswith("data: {") and (usage := json.loads(line[6:]).get("usage")):
                            amount = usage["cost_details"]["amount"]
                        if line == "data: [DONE]":
                            assert amount is not None
                            answers[response.headers["x-request-id"]] = amount
            except httpx.TransportError:
                return


def rows(ledger: Path) -> list[tuple[Any, ...]]:
    return [(row["request_id"], row["amount_nanos"]) for row in ledger_rows(ledger)]


def answered(answers: dict[str, int], wanted: int) -> bool:
    return len(answers) >= wanted


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_every_answer_is_in_the_ledger_once(start: Callable[..., Server], tmp_path: Path) -> None:
    ledger = tmp_path / "usage.sqlite"
    flags = ("--ledger", str(ledger), "--max-model-len", "512", "--kv-cache-memory", "64MiB")
    answers: dict[str, int] = {}
    for _ in range(2):
        server = await asyncio.to_thread(lambda: start(*flags).wait_ready())
        family = server.children()
        crowd = [asyncio.create_task(ask(server.url, number, answers)) for number in range(12)]
        await asyncio.to_thread(until, partial(answered, answers, len(answers) + 40), 100)
        server.process.kill()
        await asyncio.to_thread(server.process.wait)
        await asyncio.gather(*crowd)
        _, left = await asyncio.to_thread(psutil.wait_procs, family, 30)
        assert not left, "the engine outlived its server"
    server = await asyncio.to_thread(lambda: start(*flags).wait_ready())  # on the same ledger file
    last = await asyncio.to_thread(lambda: server.post("/v1/completions", prompt="last", max_tokens=2))
    answers[last.headers["x-request-id"]] = last.json()["usage"]["cost_details"]["amount"]
    written = rows(ledger)
    assert len(written) == len(dict(written))
    assert answers.items() <= dict(written).items()
    # Rows without a received answer: at most the requests that ran at each kill.
    assert len(written) - len(answers) <= 2 * len(crowd)
    assert len(answers) >= 81
