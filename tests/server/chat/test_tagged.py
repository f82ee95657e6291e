"""Calls with their arguments between tags, as Qwen3-Coder and GLM write them: read the same in all cuts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from server.chat.errors import UnfitToolError
from server.chat.grammar import ToolForm
from server.chat.parts import CallArguments, Content, Part, Warn
from server.chat.tagged import GlmFormat, QwenCoderFormat, TaggedFormat, is_glm, is_qwen_coder
from server.chat.template import choose_tools
from tests.server.chat.kit import assistant, codes, read, read_always, said, tool, user, written
from tests.server.chat.templates import GLM, HERMES, LLAMA, MISTRAL, PLAIN, PYTHONIC, QWEN_CODER

QWEN_FORMAT, GLM_FORMAT = QwenCoderFormat(QWEN_CODER), GlmFormat(GLM)
FORMATS: dict[str, TaggedFormat] = {"qwen-coder": QWEN_FORMAT, "glm": GLM_FORMAT}
TOOLS: dict[str, Any] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "where": {"type": "object"},
            "code": {"type": "string", "pattern": "^[0-9]+$"},
            "any": {},
        },
    },
    "now": {"type": "object", "properties": {}},
}
CONTROL = re.compile("</?(tool_call|arg_key|arg_value|think)>")


def parts_of(name: str, answer: str, *, tools: Any = TOOLS, **settings: Any) -> list[Part]:
    """The parts, which are the same where the tags are control tokens and where they are text."""
    make = lambda: FORMATS[name].parser(tools=tools, **settings)  # noqa: E731
    whole = read_always(make, answer)
    assert read_always(make, answer, CONTROL) == whole
    return whole


def call(name: str, arguments: dict[str, Any], tool_name: str = "weather") -> str:
    return FORMATS[name].written_calls([{"name": tool_name, "arguments": arguments}])


def test_the_templates_are_known() -> None:
    assert [t for t in (QWEN_CODER, GLM, HERMES, LLAMA, PYTHONIC, MISTRAL, PLAIN) if is_qwen_coder(t)] == [
        QWEN_CODER
    ]
    assert [t for t in (QWEN_CODER, GLM, HERMES, LLAMA, PYTHONIC, MISTRAL, PLAIN) if is_glm(t)] == [GLM]
    assert choose_tools(QWEN_CODER, "auto") == ("qwen-coder", "the template's own")
    assert choose_tools(GLM, "auto") == ("glm", "the template's own")


def test_calls_look_as_published() -> None:
    assert call("qwen-coder", {"city": "Rio", "days": 2}) == (
        "<tool_call>\n<function=weather>\n<parameter=city>\nRio\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    assert call("glm", {"city": "Rio", "days": 2}) == (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rio</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
    )


@pytest.mark.parametrize("name", FORMATS)
def test_prompts_have_tools_calls_and_results(name: str) -> None:
    chat = FORMATS[name]
    messages = [
        user("Rio?"),
        assistant("", None, ("weather", {"city": "Rio", "days": 2})),
        {"role": "tool", "tool_call_id": "c0", "content": "sunny"},
    ]
    text = chat.render(chat.decode(messages), tools=[tool("weather", city="string")])
    assert not chat.described
    assert '"name": "weather"' in text
    assert call(name, {"city": "Rio", "days": 2}) in text
    assert "sunny" in text


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "Rio"},
        {"city": ""},
        {"city": 'He said "no"\n\n</tool_call> <function=x> \\n </arg> \t'},
        {"city": "123"},
        {"city": "\n\nlines\n\n", "days": 3},
        {"days": -4, "where": {"a": [1, None, "x</b>"]}},
        {"code": "0042"},
        {"other": "12"},
        {"any": [1, 2]},
        {"any": "plain"},
        {},
    ],
)
def test_every_value_comes_back(name: str, arguments: dict[str, Any]) -> None:
    found = parts_of(name, call(name, arguments))
    assert written(found) == [("weather", arguments)]
    assert not codes(found)
    assert not said(found)


@pytest.mark.parametrize("name", FORMATS)
def test_text_before_and_several_calls(name: str) -> None:
    both = f"{call(name, {'city': 'Rio'})}\n{call(name, {}, 'now')}"
    found = parts_of(name, f"I look.\n{both}\n")
    assert said(found) == "I look.\n"
    assert written(found) == [("weather", {"city": "Rio"}), ("now", {})]
    assert not codes(found)
    single = FORMATS[name].parser(tools=TOOLS, single=True)
    assert written(read(single, both)) == [("weather", {"city": "Rio"})]
    assert single.ended


def test_text_streams_as_it_comes() -> None:
    for name, chat in FORMATS.items():
        parser = chat.parser(tools=TOOLS)
        begin, _, end = call(name, {"city": "one two three"}).partition("two")
        assert isinstance(parser.text(begin)[-1], CallArguments)
        assert parser.text("two") == [CallArguments(0, "two")]
        assert parser.text(end)[-1] == CallArguments(0, ' three"}')


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        (
            "qwen-coder",
            "<function=weather>\n<parameter=city>\nRio\n</parameter>\n</function>",
            ["malformed_tool_call"],
        ),
        (
            "qwen-coder",
            "<tool_call><function=weather><parameter=city>Rio</parameter></function></tool_call>",
            [],
        ),
        (
            "qwen-coder",
            "<tool_call>\n<function=weather>\n<parameter=city>\nRio\n</parameter>\n</tool_call>",
            [],
        ),
        ("glm", "<tool_call>weather<arg_key>city</arg_key><arg_value>Rio</arg_value></tool_call>", []),
        ("glm", "<tool_call>\nweather\n<arg_key>city</arg_key>\n<arg_value>Rio</arg_value></tool_call>", []),
        (
            "glm",
            "<tool_call>weather\nhm<arg_key>city</arg_key><arg_value>Rio</arg_value></tool_call>",
            ["malformed_tool_call"],
        ),
    ],
)
def test_other_ways_to_write_a_call(name: str, answer: str, expected: list[str]) -> None:
    found = parts_of(name, answer)
    assert written(found) == [("weather", {"city": "Rio"})]
    assert codes(found) == expected
    assert not said(found)


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_that_ends_inside_a_call_is_reported(name: str) -> None:
    whole = call(name, {"city": "Rio", "days": 2})
    for end in range(len("<tool_call>"), len(whole)):
        assert codes(parts_of(name, whole[:end])) == ["truncated_tool_call"], whole[:end]


@pytest.mark.parametrize("name", FORMATS)
def test_calls_that_are_not_wanted_and_tags_in_text(name: str) -> None:
    one = call(name, {"city": "Rio"})
    assert parts_of(name, f"Well.{one}", tools=None) == [
        Content("Well."),
        Warn("unexpected_tool_call", "the model called a tool, but this request allows none", raw=one),
    ]
    assert codes(parts_of(name, call(name, {}, "sing"))) == ["unknown_tool"]
    assert codes(parts_of(name, "a</tool_call>")) == ["stray_marker"]
    closing = "</parameter>" if name == "qwen-coder" else "</arg_value>"
    assert said(parts_of(name, f"Write {closing} there.")) == f"Write {closing} there."


@pytest.mark.parametrize("name", FORMATS)
def test_a_strict_tool_has_a_list_of_properties(name: str) -> None:
    for schema in ({"anyOf": [{"type": "object"}]}, {"type": "object", "properties": {"a>b": {}}}):
        with pytest.raises(UnfitToolError, match="'plan'"):
            FORMATS[name].call_rules(
                [ToolForm("plan", schema, strict=True)], named=None, single=False, tokens={}
            )


def test_python_words_are_json() -> None:
    answer = call("qwen-coder", {"any": "x"}).replace("\nx\n", "\nTrue\n")
    assert written(parts_of("qwen-coder", answer)) == [("weather", {"any": True})]
