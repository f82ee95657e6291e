"""What the parsers of answers share: finding markers in text, reasoning, and the book of calls.

Time is linear in the length of the answer: text is searched once for literal markers, and no more
than the longest marker is ever held back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence

from server.chat.parts import CallArguments, CallStart, Content, Fault, Part, Reasoning, Warn

THINK, THOUGHT = "<think>", "</think>"


class Lexer:
    """Cuts text into markers and what is between them, however the text is cut into pieces."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = tuple(sorted(markers, key=len, reverse=True))
        self._firsts = frozenset(marker[0] for marker in self._markers)
        self._longest = max(map(len, self._markers), default=1)
        self._search = re.compile("|".join(map(re.escape, self._markers)) or r"(?!)").search
        self._held = ""

    def read(self, text: str) -> Iterator[tuple[bool, str]]:
        """Give out what is now certain: (is a marker, its text)."""
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
        """Return what is held back, and forget it."""
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
    """For formats without reasoning and tool calls: an answer is its text. Stray markers are left out."""

    markers: frozenset[str] = frozenset()
    thinking = False
    calls = 0
    ended = False

    def text(self, text: str) -> list[Part]:
        """Everything is content."""
        return [Content(text)] if text else []

    def marker(self, token: str) -> list[Part]:
        """A control token that has no meaning inside an answer; it is not text."""
        return [stray(token)]

    def finish(self) -> list[Part]:
        """Nothing was held back."""
        return []


class ThinkingParser(PlainParser):
    """For formats that mark reasoning with <think> and </think>, and have no tool calls."""

    markers = frozenset((THINK, THOUGHT))

    def __init__(self, *, thinking: bool) -> None:
        self.thinking = thinking

    def text(self, text: str) -> list[Part]:
        """Reasoning or content."""
        if not text:
            return []
        return [Reasoning(text) if self.thinking else Content(text)]

    def marker(self, token: str) -> list[Part]:
        """Begin or end reasoning."""
        if token not in self.markers or (token == THOUGHT) != self.thinking:
            return [stray(token)]
        self.thinking = token == THINK
        return []


class Calls:
    """The book of one answer's calls: starts them, streams their arguments, checks them at their end.

    Args:
        tools: names of the tools that may be called; None where none may.
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
        """More of its arguments."""
        if text:
            self._arguments.append(text)
            yield CallArguments(self.index, text)

    def end(self) -> Iterator[Part]:
        """It is complete: check that its arguments are a JSON object."""
        self.open = False
        self.complete += 1
        if problem := json_object_problem("".join(self._arguments)):
            yield self.warn("invalid_arguments", f"the call's arguments are {problem}")

    def cut(self, message: str, raw: str | None = None) -> Iterator[Part]:
        """The newest call ends before it is complete."""
        self.open = False
        yield Warn("truncated_tool_call", message, self.index, raw or None)

    def warn(self, code: Fault, message: str) -> Warn:
        """Something about the newest call."""
        return Warn(code, message, self.index)


def json_object_problem(text: str) -> str | None:
    """Say what is wrong with a text that should be a JSON object without duplicate keys; None: nothing."""

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
    """Report a marker where the format has none."""
    return Warn(
        "stray_marker", f"the model wrote {token} where it has no meaning; it was left out", raw=token
    )
