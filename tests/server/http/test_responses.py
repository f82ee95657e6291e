"""/v1/responses with OpenAI's own client, against a real server with a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from server.app import create_app
from server.chat.deepseek_v32 import DeepSeekV32
from server.generation.responses import KeptResponses
from server.http.protocol.responses import ResponseObject
from tests.server.chat.kit import CALL, EOS, VOCABULARY, ids, user
from tests.server.fake_engine import FakeEngine
from tests.server.http.test_deepseek import engine_of, prompt_of
from tests.server.kit import MODEL, client, error_of, make_app, make_config, serving, speaking

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
PATH = "/v1/responses"

Serve = Callable[..., Any]


@pytest_asyncio.fixture
async def serve() -> AsyncGenerator[Serve, None]:
    """Yield a function that starts a server around an engine and returns a client of it."""
    async with AsyncExitStack() as stack:

        async def start(engine: FakeEngine, **config: Any) -> AsyncOpenAI:
            app = create_app(make_config(**config), engine, VOCABULARY, DeepSeekV32())
            url = await stack.enter_async_context(serving(app))
            sdk = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            return await stack.enter_async_context(sdk)

        yield start


async def test_text(serve: Serve) -> None:
    engine = engine_of(f"Hello.{EOS}")
    sdk = await serve(engine)
    response = await sdk.responses.create(
        model=MODEL, input="hi", instructions="Be kind.", max_output_tokens=50, temperature=0.5, top_p=0.9,
        metadata={"a": "b"},
    )  # fmt: skip
    assert (response.output_text, response.status, response.model) == ("Hello.", "completed", MODEL)
    assert response.id.startswith("resp_")
    assert (response.metadata, response.instructions) == ({"a": "b"}, "Be kind.")
    (submitted,) = engine.submitted
    assert response.usage.input_tokens == len(submitted.prompt_token_ids)
    assert response.usage.output_tokens == len(ids("Hello.")) + 1
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    sampling = submitted.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 50)
    assert "Be kind." in prompt_of(engine)


async def test_a_call_and_its_result_by_the_previous_response(serve: Serve) -> None:
    engine = engine_of(f"Hm.</think>Look.{CALL}{EOS}", f"</think>Rain.{EOS}")
    sdk = await serve(engine)
    asked: dict[str, Any] = {"model": MODEL, "tools": [WEATHER], "reasoning": {"effort": "medium"}}
    first = await sdk.responses.create(input="Weather in Rio?", **asked)
    thought, message, call = first.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "Hm.")
    assert (message.type, message.content[0].text) == ("message", "Look.")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Rio"})
    assert first.usage.output_tokens_details.reasoning_tokens == 3
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "storm"}
    second = await sdk.responses.create(previous_response_id=first.id, input=[result], **asked)
    assert second.output_text == "Rain."
    # The same conversation, sent as a whole, is the same prompt.
    everything = [user("Weather in Rio?"), *first.output, result]
    await sdk.responses.create(input=everything, store=False, **asked)
    assert prompt_of(engine, 1) == prompt_of(engine, 2)
    assert "storm" in prompt_of(engine, 1)


@pytest.mark.parametrize("group", [1, 7, 1000])
async def test_a_stream_is_the_response_in_pieces(serve: Serve, group: int) -> None:
    sdk = await serve(engine_of(f"Hm.</think>Look.{CALL}{EOS}", group=group))
    asked: dict[str, Any] = {
        "model": MODEL, "input": "hi", "tools": [WEATHER], "reasoning": {"effort": "high"},
    }  # fmt: skip
    whole = await sdk.responses.create(**asked)
    events = [event async for event in await sdk.responses.create(stream=True, **asked)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3

    def joined(kind: str) -> str:
        return "".join(event.delta for event in events if event.type == kind)

    assert joined("response.reasoning_text.delta") == "Hm."
    assert joined("response.output_text.delta") == "Look."
    assert json.loads(joined("response.function_call_arguments.delta")) == {"city": "Rio"}
    (ended,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert (ended.name, json.loads(ended.arguments)) == ("weather", {"city": "Rio"})
    final = events[-1].response

    def shape(response: Any) -> Any:
        return [item.model_dump(exclude={"id", "call_id"}) for item in response.output]

    assert shape(final) == shape(whole)
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.model_dump() for item in done] == [item.model_dump() for item in final.output]
    assert final.usage.output_tokens == whole.usage.output_tokens
    again = await sdk.responses.retrieve(final.id)
    assert shape(again) == shape(final)


async def test_the_clients_own_stream_helper(serve: Serve) -> None:
    sdk = await serve(engine_of(f"one two{EOS}"))
    async with sdk.responses.stream(model=MODEL, input="hi") as stream:
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        final = await stream.get_final_response()
    assert (text, final.output_text) == ("one two", "one two")


async def test_an_answer_that_is_cut_says_so(serve: Serve) -> None:
    sdk = await serve(engine_of(f"one two three{EOS}"))
    response = await sdk.responses.create(model=MODEL, input="hi", max_output_tokens=2)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    events = [
        event
        async for event in await sdk.responses.create(
            model=MODEL, input="hi", max_output_tokens=2, stream=True
        )
    ]
    assert events[-1].type == "response.incomplete"


async def test_stored_responses_are_the_senders(serve: Serve) -> None:
    sdk = await serve(engine_of(f"x{EOS}"), stored_responses=2)
    first = await sdk.responses.create(model=MODEL, input="a")
    hidden = await sdk.responses.create(model=MODEL, input="b", store=False)
    assert (await sdk.responses.retrieve(first.id)).output_text == "x"
    for response_id, other in ((hidden.id, sdk), (first.id, sdk.with_options(api_key="another"))):
        with pytest.raises(openai.NotFoundError):
            await other.responses.retrieve(response_id)
        with pytest.raises(openai.NotFoundError):
            await other.responses.delete(response_id)
        with pytest.raises(openai.BadRequestError, match="send the whole conversation"):
            await other.responses.create(model=MODEL, input="c", previous_response_id=response_id)
    await sdk.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(first.id)
    made = [await sdk.responses.create(model=MODEL, input="a") for _ in range(3)]
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(made[0].id)
    await sdk.responses.retrieve(made[1].id)


def test_what_is_kept_has_a_bound() -> None:
    kept = KeptResponses(100, max_bytes=51_000)
    blank = dict.fromkeys(ResponseObject.model_fields)
    for number in range(20):
        response = ResponseObject.model_construct(
            **(blank | {"id": str(number), "output": [{"x": "x" * 10_000}]})
        )
        kept.add("k", response, [])
    assert [number for number in range(20) if kept.get(str(number), "k")] == [16, 17, 18, 19]
    for number in range(16, 20):
        kept.remove(str(number), "k")
    kept.add(
        "k", ResponseObject.model_construct(**(blank | {"id": "huge", "output": [{"x": "x" * 10**5}]})), []
    )
    assert kept.get("huge", "k") is None


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "at least one item"),
        ({"input": ""}, "input", "required"),
        ({"input": 7}, "input", "a string or a list"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "text",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "must be an item"),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]},
            "messages[0]",
            "no tool calling",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": [WEATHER]}, "tools", "tool"),
        ({"background": True, "store": False}, "background", "store"),
        ({"background": True, "stream": True}, "background", "stream"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "not the id"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than"),
    ],
)
async def test_bad_fields(fields: dict[str, Any], param: str, words: str) -> None:
    async with client(make_app(speaking())) as http:
        error = error_of(await http.post(PATH, json={"model": MODEL, "input": "hi"} | fields), 400)
    assert words in error["message"], error
    assert (error["param"] or "").startswith(param), error


@pytest.mark.parametrize("fields", [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}])
async def test_log_probabilities(fields: dict[str, Any]) -> None:
    engine = speaking("hey")
    async with client(make_app(engine)) as http:
        answer = (await http.post(PATH, json={"input": "hi", **fields})).json()
        part = answer["output"][0]["content"][0]
        assert [one["token"] for one in part["logprobs"]][:3] == ["h", "e", "y"]
        assert part["logprobs"][0].keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert engine.submitted[0].sampling.logprobs == fields.get("top_logprobs", 0)
        text = (await http.post(PATH, json={"input": "hi", "stream": True, **fields})).text
        plain = (await http.post(PATH, json={"input": "hi"})).json()
    told = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    deltas = [event for event in told if event["type"] == "response.output_text.delta"]
    assert [one["token"] for event in deltas for one in event["logprobs"]][:3] == ["h", "e", "y"]
    assert plain["output"][0]["content"][0]["logprobs"] == []


async def until_over(http: httpx.AsyncClient, response_id: str) -> Any:
    for _ in range(200):
        kept = (await http.get(f"{PATH}/{response_id}")).json()
        if kept["status"] != "queued":
            return kept
        await asyncio.sleep(0.01)
    raise AssertionError("it stays queued")


async def test_a_response_is_made_in_the_background() -> None:
    engine = speaking("Hello.", delay=0.02)
    async with client(make_app(engine)) as http:
        first = (await http.post(PATH, json={"input": "hi", "background": True})).json()
        assert (first["status"], first["background"], first["output"]) == ("queued", True, [])
        done = await until_over(http, first["id"])
        assert (done["id"], done["status"], done["background"]) == (first["id"], "completed", True)
        assert done["output"][0]["content"][0]["text"] == "Hello."
        assert done["usage"]["output_tokens"] > 0
        after = (await http.post(f"{PATH}/{first['id']}/cancel")).json()
        assert after["status"] == "completed"
        next_one = await http.post(PATH, json={"input": "more", "previous_response_id": first["id"]})
        assert next_one.status_code == 200


async def test_a_response_in_the_background_is_cancelled() -> None:
    engine = speaking("a long story " * 20, delay=0.05)
    async with client(make_app(engine)) as http:
        first = (await http.post(PATH, json={"input": "hi", "background": True})).json()
        await asyncio.sleep(0.1)
        ended = (await http.post(f"{PATH}/{first['id']}/cancel")).json()
        assert ended["status"] == "cancelled"
        assert engine.aborted
        assert (await http.get(f"{PATH}/{first['id']}")).json()["status"] == "cancelled"
        deleted = (await http.delete(f"{PATH}/{first['id']}")).json()
        assert deleted["deleted"] is True
        lost = error_of(await http.get(f"{PATH}/{first['id']}"), 404)
        assert first["id"] in lost["message"]
        plain = (await http.post(PATH, json={"input": "hi", "max_output_tokens": 1})).json()
        assert error_of(await http.post(f"{PATH}/{plain['id']}/cancel"), 400)["param"] == "response_id"


async def test_a_response_in_the_background_that_fails_says_why() -> None:
    async with client(make_app(speaking(fault="die", fault_after=2))) as http:
        first = (await http.post(PATH, json={"input": "hi", "background": True})).json()
        ended = await until_over(http, first["id"])
        assert (ended["status"], ended["error"]["code"]) == ("failed", "engine_died")


async def test_reasoning_and_effort_of_a_model_without_are_left_out_and_named() -> None:
    said = [
        {"role": "user", "content": "hi"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
        },
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "more"},
    ]
    async with client(make_app(speaking())) as http:
        answer = (await http.post(PATH, json={"input": said, "reasoning": {"effort": "low"}})).json()
    assert answer["status"] == "completed"
    assert [one["param"] for one in answer["warnings"]] == [
        "reasoning_effort",
        "messages[1].reasoning_content",
    ]


async def test_what_the_endpoint_does_not_know_is_named() -> None:
    async with client(make_app(speaking())) as http:
        answer = (await http.post(PATH, json={"input": "hi", "colour": 1})).json()
        assert [notice["param"] for notice in answer["warnings"]] == ["colour"]


async def test_a_stream_that_fails_ends_with_the_failed_response() -> None:
    async with client(make_app(speaking(fault="die", fault_after=2))) as http:
        text = (await http.post(PATH, json={"input": "hi", "stream": True})).text
    kind, _, data = text.rstrip().rpartition("\n\n")[2].partition("\n")
    assert kind == "event: response.failed"
    assert json.loads(data.removeprefix("data: "))["response"]["error"]["code"] == "engine_died"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_prompt_and_the_output_as_tokens(serve: Serve, stream: bool) -> None:
    engine = engine_of(f"Hello.{EOS}")
    sdk = await serve(engine)
    asked: dict[str, Any] = {"model": MODEL, "input": "hi", "stream": stream}
    answer = await sdk.responses.create(**asked, extra_body={"enable_response_messages": True})
    if stream:
        seen = [event.response async for event in answer if hasattr(event, "response")]
        assert [len(response.output_messages) for response in seen] == [0, 0, 1]
        answer = seen[-1]
    (read,), (written,) = answer.input_messages, answer.output_messages
    assert read == {
        "type": "raw_message_tokens",
        "message": prompt_of(engine),
        "tokens": list(engine.submitted[0].prompt_token_ids),
    }
    assert (written["message"], written["tokens"]) == (f"Hello.{EOS}", ids(f"Hello.{EOS}"))
    if not stream:
        assert "input_messages" not in (await sdk.responses.create(**asked)).model_extra
