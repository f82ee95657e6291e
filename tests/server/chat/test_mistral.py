"""Calls after Mistral's token, as a list and each for itself: prompts by the template, answers read the same in all cuts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from server.chat.mistral import MistralFormat, is_mistral
from server.chat.parts import CallArguments, CallStart, Content, Part, Warn
from tests.server.chat.kit import assistant, codes, read, read_always, said, tool, user, written
from tests.server.chat.templates import HERMES, LLAMA, MISTRAL, MISTRAL_LIST, PYTHONIC

LISTED, FORMAT = MistralFormat(MISTRAL_LIST), MistralFormat(MISTRAL)
NAMES = frozenset({"weather", "add"})
LIST_CALL = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rio"}}]'
CALL = '[TOOL_CALLS]weather[ARGS]{"city": "Rio"}'
RIO, ADD = ("weather", {"city": "Rio"}), ("add", {"a": [1, {"b": "]}"}]})
CONTROL = re.compile(r"\[(TOOL_CALLS|ARGS|CALL_ID)\]|</?think>")


def parts_of(answer: str, *, tools: Any = NAMES, **settings: Any) -> list[Part]:
    """The parts, which are the same where the tags are control tokens and where they are text."""
    whole = read_always(lambda: FORMAT.parser(tools=tools, **settings), answer)
    assert read_always(lambda: FORMAT.parser(tools=tools, **settings), answer, CONTROL) == whole
    return whole


def test_a_template_that_has_such_calls_is_known() -> None:
    assert is_mistral(MISTRAL)
    assert is_mistral(MISTRAL_LIST)
    assert not any(map(is_mistral, (HERMES, LLAMA, PYTHONIC)))


@pytest.mark.parametrize(
    ("form", "opening"), [(LISTED, "[TOOL_CALLS] ["), (FORMAT, "[TOOL_CALLS]weather[ARGS]{")]
)
def test_prompts_have_tools_calls_and_results(form: MistralFormat, opening: str) -> None:
    messages = [
        user("Rio and Oslo?"),
        assistant("", None, ("weather", {"city": "Rio"}), ("weather", {"city": "Oslo"})),
        {"role": "tool", "tool_call_id": "c0", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c1", "content": "snow"},
    ]
    decoded = form.decode(messages)
    text = form.render(decoded, tools=[tool("weather", city="string")])
    assert text.startswith('[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "weather"')
    assert opening in text
    ids = [call["id"] for call in decoded[1]["tool_calls"]]
    assert [len(name) for name in ids] == [9, 9]
    assert f"[TOOL_RESULTS]{ids[0]} sunny[/TOOL_RESULTS][TOOL_RESULTS]{ids[1]} snow[/TOOL_RESULTS]" in text
    kept = [{"role": "tool", "tool_call_id": "abcDEF123", "content": ""}]
    assert form.decode(kept) == kept


@pytest.mark.parametrize(
    "answer",
    [
        LIST_CALL, CALL, f"{CALL}\n", LIST_CALL.replace(" ", ""),
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rio"}, "id": "abcdefghi"}]',
        '[TOOL_CALLS][{"arguments": {"city": "Rio"}, "name": "weather"}]',
        '[TOOL_CALLS]{"name": "weather", "arguments": {"city": "Rio"}}',
        '[TOOL_CALLS]weather{"city": "Rio"}',
        '[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Rio"}',
    ],
)  # fmt: skip
def test_ways_to_write_a_call(answer: str) -> None:
    found = parts_of(answer)
    assert written(found) == [RIO]
    assert not codes(found)
    assert not said(found)


@pytest.mark.parametrize(
    "answer",
    [
        LIST_CALL[:-1] + ', {"name": "add", "arguments": {"a": [1, {"b": "]}"}]}}]',
        CALL + '[TOOL_CALLS]add[ARGS]{"a": [1, {"b": "]}"}]}',
    ],
)
def test_text_before_and_several_calls(answer: str) -> None:
    found = parts_of(f"Let me see. {answer}")
    assert said(found) == "Let me see. "
    assert written(found) == [RIO, ADD]
    assert not codes(found)


def test_tags_inside_a_text_are_text() -> None:
    arguments = '{"city": "a[TOOL_CALLS]b[ARGS]\\"c"}'
    for answer in (
        f"[TOOL_CALLS]weather[ARGS]{arguments}",
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {arguments}}}]',
    ):
        assert parts_of(answer) == [CallStart(0, "weather"), CallArguments(0, arguments)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (LIST_CALL[:-1], ["truncated_tool_call"]),
        (LIST_CALL[:-2], ["truncated_tool_call", "truncated_tool_call"][:1]),
        (LIST_CALL[:-3], ["truncated_tool_call"]),
        (LIST_CALL[:20], ["truncated_tool_call"]),
        (CALL[:-1], ["truncated_tool_call"]),
        ("[TOOL_CALLS]weather", ["truncated_tool_call"]),
        ("[TOOL_CALLS]weather[CALL_ID]x", ["truncated_tool_call"]),
        ("[TOOL_CALLS]sing[ARGS]{}", ["unknown_tool"]),
        ('[TOOL_CALLS]add[ARGS]{"a": 01}', ["invalid_arguments"]),
        ("[TOOL_CALLS][{1}]", ["malformed_tool_call"]),
        ("[ARGS]", ["stray_marker"]),
        ("[TOOL_CALLS][ARGS]", ["stray_marker"]),
        ('[TOOL_CALLS]add[ARGS]{"a": ' + CALL, ["truncated_tool_call"]),
    ],
)
def test_broken_calls_are_reported(answer: str, expected: list[str]) -> None:
    assert codes(parts_of(answer)) == expected


@pytest.mark.parametrize("call", [LIST_CALL, CALL])
def test_calls_that_are_not_wanted(call: str) -> None:
    assert parts_of(f"Well.{call}", tools=None) == [
        Content("Well."),
        Warn("unexpected_tool_call", "the model called a tool, but this request allows none", raw=call),
    ]


@pytest.mark.parametrize(("form", "call"), [(LISTED, LIST_CALL), (FORMAT, CALL)])
def test_a_single_call_ends_the_answer(form: MistralFormat, call: str) -> None:
    parser = form.parser(tools=NAMES, single=True)
    assert written(read(parser, f"{call}{call}")) == [RIO]
    assert parser.ended
    assert call.startswith(form.opening(None))
    assert call.startswith(form.opening("weather"))
