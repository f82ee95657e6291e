"""The format of Llama 3.2 and Llama 4 with calls in Python's form: a list of calls that is the whole answer.

Definition: "zero-shot function calling" in the documentation of Llama 3.2 and Llama 4 (llama.com). A call is
[weather(city="Rio", days=3)]
Tokens <|python_start|> and <|python_end|> may stand around it. Each value becomes JSON when it is complete.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from server.chat.call_json import BLANK, spaced
from server.chat.grammar import CallRules, ToolForm, json_value, literal
from server.chat.parsing import stray
from server.chat.parts import Parser, Part, Warn
from server.chat.text_calls import TextCallParser
from server.chat.tool_template import ToolTemplate, WrittenMessage

START, END, PYTHON = "<|python_start|>", "<|python_end|>", "<|python_tag|>"
_SIGNS = re.compile(r"\[\s*func(tion)?_?name1?\s*\(")
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_PLAIN_KEY = r"""[^\s=(),\[\]{}"']+( [^\s=(),\[\]{}"']+)*"""


def is_pythonic(template: str) -> bool:
    """Whether a template shows calls in Python's form."""
    return _SIGNS.search(template) is not None


class PythonicFormat(ToolTemplate):
    """A checkpoint's template that `is_pythonic`."""

    def described_tools(self, tools: Sequence[WrittenMessage]) -> str:
        """One tool a line."""
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        return (
            f"You can call these functions:\n{lines}\n\nTo call some, answer with nothing but a list of calls:\n"
            "[func_name1(param1=value1, param2=value2), func_name2()]"
        )

    def written_calls(self, calls: Sequence[WrittenMessage]) -> str:
        """A list of calls; values are Python's."""
        written = (
            f"{call['name']}({', '.join(f'{key}={value!r}' for key, value in call['arguments'].items())})"
            for call in calls
        )
        return f"[{', '.join(written)}]"

    def parser(
        self, *, tools: Collection[str] | None = None, thinking: bool = False, single: bool = False
    ) -> Parser:
        """Return a new parser for one answer."""
        return _Parser(tools, reasons=self.reasons, thinking=thinking, single=single)

    def opening(self, tool: str | None) -> str:
        """The text that opens a call, of any tool or of the named one."""
        return "[" + ("" if tool is None else f"{tool}(")

    def call_rules(
        self, tools: Sequence[ToolForm], *, named: str | None, single: bool, tokens: Mapping[str, int]
    ) -> CallRules:
        """Return the grammar of calls. An answer that does not begin as a call is text.

        Raises:
            UnfitToolError: a strict tool has arguments that cannot be written one by one.
        """
        rules = {tool.name: f"args{number}" for number, tool in enumerate(tools)}
        lines: list[str] = []
        for tool in tools:
            lines += _argument_rules(rules[tool.name], tool)
        close = literal(")")
        called = " | ".join(f"{literal(f'{name}(')} {rule} {close}" for name, rule in rules.items())
        opened = " | ".join(f"open{rule} {rule} {close}" for rule in rules.values())
        begins = [f"{BLANK}\\[{BLANK}{spaced(f'{name}(')}" for name in rules]
        more = "" if single else f"({literal(', ')} called)* "
        lines += [
            *(f"open{rule}[lazy]: /{begin}/" for rule, begin in zip(rules.values(), begins, strict=True)),
            f"called: {called}",
            f"opened: {opened}",
            f"after: {more}{literal(']')}",
            f"PLAIN: /(?s:.*)/ & ~/({'|'.join(begins)})(?s:.*)/",
        ]
        first = "called" if named is None else f"{rules[named]} {close}"
        start, end = (f"<[{tokens[tag]}]>? " if tag in tokens else "" for tag in (START, END))
        return CallRules(
            lines=lines,
            said=f"PLAIN | {start}opened after {end}",
            calls=f"{literal('[')} called after",
            rest=f"{first} after",
        )


def _argument_rules(name: str, tool: ToolForm) -> list[str]:
    """The rules of a tool's arguments: each a line, in the schema's order, with commas between those that are there.

    Raises:
        UnfitToolError: the tool is strict, and its schema is not a plain list of properties.
    """
    parameters = tool.listed(_PLAIN_KEY)
    if parameters is None:
        pair = f"{name}_key {literal('=')} {name}_value"
        return [
            f"{name}: ({pair} ({literal(', ')} {pair})*)?",
            f"{name}_key: /[A-Za-z_][A-Za-z0-9_]{{0,63}}/",
            f"{name}_value: {json_value({})}",
        ]
    lines = [f"{name}: {name}_first0"]
    for number, key in enumerate(parameters.schemas):
        value, rest = f"{literal(f'{key}=')} {name}_value{number}", f"{name}_more{number + 1}"
        needed = key in parameters.required
        skipped = "" if needed else f" | {name}_first{number + 1}"
        lines += [
            f"{name}_value{number}: {_value(parameters.schema(key), tool)}",
            f"{name}_first{number}: {value} {rest}{skipped}",
            f"{name}_more{number}: ({literal(', ')} {value}){'' if needed else '?'} {rest}",
        ]
    last = len(parameters.schemas)
    return [*lines, f'{name}_first{last}: ""', f'{name}_more{last}: ""']


def _value(schema: Any, tool: ToolForm) -> str:
    """The expression for a value. JSON is read as well as Python, so conditions are JSON's."""
    if isinstance(schema, dict) and schema.get("type") == "boolean" and "enum" not in schema:
        return f"{literal('True')} | {literal('False')}"
    return json_value(schema, lenient=not tool.strict)


class _Parser(TextCallParser):
    """Its own states: next (before a name), key, value."""

    def __init__(self, tools: Collection[str] | None, *, reasons: bool, thinking: bool, single: bool) -> None:
        super().__init__(tools, (START, END, PYTHON), reasons=reasons, thinking=thinking, single=single)
        self._heads = tuple(f"[{name}(" for name in tools or ())
        self._compact = ""
        self._key = ""
        self._count = 0  # arguments of the newest call
        self._open: list[str] = []  # brackets that are to be closed
        self._quote = ""
        self._escaped = False

    def _letter(self, letter: str) -> Iterator[Part]:
        match self._state:
            case "fresh":
                self._raw.append(letter)
                if not letter.isspace():
                    self._compact += letter
                    yield from self._weigh()
            case "next":
                yield from self._read_next(letter)
            case "key":
                yield from self._read_key(letter)
            case "value":
                yield from self._read_value(letter)

    def _weigh(self) -> Iterator[Part]:
        """See whether what waits is a list of calls."""
        if self._compact in self._heads:
            name, self._compact = self._compact[1:-1], ""
            yield from self._start(name)
        elif not any(head.startswith(self._compact) for head in self._heads):
            self._compact = ""
            yield from self._settle()

    def _start(self, name: str) -> Iterator[Part]:
        self._take()
        self._state, self._count = "key", 0
        yield from self._calls.start(name)

    def _read_next(self, letter: str) -> Iterator[Part]:
        if letter not in "(],":
            self._raw.append(letter)
            return
        raw = self._take().strip()
        if letter == "(" and raw:
            yield from self._start(raw)
            return
        if raw:
            yield Warn("malformed_tool_call", "the model wrote text among its tool calls", raw=raw)
        if letter == "]":
            self._leave()

    def _read_key(self, letter: str) -> Iterator[Part]:
        raw = "".join(self._raw).strip()
        if letter == "=" and raw:
            self._key, self._state = self._take().strip(), "value"
        elif letter == ")":
            yield from self._end_call()
        elif letter == ",":
            yield from self._lost()
        else:
            self._raw.append(letter)

    def _read_value(self, letter: str) -> Iterator[Part]:
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif letter == "\\":
                self._escaped = True
            elif letter == self._quote:
                self._quote = ""
        elif letter in "\"'":
            self._quote = letter
        elif letter in _PAIRS:
            self._open.append(_PAIRS[letter])
        elif self._open and letter == self._open[-1]:
            self._open.pop()
        elif not self._open and letter in ",)":
            yield from self._end_value()
            if letter == ")":
                yield from self._end_call()
            return
        self._raw.append(letter)

    def _end_value(self) -> Iterator[Part]:
        raw = self._take().strip()
        value = _as_json(raw)
        if value is None:
            yield self._calls.warn(
                "invalid_arguments", f"the value of {self._key!r} is not a constant; it was read as text"
            )
            value = json.dumps(raw, ensure_ascii=False)
        begin = ", " if self._count else "{"
        self._count += 1
        self._state = "key"
        yield from self._calls.add(f"{begin}{json.dumps(self._key, ensure_ascii=False)}: {value}")

    def _lost(self) -> Iterator[Part]:
        """Report an argument without a name."""
        if raw := self._take().strip():
            yield Warn(
                "malformed_tool_call", "the model wrote an argument without its name", self._calls.index, raw
            )

    def _end_call(self) -> Iterator[Part]:
        yield from self._lost()
        yield from self._calls.add("}" if self._count else "{}")
        yield from self._calls.end()
        self._state = "next"
        self.ended = self._single

    def _tag(self, tag: str) -> Iterator[Part]:
        if self._state == "value" and self._quote:
            for letter in tag:
                yield from self._letter(letter)
        elif self._state in ("next", "key", "value"):
            yield from self._finish()
        elif self._calls.tools is None:
            yield stray(tag)
        elif self._state == "content" or self._raw:
            yield from self._settle()
            self._compact, self._state = "", "fresh"

    def _finish(self) -> Iterator[Part]:
        raw = self._take().strip()
        match self._state:
            case "next":
                yield Warn(
                    "truncated_tool_call", "the answer ended without the end of its list", raw=raw or None
                )
            case "key" | "value":
                written = f"{self._key}={raw}" if self._state == "value" else raw
                yield from self._calls.cut("the answer ended inside this call", written)
        self._open, self._quote = [], ""
        self._leave()


def _as_json(text: str) -> str | None:
    """The JSON of a constant of JSON or Python; None if it is none."""
    try:
        return json.dumps(json.loads(text, strict=False, parse_constant=_refuse), ensure_ascii=False)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an escape that Python does not know
            value = ast.literal_eval(text)
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _refuse(name: str) -> Any:
    raise ValueError(name)
