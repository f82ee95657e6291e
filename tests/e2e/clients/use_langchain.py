"""langchain-openai: text, a stream, tools, structured output. Run as a program: the server's URL, the model."""

import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]
    people: Literal[1, 2]


def weather(city: str) -> str:
    """Say the weather of a city."""
    return city


def main(url: str, model: str) -> None:
    chat = ChatOpenAI(
        model=model, base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=400, max_retries=0
    )
    assert chat.invoke("What is the capital of France?").content
    assert "".join(str(chunk.content) for chunk in chat.stream("Say hi."))
    called = chat.bind_tools([weather], tool_choice="weather", strict=True).invoke("Weather in Rio?")
    assert called.tool_calls[0]["name"] == "weather", called
    assert isinstance(called.tool_calls[0]["args"]["city"], str)
    assert isinstance(chat.with_structured_output(City, method="json_schema").invoke("Paris"), City)
    assert isinstance(
        chat.with_structured_output(City, method="function_calling", strict=True).invoke("Paris"), City
    )


main(*sys.argv[1:])
