"""The helpers of OpenAI's and Anthropic's clients that take classes: `.parse()` of chats, responses and messages, and tools."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from enum import Enum
from typing import Any

import openai
import pytest
import pytest_asyncio
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

from engine.protocol import Submit
from server.app import create_app
from tests.server.chat.kit import EOS, VOCABULARY, ids, user
from tests.server.chat.test_hermes import FORMAT
from tests.server.fake_engine import FakeEngine, Script
from tests.server.http.test_strict_tools import allows
from tests.server.kit import MODEL, make_config, serving

pytestmark = pytest.mark.process  # the compiler of grammars


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel):
    name: str
    parts: list[Part] = []


class Car(BaseModel):
    colour: Colour
    wheels: int = Field(ge=3, le=4)
    parts: list[Part]
    owner: str | None


SAID = '{"colour": "red", "wheels": 4, "parts": [{"name": "a", "parts": []}], "owner": null}'
CAR = Car(colour=Colour.RED, wheels=4, parts=[Part(name="a")], owner=None)


@pytest_asyncio.fixture
async def served() -> AsyncGenerator[tuple[str, FakeEngine], None]:
    def script(submit: Submit) -> Script:
        called = f'<tool_call>\n{{"name": "Car", "arguments": {SAID}}}\n</tool_call>'
        return Script(token_ids=ids((called if submit.sampling.max_tokens == 500 else SAID) + EOS), group=4)

    engine = FakeEngine(script, vocab_size=400, max_model_len=8192)
    async with serving(create_app(make_config(), engine, VOCABULARY, FORMAT)) as url:
        yield url, engine


@pytest_asyncio.fixture
async def sdk(served: tuple[str, FakeEngine]) -> AsyncGenerator[AsyncOpenAI, None]:
    async with AsyncOpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


HI: list[Any] = [user("A car!")]


def checked(served: tuple[str, FakeEngine], said: str = "") -> None:
    """The engine's grammar is that of the class."""
    (submit,) = served[1].submitted
    assert allows(submit, said or SAID)
    assert not allows(submit, (said or SAID).replace("red", "green"))


async def test_a_chat(served: tuple[str, FakeEngine], sdk: AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.parse(model=MODEL, messages=HI, response_format=Car)
    assert answer.choices[0].message.parsed == CAR
    checked(served)


async def test_a_stream(served: tuple[str, FakeEngine], sdk: AsyncOpenAI) -> None:
    async with sdk.chat.completions.stream(model=MODEL, messages=HI, response_format=Car) as stream:
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.parsed == CAR
    checked(served)


async def test_a_response(served: tuple[str, FakeEngine], sdk: AsyncOpenAI) -> None:
    answer = await sdk.responses.parse(model=MODEL, input="A car!", text_format=Car)
    assert answer.output_parsed == CAR
    checked(served)


async def test_a_tool(served: tuple[str, FakeEngine], sdk: AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.parse(
        model=MODEL, messages=HI, tools=[openai.pydantic_function_tool(Car)], max_tokens=500
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.parsed_arguments == CAR
    checked(served, f'<tool_call>\n{{"name": "Car", "arguments": {SAID}}}\n</tool_call>')


async def test_a_message_of_anthropics_client(served: tuple[str, FakeEngine]) -> None:
    async with AsyncAnthropic(base_url=served[0], api_key="none", max_retries=0) as client:
        answer = await client.messages.parse(model=MODEL, max_tokens=400, messages=HI, output_format=Car)
    assert answer.parsed_output == CAR
    checked(served)
