"""The format of DeepSeek-V3.1, V3.1-Terminus and V3.2-Exp.

Definition: the chat template and the section on tools in the model cards of deepseek-ai/DeepSeek-V3.1
and deepseek-ai/DeepSeek-V3.2-Exp. All markers are control tokens. The text that opens the assistant's
turn switches thinking on or off. Tools are called without thinking.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from server.chat.deepseek import ASSISTANT, BOS, EOS, USER, calls_of, require_tokens, text_of
from server.chat.errors import PromptError
from server.chat.format import ChatFormat
from server.chat.grammar import CallRules, ToolForm, literal
from server.chat.parsing import THINK, THOUGHT, Calls, stray
from server.chat.parts import Content, Parser, Part, Reasoning, Warn
from server.text.tokenizer import Tokenizer

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
OUTPUT, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"

_RULES = f"""
IMPORTANT: ALWAYS adhere to this exact format for tool use:
{CALLS}{CALL}tool_call_name{SEPARATOR}tool_call_arguments{CALL_END}{{{{additional_tool_calls}}}}{CALLS_END}

Where:

- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces
"""


class DeepSeekV31(ChatFormat):
    """The chat format of DeepSeek-V3.1."""

    tools = True
    reasons = True
    thinking = True
    thinking_with_tools = False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt's text.

        Raises:
            PromptError: thinking should continue after a tool's result, which this format cannot express.
        """
        system = "\n\n".join(text_of(message) for message in messages if message["role"] == "system")
        if tools:
            system += "\n\n" + _describe(tools)
        turns = [message for message in messages if message["role"] != "system"]
        out = [BOS, system]
        before = "system"  # role of the message before: a tool's result continues the assistant's turn
        for message in turns:
            out += _turn(message, before)
            before = message["role"]
        if add_generation_prompt:
            if before != "tool":
                out.append(ASSISTANT + (THINK if thinking else THOUGHT))
            elif thinking:
                raise PromptError(
                    "this model answers a tool's result without thinking; switch thinking off for this request"
                )
        return "".join(out)

    def parser(
        self, *, tools: Collection[str] | None = None, thinking: bool = False, single: bool = False
    ) -> Parser:
        """Return a new parser for one answer."""
        return _Parser(tools, thinking=thinking, single=single)

    def opening(self, tool: str | None) -> str:
        """The text that opens a call, of any tool or of the named one."""
        return CALLS + CALL + ("" if tool is None else tool + SEPARATOR)

    def call_rules(
        self, tools: Sequence[ToolForm], *, named: str | None, single: bool, tokens: Mapping[str, int]
    ) -> CallRules:
        """Return the grammar of calls; a control token is itself in it."""
        arguments = {tool.name: f"args{number}" for number, tool in enumerate(tools)}
        begin, end, ends = (literal(token, tokens) for token in (CALL, CALL_END, CALLS_END))
        lines = [f"{arguments[tool.name]}: {tool.arguments()}" for tool in tools]
        called = " | ".join(f"{literal(name + SEPARATOR, tokens)} {rule}" for name, rule in arguments.items())
        lines += [f"called: {called}", f"after: {'' if single else f'({begin} called {end})* '}{ends}"]
        calls = f"{literal(CALLS, tokens)} {begin} called {end} after"
        return CallRules(
            lines=[*lines, "PLAIN: /(?s:.+)/"],
            said=f"PLAIN? ({calls})?",
            calls=calls,
            rest=f"{'called' if named is None else arguments[named]} {end} after",
        )


def build(weights: Path, tokenizer: Tokenizer | None = None) -> DeepSeekV31:
    """Build the format, and check the vocabulary if there is one.

    Raises:
        PromptError: the vocabulary lacks one of the format's control tokens.
    """
    if tokenizer is not None:
        tokens = (BOS, EOS, USER, ASSISTANT, THINK, THOUGHT, *_Parser.markers, OUTPUT, OUTPUT_END)
        require_tokens("deepseek-v3.1", tokenizer, tuple(dict.fromkeys(tokens)))
    return DeepSeekV31()


def _describe(tools: Sequence[Mapping[str, Any]]) -> str:
    described = "".join(
        f"\n### {tool['function']['name']}\n"
        f"Description: {tool['function'].get('description', '')}\n\n"
        f"Parameters: {json.dumps(tool['function']['parameters'], ensure_ascii=False)}\n"
        for tool in tools
    )
    return "## Tools\nYou have access to the following tools:\n" + described + _RULES


def _turn(message: Mapping[str, Any], before: str) -> Iterator[str]:
    match message["role"]:
        case "user":
            yield USER + text_of(message)
        case "tool":
            yield OUTPUT + text_of(message) + OUTPUT_END
        case "assistant":
            if before in ("user", "system"):
                yield ASSISTANT + THOUGHT
            calls = calls_of(message)
            yield text_of(message)
            if calls:
                yield CALLS
                yield from (f"{CALL}{call['name']}{SEPARATOR}{call['arguments']}{CALL_END}" for call in calls)
                yield CALLS_END
            yield EOS
        case role:
            raise PromptError(f"this model's chat format has no role {role!r}")


class _Parser:
    """A state machine: think, content, block (inside the calls), name, arguments, skip (calls are not wanted)."""

    markers = frozenset((THINK, THOUGHT, CALLS, CALLS_END, CALL, CALL_END, SEPARATOR))

    def __init__(self, tools: Collection[str] | None, *, thinking: bool, single: bool) -> None:
        self._calls = Calls(tools)
        self._single = single
        self._state = "think" if thinking else "content"
        self._after = False  # a block of calls came before: blank text after it is dropped
        self._raw: list[str] = []  # text of the name, skipped text, or text that should not be there
        self.ended = False

    @property
    def thinking(self) -> bool:
        return self._state == "think"

    @property
    def calls(self) -> int:
        return self._calls.complete

    def text(self, text: str) -> list[Part]:
        return list(self._text(text)) if text and not self.ended else []

    def marker(self, token: str) -> list[Part]:
        return list(self._marker(token)) if not self.ended else []

    def finish(self) -> list[Part]:
        return list(self._finish()) if not self.ended else []

    def _text(self, text: str) -> Iterator[Part]:
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
            case "arguments":
                yield from self._calls.add(text)
            case _:
                self._raw.append(text)

    def _marker(self, token: str) -> Iterator[Part]:
        if self._state == "skip":
            yield from self._skip(token)
        elif token in (CALLS, CALL) and self._state in ("think", "content"):
            yield from self._begin(token)
        elif token in (THINK, THOUGHT) and (token == THOUGHT) == (self._state == "think"):
            if self._state in ("think", "content"):
                self._state = "content" if token == THOUGHT else "think"
            else:
                yield stray(token)
        elif self._state in ("think", "content"):
            yield stray(token)
        else:
            yield from self._inside(token)

    def _begin(self, token: str) -> Iterator[Part]:
        if self._calls.tools is None:
            self._state = "skip"
            self._raw = [token]
            return
        if self._state == "think":
            yield Warn("unclosed_reasoning", "the model called a tool before it ended its reasoning")
        if token == CALL:
            yield Warn("malformed_tool_call", f"the model called a tool without {CALLS} before it")
        self._raw = []
        self._state = "block" if token == CALLS else "name"

    def _inside(self, token: str) -> Iterator[Part]:
        """Read a marker between the begin and the end of the calls."""
        match self._state, token:
            case "name", "<｜tool▁sep｜>":
                if name := self._take().strip():
                    yield from self._calls.start(name)
                    self._state = "arguments"
                else:
                    yield _malformed("the model called a tool without a name", CALL + SEPARATOR)
                    self._state = "block"
                return
            case "arguments", "<｜tool▁call▁end｜>":
                yield from self._calls.end()
                self._state = "block"
                self.ended = self._single
                return
            case _, "<｜tool▁call▁begin｜>" | "<｜tool▁call▁end｜>" | "<｜tool▁calls▁end｜>":
                yield from self._leave()
            case _:
                yield stray(token)
                return
        self._state = {CALL: "name", CALL_END: "block", CALLS_END: "content"}[token]
        self._after = self._state == "content"

    def _leave(self) -> Iterator[Part]:
        """End a state, and report it if the model did not complete it."""
        raw = self._take()
        if self._state == "arguments":
            yield from self._calls.cut("the model did not end this call")
        elif self._state == "name":
            yield _malformed("the model called a tool and did not go on to its arguments", CALL + raw)
        elif raw.strip():
            yield _malformed("the model wrote text among its tool calls", raw)

    def _skip(self, token: str) -> Iterator[Part]:
        self._raw.append(token)
        if token == CALLS_END:
            yield _unexpected(self._take())
            self._state = "content"
            self._after = True

    def _finish(self) -> Iterator[Part]:
        match self._state:
            case "arguments":
                yield from self._calls.cut("the answer ended inside this call")
            case "name":
                yield Warn(
                    "truncated_tool_call", "the answer ended inside a tool call", raw=CALL + self._take()
                )
            case "block":
                yield from self._leave()
                yield Warn("truncated_tool_call", f"the answer ended without {CALLS_END}")
            case "skip":
                yield _unexpected(self._take())

    def _take(self) -> str:
        raw, self._raw = "".join(self._raw), []
        return raw


def _malformed(message: str, raw: str) -> Warn:
    return Warn("malformed_tool_call", message, raw=raw)


def _unexpected(raw: str) -> Warn:
    return Warn("unexpected_tool_call", "the model called a tool, but this request allows none", raw=raw)
