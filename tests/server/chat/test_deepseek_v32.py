"""V3.2: prompts equal fixed texts; answers give the same parts however they are cut; bad answers lose no text."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.chat import PromptError
from server.chat.deepseek_v32 import DeepSeekV32, _Parser
from server.chat.parts import CallArguments, CallStart, Content, Part, Reasoning, Warn
from tests.server.chat.kit import assistant, calls, read, tool, user

FORMAT = DeepSeekV32()
WEATHER = tool("weather", city="string", days="integer")
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CALL = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">São "Paulo"\n</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)
ARGUMENTS = {"city": 'São "Paulo"\n', "days": 3}


def test_the_published_example() -> None:
    messages = [
        user("hello"),
        assistant("Hello! I am DeepSeek.", "The user greets me."),
        user("1+1=?"),
    ]
    assert FORMAT.render(messages, thinking=True) == (
        f"{BOS}<｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.{EOS}<｜User｜>1+1=?<｜Assistant｜><think>"
    )
    assert FORMAT.render(messages).endswith("1+1=?<｜Assistant｜></think>")


@pytest.mark.parametrize("thinking", [True, False])
def test_a_turn_with_tools(thinking: bool) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        user("?"),
        assistant("Let me see.", "hm", ("weather", ARGUMENTS), ("weather", {})),
        {"role": "tool", "content": "rain", "tool_call_id": "c0"},
        {"role": "tool", "content": "sun", "tool_call_id": "c1"},
    ]
    text = FORMAT.render(FORMAT.decode(messages), tools=[WEATHER], thinking=thinking)
    system, _, turn = text.partition("<｜User｜>")
    function = json.dumps(WEATHER["function"], ensure_ascii=False)
    assert system.startswith(f"{BOS}Be brief.\n\n## Tools\nYou have access to a set of tools")
    assert system.endswith("JSONSchema format:\n<functions>\n" + function + "\n</functions>\n")
    opened, kept = ("<think>", "hm</think>") if thinking else ("</think>", "")
    second = '\n<｜DSML｜invoke name="weather">\n\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
    assert turn == (
        f"?<｜Assistant｜>{opened}{kept}Let me see."
        + CALL.removesuffix("\n</｜DSML｜function_calls>")
        + f"{second}{EOS}\n\n<function_results>\n<result>rain</result>\n<result>sun</result>\n</function_results>"
        + f"\n\n{opened}"
    )


def test_tools_without_a_system_message_get_one() -> None:
    assert FORMAT.render([user("x")], tools=[WEATHER]).startswith(f"{BOS}\n\n## Tools\n")


def test_what_cannot_be_written_is_a_sentence() -> None:
    with pytest.raises(PromptError, match="last message"):
        FORMAT.render([user("x"), assistant("y")])
    broken = assistant("", None, ("f", {}))
    broken["tool_calls"][0]["function"]["arguments"] = "{"
    with pytest.raises(PromptError, match=r"messages\[1\].tool_calls\[0\].function.arguments"):
        FORMAT.decode([user("x"), broken])


def parser(thinking: bool = False, tools: Any = ("weather",), single: bool = False) -> _Parser:
    made = FORMAT.parser(tools=tools, thinking=thinking, single=single)
    assert isinstance(made, _Parser)
    return made


ANSWERS = [
    ("plain", False),
    ("why</think>because", True),
    ("a < b\n\n<x> 1</think>\n\nc <", True),
    (f"why</think>Look:{CALL}", True),
    (CALL, False),
    (CALL.lstrip(), False),
    (f"{CALL}\n", False),
    (f"{CALL}\nDone. {CALL}", False),
    (CALL.replace("<｜DSML｜function_calls>\n", ""), False),
    (CALL.replace("</｜DSML｜parameter>", "<x></｜DSML｜inv </｜DSML｜parameter>"), False),
    (CALL.replace("3<", "three<"), False),
    (CALL.replace(' string="true"', ""), False),
    (CALL.replace(' name="weather"', ""), False),
    (CALL.replace(' name="city"', " city"), False),
    (CALL.replace(' name="city"', " " * 1100 + 'name="city"'), False),
    (CALL.replace("weather", "nothing"), False),
    (CALL.replace("</｜DSML｜invoke>", ""), False),
    (CALL.replace("</｜DSML｜invoke>", "text"), False),
    (CALL.replace("</｜DSML｜function_calls>", ""), False),
    (f"no end of thought{CALL}", True),
    ("I may write <｜DSML｜function_calls> later</think>x", True),
    ("a</｜DSML｜invoke>b</think>c<think>d</think>e", False),
    (f"a<｜User｜>b{CALL}", False),
]


def checked(parts: list[Part]) -> list[Part]:
    for part in parts:
        assert not (isinstance(part, Content) and ("｜" in part.text or "think>" in part.text)), part
    return parts


@pytest.mark.parametrize(("answer", "thinking"), ANSWERS)
def test_every_way_of_cutting_an_answer_in_two(answer: str, thinking: bool) -> None:
    whole = checked(read(parser(thinking), answer))
    for cut in range(len(answer)):
        assert read(parser(thinking), answer, [cut]) == whole
    assert read(parser(thinking), answer, range(len(answer))) == whole


PIECES = [
    *("<｜DSML｜function_calls>", "</｜DSML｜function_calls>", "<｜DSML｜invoke", ' name="weather">\n'),
    *("</｜DSML｜invoke>", "<｜DSML｜parameter", ' name="a" string="true">', ' name="b" string="false">'),
    *(
        "</｜DSML｜parameter>",
        "<think>",
        "</think>",
        "<｜User｜>",
        "\n",
        "\n\n",
        "<",
        "｜",
        '"',
        "x",
        "1",
        CALL,
    ),
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.data(), st.booleans(), st.booleans())
def test_any_answer_cut_anyhow(answer: str, data: st.DataObject, thinking: bool, allowed: bool) -> None:
    tools = ["weather"] if allowed else None
    cuts = data.draw(st.sets(st.integers(0, max(len(answer), 1)), max_size=12))
    whole = read(parser(thinking, tools), answer)
    assert read(parser(thinking, tools), answer, cuts) == whole
    assert allowed or not calls(whole)


@given(
    st.text(alphabet='ab\n<é"\\', max_size=20),
    st.dictionaries(
        st.text(alphabet="ab_", min_size=1, max_size=4),
        st.text(alphabet='a<\n"\\é/', max_size=9)
        | st.integers()
        | st.none()
        | st.lists(st.booleans(), max_size=3),
        max_size=4,
    ),
)
def test_what_is_written_is_read_back(reasoning: str, values: dict[str, Any]) -> None:
    message = assistant("Look", reasoning + "r", ("weather", values), ("weather", {}))
    prompt = FORMAT.render([user("x")], thinking=True)
    text = FORMAT.render(FORMAT.decode([user("x"), message]), thinking=True, add_generation_prompt=False)
    answer = text.removeprefix(prompt).removesuffix(EOS)
    parts = read(parser(thinking=True), answer, range(0, len(answer), 3))
    assert parts[:2] == [Reasoning(reasoning + "r"), Content("Look")]
    assert not [part for part in parts if isinstance(part, Warn)]
    read_back = [json.loads(call["function"]["arguments"]) for call in calls(parts)]
    assert read_back == [values, {}]


def test_arguments_are_given_out_as_they_come() -> None:
    reader = parser()
    reader.text('\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n')
    first = reader.text('<｜DSML｜parameter name="city" string="true">Rio de')
    assert first == [CallArguments(0, '{"city": "'), CallArguments(0, "Rio de")]
    assert reader.text(" Jan") == [CallArguments(0, " Jan")]


@pytest.mark.parametrize(
    ("answer", "codes", "made"),
    [
        (CALL, [], [ARGUMENTS]),
        (CALL.replace("weather", "nothing"), ["unknown_tool"], [ARGUMENTS]),
        (CALL.replace("3<", "three<"), ["invalid_arguments"], None),
        (CALL.replace('name="days" string="false"', 'name="city" string="false"'), ["invalid_arguments"], None),
        (CALL.replace("<｜DSML｜function_calls>\n", ""), ["malformed_tool_call"], [ARGUMENTS]),
        (CALL.replace(' string="true"', ""), ["malformed_tool_call"], [ARGUMENTS]),
        (CALL.removesuffix("\n</｜DSML｜function_calls>"), ["truncated_tool_call"], [ARGUMENTS]),
        (CALL[:90], ["truncated_tool_call"], None),
        (CALL[:50], ["truncated_tool_call"], []),
        (CALL[:10], ["truncated_tool_call"], []),
        (f"x{CALL}", ["unclosed_reasoning"], [ARGUMENTS]),
    ],
)  # fmt: skip
def test_bad_calls_are_reported_and_kept(answer: str, codes: list[str], made: list[Any] | None) -> None:
    parts = checked(read(parser(thinking=answer.startswith("x")), answer))
    assert [part.code for part in parts if isinstance(part, Warn)] == codes
    if made is not None:
        assert [json.loads(call["function"]["arguments"]) for call in calls(parts)] == made


def test_calls_that_the_request_forbids_are_reported_raw() -> None:
    parts = read(parser(tools=None), f"Look{CALL}")
    assert parts == [Content("Look"), parts[1]]
    assert isinstance(parts[1], Warn)
    assert (parts[1].code, parts[1].raw) == ("unexpected_tool_call", CALL)


def test_a_single_call_ends_the_answer() -> None:
    reader = parser(single=True)
    block = CALL.removesuffix("\n</｜DSML｜function_calls>")
    parts = read(reader, block * 2 + "x")
    assert reader.ended
    assert [type(part) for part in parts] == [CallStart, CallArguments]


def test_time_is_linear() -> None:
    """64 times as much text, in one-letter pieces, must take far less than 64² times as long."""

    def seconds(repeats: int) -> float:
        reader = parser()
        start = time.perf_counter()
        for letter in (
            '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">' + "\n\n<｜DSML｜inv" * repeats
        ):
            reader.text(letter)
        reader.finish()
        return time.perf_counter() - start

    seconds(50)
    assert seconds(6400) < 1000 * max(seconds(100), 1e-3)
