"""The format of DeepSeek-V3.2 (December 2025): reasoning, and tool calls in DSML.

Definition: encoding/encoding_dsv32.py in deepseek-ai/DeepSeek-V3.2, which ships no chat template.
DSML tags are ordinary text to the tokenizer; <think> and </think> are control tokens. The first system
message describes the tools. Reasoning stays in the prompt until the user's next message, and the model
reasons again after a tool's result.

The module has over 400 lines because the writer and the parser of one format must change together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from server.chat.deepseek import ASSISTANT, BOS, EOS, USER, calls_of, require_tokens, text_of
from server.chat.errors import PromptError
from server.chat.format import ChatFormat
from server.chat.grammar import FREE, ArgumentList, CallRules, ToolForm, json_value, literal
from server.chat.parsing import THINK, THOUGHT, Calls, Lexer, json_object_problem, stray
from server.chat.parts import Content, Parser, Part, Reasoning, Warn
from server.text.tokenizer import Tokenizer

DSML = "｜DSML｜"
CALLS, CALLS_END = f"<{DSML}function_calls>", f"</{DSML}function_calls>"
CALL, CALL_END = f"<{DSML}invoke", f"</{DSML}invoke>"
PARAMETER, PARAMETER_END = f"<{DSML}parameter", f"</{DSML}parameter>"
RESULTS, RESULTS_END = "<function_results>", "</function_results>"

_TOOLS = f"""## Tools
You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "{CALLS}" block like the following as part of your reply to the user:
{CALLS}
{CALL} name="$FUNCTION_NAME">
{PARAMETER} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{PARAMETER_END}
...
{CALL_END}
{CALL} name="$FUNCTION_NAME2">
...
{CALL_END}
{CALLS_END}
String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).
If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:
{CALLS}
...
{CALLS_END}
{RESULTS}
...
{RESULTS_END}
{THINK}...thinking about results{THOUGHT}
Here are the functions available in JSONSchema format:
<functions>
"""

_HEADER = re.compile(r'\s*name="([^"]*)"(?: string="(true|false)")?')
_LONGEST_HEADER = 1024


class DeepSeekV32(ChatFormat):
    """The chat format of DeepSeek-V3.2."""

    tools = True
    reasons = True
    thinking = True
    thinking_with_tools = True

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt's text. This format opens the assistant's turn after every user's message.

        Raises:
            PromptError: the last message is not one that the assistant can answer.
        """
        if add_generation_prompt and messages[-1]["role"] not in ("user", "tool"):
            raise PromptError(
                "the last message must be the user's or a tool's, so that there is one to answer"
            )
        if tools and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": ""}, *messages]
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        out = [BOS]
        for index, message in enumerate(messages):
            current = bool(thinking) and index >= last_user
            match message["role"]:
                case "system":
                    out.append(text_of(message))
                    if tools and not index:
                        out.append("\n\n" + _describe(tools))
                case "user":
                    out += [USER, text_of(message), ASSISTANT, THINK if current else THOUGHT]
                case "assistant":
                    if current:
                        out += [str(message.get("reasoning_content") or ""), THOUGHT]
                    out += [text_of(message), _write_calls(calls_of(message)), EOS]
                case "tool":
                    first = messages[index - 1]["role"] != "tool"
                    last = index + 1 == len(messages) or messages[index + 1]["role"] != "tool"
                    out += ["\n\n", RESULTS] if first else []
                    out.append(f"\n<result>{text_of(message)}</result>")
                    out += ["\n", RESULTS_END, "\n\n", THINK if current else THOUGHT] if last else []
                case role:
                    raise PromptError(f"this model's chat format has no role {role!r}")
        return "".join(out)

    def decode(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Replace the JSON text of each call's arguments by its object, because `render` writes each parameter.

        Raises:
            PromptError: the arguments of a call are not a JSON object.
        """
        return [_decoded(index, message) for index, message in enumerate(messages)]

    def plain_markers(self, role: str) -> tuple[str, ...]:
        """The mark of DSML; for a tool's result also the tags around results."""
        return (DSML, "</result>", RESULTS, RESULTS_END) if role == "tool" else (DSML,)

    def parser(
        self, *, tools: Collection[str] | None = None, thinking: bool = False, single: bool = False
    ) -> Parser:
        """Return a new parser for one answer."""
        return _Parser(tools, thinking=thinking, single=single)

    def opening(self, tool: str | None) -> str:
        """The text that opens a call, of any tool or of the named one."""
        return f"\n\n{CALLS}\n{CALL} name=" + ("" if tool is None else f'"{tool}">\n')

    def call_rules(
        self, tools: Sequence[ToolForm], *, named: str | None, single: bool, tokens: Mapping[str, int]
    ) -> CallRules:
        """Return the grammar of calls. Text before calls is told from their tag by lazy matching.

        Raises:
            UnfitToolError: a strict tool has arguments that are not written as parameters.
        """
        lines = [
            f"upto[lazy]: /(?s:.*)<{DSML}/ & ~/((?s:.*)[^<])?{DSML}(?s:.*)/",
            f"PLAIN: /(?s:.*)/ & ~/(?s:.*){DSML}(?s:.*)/",
            f"value[lazy]: /(?s:.*)<\\/{DSML}parameter>/",
            f"any_value: {literal(_TEXT_END)} value | {literal(_JSON_END)} {json_value({})} {literal(PARAMETER_END)}",
            r'NAME: /[^"<>\n]{1,64}/',
            f"any: ({literal(_PARAMETER)} NAME any_value {literal(chr(10))})*",
        ]
        rules = {tool.name: f"args{number}" for number, tool in enumerate(tools)}
        for tool in tools:
            lines += _parameter_rules(rules[tool.name], tool)
        heads = " | ".join(f"""{literal(f'"{name}">' + chr(10))} {rule}""" for name, rule in rules.items())
        more = '""' if single else f"({literal(chr(10) + CALL + ' name=')} called end)*"
        lines += [
            f"called: {heads}",
            f"end: {literal(CALL_END)}",
            f"after: {more} {literal(chr(10) + CALLS_END)}",
        ]
        opened = literal(self.opening(None).partition(DSML)[2])
        return CallRules(
            lines=lines,
            said=f"PLAIN | upto {opened} called end after",
            calls=f"{literal(self.opening(None))} called end after",
            rest=f"{'called' if named is None else rules[named]} end after",
            reasoning=f"{FREE} & ~/(?s:.*)\\n\\n{CALLS}(?s:.*)/",
        )


def build(weights: Path, tokenizer: Tokenizer | None = None) -> DeepSeekV32:
    """Build the format, and check the vocabulary if there is one.

    Raises:
        PromptError: the vocabulary lacks one of the format's control tokens.
    """
    if tokenizer is not None:
        require_tokens("deepseek-v3.2", tokenizer, (BOS, EOS, USER, ASSISTANT, THINK, THOUGHT))
    return DeepSeekV32()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _describe(tools: Sequence[Mapping[str, Any]]) -> str:
    return _TOOLS + "\n".join(_json(tool["function"]) for tool in tools) + "\n</functions>\n"


def _write_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    written = []
    for call in calls:
        parameters = [
            f'{PARAMETER} name="{name}" string="{"true" if isinstance(value, str) else "false"}">'
            f"{value if isinstance(value, str) else _json(value)}{PARAMETER_END}"
            for name, value in call["arguments"].items()
        ]
        lines = "\n".join(parameters)
        written.append(f'{CALL} name="{call["name"]}">\n{lines}\n{CALL_END}')
    block = "\n".join(written)
    return f"\n\n{CALLS}\n{block}\n{CALLS_END}" if calls else ""


_PARAMETER, _TEXT_END, _JSON_END = f'{PARAMETER} name="', '" string="true">', '" string="false">'
_STRING_KEYS = frozenset("type title description default examples".split())


def _parameter_rules(name: str, tool: ToolForm) -> list[str]:
    """The rules of a tool's parameters, each on a line of its own, in the schema's order.

    Raises:
        UnfitToolError: the tool is strict, and its schema is not a plain list of properties.
    """
    parameters = tool.listed(r'[^"\n]*')
    if parameters is None:
        return [f"{name}: any"]
    parts, lines = [], []
    for number, key in enumerate(parameters.schemas):
        rule = f"{name}_{number}"
        lines.append(f"{rule}: {literal(_PARAMETER + key)} {_value(key, parameters, tool)}")
        parts.append(f"({rule} {literal(chr(10))}){'' if key in parameters.required else '?'}")
    return [*lines, f"{name}: {' '.join(parts) or '/' + chr(92) + 'n?/'}"]


def _value(key: str, parameters: ArgumentList, tool: ToolForm) -> str:
    """The expression for what follows a parameter's name. Text is as it is; what has a condition is JSON."""
    schema = parameters.schemas[key]
    if isinstance(schema, dict) and schema.get("type") == "string":
        if _STRING_KEYS.issuperset(schema):
            return f"{literal(_TEXT_END)} value"
        choices = schema.get("enum")
        if _STRING_KEYS.union(("enum",)).issuperset(schema) and isinstance(choices, list):
            texts = [choice for choice in choices if isinstance(choice, str) and PARAMETER_END not in choice]
            if texts:
                return f"{literal(_TEXT_END)} ({' | '.join(map(literal, texts))}) {literal(PARAMETER_END)}"
    value = json_value(parameters.schema(key), lenient=not tool.strict)
    return f"{literal(_JSON_END)} {value} {literal(PARAMETER_END)}"


def _decoded(index: int, message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    decoded = []
    for number, call in enumerate(calls):
        function = call["function"]
        if json_object_problem(function["arguments"]):
            raise PromptError(
                f"messages[{index}].tool_calls[{number}].function.arguments must be a JSON object with each key "
                "once, because this model's format writes its parameters one by one"
            )
        decoded.append({**call, "function": {**function, "arguments": json.loads(function["arguments"])}})
    return {**message, "tool_calls": decoded}


class _Parser:
    """A state machine: think, content, block (inside the calls), header, call, parameter (its header), value, skip."""

    markers = frozenset((THINK, THOUGHT))

    def __init__(self, tools: Collection[str] | None, *, thinking: bool, single: bool) -> None:
        tags = (CALLS, CALLS_END, CALL, CALL_END, PARAMETER, PARAMETER_END)
        self._lexer = Lexer(("\n\n" + CALLS, *tags))
        self._calls = Calls(tools)
        self._single = single
        self._state = "think" if thinking else "content"
        self._after = False  # a block of calls came before: blank text after it is dropped
        self._raw: list[str] = []
        self._header = ""
        self._names: set[str] = set()
        self._is_text = False
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
        return [*self._flush(), *self._control(token)] if not self.ended else []

    def finish(self) -> list[Part]:
        return [*self._flush(), *self._finish()] if not self.ended else []

    # ---- what comes in ----

    def _text(self, text: str) -> Iterator[Part]:
        if self.ended:
            return
        match self._state:
            case "think":
                yield Reasoning(text)
            case "content" if self._after:
                self._raw.append(text)
                if text.strip():
                    self._after = False
                    yield Content(self._take())
            case "content":
                yield Content(text)
            case "header" | "parameter":
                yield from self._read_header(text)
            case "value":
                yield from self._calls.add(_json(text)[1:-1] if self._is_text else text)
            case _:
                self._raw.append(text)

    def _control(self, token: str) -> Iterator[Part]:
        if self._state == "think" and token == THOUGHT:
            self._state = "content"
        elif self._state == "content" and token == THINK:
            self._state = "think"
        elif self._state == "skip":
            self._raw.append(token)
        else:
            yield stray(token)

    def _tag(self, tag: str) -> Iterator[Part]:
        if self.ended:
            return
        match self._state:
            case "think" if tag != "\n\n" + CALLS or self._calls.tools is None:
                yield Reasoning(tag)  # the model only writes about the format
            case "think" | "content":
                yield from self._begin(tag)
            case "skip":
                self._raw.append(tag)
                if tag == CALLS_END:
                    yield _unexpected(self._take())
                    self._end_block()
            case "value" if tag != PARAMETER_END:
                yield from self._text(tag)  # only its own end tag ends a value
            case "value":
                yield from self._calls.add('"' if self._is_text else "")
                self._state = "call"
            case _:
                yield from self._inside(tag.strip())

    def _begin(self, tag: str) -> Iterator[Part]:
        begins = tag.strip() in (CALLS, CALL)
        if not begins:
            yield stray(tag)
            return
        if self._calls.tools is None:
            self._state = "skip"
            self._raw = [tag]
            return
        if self._state == "think":
            yield Warn("unclosed_reasoning", "the model called a tool before it ended its reasoning")
        self._raw = []
        self._state = "block"
        if tag == CALL:
            yield Warn("malformed_tool_call", f"the model called a tool without {CALLS} before it")
            self._state = "header"
            self._header = ""

    def _inside(self, tag: str) -> Iterator[Part]:
        """Read a tag between the begin and the end of the calls, outside values."""
        yield from self._leave_header()
        raw = self._take()
        if raw.strip():
            yield _malformed("the model wrote text among its tool calls", raw)
        match tag:
            case "<｜DSML｜invoke":
                yield from self._abandon()
                self._state = "header"
                self._header = ""
            case "</｜DSML｜function_calls>":
                yield from self._abandon()
                self._end_block()
            case "</｜DSML｜invoke>" if self._calls.open:
                yield from self._calls.add("}" if self._names else "{}")
                yield from self._calls.end()
                self._state = "block"
                self.ended = self._single
            case "<｜DSML｜parameter" if self._calls.open:
                self._state = "parameter"
                self._header = ""
            case _:
                yield stray(tag)

    # ---- headers: the text between a tag's name and its > ----

    def _read_header(self, text: str) -> Iterator[Part]:
        begin = max(len(self._header) - 1, 0)
        self._header += text
        end = self._header.find('">', begin)
        if end < 0 or end > _LONGEST_HEADER:
            if len(self._header) > _LONGEST_HEADER:
                self._header, rest = self._header[:_LONGEST_HEADER], self._header[_LONGEST_HEADER:]
                yield from self._leave_header()
                yield from self._text(rest)
            return
        header, rest = self._header[: end + 1], self._header[end + 2 :]
        match = _HEADER.fullmatch(header)
        if match is None:
            self._header = header + ">"
            yield from self._leave_header()
        elif self._state == "header":
            yield from self._calls.start(match[1])
            self._names = set()
            self._state = "call"
        else:
            yield from self._start_parameter(match[1], match[2])
        if rest:
            yield from self._text(rest)

    def _start_parameter(self, name: str, string: str | None) -> Iterator[Part]:
        if string is None:
            yield self._calls.warn(
                "malformed_tool_call",
                f"the model did not say whether {name!r} is a string; it was read as one",
            )
        self._is_text = string != "false"
        begin = ", " if self._names else "{"
        self._names.add(name)
        self._state = "value"
        yield from self._calls.add(f"{begin}{_json(name)}: " + ('"' if self._is_text else ""))

    def _leave_header(self) -> Iterator[Part]:
        """Report a header that was not completed."""
        if self._state in ("header", "parameter"):
            tag = CALL if self._state == "header" else PARAMETER
            yield _malformed("the model wrote a tag that cannot be read", tag + self._header)
            self._state = "block" if self._state == "header" else "call"

    # ---- ends ----

    def _abandon(self) -> Iterator[Part]:
        if self._calls.open:
            yield from self._calls.cut("the model did not end this call")

    def _end_block(self) -> None:
        self._state = "content"
        self._after = True

    def _flush(self) -> Iterator[Part]:
        """Read what the lexer held back, at the end of the answer. An incomplete tag is reported and is not text."""
        held = self._lexer.rest()
        if "<｜" in held or "</｜" in held:
            yield Warn("truncated_tool_call", "the answer ended inside a tag", raw=held)
        elif held:
            yield from self._text(held)

    def _finish(self) -> Iterator[Part]:
        match self._state:
            case "header":
                yield Warn(
                    "truncated_tool_call", "the answer ended inside a tool call", raw=CALL + self._header
                )
            case "parameter":
                yield from self._calls.cut("the answer ended inside this call", PARAMETER + self._header)
            case "call" | "value":
                yield from self._calls.cut("the answer ended inside this call", self._take().strip())
            case "block":
                raw = self._take()
                yield Warn(
                    "truncated_tool_call", f"the answer ended without {CALLS_END}", raw=raw.strip() or None
                )
            case "skip":
                yield _unexpected(self._take())

    def _take(self) -> str:
        raw, self._raw = "".join(self._raw), []
        return raw


def _malformed(message: str, raw: str) -> Warn:
    return Warn("malformed_tool_call", message, raw=raw)


def _unexpected(raw: str) -> Warn:
    return Warn("unexpected_tool_call", "the model called a tool, but this request allows none", raw=raw)
