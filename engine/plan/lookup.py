"""Drafts without a model: what followed the last time the text ended like this.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023; reference text in Yang et al., arXiv 2304.04487):
answers repeat what they are about, be that a document, code under edit, or themselves. A guess costs a
search and its verification, never a wrong token.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 4
"""Tokens at the end that are looked for first."""

SHORTEST = 2
"""Fewer than these are no sign of a repetition."""

_WIDTH = 4  # bytes a token


class PromptLookup:
    """Guesses the continuation of one request's text from the text itself.

    Args:
        token_ids: the request's own list, which may grow at its end but must not change otherwise.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids
        self._text = bytearray()  # the same, 4 bytes each: searched at the speed of C, and small

    def propose(self, count: int) -> tuple[int, ...]:
        """`count` tokens that may follow, or none.

        The longest ending (4 to 2 tokens) that occurred before decides, at its latest occurrence. Where what
        followed runs into the end of the text, the text is repeating itself and is taken to go on so.
        """
        if count < 1:
            return ()
        for token_id in self._token_ids[len(self._text) // _WIDTH :]:
            self._text += token_id.to_bytes(_WIDTH, "little")
        for length in range(min(LONGEST, len(self._token_ids) - 1), SHORTEST - 1, -1):
            start = self._last_before_the_end(length)
            if start is not None:
                guess: list[int] = []
                for position in range(start + length, start + length + count):
                    behind = position - len(self._token_ids)
                    guess.append(self._token_ids[position] if behind < 0 else guess[behind])
                return tuple(guess)
        return ()

    def _last_before_the_end(self, length: int) -> int | None:
        """Where the text's last `length` tokens begin at their latest earlier occurrence."""
        size = length * _WIDTH
        ending, limit = self._text[-size:], len(self._text) - 1
        while (at := self._text.rfind(ending, 0, limit)) >= 0:
            if at % _WIDTH == 0:
                return at // _WIDTH
            limit = at + size - 1  # the bytes of two tokens happened to look like it
        return None
