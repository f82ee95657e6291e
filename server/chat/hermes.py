"""The format of Qwen 2.5, Qwen 3 and Nous Hermes: the checkpoint's own template, and calls as JSON between tags.

Definition: the chat template of Qwen/Qwen2.5-Coder-1.5B-Instruct. A call is
<tool_call>
{"name": "weather", "arguments": {"city": "Rio"}}
</tool_call>
The tags are ordinary text to the guard and to the parser, though most vocabularies have a token for each.

The module has over 400 lines because calls with tags and calls without them are one state machine.

Small models of the family leave the tags out and write the JSON alone, or in a fence. At the begin of an answer, or after
a call, such JSON with the name of a tool is a call, too, and is reported as malformed.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from server.chat.call_json import FENCE, BareHeads, ObjectEnd, call_of, name_of
from server.chat.grammar import CallRules, ToolForm, literal
from server.chat.parsing import THINK, THOUGHT, Calls, Lexer, stray
from server.chat.parts import Content, Parser, Part, Reasoning, Warn
from server.chat.tool_template import RESULT, RESULT_END, ToolTemplate

CALL, CALL_END = "<tool_call>", "</tool_call>"
TOOLS, TOOLS_END = "<tools>", "</tools>"

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_LONGEST_HEAD = 1024


def is_hermes(template: str) -> bool:
    """Whether a template describes tools and wants their calls as JSON between these tags."""
    return CALL in template and '"arguments"' in template.replace('\\"', '"') and "<function=" not in template


class HermesFormat(ToolTemplate):
    """A checkpoint's template that `is_hermes`."""

    def described_tools(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """One tool a line, between tags."""
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        return (
            f"You can call these functions:\n{TOOLS}\n{lines}\n{TOOLS_END}\n\n"
            f"To call one, write JSON with its name and arguments between tags:\n{CALL}\n"
            f'{{"name": the function\'s name, "arguments": an object with its arguments}}\n{CALL_END}'
        )

    def written_calls(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Each call between tags."""
        written = (
            json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)
            for call in calls
        )
        return "\n".join(f"{CALL}\n{text}\n{CALL_END}" for text in written)

    def plain_markers(self, role: str) -> tuple[str, ...]:
        """The tags of calls, results and tools."""
        return (CALL, CALL_END, RESULT, RESULT_END, TOOLS, TOOLS_END)

    def parser(
        self, *, tools: Collection[str] | None = None, thinking: bool = False, single: bool = False
    ) -> Parser:
        """Return a new parser for one answer."""
        return _Parser(tools, reasons=self.reasons, thinking=thinking, single=single)

    def opening(self, tool: str | None) -> str:
        """The text that opens a call, of any tool or of the named one."""
        return f'{CALL}\n{{"name": "' + ("" if tool is None else f'{tool}", "arguments": ')

    def call_rules(
        self, tools: Sequence[ToolForm], *, named: str | None, single: bool, tokens: Mapping[str, int]
    ) -> CallRules:
        """Return the grammar of calls. Text before a call is told from the call's tag by lazy matching."""
        arguments = {tool.name: f"args{number}" for number, tool in enumerate(tools)}
        heads = _bare(arguments)
        called = " | ".join(
            f"""{literal(f'{name}", "arguments": ')} {rule}""" for name, rule in arguments.items()
        )
        begin, end = literal(self.opening(None)), literal("}\n" + CALL_END)
        more = "" if single else f" | {end} LINES? {begin} called tail"
        bare = " | ".join(f"bare{rule} GAP? {rule} BARE_END" for rule in arguments.values())
        lines = [
            *(f"{arguments[tool.name]}: {tool.arguments()}" for tool in tools),
            *(f"bare{rule}[lazy]: /{heads.pattern([name])}/" for name, rule in arguments.items()),
            f"called: {called}",
            f'tail: "}}" | {end} LINES?{more}',  # models end an answer or a line there
            r"LINES: /\n{1,2}/",
            f"upto[lazy]: /(?s:.*){CALL}/",
            f"PLAIN: /(?s:.*)/ & ~/(?s:.*){CALL}(?s:.*)/ & ~/{heads.pattern(arguments)}(?s:.*)/",
            r"GAP: /[ \n]{1,4}/",
            r"BARE_END: /\s{0,4}\}\s{0,4}(```)?/",
        ]
        opened = literal(self.opening(None).removeprefix(CALL))
        return CallRules(
            lines=lines,
            said=f"PLAIN | upto {opened} called tail | {bare}",
            calls=f"{begin} called tail",
            rest=f"{'called' if named is None else arguments[named]} tail",
        )


class _Parser:
    """A state machine: think, content, head (before the arguments), arguments, tail (after them), skip."""

    def __init__(self, tools: Collection[str] | None, *, reasons: bool, thinking: bool, single: bool) -> None:
        self.markers = frozenset((THINK, THOUGHT)) if reasons else frozenset()
        self._lexer = Lexer(("\n" + CALL, CALL, CALL_END))
        self._calls = Calls(tools)
        self._single = single
        self._state = "think" if thinking else "content"
        self._bare = _bare(tools or ()).compact
        self._fenced = False  # the call is in a fence and without tags
        self._tagged = True  # the call is between tags
        self._fresh = True  # no content yet since the begin or the last call; blank text waits
        self._after = False  # a call came before: blank text after it is dropped
        self._raw: list[str] = []
        self._length = 0  # of the head
        self._object = ObjectEnd()
        self.ended = False

    @property
    def thinking(self) -> bool:
        return self._state == "think"

    @property
    def calls(self) -> int:
        return self._calls.complete

    def text(self, text: str) -> list[Part]:
        return [
            part
            for is_tag, piece in self._lexer.read(text)
            for part in (self._tag(piece) if is_tag else self._text(piece))
        ]

    def marker(self, token: str) -> list[Part]:
        return [*self._text(self._lexer.rest()), *self._control(token)] if not self.ended else []

    def finish(self) -> list[Part]:
        return [*self._text(self._lexer.rest()), *self._finish()] if not self.ended else []

    # ---- what comes in ----

    def _text(self, text: str) -> Iterator[Part]:
        if self.ended or not text:
            return
        match self._state:
            case "think":
                yield Reasoning(text)
            case "content" if self._fresh:
                self._raw.append(text)
                yield from self._read_fresh()
            case "content":
                yield Content(text)
            case "head":
                yield from self._read_head(text)
            case "arguments":
                yield from self._read_arguments(text)
            case "tail" if not self._tagged:
                self._raw.append(text)
                yield from self._read_bare_tail()
            case _:
                self._raw.append(text)

    def _control(self, token: str) -> Iterator[Part]:
        if self._state == "skip":
            self._raw.append(token)
        elif token == THOUGHT and self._state == "think":
            self._state = "content"
        elif token == THINK and token in self.markers and self._state == "content":
            yield from self._settle()
            self._state = "think"
        else:
            yield stray(token)

    def _tag(self, tag: str) -> Iterator[Part]:
        if self.ended:
            return
        begins = tag.strip() == CALL
        match self._state:
            case "think":
                yield Reasoning(tag)  # the model only writes about the format
            case "content" if not begins:
                yield from self._settle()
                yield stray(tag)
            case "content":
                yield from self._settle()
                self._begin(tag)
            case "arguments" if self._object.in_string:
                yield from self._read_arguments(tag)  # a part of a text among the arguments
            case "tail" if not begins and not self._tagged:
                yield from self._end_call()
            case "skip":
                self._raw.append(tag)
                if not begins:
                    yield _unexpected(self._take())
                    self._leave()
            case _:
                yield from self._end_call()
                if begins:
                    yield _malformed(f"the model began a call without {CALL_END} before it", tag.strip())
                    if not self.ended:
                        self._begin(tag)

    def _settle(self) -> Iterator[Part]:
        """Give out what waited at the begin of content, which is no call. Blank text beside calls is dropped."""
        if (raw := self._take()).strip():
            self._fresh = self._after = False
            yield Content(raw)

    def _read_fresh(self) -> Iterator[Part]:
        """Wait for content that is not blank, and see whether it is a call without tags."""
        raw = "".join(self._raw)
        compact = "".join(raw.split())
        if not compact or any(head.startswith(compact) for head in self._bare):
            return
        found = next(((head, name) for head, name in self._bare.items() if compact.startswith(head)), None)
        if found is None:
            yield from self._settle()
            return
        head, name = found
        # The arguments begin with the last letter of the head.
        letters = (place for place, letter in enumerate(raw) if not letter.isspace())
        begin = next(itertools.islice(letters, len(head) - 1, None))
        self._take()
        self._fenced, self._tagged = head.startswith(FENCE), False
        self._object = ObjectEnd()
        self._state = "arguments"
        yield _malformed(f"the model called a tool without {CALL}")
        yield from self._calls.start(name)
        yield from self._read_arguments(raw[begin:])

    def _read_bare_tail(self) -> Iterator[Part]:
        """End a call without tags at its last brace, or at the end of its fence."""
        raw, end, matched = "".join(self._raw), "}" + (FENCE if self._fenced else ""), 0
        for place, letter in enumerate(raw):
            if letter.isspace():
                continue
            if letter != end[matched]:
                break
            matched += 1
            if matched == len(end):
                place += 1
                break
        else:
            return
        self._raw = [end[:matched]]
        yield from self._end_call()
        yield from self._text(raw[place:])

    def _begin(self, tag: str) -> None:
        self._take()
        self._after = False
        self._tagged = True
        if self._calls.tools is None:
            self._state = "skip"
            self._raw = [tag.strip()]
            return
        self._state = "head"
        self._length = 0

    # ---- inside a call ----

    def _read_head(self, text: str) -> Iterator[Part]:
        """Wait for the name and the begin of the arguments, which can then be passed on as they come."""
        self._raw.append(text)
        self._length += len(text)
        if self._length - len(text) > _LONGEST_HEAD:
            return  # another order of keys: the call is read when it is complete
        head = "".join(self._raw)
        match = _HEAD.match(head)
        if match is None:
            return
        name = name_of(match[1])
        if name is None:
            return
        self._take()
        self._object = ObjectEnd()
        self._state = "arguments"
        yield from self._calls.start(name)
        yield from self._read_arguments(head[match.end() :])

    def _read_arguments(self, text: str) -> Iterator[Part]:
        end = self._object.end(text)
        yield from self._calls.add(text if end < 0 else text[:end])
        if end >= 0:
            self._state = "tail"
            self._raw = []
            yield from self._text(text[end:])

    def _end_call(self) -> Iterator[Part]:
        """End a call at a tag, or at the end of the answer."""
        match self._state:
            case "head":
                yield from self._whole_call(self._take())
            case "arguments":
                yield from self._calls.cut("the model ended this call inside its arguments")
            case "tail":
                tail = self._take().strip()
                if not self._tagged:
                    tail = tail.rstrip("`")
                if tail != "}":
                    said = f"wrote {tail!r:.60} after" if tail else "did not close the call after"
                    yield self._calls.warn("malformed_tool_call", f"the model {said} its arguments")
                yield from self._calls.end()
                self.ended = self._single
        self._leave()

    def _whole_call(self, text: str) -> Iterator[Part]:
        """Read a call with its keys in another order, or with arguments that are no object."""
        found = call_of(text)
        if found is None:
            yield _malformed(
                "the model wrote a call that is not JSON with a name and arguments", text.strip()
            )
            return
        name, arguments = found
        yield from self._calls.start(name)
        yield from self._calls.add(arguments)
        yield from self._calls.end()
        self.ended = self._single

    def _leave(self) -> None:
        self._state = "content"
        self._fresh = self._after = True
        self._raw = []

    def _finish(self) -> Iterator[Part]:
        match self._state:
            case "head":
                text = self._take()
                if call_of(text) is None:
                    yield Warn("truncated_tool_call", "the answer ended inside a tool call", raw=CALL + text)
                else:
                    yield from self._whole_call(text)
                    yield Warn("truncated_tool_call", f"the answer ended without {CALL_END}")
            case "arguments":
                yield from self._calls.cut("the answer ended inside this call")
            case "content" if self._fresh and not self._after:
                yield from (Content(raw) for raw in (self._take(),) if raw)
            case "content":
                yield from self._settle()
            case "tail" if not self._tagged:
                yield from self._end_call()
            case "tail":
                yield from self._end_call()
                yield Warn("truncated_tool_call", f"the answer ended without {CALL_END}")
            case "skip":
                yield _unexpected(self._take())

    def _take(self) -> str:
        raw, self._raw = "".join(self._raw), []
        return raw


def _bare(names: Collection[str]) -> BareHeads:
    return BareHeads(names, [("name", "arguments")])


def _malformed(message: str, raw: str | None = None) -> Warn:
    return Warn("malformed_tool_call", message, raw=raw)


def _unexpected(raw: str) -> Warn:
    return Warn("unexpected_tool_call", "the model called a tool, but this request allows none", raw=raw)
