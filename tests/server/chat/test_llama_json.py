"""Calls as JSON that is the whole answer: prompts by the template, answers read the same however they are cut up."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.chat.llama_json import LlamaJsonFormat, is_llama_json
from server.chat.parts import CallArguments, CallStart, Content, Part, Reasoning
from tests.server.chat.kit import assistant, codes, read, read_always, said, tool, user, written
from tests.server.chat.templates import HERMES, LLAMA, MISTRAL, PYTHONIC

FORMAT = LlamaJsonFormat(LLAMA, {"bos_token": "<s>"})
NAMES = frozenset({"weather", "add"})
CALL = '{"name": "weather", "parameters": {"city": "Rio"}}'
RIO = ("weather", {"city": "Rio"})
PYTHON = re.compile(r"<\|python_tag\|>|</?think>")


def parts_of(answer: str, *, tools: Any = NAMES, **settings: Any) -> list[Part]:
    """The parts, which are the same where the tag is a control token and where it is text."""
    whole = read_always(lambda: FORMAT.parser(tools=tools, **settings), answer)
    assert read_always(lambda: FORMAT.parser(tools=tools, **settings), answer, PYTHON) == whole
    return whole


def test_a_template_that_has_such_calls_is_known() -> None:
    assert is_llama_json(LLAMA)
    assert not any(map(is_llama_json, (HERMES, MISTRAL, PYTHONIC)))


def test_prompts_have_tools_calls_and_results() -> None:
    weather = tool("weather", city="string")
    messages = [
        {"role": "system", "content": "Be brief."},
        user("Rio and Oslo?"),
        assistant("", None, ("weather", {"city": "Rio"}), ("weather", {"city": "Oslo"})),
        {"role": "tool", "tool_call_id": "c0", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c1", "content": "snow"},
    ]
    text = FORMAT.render(FORMAT.decode(messages), tools=[weather])
    assert json.dumps(weather) in text
    # The template takes one call a message, so each has a message of its own, with its result after it.
    assert text.endswith(
        '#assistant {"name": "weather", "parameters": {"city": "Rio"}}~#ipython "sunny"~'
        '#assistant {"name": "weather", "parameters": {"city": "Oslo"}}~#ipython "snow"~#assistant '
    )


def test_one_call() -> None:
    assert parts_of(CALL) == [CallStart(0, "weather"), CallArguments(0, '{"city": "Rio"}')]


@pytest.mark.parametrize(
    "answer",
    [
        f"\n {CALL} \n",
        f"<|python_tag|>{CALL}",
        f"```json\n{CALL}\n```",
        f"```\n{CALL}```\n",
        '{"name":"weather","arguments":{"city":"Rio"}}',
        '{"type": "function", "name": "weather", "parameters": {"city": "Rio"}}',
        '{ "function" : "weather", "parameters": {"city": "Rio"} }',
        '<|python_tag|>{"parameters": {"city": "Rio"}, "name": "weather"}',
        '<|python_tag|>{"type": "function", "function": {"name": "weather", "arguments": "{\\"city\\": \\"Rio\\"}"}}',
    ],
)
def test_ways_to_write_a_call(answer: str) -> None:
    found = parts_of(answer)
    assert written(found) == [RIO]
    assert not codes(found)
    assert not said(found)


@pytest.mark.parametrize("between", ["; ", ";", "\n", " ;\n", "<|python_tag|>", ";<|python_tag|>"])
def test_several_calls(between: str) -> None:
    found = parts_of(f'{CALL}{between}{{"name": "add", "parameters": {{"a": [1, "}}"]}}}}')
    assert written(found) == [RIO, ("add", {"a": [1, "}"]})]
    assert not codes(found)
    assert not said(found)


@pytest.mark.parametrize(
    "answer",
    [
        "", "  ", "It is sunny.", "{", '{"name": "weather"', '{"city": "Rio"}', '{"name": "sing", "parameters": {}}',
        "```python\nprint(1)\n```", f"I call {CALL}", '{"name": "weather", "parameters": "Rio"}', "; no", "``",
    ],
)  # fmt: skip
def test_other_answers_are_text(answer: str) -> None:
    assert parts_of(answer) == ([Content(answer)] if answer else [])


def test_text_after_a_call() -> None:
    assert parts_of(f"{CALL} Done.")[2:] == [Content(" Done.")]
    assert said(parts_of(f"```json\n{CALL}\n``x")) == "\n``x"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (CALL[:-1], ["truncated_tool_call"]),
        (CALL[:-2], ["truncated_tool_call"]),
        ('<|python_tag|>{"na', ["truncated_tool_call"]),
        ('<|python_tag|>{"name": "sing", "parameters": {}}', ["unknown_tool"]),
        ('<|python_tag|>{"na": 1}', ["malformed_tool_call"]),
        ("<|python_tag|>print(1)", ["stray_marker"]),
        ('{"name": "add", "parameters": {"a": 01}}', ["invalid_arguments"]),
        ('{"name": "add", "parameters": {"a": 1}, "b": 2}', ["malformed_tool_call"]),
        ('{"name": "add", "parameters": {"a": <|python_tag|>' + CALL, ["truncated_tool_call"]),
    ],
)
def test_broken_calls_are_reported(answer: str, expected: list[str]) -> None:
    assert codes(parts_of(answer)) == expected


def test_a_tag_inside_a_text_is_text() -> None:
    found = parts_of('{"name": "weather", "parameters": {"city": "a<|python_tag|>b"}}')
    assert written(found) == [("weather", {"city": "a<|python_tag|>b"})]


def test_calls_that_are_not_wanted() -> None:
    assert parts_of(CALL, tools=None) == [Content(CALL)]
    assert codes(parts_of(f"<|python_tag|>{CALL}", tools=None)) == ["unexpected_tool_call"]
    assert codes(parts_of(f"<|python_tag|>{CALL[:9]}", tools=None)) == ["unexpected_tool_call"]


def test_a_single_call_ends_the_answer() -> None:
    parser = FORMAT.parser(tools=NAMES, single=True)
    assert written(read(parser, f"{CALL}; {CALL}")) == [RIO]
    assert parser.ended
    assert parser.calls == 1


def test_reasoning_comes_before_calls() -> None:
    form = LlamaJsonFormat(LLAMA, reasons=True)
    answer = f"I may write {CALL}.</think>\n{CALL}"
    found = read_always(lambda: form.parser(tools=NAMES, thinking=True), answer)
    assert found[0] == Reasoning(f"I may write {CALL}.")
    assert written(found) == [RIO]
    found = read_always(lambda: form.parser(tools=NAMES), "<think>a</think>b</think>")
    assert found[:2] == [Reasoning("a"), Content("b")]
    assert codes(found) == ["stray_marker"]


@pytest.mark.parametrize("name", [None, "weather"])
def test_a_call_that_is_opened_for_the_model(name: str | None) -> None:
    assert CALL.startswith(FORMAT.opening(name))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    arguments=st.dictionaries(st.text(), json_values, max_size=4),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_any_arguments_come_through(arguments: dict[str, Any], cuts: list[int]) -> None:
    text = json.dumps(arguments, ensure_ascii=False)
    answer = f'{{"name": "add", "parameters": {text}}}'
    expected = [CallStart(0, "add"), CallArguments(0, text)]
    assert read(FORMAT.parser(tools=NAMES), answer, cuts) == expected
    assert read(FORMAT.parser(tools=NAMES), answer) == expected
