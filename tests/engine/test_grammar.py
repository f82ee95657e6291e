"""Grammars say which tokens may come next, and what they cannot do is told in a sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine.errors import GrammarError
from engine.grammar import GrammarCompiler, MaskWords, Matcher
from engine.protocol import Vocabulary
from tests.engine.grammars import CALL, END, FREE, OTHER_END, SIZE, TEXTS, THOUGHT, VOCABULARY, schema_grammar
from tests.schemas import random_schema

BEGIN = 256 + TEXTS.index(b'{"')
TRUE = 256 + TEXTS.index(b"true")


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(VOCABULARY, SIZE + 40)


def tokens(mask: MaskWords) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def spell(matcher: Matcher, text: bytes) -> None:
    for byte in text:
        matcher.consume(byte)


def test_text_that_must_come_may_come_in_any_tokens(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(FREE + 'start: "{\\"true"')
    assert tokens(matcher.mask()) == {ord("{"), BEGIN}
    matcher.consume(BEGIN)
    assert tokens(matcher.mask()) == {ord("t"), TRUE}


def test_only_what_ends_an_answer_follows_a_complete_one(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(schema_grammar({"const": 12}).text)
    spell(matcher, b"12")
    assert tokens(matcher.mask()) == {END, OTHER_END}


def test_text_has_no_control_token_and_no_id_without_text(compiler: GrammarCompiler) -> None:
    free = tokens(compiler.compile(FREE + "start: /(.|\\n)*/").mask())
    assert free.isdisjoint({THOUGHT, CALL})
    assert max(free) < SIZE
    assert {END, OTHER_END, ord("a"), 0xC3} <= free
    call = compiler.compile(f"{FREE}start: /(.|\\n)*/ <[{CALL}]> /[0-9]/")
    assert CALL in tokens(call.mask())


def test_masks_ahead_end_at_the_first_draft_that_is_not_allowed(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(FREE + "start: /[ab]{3}/")
    before = tokens(matcher.mask())
    assert [len(tokens(mask)) for mask in matcher.ahead([ord("a"), ord("b"), ord("c"), ord("a")])] == [
        2,
        2,
        2,
    ]
    assert [len(tokens(mask)) for mask in matcher.ahead([ord("c"), ord("a")])] == [2]
    ended = matcher.ahead([ord("a"), ord("a"), ord("b"), END, ord("a")])
    assert tokens(ended[-1]) == {END, OTHER_END}
    assert len(ended) == 4
    assert tokens(matcher.mask()) == before, "the place stays"
    with pytest.raises(GrammarError):
        matcher.consume(ord("c"))


def test_a_question_about_a_token_is_answered_as_by_the_mask(compiler: GrammarCompiler) -> None:
    """Also for the tokens that end an answer, for control tokens, and for ids without text."""
    random = np.random.default_rng(1)
    ended = 0
    for seed in range(40):
        matcher = compiler.compile(schema_grammar(random_schema(seed)).text)
        for _ in range(25):
            allowed = tokens(matcher.mask())
            assert {token for token in range(SIZE + 40) if matcher.allows(token)} == allowed
            if allowed & {END, OTHER_END}:
                ended += 1
            left = sorted(allowed - {END, OTHER_END})
            if not left:
                break
            matcher.consume(int(random.choice(left)))
    assert ended > 10


def test_looking_ahead_changes_nothing() -> None:
    """What a mask allows can be consumed, however often drafts were verified before. Going back spoilt this."""
    random = np.random.default_rng(0)
    letters = np.array([" ", "\n", "\t", "  ", "\n  ", '"', "{", "}", "[", "]", ":", ",", "a", "1"])
    mixed = {"".join(random.choice(letters, random.integers(2, 6))).encode() for _ in range(2000)}
    texts = (*VOCABULARY.tokens[:256], *sorted(mixed), b"<end>")
    end = len(texts) - 1
    compiler = GrammarCompiler(Vocabulary(tokens=texts, special=(end,), ends=(end,)), len(texts))
    first = compiler.compile(FREE + 'start: %json {"type": "object"}')
    for seed in range(20):
        random = np.random.default_rng(seed)
        matcher = first.copy()
        for _ in range(200):
            allowed = sorted(tokens(matcher.mask()))
            if random.random() < 0.5:
                matcher.ahead(random.choice(allowed, 3).tolist())
            weights = np.array([3.0 if texts[token_id].isspace() else 1.0 for token_id in allowed])
            token_id = int(random.choice(allowed, p=weights / weights.sum()))
            if token_id == end:
                break
            matcher.consume(token_id)


def test_copies_go_their_own_ways(compiler: GrammarCompiler) -> None:
    first = compiler.compile(FREE + 'start: "ab" | "cd"')
    second = first.copy()
    first.consume(ord("a"))
    second.consume(ord("c"))
    assert (tokens(first.mask()), tokens(second.mask())) == ({ord("b")}, {ord("d")})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("start: foo", 'unknown name: "foo"'),
        ("start: /[/", "unclosed character class"),
        (schema_grammar({"type": "object", "if": {}}).text, 'Unimplemented keys: ["if"]'),
        (schema_grammar({"allOf": [{"type": "string"}, {"type": "null"}]}).text, "Unsatisfiable schema"),
        (schema_grammar({"type": "string", "format": "xx"}).text, "Unknown format: xx"),
        ("start: %json " + '{"items":' * 300 + "{}" + "}" * 300, "recursion limit exceeded"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_says_why_in_a_line(
    compiler: GrammarCompiler, text: str, said: str
) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler.compile(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_a_grammar_that_takes_too_much_fails_by_itself(compiler: GrammarCompiler) -> None:
    branches = [
        {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(200)}} for _ in range(50)
    ]
    with pytest.raises(GrammarError):
        _follow(compiler, "start: %json " + json.dumps({"anyOf": branches}), b'{"k1":"x","k2":"y"}')


def _follow(compiler: GrammarCompiler, grammar: str, answer: bytes) -> None:
    matcher = compiler.compile(grammar)
    for byte in answer:
        matcher.mask()
        matcher.consume(byte)
