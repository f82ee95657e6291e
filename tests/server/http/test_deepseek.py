"""DeepSeek's formats over HTTP: tools, reasoning and its budget, with OpenAI's own client and a fake engine."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from engine.protocol import Submit
from server.app import create_app
from server.chat.deepseek_v31 import DeepSeekV31
from server.chat.deepseek_v32 import DeepSeekV32
from tests.server.chat.kit import CALL, EOS, OLD_CALL, VOCABULARY, WEATHER, ids, tool, user
from tests.server.fake_engine import FakeEngine, Script
from tests.server.kit import MODEL, client, error_of, events, make_config, serving


def engine_of(*answers: str, group: int = 3) -> FakeEngine:
    """An engine that gives one answer to each request in turn, and the last answer to all further requests."""
    left = list(answers)

    def script(submit: Submit) -> Script:
        return Script(token_ids=ids(left.pop(0) if len(left) > 1 else left[0]), group=group)

    return FakeEngine(script, vocab_size=400, max_model_len=8192)


Serve = Callable[..., Any]


@pytest_asyncio.fixture
async def serve() -> AsyncGenerator[Serve, None]:
    """Yield a function that starts a server around an engine and returns a client, which is closed after the test."""
    import contextlib

    async with contextlib.AsyncExitStack() as stack:

        async def start(engine: FakeEngine, chat: Any = None) -> AsyncOpenAI:
            app = create_app(make_config(), engine, VOCABULARY, chat or DeepSeekV32())
            url = await stack.enter_async_context(serving(app))
            sdk = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            return await stack.enter_async_context(sdk)

        yield start


def prompt_of(engine: FakeEngine, number: int = 0) -> str:
    return VOCABULARY.decode(engine.submitted[number].prompt_token_ids, skip_special=False)


@pytest.mark.parametrize(("chat", "call"), [(DeepSeekV32(), CALL), (DeepSeekV31(), OLD_CALL)])
async def test_a_call_and_its_result(serve: Serve, chat: Any, call: str) -> None:
    engine = engine_of(f"Look.{call}{EOS}", f"Rain.{EOS}")
    sdk = await serve(engine, chat)
    messages: list[Any] = [user("Weather in Rio?")]
    answer = await sdk.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Look.")
    (made,) = choice.message.tool_calls
    assert (made.type, made.function.name) == ("function", "weather")
    assert json.loads(made.function.arguments) == {"city": "Rio"}
    assert answer.usage.completion_tokens == len(ids(f"Look.{call}")) + 1
    assert "## Tools" in prompt_of(engine)
    messages += [choice.message, {"role": "tool", "tool_call_id": made.id, "content": "rain"}]
    again = await sdk.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
    assert (again.choices[0].finish_reason, again.choices[0].message.content) == ("stop", "Rain.")
    begin = engine.submitted[0].prompt_token_ids
    assert engine.submitted[1].prompt_token_ids[: len(begin)] == begin  # so it finds the first's pages
    assert f"Look.{call}{EOS}" in prompt_of(engine, 1)


@pytest.mark.parametrize("group", [1, 7, 1000])
async def test_a_streamed_answer_has_one_kind_in_a_chunk(serve: Serve, group: int) -> None:
    sdk = await serve(engine_of(f"Hm.</think>Look.{CALL}{EOS}", group=group))
    stream = await sdk.chat.completions.create(
        model=MODEL, messages=[user("?")], tools=[WEATHER], stream=True,
        stream_options={"include_usage": True}, extra_body={"thinking": {"type": "enabled"}},
    )  # fmt: skip
    reasoning = content = arguments = ""
    reasons, names = [], []
    async for chunk in stream:
        if not chunk.choices:
            assert chunk.usage.completion_tokens_details.reasoning_tokens == 3
            continue
        (choice,) = chunk.choices
        reasons.append(choice.finish_reason)
        thought = getattr(choice.delta, "reasoning_content", None)
        assert sum(map(bool, (thought, choice.delta.content, choice.delta.tool_calls))) <= 1
        reasoning += thought or ""
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            names += [call.function.name] if call.id else []
            arguments += call.function.arguments
    assert (reasoning, content, names) == ("Hm.", "Look.", ["weather"])
    assert json.loads(arguments) == {"city": "Rio"}
    assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]


@pytest.mark.parametrize(
    "switch",
    [
        {"thinking": {"type": "enabled"}},
        {"chat_template_kwargs": {"thinking": True}},
        {"reasoning_effort": "high"},
        {"reasoning_effort": "low"},
    ],
)
async def test_thinking(serve: Serve, switch: dict[str, Any]) -> None:
    engine = engine_of(f"1+1</think>2{EOS}")
    sdk = await serve(engine)
    answer = await sdk.chat.completions.create(model=MODEL, messages=[user("?")], extra_body=switch)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("1+1", "2")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3
    assert answer.usage.completion_tokens == 6
    assert prompt_of(engine).endswith("<think>")
    back = await sdk.chat.completions.create(model=MODEL, messages=[user("?"), message, user("!")])
    assert prompt_of(engine, 1).endswith(f"2{EOS}<｜User｜>!<｜Assistant｜></think>")
    assert back.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("group", [1, 4, 100])
async def test_a_thinking_budget_ends_reasoning_and_goes_on(serve: Serve, group: int) -> None:
    engine = engine_of("on and on and on", f"Two.{EOS}", group=group)
    sdk = await serve(engine)
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=[user("?")], max_tokens=50, seed=1, temperature=0,
        extra_body={"thinking": {"type": "enabled", "budget_tokens": 6}},
    )  # fmt: skip
    (choice,) = answer.choices
    assert (choice.message.reasoning_content, choice.message.content) == ("on and", "Two.")
    assert (choice.finish_reason, answer.usage.completion_tokens) == ("stop", 6 + 1 + 5)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 6
    first, second = engine.submitted
    assert answer.usage.prompt_tokens == len(first.prompt_token_ids)
    assert second.prompt_token_ids == (*first.prompt_token_ids, *ids("on and</think>"))
    assert second.sampling.max_tokens == 50 - 7
    assert second.sampling.seed != first.sampling.seed
    assert second.request_id != first.request_id
    assert engine.aborted == ([first.request_id] if group < 100 else [])  # a group of 100 is the whole answer


async def test_a_budget_that_uses_up_the_limit_ends_the_answer(serve: Serve) -> None:
    engine = engine_of("on and on", group=1)
    sdk = await serve(engine)
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=[user("?")], max_tokens=6,
        extra_body={"thinking": {"type": "enabled"}, "thinking_token_budget": 6},
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6
    assert len(engine.submitted) == 1


NAMED = {"type": "function", "function": {"name": "weather"}}
TWO = [WEATHER, tool("time")]


@pytest.mark.process  # the compiler of grammars
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(("choice", "tools"), [("required", [WEATHER]), ("required", TWO), (NAMED, TWO)])
async def test_a_call_that_is_asked_for_is_opened(
    serve: Serve, choice: Any, tools: list[Any], thinking: bool
) -> None:
    begin = "\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="
    begin += "" if choice == "required" and tools == TWO else '"weather">\n'
    rest = f"{CALL.removeprefix(begin)}{EOS}"
    engine = engine_of(*(["Hm.</think>I will not.", rest] if thinking else [rest]))
    sdk = await serve(engine)
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=[user("?")], tools=tools, tool_choice=choice,
        extra_body={"thinking": {"type": "enabled" if thinking else "disabled"}},
    )  # fmt: skip
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("weather", '{"city": "Rio"}')
    ]
    assert getattr(message, "reasoning_content", None) == ("Hm." if thinking else None)
    assert prompt_of(engine, -1).endswith("</think>" + begin)


async def test_tool_choice_none_and_a_single_call(serve: Serve) -> None:
    engine = engine_of(f"Hi.{CALL}{EOS}", f"{CALL.removesuffix('</｜DSML｜function_calls>')}{CALL}{CALL}")
    sdk = await serve(engine)
    create = sdk.chat.completions.create
    none = await create(model=MODEL, messages=[user("?")], tools=[WEATHER], tool_choice="none")
    assert "weather" not in prompt_of(engine)
    assert (none.choices[0].finish_reason, none.choices[0].message.content) == ("stop", "Hi.")
    assert none.choices[0].message.tool_calls is None
    (warning,) = none.choices[0].warnings
    assert (warning["code"], warning["raw"]) == ("unexpected_tool_call", CALL)
    one = await create(model=MODEL, messages=[user("?")], tools=[WEATHER], parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1
    assert one.choices[0].finish_reason == "tool_calls"
    assert len(engine.aborted) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_is_cut_is_reported_and_kept(serve: Serve, stream: bool) -> None:
    sdk = await serve(engine_of(f"{CALL}{EOS}"))
    limit = len(ids(CALL.partition("o</")[0]))
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=[user("?")], tools=[WEATHER], max_tokens=limit, stream=stream
    )
    chunks = [chunk async for chunk in answer] if stream else [answer]
    choice = chunks[-1].choices[0]
    assert choice.finish_reason == "length"
    assert [(w["code"], w["tool_call"]) for w in choice.warnings] == [("truncated_tool_call", 0)]
    if not stream:
        assert choice.message.tool_calls[0].function.arguments == '{"city": "Ri'


async def test_stop_strings_end_the_content_only(serve: Serve) -> None:
    engine = engine_of(f"a.b</think>c.d{EOS}")
    sdk = await serve(engine)
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=[user("?")], stop=".", extra_body={"thinking": {"type": "enabled"}}
    )
    assert (answer.choices[0].message.reasoning_content, answer.choices[0].message.content) == ("a.b", "c")
    assert len(engine.aborted) == 1


@pytest.mark.process  # the compiler of grammars
async def test_a_call_inside_reasoning_is_not_opened_again(serve: Serve) -> None:
    engine = engine_of(f"Hm.{CALL}{EOS}")
    sdk = await serve(engine)
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=[user("?")], tools=[WEATHER], tool_choice="required",
        extra_body={"thinking": {"type": "enabled"}},
    )  # fmt: skip
    (choice,) = answer.choices
    assert [warning["code"] for warning in choice.warnings] == ["unclosed_reasoning"]
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"city": "Rio"}']
    assert len(engine.submitted) == 1


@pytest.mark.process  # the compiler of grammars
async def test_a_model_that_does_not_call_is_reported(serve: Serve) -> None:
    sdk = await serve(engine_of(f"No.</think>{EOS}", EOS))
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=[user("?")], tools=[WEATHER], tool_choice="required",
        extra_body={"thinking": {"type": "enabled"}},
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert [warning["code"] for warning in choice.warnings] == ["truncated_tool_call"]


CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": name, "type": "function", "function": {"name": "weather", "arguments": "{}"}} for name in "ab"
    ],
}


def result(name: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": name, "content": f"of {name}"}


async def test_results_are_put_into_the_order_of_their_calls(serve: Serve) -> None:
    engine = engine_of(f"ok{EOS}")
    sdk = await serve(engine)
    messages: list[Any] = [user("?"), CALLED, result("b"), result("a")]
    await sdk.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
    assert "<result>of a</result>\n<result>of b</result>" in prompt_of(engine)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": [user("?"), CALLED, result("a")]}, "messages", "'b' has no result"),
        ({"messages": [user("?"), CALLED, user("!")]}, "messages[2]", "before the result"),
        ({"messages": [user("?"), result("a")]}, "messages[1].tool_call_id", "not the id of a call"),
        (
            {"messages": [user("?") | {"tool_calls": CALLED["tool_calls"]}]},
            "messages[0].tool_calls",
            "'assistant'",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "each of their own"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tool_choice": "required"}, "tool_choice", "no tools to call"),
        (
            {"tools": TWO, "tool_choice": NAMED | {"function": {"name": "x"}}},
            "tool_choice.function.name",
            "'x'",
        ),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, "reasoning_effort", "contradict"),
        ({"reasoning_effort": "loud"}, "reasoning_effort", "'none', 'minimal'"),
        ({"thinking_token_budget": 3}, "thinking_token_budget", "switched on"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 3}, "presence_penalty": 1},
            "thinking.budget_tokens",
            "presence_penalty",
        ),
    ],
)
async def test_what_makes_no_sense_is_refused(fields: dict[str, Any], param: str, words: str) -> None:
    async with client(create_app(make_config(), engine_of("x"), VOCABULARY, DeepSeekV32())) as http:
        body = {"model": MODEL, "messages": [user("?")]} | fields
        error = error_of(await http.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == param
    assert words in error["message"], error["message"]


@pytest.mark.parametrize("policy", ["accept", "refuse"])
async def test_a_template_gets_only_the_switches_that_are_known(policy: str) -> None:
    app = create_app(make_config(unknown_fields=policy), engine_of("x"), VOCABULARY, DeepSeekV32())
    async with client(app) as http:
        body = {"model": MODEL, "messages": [user("?")], "chat_template_kwargs": {"template": "x"}}
        response = await http.post("/v1/chat/completions", json=body)
    if policy == "refuse":
        assert error_of(response, 400)["param"] == "chat_template_kwargs.template"
    else:
        assert [notice["param"] for notice in response.json()["warnings"]] == [
            "chat_template_kwargs.template"
        ]


async def test_v31_calls_tools_without_thinking() -> None:
    async with client(create_app(make_config(), engine_of("x"), VOCABULARY, DeepSeekV31())) as http:
        body = {"model": MODEL, "messages": [user("?")], "tools": [WEATHER], "thinking": {"type": "enabled"}}
        assert (
            "without thinking" in error_of(await http.post("/v1/chat/completions", json=body), 400)["message"]
        )


@pytest.mark.parametrize("depth", [100, 900, 20_000])
async def test_nesting_is_no_fault_of_the_server(depth: int) -> None:
    arguments = '{"a": ' + "[" * depth + "]" * depth + "}"
    call = {"id": "a", "type": "function", "function": {"name": "no such <tool>", "arguments": arguments}}
    messages = [user("?"), {"role": "assistant", "content": None, "tool_calls": [call]}, result("a")]
    async with client(create_app(make_config(), engine_of("x"), VOCABULARY, DeepSeekV32())) as http:
        answer = await http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
    if depth > 100:
        error_of(answer, 400)
    else:
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_under_the_name_that_vllm_has(stream: bool) -> None:
    app = create_app(
        make_config(reasoning_field="reasoning"),
        engine_of(f"Hm.</think>Two.{EOS}"),
        VOCABULARY,
        DeepSeekV32(),
    )
    body = {"messages": [user("?")], "thinking": {"type": "enabled"}, "stream": stream}
    async with client(app) as http:
        reply = await http.post("/v1/chat/completions", json=body)
    if stream:
        said = [chunk["choices"][0]["delta"] for chunk in events(reply)[:-1] if chunk["choices"]]
    else:
        said = [reply.json()["choices"][0]["message"]]
    assert "".join(part.get("reasoning") or "" for part in said) == "Hm."
    assert not any("reasoning_content" in part for part in said)


async def test_the_servers_budget_is_that_of_requests_without_one() -> None:
    engine = engine_of(
        "on and on and on", f"Two.{EOS}", "on and on and on", f"Two.{EOS}", f"Hm.</think>c{EOS}"
    )
    app = create_app(make_config(thinking_budget=4), engine, VOCABULARY, DeepSeekV32())
    asked: dict[str, Any] = {"messages": [user("?")]}
    on = {"type": "enabled"}
    async with client(app) as http:
        for thinking, tokens in ((on, 4), (on | {"budget_tokens": 2}, 2)):
            reply = await http.post("/v1/chat/completions", json=asked | {"thinking": thinking})
            details = reply.json()["usage"]["completion_tokens_details"]
            assert details == {"reasoning_tokens": tokens}
            assert reply.json()["choices"][0]["message"]["content"] == "Two."
        penalties = asked | {"thinking": on, "presence_penalty": 0.5}
        reply = await http.post("/v1/chat/completions", json=penalties)
    assert reply.json()["choices"][0]["message"] == {
        "role": "assistant",
        "content": "c",
        "refusal": None,
        "reasoning_content": "Hm.",
    }
    assert len(engine.submitted) == 5
