"""Incremental decoding: the text of tokens that come one at a time.

`tokenizers.decoders.DecodeStream` does not fit. It cannot return the text that it holds at the end. And after
bytes that can never become a character it holds back everything until the next complete character.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from server.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_CONTEXT = 8
"""So many tokens before an output are looked at."""


class TextStream(Protocol):
    """Returns each character once it is complete. The texts, joined, are `Tokenizer.decode` of all tokens."""

    def push(self, token_id: int) -> str:
        """Add a token; return the characters that are now complete."""
        ...

    def finish(self) -> str:
        """Return the rest of the text, with U+FFFD for bytes that never became a character."""
        ...


def text_stream(tokenizer: Tokenizer, *, skip_special: bool, after: Sequence[int] = ()) -> TextStream:
    """Make the stream that fits the tokenizer's vocabulary.

    The text is what the tokens add to the text of `after`, the tokens before them. Some vocabularies begin a text of
    its own without the space of its first token.
    """
    if tokenizer.byte_level:
        return ByteStream(tokenizer, skip_special=skip_special)
    return WindowStream(tokenizer, skip_special=skip_special, after=after)


class ByteStream:
    """Decodes byte-level vocabularies. Their tokens are bytes, so this is Python's own incremental decoder.

    Most tokens are whole characters. Between whole characters their texts need no decoder.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._raw = tokenizer.raw
        self._whole = tokenizer.whole
        self._skip = tokenizer.special_ids if skip_special else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._within = False  # the bytes so far end within a character

    def push(self, token_id: int) -> str:
        """Add a token; return the characters that are now complete."""
        if token_id in self._skip:
            return ""
        if not self._within and (text := self._whole(token_id)) is not None:
            return text
        text = self._utf8.decode(self._raw(token_id))
        self._within = bool(self._utf8.getstate()[0])
        return text

    def finish(self) -> str:
        """Return U+FFFD for bytes that never became a character."""
        return self._utf8.decode(b"", final=True)


class WindowStream:
    """Decodes every other vocabulary, where a token's text may depend on its neighbours.

    It decodes a window of the newest tokens with and without the new token; the difference is the new
    text. It returns nothing while the text ends in U+FFFD or the newest token is a single byte, because
    the next token may change that character.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset[int]()
        context = [token_id for token_id in after[-_CONTEXT:] if token_id not in self._skip]
        while context and tokenizer.is_byte(context[-1]):  # half a character would change with the next token
            context.pop()
        self._context = context  # tokens already returned as text; the text after them depends on them
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Add a token; return the characters that are now complete."""
        if token_id in self._skip:  # the bytes before and after a skipped token are neighbours
            return ""
        self._pending.append(token_id)
        if self._tokenizer.is_byte(token_id):
            return ""
        text = self._difference()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """Return the text that was held back."""
        text = self._difference()
        self._context, self._pending = self._pending, []
        return text

    def _difference(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)
