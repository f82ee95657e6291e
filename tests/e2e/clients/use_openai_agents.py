"""openai-agents: an agent with a tool, by chats and by Responses. Run as a program: the server's URL, the model."""

import asyncio
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

SEEN: list[str] = []


class City(BaseModel):
    """A city."""

    name: str


@function_tool
def weather(city: str) -> str:
    """Say the weather of a city."""
    SEEN.append(city)
    return "sunny"


async def main(url: str, model: str) -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        SEEN.clear()
        settings = ModelSettings(tool_choice="required", temperature=0, max_tokens=60)
        own = {"model": kind(model=model, openai_client=client), "model_settings": settings}
        agent = Agent(name="A", instructions="Be brief.", tools=[weather], **own)
        answer = await Runner.run(agent, "Weather in Rio?", max_turns=3)
        assert SEEN, answer
        assert isinstance(answer.final_output, str)
        streamed = Runner.run_streamed(agent, "Weather in Rio?", max_turns=3)
        assert [event.type async for event in streamed.stream_events()]
        own["model_settings"] = ModelSettings(temperature=0, max_tokens=60)
        formed = await Runner.run(Agent(name="B", output_type=City, **own), "Name a city.")
        assert isinstance(formed.final_output, City)


asyncio.run(main(*sys.argv[1:]))
