"""Many clients at once: a client's text does not depend on the other clients, and no resource leaks."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tests.e2e.serving import MODEL, Server, until

TOPICS = "rivers bread glass winter copper maps bridges tea islands paper clocks salt".split()


async def stream_text(sdk: AsyncOpenAI, **fields: Any) -> tuple[str, Any]:
    """Return the text and the usage of a completion stream, which must end without an error."""
    stream = await sdk.completions.create(
        model=MODEL, stream=True, stream_options={"include_usage": True}, **fields
    )
    text, ends, usage = "", [], None
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.text
            ends += [choice.finish_reason] * (choice.finish_reason is not None)
        usage = chunk.usage or usage
    assert ends in (["stop"], ["length"])
    assert usage is not None
    return text, usage


def request(number: int, max_tokens: int = 24) -> dict[str, Any]:
    """One of many different requests: short and long prompts, sparse and dense, greedy and drawn, with stop strings."""
    topic = TOPICS[number % len(TOPICS)]
    fields: dict[str, Any] = {
        "prompt": f"{number}. " + f"A note about {topic}, " * (1 + 3 * (number % 5)),
        "max_tokens": max_tokens,
        "temperature": 0 if number % 3 else 1.0,
        "seed": number,
    }
    if number % 4 != 3:
        fields["extra_body"] = {"dsa": {"top_k": ("dense", 16, 64)[number % 4]}}
    if number % 5 == 0:
        fields["stop"] = [".", "\n\n"]
    return fields


@pytest.mark.timeout(300)
async def test_64_streams_leave_nothing_behind(server: Server) -> None:
    async with server.async_sdk() as sdk:
        await stream_text(sdk, **request(4))
    before = await asyncio.to_thread(server.resources)
    assert (before.pages_used, before.requests) == (0, 0)
    async with server.async_sdk() as sdk:
        answers = await asyncio.gather(*(stream_text(sdk, **request(number)) for number in range(64)))
    for number, (text, usage) in enumerate(answers):
        fields = request(number)
        assert usage.completion_tokens <= 24
        assert not any(stop in text for stop in fields.get("stop", []))
        wanted = fields.get("extra_body", {}).get("dsa", {}).get("top_k")
        assert wanted is None or usage.model_dump()["dsa"]["top_k"] == wanted
    await asyncio.to_thread(until, lambda: server.resources() == before)
    assert server.ready


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_storms_with_hang_ups_leave_nothing_behind(server: Server) -> None:
    chance = random.Random(0)

    async def client(sdk: AsyncOpenAI, number: int, patience: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await stream_text(sdk, **request(number))

    async with server.async_sdk() as sdk:
        await stream_text(sdk, **request(4))
    before = await asyncio.to_thread(server.resources)
    for _ in range(3):
        async with server.async_sdk() as sdk:
            patience = [chance.choice([0.01, 0.5, 2.0, 5.0, 100.0]) for _ in range(64)]
            await asyncio.gather(*(client(sdk, number, patience[number]) for number in range(64)))
        await asyncio.to_thread(until, lambda: server.resources() == before)
    gone = server.metrics()['dsa_requests_total{endpoint="/v1/completions",outcome="disconnected"}']
    assert gone >= 50
    assert server.post("/v1/completions", prompt="hello", max_tokens=1).status_code == 200


@pytest.mark.parametrize("seed", [1234, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5))])
async def test_the_same_seed_gives_the_same_text_in_any_company(small_server: Server, seed: int) -> None:
    mine: dict[str, Any] = {
        "prompt": "The old lighthouse keeper wrote in his diary about the weather, the ships and the sea. "
        * 5,
        "max_tokens": 24,
        "temperature": 1.0,
        "seed": seed,
        "extra_body": {"dsa": {"top_k": 32}},  # the prompt is longer, so it is sparse indeed
    }
    async with small_server.async_sdk() as sdk:
        alone, usage = await stream_text(sdk, **mine)
        assert usage.prompt_tokens > 64
        others = [asyncio.create_task(stream_text(sdk, **request(number, 16))) for number in range(4)]
        await asyncio.to_thread(until, lambda: small_server.metrics()["dsa_requests_running"] >= 4)
        task = asyncio.create_task(stream_text(sdk, **mine))
        others += [asyncio.create_task(stream_text(sdk, **request(number, 16))) for number in range(4, 8)]
        crowded, _ = await task
        await asyncio.gather(*others)
        other_seed, _ = await stream_text(sdk, **mine | {"seed": seed + 1, "max_tokens": 8})
    assert crowded == alone
    assert not alone.startswith(other_seed)


@pytest.mark.timeout(300)
async def test_preempted_streams_finish_with_the_text_that_they_have_alone(small_server: Server) -> None:
    def long(number: int) -> dict[str, Any]:
        topic = TOPICS[number]
        return {
            "prompt": f"Write a long story about {topic} and the people who live with {topic}. " * 3,
            "max_tokens": 30,
            "temperature": 1.0,
            "seed": number,
            "extra_body": {"ignore_eos": True, "dsa": {"top_k": 32}},
        }

    before = small_server.metrics()["dsa_preemptions_total"]
    async with small_server.async_sdk() as sdk:
        answers = await asyncio.gather(*(stream_text(sdk, **long(number)) for number in range(8)))
        assert [usage.completion_tokens for _, usage in answers] == [30] * 8
        assert small_server.metrics()["dsa_preemptions_total"] > before
        await asyncio.to_thread(until, lambda: small_server.metrics()['dsa_kv_pages{state="used"}'] == 0)
        assert (await stream_text(sdk, **long(7)))[0] == answers[7][0]
    assert "error" not in small_server.errors


async def test_choices_and_prompts_of_one_request(small_server: Server) -> None:
    async with httpx.AsyncClient(timeout=100) as http:
        body = {
            "model": MODEL,
            "prompt": ["One", "Two"],
            "n": 3,
            "seed": 5,
            "max_tokens": 8,
            "temperature": 1,
        }
        answer = (await http.post(f"{small_server.url}/v1/completions", json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert len({choice["text"] for choice in answer["choices"]}) == 6
    assert answer["usage"]["completion_tokens"] <= 48
