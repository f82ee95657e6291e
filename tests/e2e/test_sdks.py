"""The SDKs of OpenAI and Anthropic on a live server: forms, tools in streams, Responses, Messages."""

from __future__ import annotations

import json
from typing import Any, Literal

from anthropic import Anthropic
from pydantic import BaseModel

from tests.e2e.serving import MODEL, Server

ASK: list[Any] = [{"role": "user", "content": "What is the weather in Rio?"}]
CITY = {"type": "string", "enum": ["Rio", "Oslo"]}
SCHEMA = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}


class Verdict(BaseModel):
    """A form that a small model fills in, too."""

    city: Literal["Rio", "Oslo"]
    sunny: bool


def test_forms_of_openai(server: Server) -> None:
    with server.sdk() as sdk:
        parsed = sdk.chat.completions.parse(
            model=MODEL, messages=ASK, response_format=Verdict, temperature=0, max_tokens=60
        )
        assert isinstance(parsed.choices[0].message.parsed, Verdict)
        response = sdk.responses.parse(
            model=MODEL, input="Rio?", text_format=Verdict, temperature=0, max_output_tokens=60
        )
        assert isinstance(response.output_parsed, Verdict)


def test_tools_of_openai_in_a_stream(server: Server) -> None:
    with (
        server.sdk() as sdk,
        sdk.chat.completions.stream(
            model=MODEL, messages=ASK, tools=[TOOL], tool_choice="required", parallel_tool_calls=False,
            temperature=0, max_tokens=60,
        ) as stream,
    ):  # fmt: skip
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert message.tool_calls
    call = message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rio", "Oslo")
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    said: Any = message.model_dump(exclude_none=True)
    with server.sdk() as sdk:
        more = sdk.chat.completions.create(
            model=MODEL, messages=[*ASK, said, result], tools=[TOOL], max_tokens=5
        )
    assert more.usage is not None


def test_anthropics_client(server: Server) -> None:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as sdk:
        tool: Any = {"name": "weather", "description": "Says it.", "input_schema": SCHEMA}
        own: dict[str, Any] = {"model": MODEL, "messages": ASK, "max_tokens": 60}
        assert sdk.messages.create(**own).content[0].type == "text"
        with sdk.messages.stream(
            **own, tools=[tool], tool_choice={"type": "any", "disable_parallel_tool_use": True}
        ) as stream:
            final = stream.get_final_message()
        assert final.stop_reason == "tool_use"
        block = final.content[0]
        assert block.type == "tool_use"
        assert block.input in ({"city": "Rio"}, {"city": "Oslo"})
        assert sdk.messages.count_tokens(model=MODEL, messages=ASK, tools=[tool]).input_tokens > 50
