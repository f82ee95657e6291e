from __future__ import annotations

import random

import pytest

from server.generation.loops import LEAST_TOKENS, LONGEST, repeated_tokens

START = list(range(1000, 1200))


@pytest.mark.parametrize("period", [1, 2, 7, 24, 25, LONGEST])
def test_an_end_that_repeats(period: int) -> None:
    loop = random.Random(period).sample(range(900), period)
    whole = max(LEAST_TOKENS, 4 * period)
    repeated = (loop * whole)[: whole + period // 2]  # it may be cut anywhere
    assert repeated_tokens([*START, *repeated]) == period
    assert repeated_tokens([*START, *repeated[: whole - 1]]) is None
    assert repeated_tokens([*START, *repeated, 999]) is None  # it went on


def test_what_is_no_loop() -> None:
    assert repeated_tokens([]) is None
    assert repeated_tokens(START) is None
    assert repeated_tokens([7] * (LEAST_TOKENS - 1)) is None
    longer = random.Random(0).sample(range(900), LONGEST + 1)
    assert repeated_tokens(longer * 8) is None
    table = [token for row in range(60) for token in (1, 2, row + 100, 3)]  # the numbers differ
    assert repeated_tokens(table) is None
