"""For the tests of chat formats: transcripts of answers, ways of cutting them up, DeepSeek's vocabulary."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from server.chat.parts import CallArguments, CallStart, Content, Parser, Part, Warn, merge
from server.text.tokenizer import Tokenizer

CONTROL = re.compile("</?think>|<｜(?!DSML)[^｜]*｜>")


def pieces(answer: str, control: re.Pattern[str] = CONTROL) -> list[tuple[bool, str]]:
    """Split an answer's text as a tokenizer of this family does: (is a control token, text)."""
    out: list[tuple[bool, str]] = []
    position = 0
    for match in control.finditer(answer):
        out += [(False, answer[position : match.start()]), (True, match[0])]
        position = match.end()
    return [*out, (False, answer[position:])]


def read(
    parser: Parser, answer: str, cuts: Iterable[int] = (), control: re.Pattern[str] = CONTROL
) -> list[Part]:
    """Parse an answer that arrives in pieces, cut before the characters at `cuts`."""
    wanted = sorted({0, *cuts})
    parts: list[Part] = []
    position = 0
    for is_control, text in pieces(answer, control):
        if is_control:
            parts += parser.marker(text)
        else:
            inside = [cut - position for cut in wanted if 0 < cut - position < len(text)]
            for begin, end in zip([0, *inside], [*inside, len(text)], strict=True):
                parts += parser.text(text[begin:end])
        position += len(text)
    return merge([*parts, *parser.finish()])


def read_always(make: Callable[[], Parser], answer: str, control: re.Pattern[str] = CONTROL) -> list[Part]:
    """Parse an answer whole, cut at each place for itself, letter by letter, and in sevens: always the same."""
    whole = read(make(), answer, control=control)
    cuts = [(place,) for place in range(1, len(answer))]
    for cut in (*cuts, range(len(answer)), range(0, len(answer), 7)):
        assert read(make(), answer, cut, control) == whole
    return whole


def codes(parts: Sequence[Part]) -> list[str]:
    """The faults among parts."""
    return [part.code for part in parts if isinstance(part, Warn)]


def written(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """The calls among parts: name and arguments, as JSON where they are JSON."""
    found = []
    for call in calls(parts):
        arguments = call["function"]["arguments"]
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
        found.append((call["function"]["name"], arguments))
    return found


def said(parts: Sequence[Part]) -> str:
    """The content among parts."""
    return "".join(part.text for part in parts if isinstance(part, Content))


def calls(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The calls among parts, as an assistant's message has them."""
    found: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, CallStart):
            found.append(
                {"id": f"c{part.index}", "type": "function", "function": {"name": part.name, "arguments": ""}}
            )
        elif isinstance(part, CallArguments):
            found[part.index]["function"]["arguments"] += part.text
    return found


def tool(name: str, **properties: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {
        "type": "function",
        "function": {"name": name, "description": f"Does {name}.", "parameters": schema},
    }


def assistant(
    content: str = "", reasoning: str | None = None, *called: tuple[str, dict[str, Any]]
) -> dict[str, Any]:
    made = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(values)}}
        for i, (name, values) in enumerate(called)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    return (
        message
        | ({"reasoning_content": reasoning} if reasoning else {})
        | ({"tool_calls": made} if made else {})
    )


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


EOS = "<｜end▁of▁sentence｜>"
TOKENS = [
    *("<｜begin▁of▁sentence｜>", EOS, "<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
]
WEATHER = tool("weather", city="string")
CALL = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Rio</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)
OLD_CALL = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rio"}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>"
)


def make_vocabulary() -> Tokenizer:
    """A token a byte and the family's control tokens, of which, as published, not all are flagged special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=i < 2, normalized=False) for i, text in enumerate(TOKENS)])
    return Tokenizer(backend, eos_token_ids=[257], bos_token_id=256)


VOCABULARY = make_vocabulary()


def ids(text: str) -> list[int]:
    return VOCABULARY.encode(text, add_bos=False, parse_special=True)
