"""The ways of splitting text before byte pair encoding, by their names in GGUF."""

from __future__ import annotations

import pytest

from server.text.splitting import PRE_TOKENIZERS


def pieces(pre: str, text: str) -> list[str]:
    """The pieces, with their blanks and letters as the text has them."""
    found = PRE_TOKENIZERS[pre]().pre_tokenizer.pre_tokenize_str(text)
    return [text[begin:end] for _, (begin, end) in found]


@pytest.mark.parametrize(
    ("pre", "text", "split"),
    [
        ("default", "I'll pay $12345, ok?", ["I", "'", "ll", " pay", " ", "$", "123", "45", ",", " ok", "?"]),
        (
            "tekken",
            "HelloWorld's 123\n\nabc/",
            ["Hello", "World", "'s", " ", "1", "2", "3", "\n\n", "abc", "/"],
        ),
        ("llama-v3", "HelloWorld's 12345", ["HelloWorld", "'s", " ", "123", "45"]),
        ("llama3", "DON'T", ["DON", "'T"]),
        ("qwen2", "a 123", ["a", " ", "1", "2", "3"]),
    ],
)
def test_pieces(pre: str, text: str, split: list[str]) -> None:
    assert pieces(pre, text) == split
    assert "".join(pieces(pre, text)) == text
