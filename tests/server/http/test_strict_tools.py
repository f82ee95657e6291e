"""Strict tools and tool_choice over HTTP, with a fake engine: the grammar of calls that reaches the engine."""

from __future__ import annotations

from typing import Any

import pytest

from engine.grammar import GrammarCompiler
from engine.protocol import Submit
from server.app import create_app
from server.chat.deepseek_v31 import DeepSeekV31
from server.chat.deepseek_v32 import DeepSeekV32
from server.chat.format import ChatFormat
from server.chat.hermes import HermesFormat
from server.chat.llama_json import LlamaJsonFormat
from server.chat.mistral import MistralFormat
from server.chat.pythonic import PythonicFormat
from server.generation.grammars import vocabulary_of
from tests.server.chat.kit import CALL, EOS, OLD_CALL, VOCABULARY, ids, user
from tests.server.chat.templates import LLAMA, MISTRAL, MISTRAL_LIST, PLAIN, PYTHONIC
from tests.server.chat.test_hermes import FORMAT as HERMES
from tests.server.fake_engine import FakeEngine, Script
from tests.server.kit import MODEL, client, error_of, make_config

pytestmark = pytest.mark.process  # the compiler of grammars

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TAGGED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rio"}}\n</tool_call>'
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Rio"}}'
LISTED = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rio"}}]'
CALLS: dict[str, tuple[ChatFormat, str]] = {
    "v3.1": (DeepSeekV31(), OLD_CALL),
    "v3.2": (DeepSeekV32(), CALL),
    "hermes": (HERMES, TAGGED),
    "llama-json": (LlamaJsonFormat(LLAMA), LLAMA_CALL),
    "pythonic": (PythonicFormat(PYTHONIC), '[weather(city="Rio")]'),
    "mistral": (MistralFormat(MISTRAL), '[TOOL_CALLS]weather[ARGS]{"city": "Rio"}'),
    "mistral-list": (MistralFormat(MISTRAL_LIST), LISTED),
    "described": (HermesFormat(PLAIN), TAGGED),
}
FORMS = pytest.mark.parametrize(("chat", "call"), CALLS.values(), ids=CALLS)


def weather(strict: bool = True, schema: Any = CITY) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "parameters": schema, "strict": strict}}


async def ask(
    chat: Any, said: str, path: str = "/v1/chat/completions", **fields: Any
) -> tuple[Any, list[Submit]]:
    """The answer to a request, and what the engine got."""
    left = said.split("|")

    def script(submit: Submit) -> Script:
        return Script(token_ids=ids(left.pop(0) if len(left) > 1 else left[0]), group=3)

    engine = FakeEngine(script, vocab_size=400, max_model_len=8192)
    app = create_app(make_config(), engine, VOCABULARY, chat)
    body = {"model": MODEL, "messages": [user("Weather in Rio?")]} | fields
    async with app.router.lifespan_context(app), client(app) as http:
        return await http.post(path, json=body), engine.submitted


def allows(submit: Submit, text: str) -> bool:
    """Whether the grammar of a request allows a text as a whole answer."""
    vocabulary = vocabulary_of(VOCABULARY)
    assert vocabulary is not None
    assert submit.grammar is not None
    matcher = GrammarCompiler(vocabulary, 400).compile(submit.grammar.text)
    for token_id in ids(text + EOS):
        if not int(matcher.mask()[token_id // 32]) >> (token_id % 32) & 1:
            return False
        matcher.consume(token_id)
    return True


@FORMS
async def test_text_or_calls_that_are_valid(chat: Any, call: str) -> None:
    look = "" if isinstance(chat, LlamaJsonFormat | PythonicFormat) else "Look."  # a call is the whole answer
    reply, (submit,) = await ask(chat, f"{look}{call}{EOS}", tools=[weather()])
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["finish_reason"] == "tool_calls"
    assert allows(submit, "Just text with <b> and {}.")
    assert allows(submit, f"{look}{call}")
    assert not allows(submit, f"{look}{call}".replace("city", "town"))
    assert allows(submit, call.replace("weather", "other")) == (not look)  # which is text then


@FORMS
async def test_a_tool_that_is_not_strict_leaves_the_answer_free(chat: Any, call: str) -> None:
    reply, (submit,) = await ask(chat, f"{call}{EOS}", tools=[weather(strict=False)])
    assert reply.status_code == 200, reply.text
    assert submit.grammar is None


@FORMS
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("strict", [False, True])
async def test_a_call_that_must_come_follows_its_opening(
    chat: Any, call: str, choice: Any, strict: bool
) -> None:
    tools = [weather(strict), weather(strict) | {"function": {"name": "time", "strict": strict}}]
    named = "weather" if isinstance(choice, dict) else None
    rest = call.removeprefix(chat.opening(named))
    reply, (submit,) = await ask(chat, f"{rest}{EOS}", tools=tools, tool_choice=choice)
    assert reply.status_code == 200, reply.text
    assert (
        reply.json()["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Rio"}'
    )
    assert "warnings" not in reply.json()["choices"][0]
    assert allows(submit, rest)
    assert chat is not HERMES or allows(submit, rest + "\n")
    assert not allows(submit, "No.")
    assert not allows(submit, rest.replace("city", "town"))


async def test_a_call_that_must_come_after_reasoning() -> None:
    chat = DeepSeekV32()
    rest = CALL.removeprefix(chat.opening("weather"))
    reply, (first, second) = await ask(
        chat, f"Hm.</think>|{rest}{EOS}", tools=[weather()], tool_choice="required",
        thinking={"type": "enabled"},
    )  # fmt: skip
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["reasoning_content"] == "Hm."
    assert allows(first, "Hm.</think>")
    assert not allows(first, "Hm.")
    assert not allows(first, f"Hm.{CALL}</think>")
    assert allows(second, rest)
    assert not allows(second, rest.replace("Rio", "Rio</｜DSML｜parameter>"))


async def test_strict_tools_after_reasoning() -> None:
    reply, (submit,) = await ask(
        DeepSeekV32(), f"Hm.</think>{CALL}{EOS}", tools=[weather()], thinking={"type": "enabled"}
    )
    assert reply.status_code == 200, reply.text
    assert allows(submit, f"Hm.</think>{CALL}")
    assert allows(submit, "Hm.</think>Yes.")
    assert not allows(submit, f"Hm.{CALL}</think>")


@FORMS
async def test_text_under_a_schema_or_calls(chat: Any, call: str) -> None:
    reply, (submit,) = await ask(
        chat, f'{{"a": 1}}{EOS}', tools=[weather(strict=False)], response_format={"type": "json_object"}
    )
    assert reply.status_code == 200, reply.text
    assert allows(submit, '{"a": 1}')
    assert allows(submit, call)
    assert not allows(submit, "text")


UNFIT = CITY | {"not": {"required": ["x"]}}


@FORMS
async def test_a_schema_that_cannot_be_enforced(chat: Any, call: str) -> None:
    reply, submitted = await ask(chat, call, tools=[weather(schema=UNFIT)])
    error = error_of(reply, 400)
    assert (error["code"], error["param"].partition("[")[0]) == ("unfit_grammar", "tools")
    assert not submitted
    rest = call.removeprefix(chat.opening("weather"))
    reply, (submit,) = await ask(chat, f"{rest}{EOS}", tools=[weather(False, UNFIT)], tool_choice="required")
    assert reply.status_code == 200, reply.text
    assert allows(submit, rest)


async def test_a_tool_that_is_not_strict_costs_no_400() -> None:
    broken = {"type": "object", "properties": {"a": {"$ref": "http://example.org/x"}}}
    reply, (submit,) = await ask(
        HERMES, f'{{"b": 1}}}}\n</tool_call>{EOS}', tools=[weather(False, broken)], tool_choice="required"
    )
    assert reply.status_code == 200, reply.text
    assert allows(submit, '{"b": 1}}\n</tool_call>')


async def test_what_contradicts_a_strict_tool() -> None:
    reply, _ = await ask(HERMES, "x", tools=[weather()], ignore_eos=True)
    assert error_of(reply, 400)["param"] == "ignore_eos"


async def test_the_other_interfaces_have_it_too() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    own = {"messages": None, "input": "Weather?"}
    named = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    reply, (submit,) = await ask(
        HERMES, f'{{"a": 1}}{EOS}', "/v1/responses", **own, text={"format": named},
    )  # fmt: skip
    assert reply.status_code == 200, reply.text
    assert reply.json()["text"]["format"] == named
    assert allows(submit, '{"a": 1}')
    assert not allows(submit, "{}")
    flat = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
    reply, (submit,) = await ask(HERMES, f"{TAGGED}{EOS}", "/v1/responses", **own, tools=[flat])
    assert reply.status_code == 200, reply.text
    assert not allows(submit, TAGGED.replace("city", "town"))
    reply, (submit,) = await ask(
        HERMES, f'{{"a": 1}}{EOS}', "/v1/messages", max_tokens=50,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )  # fmt: skip
    assert reply.status_code == 200, reply.text
    assert allows(submit, '{"a": 1}')
    assert not allows(submit, "{}")
    tool = {"name": "weather", "input_schema": CITY, "strict": True}
    reply, (submit,) = await ask(HERMES, f"{TAGGED}{EOS}", "/v1/messages", max_tokens=50, tools=[tool])
    assert reply.status_code == 200, reply.text
    assert not allows(submit, TAGGED.replace("city", "town"))
