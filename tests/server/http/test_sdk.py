"""OpenAI's own client, against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import cast

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionUserMessageParam

from engine.protocol import Submit
from tests.server.fake_engine import FakeEngine, Script
from tests.server.kit import MODEL, ids, make_app, say, serving

HI: list[ChatCompletionMessageParam] = [ChatCompletionUserMessageParam(role="user", content="hi")]


def script(submit: Submit) -> Script:
    """The request's seed chooses what happens."""
    return {
        0: say("hello", cached=1),
        1: say("hello", fault="die", fault_after=2),
        2: say("hello", fault="refuse"),
        3: say("hello", fault="error", fault_after=2),
    }[submit.sampling.seed]


@pytest_asyncio.fixture
async def sdk() -> AsyncGenerator[AsyncOpenAI, None]:
    async with (
        serving(make_app(FakeEngine(script))) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_chat(sdk: AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=HI, seed=0, extra_body={"dsa": {"top_k": 8}}, logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].finish_reason == "stop"
    logprobs, usage = answer.choices[0].logprobs, answer.usage
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].top_logprobs[0].token == "h"
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 1
    assert usage.total_tokens == 10
    assert usage.model_extra is not None
    assert usage.model_extra["dsa"] == {"top_k": 8}
    assert answer._request_id
    # Users send an answer's message back as it is, which the client takes and its types do not.
    said = cast(ChatCompletionMessageParam, answer.choices[0].message)
    again = await sdk.chat.completions.create(model=MODEL, messages=[*HI, said, *HI], seed=0)
    assert again.usage is not None
    assert again.usage.prompt_tokens == 13


async def test_streamed_chat(sdk: AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model=MODEL, messages=HI, seed=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "hello"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"


async def test_the_sdks_stream_helper(sdk: AsyncOpenAI) -> None:
    async with sdk.chat.completions.stream(model=MODEL, messages=HI, seed=0) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "hello"


async def test_completions(sdk: AsyncOpenAI) -> None:
    answer = await sdk.completions.create(
        model=MODEL, prompt=[ids("ab"), ids("c")], seed=0, echo=True, logprobs=1
    )
    assert [choice.text for choice in answer.choices] == ["abhello", "chello"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    stream = await sdk.completions.create(model=MODEL, prompt="x", seed=0, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello"


async def test_models(sdk: AsyncOpenAI) -> None:
    assert [model.id async for model in sdk.models.list()] == [MODEL]
    assert (await sdk.models.retrieve(MODEL)).object == "model"
    with pytest.raises(openai.NotFoundError, match="fake-model"):
        await sdk.models.retrieve("deepseek-ai/other")


async def test_errors(sdk: AsyncOpenAI) -> None:
    create = sdk.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="no tool calling") as bad:
        await create(model=MODEL, messages=HI, tools=[{"type": "function", "function": {"name": "f"}}])
    assert (bad.value.param, bad.value.type) == ("tools", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        await create(model="other", messages=HI)
    assert missing.value.code == "model_not_found"
    for seed, code, kind in (
        (1, "engine_died", 503),
        (2, "engine_unavailable", 503),
        (3, "generation_failed", 500),
    ):
        with pytest.raises(openai.InternalServerError) as failed:
            await create(model=MODEL, messages=HI, seed=seed)
        assert (failed.value.code, failed.value.status_code) == (code, kind)


async def test_errors_in_a_stream(sdk: AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(model=MODEL, messages=HI, seed=1, stream=True)
    seen = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
    with pytest.raises(openai.APIError, match="the engine died") as failed:
        await anext(stream)
    assert seen == ["h", "e"]
    assert failed.value.code == "engine_died"
    with pytest.raises(openai.InternalServerError):
        await sdk.chat.completions.create(model=MODEL, messages=HI, seed=2, stream=True)


async def test_the_blocking_client(sdk: AsyncOpenAI) -> None:
    def ask() -> list[str | None]:
        with OpenAI(base_url=sdk.base_url, api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(model=MODEL, messages=HI, seed=0, stream=True)
            return [chunk.choices[0].delta.content for chunk in stream]

    assert "".join(part or "" for part in await asyncio.to_thread(ask)) == "hello"
