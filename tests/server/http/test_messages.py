"""/v1/messages with Anthropic's own client, against a real server with a fake engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from typing import Any

import anthropic
import pytest
import pytest_asyncio
from anthropic import AsyncAnthropic

from server.app import create_app
from server.chat import ChatFormat
from server.chat.deepseek_v32 import DeepSeekV32
from tests.server.chat.kit import CALL, EOS, VOCABULARY, ids, user
from tests.server.fake_engine import FakeEngine
from tests.server.http.test_deepseek import engine_of, prompt_of
from tests.server.kit import MODEL, TEXT, client, error_of, make_app, make_config, serving, speaking

WEATHER: Any = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
HI: Any = user("hi")

Serve = Callable[..., Any]


@pytest_asyncio.fixture
async def serve() -> AsyncGenerator[Serve, None]:
    """Yield a function that starts a server around an engine and returns a client of it."""
    async with AsyncExitStack() as stack:

        async def start(engine: FakeEngine, chat: ChatFormat | None = None, **config: Any) -> AsyncAnthropic:
            app = create_app(make_config(**config), engine, VOCABULARY, chat or DeepSeekV32())
            url = await stack.enter_async_context(serving(app))
            sdk = AsyncAnthropic(base_url=url, api_key="none", max_retries=0)
            return await stack.enter_async_context(sdk)

        yield start


async def test_text(serve: Serve) -> None:
    engine = engine_of(f"Hello.{EOS}")
    sdk = await serve(engine)
    message = await sdk.messages.create(
        model=MODEL, max_tokens=50, system=[{"type": "text", "text": "Be kind."}], messages=[HI],
        extra_body={"temperature": 0.5, "top_k": 5, "top_p": 0.9},
    )  # fmt: skip
    assert [(block.type, block.text) for block in message.content] == [("text", "Hello.")]
    assert (message.role, message.model, message.stop_reason, message.stop_sequence) == (
        "assistant", MODEL, "end_turn", None,
    )  # fmt: skip
    assert message.id.startswith("msg_")
    assert message._request_id
    (submitted,) = engine.submitted
    assert message.usage.input_tokens == len(submitted.prompt_token_ids)
    assert message.usage.output_tokens == len(ids("Hello.")) + 1
    sampling = submitted.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_tokens) == (0.5, 5, 0.9, 50)
    assert "Be kind." in prompt_of(engine)
    count = await sdk.messages.count_tokens(model=MODEL, system="Be kind.", messages=[HI])
    assert count.input_tokens == message.usage.input_tokens


async def test_a_call_and_its_result(serve: Serve) -> None:
    engine = engine_of(f"Hm.</think>Look.{CALL}{EOS}", f"</think>Rain.{EOS}")
    sdk = await serve(engine)
    asked: dict[str, Any] = {
        "model": MODEL, "max_tokens": 200, "tools": [WEATHER],
        "thinking": {"type": "enabled", "budget_tokens": 100},
    }  # fmt: skip
    message = await sdk.messages.create(messages=[HI], **asked)
    thought, text, call = message.content
    assert (thought.type, thought.thinking, text.text) == ("thinking", "Hm.", "Look.")
    assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "Rio"})
    assert message.stop_reason == "tool_use"
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": call.id, "content": "storm"}
    more = [HI, {"role": "assistant", "content": message.content}]
    answer: dict[str, Any] = {"role": "user", "content": [result, {"type": "text", "text": "And?"}]}
    again = await sdk.messages.create(messages=[*more, answer], **asked)
    assert [block.text for block in again.content] == ["Rain."]
    assert "storm" in prompt_of(engine, 1)
    assert "And?" in prompt_of(engine, 1)
    failed = {"role": "user", "content": [result | {"is_error": True}]}
    await sdk.messages.create(messages=[*more, failed], **asked)
    assert "Error: storm" in prompt_of(engine, 2)


@pytest.mark.parametrize("group", [1, 7, 1000])
async def test_a_stream_is_the_message_in_pieces(serve: Serve, group: int) -> None:
    sdk = await serve(engine_of(f"Hm.</think>Look.{CALL}{EOS}", group=group))
    asked: dict[str, Any] = {
        "model": MODEL, "max_tokens": 200, "tools": [WEATHER], "messages": [HI], "thinking": {"type": "enabled"},
    }  # fmt: skip
    whole = await sdk.messages.create(**asked)
    kinds: list[str] = []
    async with sdk.messages.stream(**asked) as stream:
        async for event in stream:
            kinds.append(event.type)
        streamed = await stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3

    def shape(message: Any) -> Any:
        blocks = [
            block.model_dump(exclude={"id", "parsed_output"}, exclude_none=True) for block in message.content
        ]
        return blocks, message.stop_reason, message.usage.input_tokens, message.usage.output_tokens

    assert shape(streamed) == shape(whole)


@pytest.mark.process  # the compiler of grammars
@pytest.mark.parametrize(
    ("choice", "words"), [({"type": "any"}, "invoke"), ({"type": "tool", "name": "weather"}, "weather")]
)
async def test_a_call_can_be_asked_for(serve: Serve, choice: dict[str, Any], words: str) -> None:
    engine = engine_of(f"{CALL}{EOS}")
    sdk = await serve(engine)
    await sdk.messages.create(model=MODEL, max_tokens=99, messages=[HI], tools=[WEATHER], tool_choice=choice)
    assert words in prompt_of(engine)[-40:]


async def test_how_answers_end(serve: Serve) -> None:
    sdk = await serve(engine_of(f"one two three{EOS}"))
    asked: dict[str, Any] = {"model": MODEL, "messages": [HI]}
    cut = await sdk.messages.create(max_tokens=2, **asked)
    assert cut.stop_reason == "max_tokens"
    stopped = await sdk.messages.create(max_tokens=99, stop_sequences=["x", " three"], **asked)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " three")
    assert stopped.content[0].text == "one two"
    async with sdk.messages.stream(max_tokens=99, stop_sequences=[" two"], **asked) as stream:
        final = await stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence, final.content[0].text) == ("stop_sequence", " two", "one")


async def test_a_last_message_of_the_assistant_is_continued(serve: Serve) -> None:
    engine = engine_of(f" then{EOS}")
    sdk = await serve(engine)
    await sdk.messages.create(
        model=MODEL, max_tokens=9, messages=[HI, {"role": "assistant", "content": "Well"}]
    )
    assert prompt_of(engine).endswith("Well")


async def test_what_the_endpoint_does_not_know_is_named() -> None:
    async with client(make_app(speaking())) as http:
        body: dict[str, Any] = {"model": MODEL, "max_tokens": 9, "messages": [HI], "colour": 1}
        answer = (await http.post("/v1/messages?beta=true", json=body)).json()
        assert [notice["param"] for notice in answer["warnings"]] == ["colour"]
        streamed = await http.post("/v1/messages", json=body | {"stream": True})
        assert streamed.text.startswith("event: message_start\n")
        assert '"param":"colour"' in streamed.text.partition("\n\n")[0]
        counted = await http.post("/v1/messages/count_tokens", json=body)
        assert {notice["param"] for notice in counted.json()["warnings"]} == {"colour", "max_tokens"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "at least 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "reads text only"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
                ]
            },
            "cannot have",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        (
            {
                "messages": [
                    HI,
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
                    },
                    HI,
                ]
            },
            "messages[2] must begin with a tool_result",
        ),
        ({"tools": [WEATHER]}, "tool"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking"),
        ({"tool_choice": {"type": "tool"}}, "name of the tool"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ],
)
async def test_errors_have_anthropics_form(fields: dict[str, Any], words: str) -> None:
    async with client(make_app(speaking())) as http:
        body = {"model": MODEL, "max_tokens": 9, "messages": [HI]} | fields
        response = await http.post("/v1/messages", json=body)
        assert response.status_code == 400, response.text
        answer = response.json()
        assert set(answer) == {"type", "error"}
        assert (answer["type"], answer["error"]["type"]) == ("error", "invalid_request_error")
        assert words in answer["error"]["message"], answer


async def test_other_errors_have_it_too(serve: Serve) -> None:
    async with client(make_app(speaking(), max_body_bytes=200)) as http:
        other = await http.post("/v1/messages", json={"model": "x", "max_tokens": 9, "messages": [HI]})
        assert (other.status_code, other.json()["error"]["type"]) == (404, "not_found_error")
        large = await http.post("/v1/messages", json={"x": "x" * 300})
        assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
        wrong = await http.get("/v1/messages")
        assert (wrong.status_code, wrong.json()["type"]) == (405, "error")
    sdk = await serve(engine_of("x"))
    with pytest.raises(anthropic.NotFoundError):
        await sdk.messages.create(model="x", max_tokens=9, messages=[HI])


async def test_a_stream_that_fails_ends_with_an_error() -> None:
    async with client(make_app(speaking(fault="die", fault_after=2))) as http:
        body = {"model": MODEL, "max_tokens": 9, "messages": [HI], "stream": True}
        text = (await http.post("/v1/messages", json=body)).text
    assert (
        text.rstrip()
        .rpartition("\n\n")[2]
        .startswith('event: error\ndata: {"type":"error","error":{"type":"')
    )
    assert "message_stop" not in text


async def test_chat_continues_a_message_as_well() -> None:
    engine = speaking()
    messages = [HI, {"role": "assistant", "content": "Well"}]
    async with client(make_app(engine)) as http:
        body = {"messages": messages, "continue_final_message": True}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
        body = {"messages": [HI], "continue_final_message": True}
        error_of(await http.post("/v1/chat/completions", json=body), 400)
    assert TEXT.decode(engine.submitted[0].prompt_token_ids).endswith("Well")
