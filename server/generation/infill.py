"""Fill in the middle: a prompt and a suffix become one prompt, with the marks that some vocabularies have for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.http.protocol.errors import bad_request
from server.text.tokenizer import Tokenizer, TokenizerError

_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, arXiv 2409.12186
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, arXiv 2305.06161
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder, arXiv 2401.14196
)
"""What comes before the prompt, between it and the suffix, and after the suffix."""

_ENDS = ("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|endoftext|>", "<file_sep>", "<filename>")
"""What models write after the middle, besides the end of the sequence."""


@dataclass(frozen=True, slots=True)
class Infill:
    """The marks of one vocabulary, as token ids.

    Attributes:
        before: the prompt.
        between: the prompt and the suffix.
        after: the suffix.
        ends: what ends an answer.
    """

    before: int
    between: int
    after: int
    ends: tuple[int, ...]

    def prompt(self, prefix: Sequence[int], suffix: str, text: Tokenizer) -> tuple[int, ...]:
        """Return the prompt for what is between `prefix` and `suffix`.

        Raises:
            ApiError: the suffix is not valid Unicode.
        """
        try:
            following = text.encode(suffix, add_bos=False)
        except TokenizerError as error:
            raise bad_request(f"suffix cannot be read: {error}", param="suffix") from None
        begins = text.adds_bos and tuple(prefix[:1]) == (text.bos_token_id,)
        first, rest = (prefix[:1], prefix[1:]) if begins else ((), prefix)
        return (*first, self.before, *rest, self.between, *following, self.after)


def infill_of(text: Tokenizer) -> Infill | None:
    """Return the marks that a vocabulary has; None if it has none."""
    tokens = text.control_tokens
    for marks in _MARKS:
        if all(mark in tokens for mark in marks):
            before, between, after = (tokens[mark] for mark in marks)
            ends = (before, between, after, *(tokens[end] for end in _ENDS if end in tokens))
            return Infill(before, between, after, ends)
    return None
