"""Calls in Python's form: prompts by the template, answers read the same however they are cut up."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.chat.errors import UnfitToolError
from server.chat.grammar import ToolForm
from server.chat.parts import CallArguments, CallStart, Content, Part
from server.chat.pythonic import PythonicFormat, is_pythonic
from tests.server.chat.kit import assistant, codes, read, read_always, said, tool, user, written
from tests.server.chat.templates import HERMES, LLAMA, MISTRAL, PYTHONIC

FORMAT = PythonicFormat(PYTHONIC)
NAMES = frozenset({"weather", "add"})
CALL = '[weather(city="Rio", days=3)]'
RIO = ("weather", {"city": "Rio", "days": 3})
CONTROL = re.compile(r"<\|python_(start|end|tag)\|>|</?think>")


def parts_of(answer: str, *, tools: Any = NAMES, **settings: Any) -> list[Part]:
    """The parts, which are the same where the tags are control tokens and where they are text."""
    whole = read_always(lambda: FORMAT.parser(tools=tools, **settings), answer)
    assert read_always(lambda: FORMAT.parser(tools=tools, **settings), answer, CONTROL) == whole
    return whole


def test_a_template_that_has_such_calls_is_known() -> None:
    assert is_pythonic(PYTHONIC)
    assert not any(map(is_pythonic, (HERMES, LLAMA, MISTRAL)))


def test_prompts_have_tools_calls_and_results() -> None:
    messages = [
        user("Rio?"),
        assistant("", None, ("weather", {"city": "Rio", "days": 3}), ("add", {})),
        {"role": "tool", "tool_call_id": "c0", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c1", "content": "0"},
    ]
    text = FORMAT.render(FORMAT.decode(messages), tools=[tool("weather", city="string")])
    assert '#tools {"type": "function", "function": {"name": "weather"' in text
    assert '#assistant [weather(city="Rio", days=3), add()]~#tool sunny~#tool 0~' in text


def test_arguments_stream_one_by_one() -> None:
    parser = FORMAT.parser(tools=NAMES)
    seen = [parser.text(letters) for letters in ('[weather(city="R', 'io"', ",", " days=3", ")]")]
    assert seen == [
        [CallStart(0, "weather")],
        [],
        [CallArguments(0, '{"city": "Rio"')],
        [],
        [CallArguments(0, ', "days": 3}')],
    ]


@pytest.mark.parametrize(
    "answer",
    [
        CALL, f" \n{CALL}\n", f"<|python_start|>{CALL}<|python_end|>", f"<|python_tag|>{CALL}",
        "[ weather ( city = 'Rio' , days = 3 , ) ]", "[weather(city='R' 'io', days=+3)]", "[weather(city=\"\"\"Rio\"\"\", days=3)]",
    ],
)  # fmt: skip
def test_ways_to_write_a_call(answer: str) -> None:
    found = parts_of(answer)
    assert written(found) == [RIO]
    assert not codes(found)
    assert not said(found)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("True", True), ("true", True), ("None", None), ("null", None), ("-1.5e3", -1500.0), ("1_000", 1000),
        ("[1, 'a', (2, 3)]", [1, "a", [2, 3]]), ("{'a': {\"b\": [True]}}", {"a": {"b": [True]}}),
        (r"'it\'s, (ok)'", "it's, (ok)"), (r'"a\"b]"', 'a"b]'), (r"'\d+'", r"\d+"), ('"é<|python_end|>"', "é<|python_end|>"),
    ],
)  # fmt: skip
def test_values_become_json(value: str, expected: Any) -> None:
    found = parts_of(f"[add(a={value}, b=1)]")
    assert written(found) == [("add", {"a": expected, "b": 1})]
    assert not codes(found)


def test_a_name_need_not_be_pythons() -> None:
    assert written(parts_of("[add(a-b=1, a b = 2)]")) == [("add", {"a-b": 1, "a b": 2})]


def test_several_calls() -> None:
    found = parts_of("[add(a=1),weather(), sing(x=2)] Done.")
    assert written(found) == [("add", {"a": 1}), ("weather", {}), ("sing", {"x": 2})]
    assert codes(found) == ["unknown_tool"]
    assert said(found) == " Done."


@pytest.mark.parametrize(
    "answer", ["", " ", "[1, 2]", "[weather", "[sing()]", "I call [weather()]", "[weather]"]
)
def test_other_answers_are_text(answer: str) -> None:
    assert parts_of(answer) == ([Content(answer)] if answer else [])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[add(a=1", ["truncated_tool_call"]),
        ("[add(", ["truncated_tool_call"]),
        ('[add(a="x)]', ["truncated_tool_call"]),
        ("[add(a=1)", ["truncated_tool_call"]),
        ("[add(a=1<|python_end|>", ["truncated_tool_call"]),
        ("[add(1, b=2)]", ["malformed_tool_call"]),
        ("[add(a=1) and add(a=2)]", ["unknown_tool"]),
        ("[add(a=1), no]", ["malformed_tool_call"]),
        ("[add(a=x + y)]", ["invalid_arguments"]),
        ("[add(a={1, 2})]", ["invalid_arguments"]),
        ("[add(a=1, a=2)]", ["invalid_arguments"]),
    ],
)
def test_broken_calls_are_reported(answer: str, expected: list[str]) -> None:
    assert codes(parts_of(answer)) == expected


def test_calls_that_are_not_wanted_are_text() -> None:
    assert parts_of(CALL, tools=None) == [Content(CALL)]


def test_a_single_call_ends_the_answer() -> None:
    parser = FORMAT.parser(tools=NAMES, single=True)
    assert written(read(parser, "[add(a=1), add(a=2)]")) == [("add", {"a": 1})]
    assert parser.ended


@pytest.mark.parametrize(
    "schema", [{"type": "object", "properties": {"a=b": {}}}, {"anyOf": [{"type": "object"}]}]
)
def test_parameters_that_cannot_be_written_one_by_one(schema: dict[str, Any]) -> None:
    with pytest.raises(UnfitToolError, match="'plan'"):
        FORMAT.call_rules([ToolForm("plan", schema, strict=True)], named=None, single=False, tokens={})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    arguments=st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), values, max_size=4),
    cuts=st.lists(st.integers(0, 200), max_size=8),
    python=st.booleans(),
)
def test_any_arguments_come_through(arguments: dict[str, Any], cuts: list[int], python: bool) -> None:
    write = repr if python else json.dumps
    answer = f"[add({', '.join(f'{key}={write(value)}' for key, value in arguments.items())})]"
    found = read(FORMAT.parser(tools=NAMES), answer, cuts)
    assert written(found) == [("add", arguments)]
    assert found == read(FORMAT.parser(tools=NAMES), answer)
