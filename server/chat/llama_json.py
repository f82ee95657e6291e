"""The format of Llama 3.1, 3.2 and 3.3: the checkpoint's own template, and calls as JSON that is the whole answer.

Definition: "JSON based tool calling" in the documentation of Llama 3.1 (llama.com), and the chat template of
meta-llama/Llama-3.1-8B-Instruct. A call is
{"name": "weather", "parameters": {"city": "Rio"}}
The token <|python_tag|> may come before it. Several calls have a semicolon between them. Models of the family also write
"arguments", or "type": "function" first, or put the call into a fence.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from server.chat.call_json import FENCE, BareHeads, CallReader
from server.chat.grammar import CallRules, ToolForm, json_value, literal
from server.chat.parsing import Calls, stray
from server.chat.parts import Parser, Part
from server.chat.text_calls import TextCallParser, unexpected
from server.chat.tool_template import ToolTemplate

PYTHON = "<|python_tag|>"
_KEYS = tuple((name, key) for name in ("name", "function") for key in ("parameters", "arguments"))


def is_llama_json(template: str) -> bool:
    """Whether a template wants calls as JSON with `parameters`, and has the role of Llama's results."""
    return "ipython" in template and '"parameters"' in template.replace('\\"', '"')


class LlamaJsonFormat(ToolTemplate):
    """A checkpoint's template that `is_llama_json`."""

    def described_tools(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """One tool a line."""
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        return (
            f"You can call these functions:\n{lines}\n\nTo call one, answer with nothing but JSON of this form:\n"
            '{"name": the function\'s name, "parameters": an object with its arguments}'
        )

    def written_calls(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """One call after the other."""
        return "; ".join(
            json.dumps({"name": call["name"], "parameters": call["arguments"]}, ensure_ascii=False)
            for call in calls
        )

    def parser(
        self, *, tools: Collection[str] | None = None, thinking: bool = False, single: bool = False
    ) -> Parser:
        """Return a new parser for one answer."""
        return _Parser(tools, reasons=self.reasons, thinking=thinking, single=single)

    def opening(self, tool: str | None) -> str:
        """The text that opens a call, of any tool or of the named one."""
        return '{"name": "' + ("" if tool is None else f'{tool}", "parameters": ')

    def call_rules(
        self, tools: Sequence[ToolForm], *, named: str | None, single: bool, tokens: Mapping[str, int]
    ) -> CallRules:
        """Return the grammar of calls. An answer that does not begin as a call is text."""
        arguments = {tool.name: f"args{number}" for number, tool in enumerate(tools)}
        heads = _heads(arguments)
        # Beside a form in JSON a call is JSON, too, because two ways to write a brace exclude each other.
        whole = " | ".join(rule.replace("args", "json") for rule in arguments.values())
        called = " | ".join(
            f"{literal(self.opening(name).removeprefix(self.opening(None)))} {rule}"
            for name, rule in arguments.items()
        )
        more = '""' if single else f"({literal('; ' + self.opening(None))} called {literal('}')})*"
        again = '""' if single else "(SEMICOLON bare)*"
        bare = " | ".join(f"bare{rule} GAP? {rule} BARE_END" for rule in arguments.values())
        tag = f"<[{tokens[PYTHON]}]>? " if PYTHON in tokens else ""
        lines = [
            *(f"{arguments[tool.name]}: {tool.arguments()}" for tool in tools),
            *(f"bare{rule}[lazy]: /{heads.pattern([name])}/" for name, rule in arguments.items()),
            *(f"{arguments[tool.name].replace('args', 'json')}: {_whole(tool)}" for tool in tools),
            f"whole: {whole}",
            f"wholes: whole{'' if single else ' (SEMICOLON whole)*'}",
            f"called: {called}",
            f"after: {more}",
            f"bare: {bare}",
            f"again: {again}",
            f"PLAIN: /(?s:.*)/ & ~/{heads.pattern(arguments)}(?s:.*)/",
            r"GAP: /[ \n]{1,4}/",
            r"BARE_END: /\s{0,4}\}\s{0,4}(```)?/",
            r"SEMICOLON: /[ \n]{0,2};[ \n]{0,2}/",
        ]
        end = literal("}")
        return CallRules(
            lines=lines,
            said=f"PLAIN | {tag}bare again",
            calls="wholes",
            rest=f"{'called' if named is None else arguments[named]} {end} after",
        )


def _whole(tool: ToolForm) -> str:
    """The expression for a whole call as JSON."""
    arguments = {key: value for key, value in tool.schema.items() if key != "$schema"}
    shared: dict[str, Any] = {key: arguments[key] for key in ("$defs", "definitions") if key in arguments}
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": {"type": "object", **arguments}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
    return json_value({**schema, **shared}, lenient=not tool.strict)


def _heads(names: Collection[str]) -> BareHeads:
    return BareHeads(names, _KEYS, typed=True)


class _Parser(TextCallParser):
    """Its own states: call, and fence (the letters that may end the fence around a call)."""

    def __init__(self, tools: Collection[str] | None, *, reasons: bool, thinking: bool, single: bool) -> None:
        super().__init__(tools, (PYTHON,), reasons=reasons, thinking=thinking, single=single)
        self._heads = _heads(tools or ())
        self._compact = ""
        self._reader = self._make_reader()
        self._fenced = self._tagged = False

    def _letter(self, letter: str) -> Iterator[Part]:
        self._raw.append(letter)
        match self._state:
            case "fresh" if not letter.isspace():
                self._compact += letter
                yield from self._weigh()
            case "fence":
                yield from self._read_fence()
            case "call":
                yield from self._read(letter)

    def _weigh(self) -> Iterator[Part]:
        """See whether what waits is a call."""
        if self._after and self._compact == ";":
            self._take()
            self._compact, self._after = "", True
            return
        if self._tagged and self._compact == "{":
            yield from self._begin("".join(self._raw).lstrip())
            return
        if self._heads.possible(self._compact) and self._heads.find(self._compact) is None:
            return
        if self._heads.find(self._compact) is None:
            if self._tagged:
                yield stray(PYTHON)
            yield from self._settle()
            return
        self._fenced = self._compact.startswith(FENCE)
        raw = "".join(self._raw)
        yield from self._begin(raw[raw.index("{") :])

    def _begin(self, raw: str) -> Iterator[Part]:
        self._take()
        self._state, self._compact = "call", ""
        self._reader = self._make_reader()
        for letter in raw:
            self._raw.append(letter)
            yield from self._read(letter)

    def _make_reader(self) -> CallReader:
        return CallReader(Calls(()) if self._calls.tools is None else self._calls)

    def _read(self, letter: str) -> Iterator[Part]:
        parts = self._reader.letter(letter)
        if self._calls.tools is not None:
            yield from parts
        else:
            list(parts)  # read, and not reported: this answer may have no calls
        if self._reader.done:
            if self._calls.tools is None:
                yield unexpected(PYTHON + self._take())
            fenced, self._tagged, self._fenced = self._fenced, False, False
            self._leave()
            if fenced and not self.ended:
                self._state = "fence"

    def _read_fence(self) -> Iterator[Part]:
        """Drop the end of a fence, or give its letters back if something else stands there."""
        kept = "".join(self._raw).strip()
        if kept == FENCE:
            self._leave()
        elif not FENCE.startswith(kept):
            raw = self._take()
            self._leave()
            yield from self._letters(raw)

    def _tag(self, tag: str) -> Iterator[Part]:
        if self._state == "call" and self._reader.in_string:
            for letter in tag:
                yield from self._letter(letter)
            return
        if self._state == "call":
            yield from self._finish()
        elif self._state != "content":
            yield from self._settle()
        if self.ended:
            return
        self._leave()
        self._compact, self._tagged = "", True

    def _finish(self) -> Iterator[Part]:
        if self._state != "call":
            return
        if self._calls.tools is None:
            yield unexpected(PYTHON + self._take())
        else:
            yield from self._reader.cut("the answer ended inside this call")
        self._leave()
