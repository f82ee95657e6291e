"""Compiles grammars, which say what the tokens of an answer may spell, and follows an answer through one.

The library is llguidance: an Earley parser over derivatives of regular expressions, which computes the set of tokens that
may come next when it is asked, and so needs no table a grammar. The engine asks it before every draw (`engine.step.masking`). The
server runs the same compiler in a process with limits first, so that no grammar harms the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import GrammarError
from engine.protocol import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits

MaskWords = NDArray[np.int32]
"""[W]: bit t % 32 of word t // 32 says whether token t may come next."""

MAX_LEXER_STATES = 16_000
"""Of a compiled grammar, 1 to 2 kB each."""

_LONGEST_REASON = 300


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Safe to share between threads.

    Args:
        vocabulary: the tokenizer's
        vocab_size: token ids of the model; those that the tokenizer does not have are never allowed.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        from llguidance import LLTokenizer  # with the first grammar: most engines see none

        tokens = [*vocabulary.tokens[:vocab_size], *[b""] * (vocab_size - len(vocabulary.tokens))]
        self._tokenizer = LLTokenizer(
            _Tokens(tokens, vocabulary),  # type: ignore[arg-type] # it asks for the attributes only
            eos_token=[token_id for token_id in vocabulary.ends if token_id < vocab_size],
            slices=LLTokenizer.json_slices(),
        )
        self._ends = frozenset(vocabulary.ends)
        self.words = -(-vocab_size // 32)
        """Words of a mask."""

    def compile(self, text: str) -> Matcher:
        """Compile a grammar.

        Args:
            text: in llguidance's variant of Lark

        Raises:
            GrammarError: the grammar is wrong, asks for what cannot be enforced, or takes too much.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=_limits())
        _check(matcher)
        return Matcher(matcher, self._ends, self.words)


class Matcher:
    """An answer's place in its grammar. Not safe to share between threads."""

    def __init__(self, matcher: LLMatcher, ends: frozenset[int], words: int) -> None:
        self._matcher, self._ends, self._words = matcher, ends, words

    def copy(self) -> Matcher:
        """Another one at the same place. It takes microseconds."""
        return Matcher(self._matcher.deep_copy(), self._ends, self._words)

    def mask(self) -> MaskWords:
        """Compute which tokens may come next: [W]. After a complete answer these are the tokens that end one.

        Raises:
            GrammarError: it takes too much.
        """
        words = np.zeros(self._words, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        _check(self._matcher)
        return words

    def allows(self, token_id: int) -> bool:
        """Whether a mask here would allow a token. It takes a few microseconds.

        Raises:
            GrammarError: it takes too much.
        """
        if token_id in self._ends:
            allowed = self._matcher.is_accepting()
        else:
            allowed = self._matcher.validate_tokens([token_id]) == 1
        if not allowed:
            _check(self._matcher)
        return allowed

    def consume(self, token_id: int) -> None:
        """Go on by a token that a mask allows.

        Raises:
            GrammarError: the grammar does not allow it here.
        """
        self._matcher.consume_token(token_id)
        _check(self._matcher)

    def ahead(self, token_ids: Sequence[int]) -> list[MaskWords]:
        """The masks of this place, and of those after each of the tokens, up to the first that is not allowed or ends the answer.

        The place stays what it is.

        Raises:
            GrammarError: it takes too much.
        """
        masks = [self.mask()]
        place = self  # llguidance 1.9.1 loses its place now and then when it goes back, so a copy goes ahead
        for token_id in token_ids:
            if token_id in self._ends:
                break
            if place is self:
                place = self.copy()
            if place._matcher.try_consume_tokens([token_id]) == 0:
                break
            masks.append(place.mask())
        return masks


def _limits() -> LLParserLimits:
    """What a grammar may take of time and memory. To exceed a limit ends its request, never the process."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        step_lexer_fuel=100_000,  # about 7 ms
        max_lexer_states=MAX_LEXER_STATES,
        verbose_errors=False,
    )


class _Tokens:
    """What llguidance reads of a tokenizer. It never encodes text, because our grammars force no tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], vocabulary: Vocabulary) -> None:
        self.tokens = tokens
        self.special_token_ids = [token_id for token_id in vocabulary.special if token_id < len(tokens)]
        self.eos_token_id = vocabulary.ends[0]

    def __call__(self, text: str | bytes) -> list[int]:
        return []


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(_reason(matcher.get_error()))


def _reason(message: str) -> str:
    """What llguidance says, in a line, without places in a text that the client has not written."""
    if message.startswith("panic"):
        return "its compiler fails at it, because it is too large"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reason = lines[0] if lines else "it cannot be compiled"
    for prefix in _PREFIXES:
        reason = reason.partition(prefix)[2] or reason
    inner = next((line for line in lines[1:] if line.startswith("error: ")), None)  # of a regular expression
    if inner is not None:
        reason = f"{reason.rstrip(':')}: {inner.removeprefix('error: ')}"
    return reason.rstrip(".")[:_LONGEST_REASON]


_PREFIXES = ("): ", "failed to compile JSON schema: ", 'failed to parse "%json": ')
