"""V3.1: prompts equal fixed texts and the model card's rules as a template; answers are read into their parts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.chat import PromptError
from server.chat.deepseek_v31 import DeepSeekV31
from server.chat.jinja import JinjaFormat
from server.chat.parts import CallArguments, CallStart, Content, Parser, Reasoning, Warn
from tests.server.chat.kit import assistant, calls, read, tool, user

FORMAT = DeepSeekV31()
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
WEATHER = tool("weather", city="string")
ONE = '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rio"}<｜tool▁call▁end｜>'
CALL = f"<｜tool▁calls▁begin｜>{ONE}<｜tool▁calls▁end｜>"

# The model card's rules for turns, written down as a template.
RULES = """{{ '<｜begin▁of▁sentence｜>' }}
{%- for m in messages if m.role == 'system' %}{{ ('' if loop.first else '\n\n') + m.content }}{% endfor %}
{%- set ns = namespace(open=true) %}
{%- for m in messages if m.role != 'system' %}
    {%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% set ns.open = true %}
    {%- elif m.role == 'tool' %}
        {{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{% set ns.open = false %}
    {%- else %}
        {{- ('<｜Assistant｜></think>' if ns.open else '') + m.content }}{% set ns.open = false %}
        {%- for c in m.tool_calls %}
            {{- '<｜tool▁calls▁begin｜>' if loop.first else '' }}{{ '<｜tool▁call▁begin｜>' + c.function.name }}
            {{- '<｜tool▁sep｜>' + c.function.arguments + '<｜tool▁call▁end｜>' }}
            {{- '<｜tool▁calls▁end｜>' if loop.last else '' }}
        {%- endfor %}{{ '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if messages[-1].role != 'tool' %}{{ '<｜Assistant｜>' }}{{ '<think>' if thinking else '</think>' }}{% endif %}"""

TEXT = st.text(alphabet="ab \n", max_size=4)
TURNS = st.one_of(
    TEXT.map(user),
    TEXT.map(assistant),
    TEXT.map(lambda text: assistant(text, None, ("weather", {"city": text}))),
    TEXT.map(lambda text: {"role": "tool", "content": text, "tool_call_id": "c0"}),
)


@given(
    st.lists(TEXT.map(lambda text: {"role": "system", "content": text}), max_size=2),
    st.lists(TURNS, min_size=1),
)
def test_prompts_follow_the_rules(system: list[dict[str, Any]], turns: list[dict[str, Any]]) -> None:
    messages = [*system, *turns]
    rules = JinjaFormat(RULES)
    assert FORMAT.render(messages) == rules.render(messages)


def test_prompts_letter_by_letter() -> None:
    messages = [user("hi"), assistant("hello", "dropped"), user("1+1=?")]
    said = f"{BOS}<｜User｜>hi<｜Assistant｜></think>hello{EOS}<｜User｜>1+1=?<｜Assistant｜>"
    assert FORMAT.render(messages) == said + "</think>"
    assert FORMAT.render(messages, thinking=True) == said + "<think>"
    schema = json.dumps(WEATHER["function"]["parameters"])
    assert FORMAT.render([{"role": "system", "content": "Be brief."}, user("?")], tools=[WEATHER]) == (
        f"{BOS}Be brief.\n\n## Tools\nYou have access to the following tools:\n\n### weather\n"
        f"Description: Does weather.\n\nParameters: {schema}\n\nIMPORTANT: ALWAYS adhere to this exact format for "
        "tool use:\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments"
        "<｜tool▁call▁end｜>{{additional_tool_calls}}<｜tool▁calls▁end｜>\n\nWhere:\n\n- `tool_call_name` must be an "
        "exact match to one of the available tools\n- `tool_call_arguments` must be valid JSON that strictly "
        "follows the tool's Parameters Schema\n- For multiple tool calls, chain them directly without separators "
        "or spaces\n<｜User｜>?<｜Assistant｜></think>"
    )
    messages = [user("?"), assistant("", None, ("weather", {"city": "Rio"}))]
    messages.append({"role": "tool", "content": "rain", "tool_call_id": "c0"})
    assert FORMAT.render(messages) == (
        f"{BOS}<｜User｜>?<｜Assistant｜></think>{CALL}{EOS}<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜>"
    )
    with pytest.raises(PromptError, match="without thinking"):
        FORMAT.render(messages, thinking=True)


def parser(thinking: bool = False, tools: Any = ("weather",), single: bool = False) -> Parser:
    return FORMAT.parser(tools=tools, thinking=thinking, single=single)


@pytest.mark.parametrize(
    ("answer", "thinking"),
    [
        ("why</think>because", True),
        (f"Look:{CALL}", False),
        (f"Look:{CALL} \nx", False),
        (f"why{CALL}", True),
        (f"<｜tool▁calls▁begin｜>{ONE}{ONE}<｜tool▁calls▁end｜>", False),
        (f"a{ONE}b", False),
        (f"<｜tool▁calls▁begin｜>a{ONE}b{ONE}", False),
        (CALL.replace("<｜tool▁call▁end｜>", ""), False),
        (CALL.replace("<｜tool▁sep｜>", ""), False),
        (CALL.replace("weather", "nothing"), False),
        (f"x<｜User｜>y</think>z{CALL}", False),
    ],
)
def test_every_way_of_cutting_an_answer_in_two(answer: str, thinking: bool) -> None:
    whole = read(parser(thinking), answer)
    for cut in range(len(answer)):
        assert read(parser(thinking), answer, [cut]) == whole
    assert not any(isinstance(part, Content) and "｜" in part.text for part in whole)


PIECES = [
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁sep｜>", "weather", "{}", "<think>", "</think>", "<｜User｜>", " ", "\n", "x", CALL),
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.data(), st.booleans(), st.booleans())
def test_any_answer_cut_anyhow(answer: str, data: st.DataObject, thinking: bool, allowed: bool) -> None:
    tools = ["weather"] if allowed else None
    cuts = data.draw(st.sets(st.integers(0, max(len(answer), 1)), max_size=12))
    whole = read(parser(thinking, tools), answer)
    assert read(parser(thinking, tools), answer, cuts) == whole
    assert allowed or not calls(whole)
    assert not any(isinstance(part, Content) and "｜" in part.text for part in whole)


@pytest.mark.parametrize(
    ("answer", "codes", "made"),
    [
        (CALL, [], ['{"city": "Rio"}']),
        (CALL.replace("weather", "nothing"), ["unknown_tool"], ['{"city": "Rio"}']),
        (CALL.replace("}", ""), ["invalid_arguments"], ['{"city": "Rio"']),
        (ONE, ["malformed_tool_call", "truncated_tool_call"], ['{"city": "Rio"}']),
        (CALL.replace("<｜tool▁call▁end｜>", ""), ["truncated_tool_call"], ['{"city": "Rio"}']),
        (CALL.partition("Rio")[0], ["truncated_tool_call"], ['{"city": "']),
        (CALL.partition("<｜tool▁sep｜>")[0], ["truncated_tool_call"], []),
        (CALL.replace("<｜tool▁sep｜>", ""), ["malformed_tool_call"], []),
        (CALL.replace("weather", ""), ["malformed_tool_call", "malformed_tool_call"], []),
    ],
)
def test_bad_calls_are_reported_and_kept(answer: str, codes: list[str], made: list[str]) -> None:
    parts = read(parser(), answer)
    assert [part.code for part in parts if isinstance(part, Warn)] == codes
    assert [call["function"]["arguments"] for call in calls(parts)] == made


def test_what_is_written_is_read_back() -> None:
    message = assistant("Look", None, ("weather", {"city": "São"}), ("weather", {}))
    prompt = FORMAT.render([user("x")])
    text = FORMAT.render([user("x"), message], add_generation_prompt=False)
    parts = read(parser(), text.removeprefix(prompt).removesuffix(EOS))
    assert parts[0] == Content("Look")
    assert calls(parts) == message["tool_calls"]


def test_thinking_a_single_call_and_forbidden_calls() -> None:
    assert read(parser(thinking=True), "why</think>so") == [Reasoning("why"), Content("so")]
    single = parser(single=True)
    assert [type(part) for part in read(single, f"<｜tool▁calls▁begin｜>{ONE}{ONE}")] == [
        CallStart,
        CallArguments,
    ]
    assert single.ended
    content, warning = read(parser(tools=None), f"x{CALL}")
    assert content == Content("x")
    assert isinstance(warning, Warn)
    assert (warning.code, warning.raw) == ("unexpected_tool_call", CALL)
