"""The interface of a chat format. Its defaults are those of a format without tools and reasoning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from server.chat.grammar import CallRules, ToolForm
from server.chat.parsing import PlainParser
from server.chat.parts import Parser


class ChatFormat(ABC):
    """One way of writing a conversation as a prompt, and of reading the answer.

    Attributes:
        tools: the format has tool calls.
        reasons: answers may have reasoning, marked by <think> and </think>.
        thinking: a request may switch reasoning on and off.
        thinking_with_tools: a request may have both tools and reasoning.
        names: the prompt has the names of speakers.
        source: the Jinja template that the format runs; None if it is code.
        variables: what else a request may set of the prompt, by name.
    """

    tools: bool = False
    reasons: bool = False
    thinking: bool = False
    thinking_with_tools: bool = False
    names: bool = False
    source: str | None = None
    variables: frozenset[str] = frozenset()

    def with_variables(self, values: Mapping[str, Any]) -> ChatFormat:
        """The format with some of its `variables` set."""
        return self

    def writes_role(self, role: str) -> bool:
        """Whether a message may have this role, which is none of OpenAI's."""
        return False

    @abstractmethod
    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt's text, in which control tokens are written out.

        Args:
            messages: OpenAI's messages, with content that is text.
            tools: OpenAI's tools, each with `parameters`.
            thinking: whether the model reasons; None is the format's default.
            add_generation_prompt: end the prompt with the opening of the assistant's turn.

        Raises:
            PromptError: the format cannot express these messages; the message says why.
        """

    def decode(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return the messages with all values decoded that `render` writes decoded.

        `server.chat.guard` calls it before `render`, so that it sees the text that the prompt will have.

        Raises:
            PromptError: a value cannot be decoded.
        """
        return messages

    def plain_markers(self, role: str) -> tuple[str, ...]:
        """The format's markers that are ordinary text to the tokenizer, and that a message of `role` must not forge."""
        return ()

    def parser(
        self, *, tools: Collection[str] | None = None, thinking: bool = False, single: bool = False
    ) -> Parser:
        """Return a new parser for one answer.

        Args:
            tools: names of the tools that may be called; None if no tool may be called. A mapping also has the schema
                of each one's arguments, which says what a value is where a format does not quote it.
            thinking: the prompt has opened the model's reasoning.
            single: the answer ends with its first call.
        """
        return PlainParser()

    def opening(self, tool: str | None) -> str:
        """The text that opens a call: of the tool with this name, or of any tool if it is None."""
        raise NotImplementedError

    def call_rules(
        self, tools: Sequence[ToolForm], *, named: str | None, single: bool, tokens: Mapping[str, int]
    ) -> CallRules:
        """Return the grammar of calls.

        Args:
            tools: the tools that may be called; at least one
            named: the tool whose call the prompt has opened, if it has opened one of a certain tool
            single: there is one call
            tokens: the control tokens of the vocabulary, text -> id

        Raises:
            UnfitToolError: a strict tool cannot be enforced.
        """
        raise NotImplementedError
