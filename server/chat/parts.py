"""What a model's answer is made of, in the order in which it comes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; calls are numbered from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Fault = Literal[
    "invalid_arguments",
    "malformed_tool_call",
    "no_tool_call",
    "stray_marker",
    "truncated_tool_call",
    "unclosed_reasoning",
    "unexpected_tool_call",
    "unknown_tool",
]


@dataclass(frozen=True, slots=True)
class Warn:
    """The model broke its format.

    Attributes:
        code: what it did.
        message: one sentence for the client.
        index: the call that is concerned, if it is among the calls.
        raw: the model's text, if it is nowhere else.
    """

    code: Fault
    message: str
    index: int | None = None
    raw: str | None = None


Part = Content | Reasoning | CallStart | CallArguments | Warn


class Parser(Protocol):
    """Reads an answer piece by piece. However text is cut into pieces, the parts, merged, are the same.

    Attributes:
        markers: control tokens that have a meaning in this format.
        thinking: what comes now is reasoning.
        calls: tool calls that are complete.
        ended: what would come now is not wanted.
    """

    @property
    def markers(self) -> frozenset[str]:
        """See above."""
        ...

    @property
    def thinking(self) -> bool:
        """See above."""
        ...

    @property
    def calls(self) -> int:
        """See above."""
        ...

    @property
    def ended(self) -> bool:
        """See above."""
        ...

    def text(self, text: str) -> list[Part]:
        """Read ordinary text, which no control token is part of."""
        ...

    def marker(self, token: str) -> list[Part]:
        """Read a control token."""
        ...

    def finish(self) -> list[Part]:
        """The answer is over: give out what was held back, report what is incomplete."""
        ...


def merge(parts: Iterable[Part]) -> list[Part]:
    """Join neighbours of one kind, and leave out what is empty."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, Content | Reasoning | CallArguments) and not part.text:
            continue
        if isinstance(last, Content) and isinstance(part, Content):
            merged[-1] = Content(last.text + part.text)
        elif isinstance(last, Reasoning) and isinstance(part, Reasoning):
            merged[-1] = Reasoning(last.text + part.text)
        elif isinstance(last, CallArguments) and isinstance(part, CallArguments) and last.index == part.index:
            merged[-1] = replace(last, text=last.text + part.text)
        else:
            merged.append(part)
    return merged
