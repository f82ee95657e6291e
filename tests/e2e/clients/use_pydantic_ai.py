"""pydantic-ai: an agent with a tool and one with a form. Run as a program: the server's URL, the model."""

import asyncio
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    """A city."""

    name: str
    people: int


async def main(url: str, model: str) -> None:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        own = {
            "model": kind(model, provider=provider),
            "model_settings": {"temperature": 0, "max_tokens": 100},
        }
        assert (await Agent(**own).run("Say hi.")).output
        assert isinstance((await Agent(output_type=NativeOutput(City), **own).run("Paris")).output, City)
        agent = Agent(**own)

        @agent.tool_plain
        def weather(city: str) -> str:
            """Say the weather of a city."""
            return f"sunny in {city}"

        assert (await agent.run("Weather in Rio?")).output
        async with agent.run_stream("Say hi.") as stream:
            assert await stream.get_output()


asyncio.run(main(*sys.argv[1:]))
