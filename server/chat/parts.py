"""The parts of a model's answer, and the interface of the parsers that find them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

from msgspec import Struct
from msgspec.structs import replace


class Content(Struct, frozen=True):
    """Text for the user."""

    text: str


class Reasoning(Struct, frozen=True):
    """Text that the model thinks before it answers."""

    text: str


class CallStart(Struct, frozen=True):
    """A tool call begins; calls are numbered from 0."""

    index: int
    name: str


class CallArguments(Struct, frozen=True):
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


class Warn(Struct, frozen=True):
    """The model broke its format.

    Attributes:
        code: what it did.
        message: one sentence for the client.
        index: the number of the call with the fault; None if the fault is in no reported call.
        raw: the model's text, if no other part has it.
    """

    code: Fault
    message: str
    index: int | None = None
    raw: str | None = None


Part = Content | Reasoning | CallStart | CallArguments | Warn


class Parser(Protocol):
    """Reads an answer piece by piece. The merged parts do not depend on how the text is cut into pieces."""

    @property
    def markers(self) -> frozenset[str]:
        """The control tokens that have a meaning in this format."""
        ...

    @property
    def thinking(self) -> bool:
        """Whether the text that comes next is reasoning."""
        ...

    @property
    def calls(self) -> int:
        """How many tool calls are complete."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the answer is over, so that more text is not wanted."""
        ...

    def text(self, text: str) -> list[Part]:
        """Read ordinary text, which contains no control token."""
        ...

    def marker(self, token: str) -> list[Part]:
        """Read a control token."""
        ...

    def finish(self) -> list[Part]:
        """End the answer: return what was held back, and report what is incomplete."""
        ...


def merge(parts: Iterable[Part]) -> list[Part]:
    """Join neighbouring parts of one kind, and leave out empty parts."""
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
