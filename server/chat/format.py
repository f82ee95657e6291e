"""The face of a prompt format, with the answers of one that can do no more than plain text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from server.chat.parsing import PlainParser
from server.chat.parts import Parser


class ChatFormat(ABC):
    """One way of writing a conversation as a prompt, and of reading the answer.

    Attributes:
        tools: it has tool calls.
        reasons: answers may have reasoning, marked by <think> and </think>.
        thinking: a request may switch reasoning on and off.
        thinking_with_tools: both at once.
    """

    tools: bool = False
    reasons: bool = False
    thinking: bool = False
    thinking_with_tools: bool = False

    @abstractmethod
    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt's text, control tokens written out.

        Args:
            messages: as OpenAI's, with content that is text.
            tools: as OpenAI's, each with `parameters`.
            thinking: None is the format's default.
            add_generation_prompt: open the assistant's turn.

        Raises:
            PromptError: the format cannot express these messages; the message says why.
        """

    def decode(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Messages with everything decoded that `render` writes decoded, so that the guard sees its text.

        Raises:
            PromptError: something cannot be decoded.
        """
        return messages

    def plain_markers(self, role: str) -> tuple[str, ...]:
        """Markers of the format that are no control tokens, and that messages of a role must not forge."""
        return ()

    def parser(
        self, *, tools: Collection[str] | None = None, thinking: bool = False, single: bool = False
    ) -> Parser:
        """A reader of one answer.

        Args:
            tools: the tools that may be called; None where none may.
            thinking: the prompt has opened the model's reasoning.
            single: the answer ends with its first call.
        """
        return PlainParser()

    def opening(self, tool: str | None) -> str:
        """What an answer begins with that calls a tool: any, or the one of that name."""
        raise NotImplementedError
