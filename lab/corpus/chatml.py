"""Renders ChatML as token ids, part by part, so that text can never become a control token.

The ids are the same as if the rendered string were encoded: control tokens split a text before any merge, so the
text between two of them can be encoded by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""The system message that SmolLM2-Instruct's own template adds if a chat has none."""


class Encoder(Protocol):
    """The part of a tokenizer that the corpus needs."""

    def encode(self, text: str, *, add_bos: bool = ..., parse_special: bool = ...) -> Sequence[int]:
        """Return the ids of `text`. Control tokens written in the text are read as such only with `parse_special`."""
        ...


class ChatTurn(msgspec.Struct, frozen=True):
    """One message of a chat."""

    role: str
    content: str


class Rendered(NamedTuple):
    """A chat as token ids; `answers` are the spans [start, end) of the assistant's turns with their headers."""

    ids: list[int]
    answers: list[tuple[int, int]]


class ChatML:
    """Renders chats with one tokenizer.

    Attributes:
        separator: the token between documents of one sequence. It is the end-of-text token, with which the
            model learnt documents in pre-training, and not the token that ends a turn.

    Raises:
        ValueError: the vocabulary lacks one of ChatML's control tokens.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._start = self._control("<|im_start|>")
        self._end = self._control("<|im_end|>")
        self.separator = self._control("<|endoftext|>")
        self._newline = self.text("\n")

    def text(self, text: str) -> list[int]:
        """Encode plain text."""
        return list(self._encoder.encode(text, add_bos=False, parse_special=False))

    def render(self, messages: Sequence[ChatTurn], *, generation_prompt: bool = False) -> Rendered:
        """Encode a chat. If it has no system message, the default one is added."""
        turns = list(messages)
        if not turns or turns[0].role != "system":
            turns.insert(0, ChatTurn("system", SYSTEM_PROMPT))
        ids: list[int] = []
        answers: list[tuple[int, int]] = []
        for turn in turns:
            begin = len(ids)
            ids += [self._start, *self.text(f"{turn.role}\n{turn.content}"), self._end]
            if turn.role == "assistant":
                answers.append((begin, len(ids)))
            ids += self._newline
        if generation_prompt:
            ids += [self._start, *self.text("assistant\n")]
        return Rendered(ids, answers)

    def _control(self, text: str) -> int:
        ids = self._encoder.encode(text, add_bos=False, parse_special=True)
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer has no control token {text}: the corpus needs a ChatML vocabulary"
            )
        return int(ids[0])
