"""The format of Mistral's instruct models: the checkpoint's own template, and calls after the token [TOOL_CALLS].

Definition: the tokenizers of mistralai/mistral-common, versions 3 to 13, and the chat templates of
mistralai/Mistral-7B-Instruct-v0.3 and mistralai/Mistral-Small-3.2-24B-Instruct-2506. Older models write all calls as one
list, newer ones each call for itself:
[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rio"}}]
[TOOL_CALLS]weather[ARGS]{"city": "Rio"}
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence

from server.chat.call_json import CallReader, ObjectEnd
from server.chat.grammar import CallRules, ToolForm, literal
from server.chat.parsing import stray
from server.chat.parts import Parser, Part, Warn
from server.chat.text_calls import PartwiseCallParser
from server.chat.tool_template import ToolTemplate, WrittenMessage

CALLS, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_RESULTS, _RESULTS_END = "[TOOL_RESULTS]", "[/TOOL_RESULTS]"
_TOOLS, _TOOLS_END = "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"


def is_mistral(template: str) -> bool:
    """Whether a template writes calls after the token of Mistral's models."""
    return CALLS in template


class MistralFormat(ToolTemplate):
    """A checkpoint's template that `is_mistral`."""

    def __init__(
        self,
        template: str,
        tokens: Mapping[str, str] | None = None,
        *,
        reasons: bool = False,
        described: bool = False,
    ) -> None:
        super().__init__(template, tokens, reasons=reasons, described=described)
        self._in_list = ARGUMENTS not in template

    def described_tools(self, tools: Sequence[WrittenMessage]) -> str:
        """One tool a line."""
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        form = (
            f'{CALLS} [{{"name": the function\'s name, "arguments": an object with its arguments}}]'
            if self._in_list
            else f"{CALLS}the function's name{ARGUMENTS}an object with its arguments"
        )
        return f"You can call these functions:\n{lines}\n\nTo call one, write:\n{form}"

    def written_calls(self, calls: Sequence[WrittenMessage]) -> str:
        """The calls after their token."""
        if not self._in_list:
            return "".join(
                f"{CALLS}{call['name']}{ARGUMENTS}{json.dumps(call['arguments'], ensure_ascii=False)}"
                for call in calls
            )
        listed = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
        return f"{CALLS} {json.dumps(listed, ensure_ascii=False)}"

    def plain_markers(self, role: str) -> tuple[str, ...]:
        """The tags, where the vocabulary has no token for them."""
        own = (CALLS, ARGUMENTS, CALL_ID, _RESULTS, _RESULTS_END, _TOOLS, _TOOLS_END)
        return (*own, *super().plain_markers(role))

    def parser(
        self, *, tools: Collection[str] | None = None, thinking: bool = False, single: bool = False
    ) -> Parser:
        """Return a new parser for one answer."""
        return _Parser(tools, reasons=self.reasons, thinking=thinking, single=single)

    def opening(self, tool: str | None) -> str:
        """The text that opens a call, of any tool or of the named one."""
        if self._in_list:
            return f'{CALLS} [{{"name": "' + ("" if tool is None else f'{tool}", "arguments": ')
        return CALLS + ("" if tool is None else f"{tool}{ARGUMENTS}")

    def call_rules(
        self, tools: Sequence[ToolForm], *, named: str | None, single: bool, tokens: Mapping[str, int]
    ) -> CallRules:
        """Return the grammar of calls; a control token is itself in it."""
        arguments = {tool.name: f"args{number}" for number, tool in enumerate(tools)}
        opening = self.opening(None)
        if self._in_list:
            called = " | ".join(
                f"{literal(f'{name}{chr(34)}, {chr(34)}arguments{chr(34)}: ')} {rule} {literal('}')}"
                for name, rule in arguments.items()
            )
            again, end = literal(', {"name": "'), literal("]")
            rest = "called" if named is None else f"{arguments[named]} {literal('}')}"
        else:
            called = " | ".join(
                f"{literal(name + ARGUMENTS, tokens)} {rule}" for name, rule in arguments.items()
            )
            again, end = literal(CALLS, tokens), '""'
            rest = "called" if named is None else arguments[named]
        lines = [
            *(f"{arguments[tool.name]}: {tool.arguments()}" for tool in tools),
            f"called: {called}",
            f"after: {'' if single else f'({again} called)* '}{end}",
        ]
        calls = f"{literal(opening, tokens)} called after"
        if CALLS in tokens:
            lines.append("PLAIN: /(?s:.+)/")
            said = f"PLAIN? ({calls})?"
        else:
            tag = r"\[TOOL_CALLS\]"
            lines += [f"upto[lazy]: /(?s:.*){tag}/", f"PLAIN: /(?s:.*)/ & ~/(?s:.*){tag}(?s:.*)/"]
            said = f"PLAIN | upto {literal(opening.removeprefix(CALLS))} called after"
        return CallRules(lines=lines, said=said, calls=calls, rest=f"{rest} after")


class _Parser(PartwiseCallParser):
    """Its own states: block (before a call), object (a call of a list), name, id (dropped), arguments."""

    def __init__(self, tools: Collection[str] | None, *, reasons: bool, thinking: bool, single: bool) -> None:
        super().__init__(
            tools, (CALLS, ARGUMENTS, CALL_ID), reasons=reasons, thinking=thinking, single=single
        )
        self._reader = CallReader(self._record)
        self._arguments = ObjectEnd()
        self._listed = False
        self._name = ""

    def _inside(self, letter: str) -> Iterator[Part]:
        match self._state:
            case "block":
                yield from self._between(letter)
            case "object":
                yield from self._reader.letter(letter)
                if self._reader.done:
                    self._end_call()
            case "name" | "id" if letter == "{":
                yield from self._start(self._take() if self._state == "name" else self._name)
                yield from self._inside(letter)
            case "arguments":
                yield from self._record.add(letter)
                if self._arguments.end(letter) >= 0:
                    yield from self._record.end()
                    self._end_call()
            case _:
                self._raw.append(letter)

    def _between(self, letter: str) -> Iterator[Part]:
        if letter.isspace() or (self._listed and letter == ","):
            return
        match letter:
            case "[" if not self._listed:
                self._listed = True
            case "]" if self._listed:
                self._listed = False
            case "{":
                self._state, self._reader = "object", CallReader(self._record)
                yield from self._reader.letter(letter)
            case _:
                self._state, self._raw = "name", [letter]

    def _start(self, name: str) -> Iterator[Part]:
        self._take()
        self._state, self._arguments = "arguments", ObjectEnd()
        yield from self._record.start(name.strip())

    def _end_call(self) -> None:
        self._take()
        self._state = "block"
        self.ended = self._single and self._calls.complete > 0

    def _tag(self, tag: str) -> Iterator[Part]:
        if self._state in ("fresh", "content"):
            if tag != CALLS:
                yield stray(tag)
                return
            yield from self._settle()
            self._state, self._listed = "block", False
            self._unwanted = [tag]
            return
        self._unwanted.append(tag)
        yield from self._wanted(self._tag_inside(tag))

    def _tag_inside(self, tag: str) -> Iterator[Part]:
        in_string = self._reader.in_string if self._state == "object" else self._arguments.in_string
        if self._state in ("object", "arguments") and in_string:
            for letter in tag:
                yield from self._inside(letter)
        elif tag == CALLS:
            yield from self._cut("the model began a call before the end of this one")
            self._state, self._listed = "block", False
        elif self._state == "name" and tag == CALL_ID:
            self._name, self._state = self._take(), "id"
        elif self._state == "name" and tag == ARGUMENTS:
            yield from self._start(self._take())
        elif self._state == "id" and tag == ARGUMENTS:
            yield from self._start(self._name)
        else:
            yield stray(tag)

    def _cut(self, message: str) -> Iterator[Part]:
        match self._state:
            case "object":
                yield from self._reader.cut(message)
            case "arguments":
                yield from self._record.cut(message)
            case "name" | "id":
                name = self._take() if self._state == "name" else self._name
                yield Warn("truncated_tool_call", message, raw=CALLS + name)
        self._take()

    def _finish(self) -> Iterator[Part]:
        listed = self._calls.tools is not None and self._state == "block" and self._listed
        yield from super()._finish()
        if listed:
            yield Warn("truncated_tool_call", "the answer ended without the end of the list of calls")
