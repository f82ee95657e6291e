"""ChatML in token ids, built part by part so that text can never become a control token.

The same ids as encoding the rendered string: control tokens split a text before any merge, so what
stands between them can be encoded alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What SmolLM2-Instruct's own template puts first where a chat has no system message."""


class Encoder(Protocol):
    """What the corpus needs of a tokenizer."""

    def encode(self, text: str, *, add_bos: bool = ..., parse_special: bool = ...) -> Sequence[int]:
        """Return the ids of `text`; control tokens written in it count only with `parse_special`."""
        ...


class ChatTurn(msgspec.Struct, frozen=True):
    """One turn."""

    role: str
    content: str


class Rendered(NamedTuple):
    """A chat in ids; `answers` are the spans [start, end) of the assistant's turns, header included."""

    ids: list[int]
    answers: list[tuple[int, int]]


class ChatML:
    """Renders chats with one tokenizer.

    Attributes:
        separator: the token that parts documents in one sequence. It is the end-of-text token of
            pre-training, not the end of a turn: the model learnt documents with it.

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
        """Ids of plain text."""
        return list(self._encoder.encode(text, add_bos=False, parse_special=False))

    def render(self, messages: Sequence[ChatTurn], *, generation_prompt: bool = False) -> Rendered:
        """Ids of a chat, with the default system message where it has none."""
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
