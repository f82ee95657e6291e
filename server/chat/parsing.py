"""What the parsers of answers share: the search for markers in text, plain parsers, and the record of calls.

Parsing takes time linear in the length of the answer: text is searched once for literal markers, and at most the
length of the longest marker is held back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence

from server.chat.parts import CallArguments, CallStart, Content, Fault, Part, Reasoning, Warn

THINK, THOUGHT = "<think>", "</think>"


class Lexer:
    """Splits text into markers and the text between them. The result does not depend on how the text is pushed."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = tuple(sorted(markers, key=len, reverse=True))
        self._firsts = frozenset(marker[0] for marker in self._markers)
        self._longest = max(map(len, self._markers), default=1)
        self._search = re.compile("|".join(map(re.escape, self._markers)) or r"(?!)").search
        self._held = ""

    def read(self, text: str) -> Iterator[tuple[bool, str]]:
        """Yield what is certain now, as (is a marker, its text)."""
        pending = self._held + text
        position = 0
        while match := self._search(pending, position):
            if match.start() > position:
                yield False, pending[position : match.start()]
            yield True, match[0]
            position = match.end()
        keep = self._possible_start(pending, position)
        self._held = pending[keep:]
        if keep > position:
            yield False, pending[position:keep]

    def rest(self) -> str:
        """Return the text that is held back, and forget it."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, pending: str, position: int) -> int:
        for start in range(max(position, len(pending) - self._longest + 1), len(pending)):
            if pending[start] in self._firsts:
                tail = pending[start:]
                if any(marker.startswith(tail) for marker in self._markers):
                    return start
        return len(pending)


class PlainParser:
    """Parses answers of formats without reasoning and tool calls: all text is content. Markers are reported."""

    markers: frozenset[str] = frozenset()
    thinking = False
    calls = 0
    ended = False

    def text(self, text: str) -> list[Part]:
        """Return the text as content."""
        return [Content(text)] if text else []

    def marker(self, token: str) -> list[Part]:
        """Report a control token, which has no meaning inside an answer; it does not become text."""
        return [stray(token)]

    def finish(self) -> list[Part]:
        """Return nothing: this parser holds nothing back."""
        return []


class ThinkingParser(PlainParser):
    """Parses answers of formats that mark reasoning with <think> and </think> and have no tool calls."""

    markers = frozenset((THINK, THOUGHT))

    def __init__(self, *, thinking: bool) -> None:
        self.thinking = thinking

    def text(self, text: str) -> list[Part]:
        """Return the text as reasoning between the markers, else as content."""
        if not text:
            return []
        return [Reasoning(text) if self.thinking else Content(text)]

    def marker(self, token: str) -> list[Part]:
        """Begin or end reasoning; report any other marker."""
        if token not in self.markers or (token == THOUGHT) != self.thinking:
            return [stray(token)]
        self.thinking = token == THINK
        return []


class Calls:
    """Records the calls of one answer: starts them, streams their arguments, checks the arguments at the end.

    Args:
        tools: names of the tools that may be called; None if no tool may be called.
    """

    def __init__(self, tools: Collection[str] | None) -> None:
        self.tools = None if tools is None else frozenset(tools)
        self.complete = 0
        self._next = 0
        self._arguments: list[str] = []
        self.open = False

    @property
    def index(self) -> int:
        """The number of the newest call."""
        return self._next - 1

    def start(self, name: str) -> Iterator[Part]:
        """Begin a call."""
        self._next += 1
        self._arguments = []
        self.open = True
        yield CallStart(self.index, name)
        if self.tools is not None and name not in self.tools:
            yield self.warn("unknown_tool", f"the model called {name!r}, which is not among the tools")

    def add(self, text: str) -> Iterator[Part]:
        """Add text to the arguments of the newest call."""
        if text:
            self._arguments.append(text)
            yield CallArguments(self.index, text)

    def end(self) -> Iterator[Part]:
        """Complete the newest call, and check that its arguments are a JSON object."""
        self.open = False
        self.complete += 1
        if problem := json_object_problem("".join(self._arguments)):
            yield self.warn("invalid_arguments", f"the call's arguments are {problem}")

    def cut(self, message: str, raw: str | None = None) -> Iterator[Part]:
        """End the newest call, which is not complete, and report it."""
        self.open = False
        yield Warn("truncated_tool_call", message, self.index, raw or None)

    def warn(self, code: Fault, message: str) -> Warn:
        """Make a report about the newest call."""
        return Warn(code, message, self.index)


def json_object_problem(text: str) -> str | None:
    """What is wrong with a text that should be a JSON object without duplicate keys; None if it is one."""

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("duplicate key")
        return found

    def constant(name: str) -> object:
        raise ValueError(name)

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError):
        return "not valid JSON"
    return None if isinstance(value, dict) else "not a JSON object"


def stray(token: str) -> Warn:
    """Make a report about a marker at a place where the format has none."""
    return Warn(
        "stray_marker", f"the model wrote {token} where it has no meaning; it was left out", raw=token
    )
