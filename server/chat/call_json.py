"""Calls that are JSON objects with a name and arguments: where an object ends, how it begins, what it says."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from server.chat.parsing import Calls
from server.chat.parts import Part, Warn

FENCE = "```"
_STRUCTURE = re.compile(r'["\\{}\[\]]')
_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"(?:name|function)"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*'
)
_LONGEST_HEAD = 1024
_MORE_KEYS = frozenset(("id", "type"))


class ObjectEnd:
    """Finds the end of a JSON object that arrives in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._escaped_at = -1  # the place of a character after a backslash, from the start of the next piece
        self.in_string = False

    def end(self, text: str) -> int:
        """Return where the object ends in `text`, which continues the pieces before; -1 if it does not."""
        escaped = self._escaped_at
        for match in _STRUCTURE.finditer(text):
            at, letter = match.start(), match[0]
            if at == escaped:
                continue
            if self.in_string:
                if letter == "\\":
                    escaped = at + 1
                elif letter == '"':
                    self.in_string = False
            elif letter == '"':
                self.in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        self._escaped_at = escaped - len(text) if escaped >= len(text) else -1
        return -1


class CallReader:
    """Reads one call letter by letter, from its first brace to its last. Arguments stream as they come.

    Attributes:
        done: the call's last brace was read.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._raw: list[str] = []
        self._whole, self._arguments = ObjectEnd(), ObjectEnd()
        self._state = "head"
        self.done = False

    @property
    def in_string(self) -> bool:
        """Whether the next letter is inside a JSON string."""
        return self._whole.in_string

    def letter(self, letter: str) -> Iterator[Part]:
        """Read one letter. The first is the brace."""
        self.done = self._whole.end(letter) >= 0
        if self._state == "head" and letter == "{" and 0 < len(self._raw) <= _LONGEST_HEAD:
            match = _HEAD.fullmatch("".join(self._raw))
            if match is not None and (name := name_of(match[1])) is not None:
                self._state, self._raw = "arguments", []
                yield from self._calls.start(name)
        if self._state == "arguments":
            yield from self._calls.add(letter)
            if self._arguments.end(letter) >= 0:
                self._state = "tail"
            return
        self._raw.append(letter)
        if self.done:
            raw = "".join(self._raw)
            yield from self._whole_call(raw) if self._state == "head" else self._tail(raw)

    def cut(self, message: str) -> Iterator[Part]:
        """End a call that is not complete."""
        match self._state:
            case "head":
                yield Warn("truncated_tool_call", message, raw="".join(self._raw))
            case "arguments":
                yield from self._calls.cut(message)
            case "tail":
                yield from self._calls.end()
                yield self._calls.warn("truncated_tool_call", f"{message}, after its arguments")

    def _tail(self, raw: str) -> Iterator[Part]:
        try:
            strange = json.loads('{"id":0' + raw).keys() - _MORE_KEYS
        except (ValueError, RecursionError):
            strange = {raw}
        if strange:
            yield self._calls.warn("malformed_tool_call", f"the model wrote {raw!r:.60} after its arguments")
        yield from self._calls.end()

    def _whole_call(self, raw: str) -> Iterator[Part]:
        """Read a call with its keys in another order, or with arguments that are no object."""
        found = call_of(raw)
        if found is None:
            message = "the model wrote a call that is not JSON with a name and arguments"
            yield Warn("malformed_tool_call", message, raw=raw)
            return
        name, arguments = found
        yield from self._calls.start(name)
        yield from self._calls.add(arguments)
        yield from self._calls.end()


class BareHeads:
    """How calls that stand alone begin, up to the brace of the arguments.

    Args:
        names: of the tools.
        keys: pairs of keys that a call may have: for the name and for the arguments.
        typed: a call may begin with `"type": "function"`.
    """

    def __init__(
        self, names: Collection[str], keys: Collection[tuple[str, str]], *, typed: bool = False
    ) -> None:
        self._keys, self._types = keys, ("", '"type":"function",') if typed else ("",)
        self.compact = {f"{before}{head}{{": name for before, head, name in self._all(names)}
        """Text without blanks -> name of the tool."""

    def _all(self, names: Collection[str]) -> Iterator[tuple[str, str, str]]:
        fences = ("", FENCE, f"{FENCE}json")
        for before, kind, (name_key, key), name in itertools.product(fences, self._types, self._keys, names):
            yield before, f'{{{kind}"{name_key}":{json.dumps(name)},"{key}":', name

    def find(self, compact: str) -> str | None:
        """The head that this text begins with."""
        return next((head for head in self.compact if compact.startswith(head)), None)

    def possible(self, compact: str) -> bool:
        """Whether a head begins with this text."""
        return any(head.startswith(compact) for head in self.compact)

    def pattern(self, names: Collection[str]) -> str:
        """A regular expression for the heads of these tools, with blanks, without the brace of the arguments."""
        heads = "|".join(spaced(head) for before, head, _ in self._all(names) if not before)
        fence = f"({spaced(FENCE)}{BLANK}({spaced('json')}{BLANK})?)?"
        return f"{BLANK}{fence}({heads})"


BLANK = r"[\s\x1c-\x1f]*"
"""A regular expression for all that Python takes for blank."""


def spaced(text: str) -> str:
    """A regular expression for a text with blanks anywhere in it."""
    return BLANK.join(map(re.escape, text))


def name_of(text: str) -> str | None:
    """The name that a JSON string spells; None if it is none, or empty."""
    try:
        name = json.loads(text)
    except ValueError:
        return None
    return name if isinstance(name, str) and name else None


def call_of(text: str) -> tuple[str, str] | None:
    """The name of a complete call, and its arguments as JSON; None if it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict):
        return None
    if isinstance(call.get("function"), dict):  # as OpenAI has it
        call = call["function"]
    name = call.get("name", call.get("function"))
    if not isinstance(name, str) or not name:
        return None
    arguments: Any = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # the JSON of the object, as OpenAI has it
        return name, arguments
    return name, json.dumps(arguments, ensure_ascii=False)
