"""Answers that end in a loop: the same few tokens again and again.

Greedy decoding of a small model loops now and then (Holtzman et al., arXiv 1904.09751). A model that was healthy and begins
to loop often has a damaged weight, a wrong chat format, or a selection that no longer finds what it should.
"""

from __future__ import annotations

from collections.abc import Sequence

LEAST_TOKENS = 96
"""So many tokens at the end of an answer have to be repetitions, ..."""
LEAST_TIMES = 4
"""... so often at least, ..."""
LONGEST = 64
"""... of at most so many tokens. A table or a list repeats less exactly."""


def repeated_tokens(token_ids: Sequence[int]) -> int | None:
    """How many tokens the answer repeats at its end, the fewest that do; None: it does not end in a loop.

    A few microseconds, once an answer: nothing is looked at while it is generated.
    """
    count = len(token_ids)
    if count < LEAST_TOKENS:
        return None
    last = token_ids[-1]
    for period in range(1, LONGEST + 1):
        span = max(LEAST_TOKENS, LEAST_TIMES * period)
        if span > count:
            return None
        if token_ids[-1 - period] == last and (
            token_ids[count - span : count - period] == token_ids[count - span + period :]
        ):
            return period
    return None
