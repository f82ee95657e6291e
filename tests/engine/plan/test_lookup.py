"""Prompt lookup against its definition: the latest earlier occurrence of the longest ending."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.plan.lookup import LONGEST, SHORTEST, PromptLookup


def plain(tokens: list[int], count: int) -> tuple[int, ...]:
    """The definition, by comparing lists."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[start + length + i])
                return tuple(text[len(tokens) :])
    return ()


@given(
    # Few tokens, so that they repeat; and such as have each other's bytes, so that a search may misread them.
    tokens=st.lists(st.sampled_from([0, 1, 256, 65536, 1 << 24, 257]), min_size=1, max_size=40),
    growth=st.lists(st.integers(1, 5), max_size=5),
    count=st.integers(0, 6),
)
def test_a_guess_is_what_followed_the_latest_longest_repetition(
    tokens: list[int], growth: list[int], count: int
) -> None:
    known = tokens[:1]
    lookup = PromptLookup(known)
    for step in (*growth, len(tokens)):
        known.extend(tokens[len(known) : len(known) + step])
        assert lookup.propose(count) == plain(known, count)[:count]


def test_a_text_that_repeats_itself_is_taken_to_go_on() -> None:
    assert PromptLookup([9, 1, 2, 1, 2, 1, 2]).propose(5) == (1, 2, 1, 2, 1)
    assert PromptLookup([7, 7, 7]).propose(3) == (7, 7, 7)
    assert PromptLookup([1, 2, 3, 2]).propose(3) == ()  # one token alone is no sign
