"""Drafts without a model: finds an earlier place with the same last tokens, and guesses the tokens that followed there.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023; reference text in Yang et al., arXiv 2304.04487) works because
answers repeat a document, code under edit, or themselves. A wrong guess costs a search and its verification, and
never gives a wrong token. The step verifies (`engine.step.speculation`).
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 4
"""The search begins with so many tokens of the end."""

SHORTEST = 2
"""The search stops at so many tokens: fewer equal tokens are no sign of a repetition."""

_WIDTH = 4  # bytes a token


class PromptLookup:
    """Guesses the continuation of one request's text from the text itself.

    Args:
        token_ids: the request's own list. It may grow at its end but must not change otherwise.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids
        self._text = bytearray()  # the tokens, 4 bytes each: small, and searched at the speed of C

    def propose(self, count: int) -> tuple[int, ...]:
        """Return `count` tokens that may follow, or no tokens.

        It takes the longest ending (4 to 2 tokens) that occurred before, at its latest occurrence, and returns the
        tokens that followed it. If they reach the end of the text, the text repeats itself, and the guess goes on
        with the repetition.
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
        """Find the latest earlier occurrence of the last `length` tokens; return the index of its first token."""
        size = length * _WIDTH
        ending, limit = self._text[-size:], len(self._text) - 1
        while (at := self._text.rfind(ending, 0, limit)) >= 0:
            if at % _WIDTH == 0:
                return at // _WIDTH
            limit = at + size - 1  # not at a token's first byte: parts of two tokens had the same bytes
        return None
