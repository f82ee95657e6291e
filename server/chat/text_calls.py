"""What the readers of calls in text share: reasoning, tags, and content that may turn out to be a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator

from server.chat.parsing import THINK, THOUGHT, Calls, Lexer, stray
from server.chat.parts import Content, Part, Reasoning, Warn, merge


class TextCallParser(ABC):
    """A state machine that reads letters and tags. A tag may be a control token or ordinary text.

    Its own states are `think`, `fresh` (what comes may be a call; it waits in `_raw`) and `content`; others are inside calls.

    Args:
        tools: names of the tools that may be called; None if no tool may be called.
        tags: the format's.
        reasons: answers may have reasoning.
        thinking: the prompt has opened it.
        single: the answer ends with its first call.
    """

    def __init__(
        self,
        tools: Collection[str] | None,
        tags: Collection[str],
        *,
        reasons: bool,
        thinking: bool,
        single: bool,
    ) -> None:
        self._tags = frozenset(tags)
        self.markers = self._tags | (frozenset((THINK, THOUGHT)) if reasons else frozenset())
        self._lexer = Lexer(tuple(tags))
        self._calls = Calls(tools)
        self._single = single
        self._state = "think" if thinking else "fresh"
        self._after = False  # a call came before: blank text after it is dropped
        self._raw: list[str] = []
        self.ended = False

    @property
    def thinking(self) -> bool:
        """Whether the text that comes next is reasoning."""
        return self._state == "think"

    @property
    def calls(self) -> int:
        """How many tool calls are complete."""
        return self._calls.complete

    def text(self, text: str) -> list[Part]:
        """Read ordinary text."""
        return merge(
            part
            for is_tag, piece in self._lexer.read(text)
            for part in (self._read_tag(piece) if is_tag else self._letters(piece))
        )

    def marker(self, token: str) -> list[Part]:
        """Read a control token."""
        parts = list(self._letters(self._lexer.rest()))
        if self.ended:
            return parts
        if token in self._tags:
            return [*parts, *self._read_tag(token)]
        if token == THOUGHT and self._state == "think":
            self._state = "fresh"
        elif token == THINK and THINK in self.markers and self._state in ("fresh", "content"):
            parts += self._settle()
            self._state = "think"
        else:
            parts.append(stray(token))
        return parts

    def finish(self) -> list[Part]:
        """End the answer."""
        parts = list(self._letters(self._lexer.rest()))
        if self.ended:
            return parts
        if self._state == "fresh" and not self._after:
            return [*parts, Content(self._take())]
        return [*parts, *(self._settle() if self._state in ("fresh", "content") else self._finish())]

    # ---- for the formats ----

    @abstractmethod
    def _letter(self, letter: str) -> Iterator[Part]:
        """Read a letter in `fresh`, or inside a call."""

    @abstractmethod
    def _tag(self, tag: str) -> Iterator[Part]:
        """Read a tag outside reasoning."""

    @abstractmethod
    def _finish(self) -> Iterator[Part]:
        """End an answer that is inside a call."""

    def _settle(self) -> Iterator[Part]:
        """Give out what waited and is no call. Blank text beside calls is dropped."""
        if (raw := self._take()).strip():
            yield Content(raw)
        self._state, self._after = "content", False

    def _leave(self) -> None:
        """End a call."""
        self._take()
        self._state, self._after = "fresh", True
        self.ended = self._single and self._calls.complete > 0

    def _take(self) -> str:
        raw, self._raw = "".join(self._raw), []
        return raw

    # ---- what comes in ----

    def _letters(self, text: str) -> Iterator[Part]:
        for place, letter in enumerate(text):
            if self.ended:
                return
            if self._state in ("think", "content"):
                yield Reasoning(text[place:]) if self._state == "think" else Content(text[place:])
                return
            yield from self._letter(letter)

    def _read_tag(self, tag: str) -> Iterator[Part]:
        if self._state == "think":
            yield Reasoning(tag)  # the model only writes about the format
        elif not self.ended:
            yield from self._tag(tag)


class PartwiseCallParser(TextCallParser):
    """A reader of calls whose name and arguments stand apart.

    Calls that the request does not allow are read, too: to find their end, and to tell what they were.
    """

    def __init__(
        self,
        tools: Collection[str] | None,
        tags: Collection[str],
        *,
        reasons: bool,
        thinking: bool,
        single: bool,
    ) -> None:
        super().__init__(tools, tags, reasons=reasons, thinking=thinking, single=single)
        self._record = self._calls if tools is not None else Calls(())
        self._unwanted: list[str] = []  # all letters of calls that the request does not allow

    @abstractmethod
    def _inside(self, letter: str) -> Iterator[Part]:
        """Read a letter inside a call."""

    @abstractmethod
    def _cut(self, message: str) -> Iterator[Part]:
        """End a call that is not complete."""

    def _letter(self, letter: str) -> Iterator[Part]:
        if self._state == "fresh":
            self._raw.append(letter)
            if not letter.isspace():
                yield from self._settle()
            return
        self._unwanted.append(letter)
        yield from self._wanted(self._inside(letter))

    def _wanted(self, parts: Iterator[Part]) -> Iterator[Part]:
        if self._calls.tools is not None:
            yield from parts
        else:
            list(parts)

    def _finish(self) -> Iterator[Part]:
        if self._calls.tools is None:
            yield unexpected("".join(self._unwanted))
        else:
            yield from self._cut("the answer ended inside this call")


def unexpected(raw: str) -> Warn:
    """Make a report about a call in an answer that may have none."""
    return Warn("unexpected_tool_call", "the model called a tool, but this request allows none", raw=raw)
