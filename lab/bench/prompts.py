"""Makes prompts with an exact number of tokens, of the same words for every server."""

from __future__ import annotations

import random
import re

from lab.bench.errors import BenchError
from server.text.tokenizer import Tokenizer

HEAD = 4
"""How many words at the start a prompt has for itself, so that no prefix cache knows the prompt."""

_WORD = re.compile(r" [a-z]{2,}")
_FEWEST = 256


class Words:
    """The whole lowercase words of a vocabulary. Each is one token, with the space before it.

    A sequence of such tokens, decoded to text and encoded again, is the same sequence. So a prompt can be sent as
    token ids or as text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find the words of the tokenizer's vocabulary.

        Raises:
            BenchError: the vocabulary has too few words.
        """
        self._tokenizer = tokenizer
        plain = (i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids)
        self._ids = [
            i
            for i in plain
            if _WORD.fullmatch(text := tokenizer.token_text(i))
            and tokenizer.encode(text, add_bos=False) == [i]
        ]
        if len(self._ids) < _FEWEST:
            raise BenchError(
                f"the tokenizer has {len(self._ids)} plain words, too few to make prompts of; "
                "name the model that the servers serve, so that its tokenizer is used"
            )

    def prompt(self, length: int, *, body: object, head: object) -> list[int]:
        """Make a prompt of `length` tokens, with the beginning-of-sequence token if the model uses one.

        Args:
            length: tokens
            body: prompts with equal bodies have the same words after the head
            head: prompts with equal heads begin with the same words; with different heads, with other words

        Raises:
            BenchError: `length` is too small.
        """
        bos = self._tokenizer.bos_token_id
        begin = [bos] if bos is not None and self._tokenizer.adds_bos else []
        if length <= len(begin) + HEAD:
            raise BenchError(
                f"a prompt of {length} tokens is too short; the shortest has {len(begin) + HEAD + 1}"
            )
        heads = random.Random(f"head {head}").choices(self._ids, k=HEAD)
        return begin + heads + random.Random(f"body {body}").choices(self._ids, k=length - len(begin) - HEAD)

    def more(self, length: int, of: object) -> list[int]:
        """Make `length` more words; equal `of` give equal words."""
        return random.Random(f"more {of}").choices(self._ids, k=length)

    def text(self, ids: list[int]) -> str:
        """Return the prompt as text, without the beginning-of-sequence token, which a server adds itself."""
        return self._tokenizer.decode(ids)
