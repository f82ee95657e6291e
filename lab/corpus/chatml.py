"""Renders ChatML as token ids, part by part, so that text can never become a control token.

The ids are the same as if the rendered string were encoded: control tokens split a text before any merge, so the
text between two of them can be encoded by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from server.chat import ChatFormat

SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""The system message that the default model's own template adds if a chat has none; see `default_system` for others."""


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


def default_system(chat_format: ChatFormat) -> str | None:
    """Return the system message that a model's own format adds to a chat without one; None if it adds none.

    Raises:
        ValueError: the format does not write ChatML.
    """
    text = chat_format.render([{"role": "user", "content": "Hi"}])
    found = re.fullmatch(
        r"(?:<\|im_start\|>system\n(?P<system>.*?)<\|im_end\|>\n)?<\|im_start\|>user\nHi<\|im_end\|>\n<\|im_start\|>assistant\n",
        text, re.DOTALL,
    )  # fmt: skip
    if found is None:
        raise ValueError(f"the model's chat format does not write ChatML: it writes {text[:80]!r}")
    return found["system"]


class ChatML:
    """Renders chats with one tokenizer.

    Attributes:
        separator: the token between documents of one sequence. It is the end-of-text token, with which the
            model learnt documents in pre-training, and not the token that ends a turn.

    Args:
        encoder: the model's tokenizer
        system: the system message of a chat that has none; None adds none

    Raises:
        ValueError: the vocabulary lacks one of ChatML's control tokens.
    """

    def __init__(self, encoder: Encoder, system: str | None = SYSTEM_PROMPT) -> None:
        self._system = system
        self._encoder = encoder
        self._start = self._control("<|im_start|>")
        self._end = self._control("<|im_end|>")
        self.separator = self._control("<|endoftext|>")
        self._newline = self.text("\n")

    def text(self, text: str) -> list[int]:
        """Encode plain text."""
        return list(self._encoder.encode(text, add_bos=False, parse_special=False))

    def render(self, messages: Sequence[ChatTurn], *, generation_prompt: bool = False) -> Rendered:
        """Encode a chat. If it has no system message, the model's default one is added."""
        turns = list(messages)
        if self._system is not None and (not turns or turns[0].role != "system"):
            turns.insert(0, ChatTurn("system", self._system))
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
