"""Splits text into pieces before byte pair encoding. Each way of splitting has its name in GGUF.

Only ways whose definition is certain are here: a wrong one would give token ids that look right and are
wrong. To add one, write a function and a line in `PRE_TOKENIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tokenizers import Regex
from tokenizers.normalizers import NFC, Normalizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split


class Splitting(NamedTuple):
    """One way to split text, and the other settings that the checkpoints with this way share."""

    pre_tokenizer: PreTokenizer
    normalizer: Normalizer | None = None
    ignore_merges: bool = False  # a piece that is itself a token becomes that token, without merges
    add_bos: bool = False  # used if the file does not say it


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (  # of Mistral's tokenizer.json
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (  # what llama.cpp does with a file that names no way of its own
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _by_regex(*patterns: str) -> PreTokenizer:
    splits = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> Splitting:
    return Splitting(ByteLevel(add_prefix_space=False, use_regex=True))


def _digits_apart() -> Splitting:
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    return Splitting(split)


def _llama3() -> Splitting:
    return Splitting(_by_regex(_LLAMA3), ignore_merges=True, add_bos=True)


def _qwen2() -> Splitting:
    return Splitting(_by_regex(_QWEN2), normalizer=NFC())


def _default() -> Splitting:
    return Splitting(_by_regex(*_DEFAULT))


def _tekken() -> Splitting:
    return Splitting(_by_regex(_TEKKEN), ignore_merges=True, add_bos=True)


def _deepseek_v3() -> Splitting:
    return Splitting(_by_regex(*_DEEPSEEK_V3), add_bos=True)


PRE_TOKENIZERS: dict[str, Callable[[], Splitting]] = {
    "default": _default,
    "gpt-2": _gpt2,
    "smollm": _digits_apart,
    "starcoder": _digits_apart,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "tekken": _tekken,
    "qwen2": _qwen2,
    "deepseek-v3": _deepseek_v3,
}
"""`tokenizer.ggml.pre` -> the function that makes the way of splitting."""
