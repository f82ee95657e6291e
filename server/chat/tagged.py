"""Calls whose arguments stand one by one between tags: Qwen3-Coder's form and GLM's, with the checkpoint's own template.

The file has more than 400 lines because the two forms are one grammar and one state machine.

Definition: the chat templates of Qwen/Qwen3-Coder-30B-A3B-Instruct and zai-org/GLM-4.5.
<tool_call>
<function=weather>
<parameter=city>
Rio
</parameter>
</function>
</tool_call>
<tool_call>weather
<arg_key>city</arg_key>
<arg_value>Rio</arg_value>
</tool_call>
A value is not quoted, so the tool's schema says what it is: text, or JSON. What is neither described nor JSON is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from server.chat.grammar import FREE, ArgumentList, CallRules, ToolForm, json_value, literal
from server.chat.parsing import stray
from server.chat.parts import Content, Parser, Part, Warn
from server.chat.text_calls import PartwiseCallParser, unexpected
from server.chat.tool_template import RESULT, RESULT_END, ToolTemplate, WrittenMessage

CALL, CALL_END = "<tool_call>", "</tool_call>"
_TEXT_KEYS = frozenset("type title description default examples enum".split())


@dataclass(frozen=True, slots=True)
class Tags:
    """How a call is written, without the tags around all of it. A space that the model leaves out is not missed.

    Attributes:
        name: what is before the tool's name.
        name_end: what is after it.
        key: what is before an argument's name.
        key_end: what is between it and its value.
        value_end: what is after the value.
        end: what is after the last argument.
        line: a value stands on lines of its own.
    """

    name: str
    name_end: str
    key: str
    key_end: str
    value_end: str
    end: str
    line: bool

    def tags(self) -> tuple[str, ...]:
        """The tags among these texts, as the answer has them."""
        found = (
            re.findall(r"</?\w+[=>]", text)
            for text in (self.name, self.key, self.key_end, self.value_end, self.end)
        )
        return (CALL, CALL_END, *(tag for tags in found for tag in tags))


QWEN = Tags("\n<function=", ">\n", "<parameter=", ">\n", "\n</parameter>\n", "</function>\n", line=True)
GLM = Tags("", "\n", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n", "", line=False)


def is_qwen_coder(template: str) -> bool:
    """Whether a template writes calls as Qwen3-Coder does."""
    return "<function=" in template and "<parameter=" in template


def is_glm(template: str) -> bool:
    """Whether a template writes calls as GLM does."""
    return "<arg_key>" in template and CALL in template


class TaggedFormat(ToolTemplate):
    """A checkpoint's template whose calls have their arguments between tags."""

    written: ClassVar[Tags]

    def described_tools(self, tools: Sequence[WrittenMessage]) -> str:
        """One tool a line."""
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        form = self.written_calls([{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}])
        return f"You can call these functions:\n{lines}\n\nTo call one, write:\n{form}"

    def written_calls(self, calls: Sequence[WrittenMessage]) -> str:
        """Each call between tags."""
        tags = self.written
        return "\n".join(
            f"{CALL}{tags.name}{call['name']}{tags.name_end}"
            + "".join(
                f"{tags.key}{key}{tags.key_end}{_written(value)}{tags.value_end}"
                for key, value in call["arguments"].items()
            )
            + f"{tags.end}{CALL_END}"
            for call in calls
        )

    def plain_markers(self, role: str) -> tuple[str, ...]:
        """The tags of calls and of results."""
        return (CALL, CALL_END, RESULT, RESULT_END)

    def parser(
        self, *, tools: Collection[str] | None = None, thinking: bool = False, single: bool = False
    ) -> Parser:
        """Return a new parser for one answer."""
        return _Parser(self.written, tools, reasons=self.reasons, thinking=thinking, single=single)

    def opening(self, tool: str | None) -> str:
        """The text that opens a call, of any tool or of the named one."""
        return f"{CALL}{self.written.name}" + ("" if tool is None else f"{tool}{self.written.name_end}")

    def call_rules(
        self, tools: Sequence[ToolForm], *, named: str | None, single: bool, tokens: Mapping[str, int]
    ) -> CallRules:
        """Return the grammar of calls; a control token is itself in it.

        Raises:
            UnfitToolError: a strict tool has arguments that cannot be written one by one.
        """
        tags = self.written
        rules = {tool.name: f"args{number}" for number, tool in enumerate(tools)}
        begin = literal(self.opening(None), tokens)
        closing = literal(tags.value_end.rstrip("\n"), tokens)
        lines = [
            *(line for tool in tools for line in _argument_rules(rules[tool.name], tool, tags, tokens)),
            f"called: {' | '.join(f'{literal(name + tags.name_end)} {rule}' for name, rule in rules.items())}",
            f"end: {literal(tags.end + CALL_END, tokens)}",
            f"after: {'' if single else f'({literal(chr(10))}? {begin} called end)* '}" + r"/\n{0,2}/",
            f"CLOSED: {FREE} & ~/(?s:.*){_escaped(tags.value_end.strip())}(?s:.*)/",
            f"any_value: CLOSED {closing}",
            r"NAME: /[^<>\n]{1,64}/",
            f"any: ({literal(tags.key, tokens)} NAME {literal(tags.key_end, tokens)} any_value {literal(chr(10))})*",
        ]
        bare = [tags.name.strip()] if tags.name else []
        if CALL in tokens:
            lines.append(
                "PLAIN: " + " & ".join([FREE, *(f"~/(?s:.*){_escaped(tag)}(?s:.*)/" for tag in bare)])
            )
            said = f"PLAIN ({begin} called end after)?"
        else:
            hidden = "|".join(map(_escaped, [CALL, *bare]))
            lines += [
                f"upto[lazy]: /(?s:.*){CALL}/"
                + "".join(f" & ~/(?s:.*){_escaped(tag)}(?s:.*)/" for tag in bare),
                f"PLAIN: {FREE} & ~/(?s:.*)({hidden})(?s:.*)/",
            ]
            opened = literal(tags.name) if tags.name else ""
            said = f"PLAIN | upto {opened} called end after"
        return CallRules(
            lines=lines,
            said=said,
            calls=f"{begin} called end after",
            rest=f"{'called' if named is None else rules[named]} end after",
        )


class QwenCoderFormat(TaggedFormat):
    """A checkpoint's template that `is_qwen_coder`."""

    written = QWEN


class GlmFormat(TaggedFormat):
    """A checkpoint's template that `is_glm`."""

    written = GLM


def _escaped(tag: str) -> str:
    return tag.replace("/", "\\/")


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_text(schema: Any) -> bool:
    """Whether values under a schema are plain text. Text with other conditions may be quoted, as JSON is."""
    return isinstance(schema, dict) and schema.get("type") == "string" and _TEXT_KEYS.issuperset(schema)


def _argument_rules(name: str, tool: ToolForm, tags: Tags, tokens: Mapping[str, int]) -> list[str]:
    """The rules of a tool's arguments, in the schema's order.

    Raises:
        UnfitToolError: the tool is strict, and its schema is not a plain list of properties.
    """
    parameters = tool.listed(r"(?!\s)[^<>\n]*(?<!\s)")
    if parameters is None:
        return [f"{name}: any"]
    parts, lines = [], []
    for number, key in enumerate(parameters.schemas):
        opened = literal(f"{tags.key}{key}{tags.key_end}", tokens)
        lines.append(f"{name}_{number}: {opened} {_value_rule(key, parameters, tool, tags, tokens)}")
        parts.append(f"({name}_{number} {literal(chr(10))}){'' if key in parameters.required else '?'}")
    return [*lines, f"{name}: {' '.join(parts) or chr(34) * 2}"]


def _value_rule(
    key: str, parameters: ArgumentList, tool: ToolForm, tags: Tags, tokens: Mapping[str, int]
) -> str:
    """The expression for a value and what closes it."""
    schema, closing = parameters.schemas[key], literal(tags.value_end.rstrip("\n"), tokens)
    if not _is_text(schema):
        return f"{json_value(parameters.schema(key), lenient=not tool.strict)} {closing}"
    texts = [
        text
        for text in schema.get("enum", ())
        if isinstance(text, str) and tags.value_end.strip() not in text
    ]
    return f"({' | '.join(map(literal, texts))}) {closing}" if texts else "any_value"


class _Parser(PartwiseCallParser):
    """Its own states: head (before the name), name, between (before an argument or the end), key, gap, value."""

    def __init__(
        self,
        tags: Tags,
        tools: Collection[str] | None,
        *,
        reasons: bool,
        thinking: bool,
        single: bool,
    ) -> None:
        super().__init__(tools, dict.fromkeys(tags.tags()), reasons=reasons, thinking=thinking, single=single)
        self._written = tags
        self._function = tags.name.strip()  # "": the name follows the call's tag
        self._value_end = tags.value_end.strip()
        self._schemas: Mapping[str, Any] = tools if isinstance(tools, Mapping) else {}
        self._properties: Mapping[str, Any] = {}
        self._tagged = True  # the call is between tags
        self._count = 0  # arguments of the newest call
        self._schema: Any = None  # of the argument
        self._text = False  # the argument is text, and passed on as it comes
        self._held = ""  # a line break that may be the value's last letter, and then is no part of it
        self._begun = False  # a letter of the value came

    # ---- what comes in ----

    def _tag(self, tag: str) -> Iterator[Part]:
        if self._state not in ("fresh", "content"):
            self._unwanted.append(tag)
            yield from self._wanted(self._tag_inside(tag))
        elif tag == CALL:
            yield from self._settle()
            self._begin(tag)
        elif tag == self._function and self._calls.tools is not None:
            yield from self._settle()
            yield Warn("malformed_tool_call", f"the model called a tool without {CALL}")
            self._begin(tag)
            self._tagged, self._state = False, "name"
        elif tag == CALL_END:
            yield from self._settle()
            yield stray(tag)
        elif self._state == "content":
            yield Content(tag)  # the model only writes about the format
        else:
            for letter in tag:
                yield from self._letters(letter)

    def _wanted(self, parts: Iterator[Part]) -> Iterator[Part]:
        yield from super()._wanted(parts)
        if self._calls.tools is None and self._state in ("fresh", "content"):
            raw, self._unwanted = "".join(self._unwanted), []
            yield unexpected(raw)

    def _begin(self, tag: str) -> None:
        self._take()
        self._unwanted = [tag]
        self._tagged = True
        self._state = "head" if self._function else "name"

    # ---- inside a call ----

    def _inside(self, letter: str) -> Iterator[Part]:
        match self._state:
            case "name" if letter == self._written.name_end[0] and "".join(self._raw).strip():
                yield from self._start()
            case "key" if letter == self._written.key_end[0] == ">":
                yield from self._start_value()
            case "value":
                yield from self._read_value(letter)
            case "gap":
                pass
            case _:
                self._raw.append(letter)

    def _tag_inside(self, tag: str) -> Iterator[Part]:
        tags = self._written
        if self._state == "value":
            if tag == self._value_end:
                yield from self._end_value()
            else:
                for letter in tag:
                    yield from self._read_value(letter)
        elif self._state == "key" and tags.key_end.startswith(tag):
            self._state = "gap"
        elif self._state == "gap" and tags.key_end.endswith(tag):
            yield from self._start_value()
        elif self._state == "head" and tag == self._function:
            self._take()
            self._state = "name"
        elif self._state in ("name", "between") and tag in (tags.key, CALL_END, tags.end.strip()):
            if self._state == "name":
                yield from self._start()
            yield from self._among()
            if tag == tags.key:
                self._state = "key"
            elif tag == CALL_END or not self._tagged:
                yield from self._end_call()
        elif tag in (CALL, CALL_END):
            yield from self._cut(f"the model wrote {tag} inside this call")
            if tag == CALL:
                self._begin(tag)
            else:
                self._leave()
        else:
            self._raw.append(tag)

    def _start(self) -> Iterator[Part]:
        name = self._take().strip()
        schema = self._schemas.get(name)
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        self._properties = properties if isinstance(properties, Mapping) else {}
        self._state, self._count = "between", 0
        yield from self._record.start(name)
        yield from self._record.add("{")

    def _among(self) -> Iterator[Part]:
        if raw := self._take().strip():
            yield self._record.warn("malformed_tool_call", f"the model wrote {raw!r:.60} among the arguments")

    def _start_value(self) -> Iterator[Part]:
        key = self._take().strip()
        self._schema = self._properties.get(key, {"type": "string"})
        self._text = _is_text(self._schema)
        self._state, self._held, self._begun = "value", "", False
        comma = ", " if self._count else ""
        self._count += 1
        yield from self._record.add(f"{comma}{json.dumps(key, ensure_ascii=False)}: {chr(34) * self._text}")

    def _read_value(self, letter: str) -> Iterator[Part]:
        if self._written.line:  # the line breaks beside the tags are no part of the value
            if not self._begun and letter == "\n":
                self._begun = True
                return
            letter, self._held = (self._held, letter) if letter == "\n" else (self._held + letter, "")
        self._begun = True
        if self._text:
            yield from self._record.add(json.dumps(letter, ensure_ascii=False)[1:-1])
        else:
            self._raw.append(letter)

    def _end_value(self) -> Iterator[Part]:
        self._state = "between"
        yield from self._record.add('"' if self._text else _as_json(self._take(), self._schema))

    def _end_call(self) -> Iterator[Part]:
        yield from self._record.add("}")
        yield from self._record.end()
        self._leave()

    def _cut(self, message: str) -> Iterator[Part]:
        if self._state in ("head", "name"):
            yield Warn("truncated_tool_call", message, raw="".join((CALL, *self._raw)))
        else:
            if self._state == "value" and not self._text:
                yield from self._record.add("".join(self._raw))
            yield from self._record.cut(message)
        self._take()


def _as_json(raw: str, schema: Any) -> str:
    """An argument as JSON: what the model wrote if that is JSON and may be so, else as text."""
    text = {"True": "true", "False": "false", "None": "null"}.get(raw.strip(), raw.strip())
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(raw, ensure_ascii=False)
    is_string = isinstance(schema, Mapping) and schema.get("type") == "string"
    return text if isinstance(value, str) or not is_string else json.dumps(raw, ensure_ascii=False)


def _refuse(name: str) -> Any:
    raise ValueError(name)
