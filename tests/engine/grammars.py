"""A small vocabulary in which grammars can be spelled: every byte, some longer texts, control tokens and two ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from engine.protocol import Grammar, Vocabulary

TEXTS = (
    b'{"',
    b'":',
    b'",',
    b'"}',
    b"true",
    b"false",
    b"null",
    b" the",
    "é".encode(),
    "漢字".encode(),
    b"</think>",
)
THOUGHT, CALL, END, OTHER_END = (256 + len(TEXTS) + n for n in range(4))
SIZE = OTHER_END + 1
VOCABULARY = Vocabulary(
    tokens=(*(bytes([n]) for n in range(256)), *TEXTS, b"</think>", b"<call>", b"<end>", b"<other end>"),
    special=(THOUGHT, CALL, END, OTHER_END),
    ends=(END, OTHER_END),
)
FREE = '%llguidance {"no_forcing": true}\n'
"""Every grammar that the server makes begins so: text that must come may come in any tokens."""


def text_of(token_ids: Sequence[int]) -> str:
    """What tokens spell, without those that end an answer."""
    return b"".join(VOCABULARY.tokens[t] for t in token_ids if t not in VOCABULARY.ends).decode()


def schema_grammar(schema: Any, after: tuple[int, ...] = ()) -> Grammar:
    """The grammar of a JSON schema."""
    own = (
        {**schema, "x-guidance": {"whitespace_pattern": "[ \\n]{1,4}"}}
        if isinstance(schema, dict)
        else schema
    )
    return Grammar(text=f"{FREE}start: %json {json.dumps(own)}", after=after)
