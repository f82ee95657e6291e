"""Limits of rate against a clock that only moves when told, and against a plain model of a bucket."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.access.keys import KeyRecord, TopKRange
from server.access.limits import Bucket, LimitError, Limits, NeverError


def record(name: str = "a", **fields: Any) -> KeyRecord:
    return KeyRecord(name=name, sha256=("0" * 64,), **fields)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_requests_a_minute() -> None:
    clock = Clock()
    limits, key = Limits(clock), record(requests_per_minute=3)
    for _ in range(3):
        with limits.enter(key):
            pass
    with pytest.raises(LimitError, match="3 requests a minute") as caught, limits.enter(key):
        pass
    assert caught.value.retry_after == pytest.approx(20)
    with limits.enter(record("b", requests_per_minute=3)):  # another's are its own
        pass
    clock.now += caught.value.retry_after + 0.001
    with limits.enter(key):
        pass
    (standing,) = limits.standings(key)
    assert (standing.limit, standing.remaining, round(standing.reset)) == (3, 0, 60)


def test_requests_at_once() -> None:
    limits, key = Limits(Clock()), record(concurrent=2)
    with ExitStack() as stack:
        stack.enter_context(limits.enter(key))
        stack.enter_context(limits.enter(key))
        with pytest.raises(LimitError, match="2 requests at once"), limits.enter(key):
            pass
    with limits.enter(key):
        pass
    with pytest.raises(KeyError), limits.enter(key):  # a request that fails leaves, too
        raise KeyError
    assert limits._state("a").running == 0


def test_a_refused_request_takes_nothing() -> None:
    limits, key = Limits(Clock()), record(concurrent=1, requests_per_minute=5)
    with limits.enter(key):
        for _ in range(10):
            with pytest.raises(LimitError), limits.enter(key):
                pass
    assert limits.standings(key)[0].remaining == 4


def test_tokens_are_given_back() -> None:
    clock = Clock()
    limits, key = Limits(clock), record(tokens_per_minute=100)
    give_back = limits.take_tokens(key, 80)
    with pytest.raises(LimitError, match="100 tokens a minute") as caught:
        limits.take_tokens(key, 50)
    assert caught.value.retry_after == pytest.approx(18)
    give_back(10)
    limits.take_tokens(key, 90)
    assert limits.standings(key)[0].remaining == 0
    with pytest.raises(NeverError, match="lower max_tokens"):
        limits.take_tokens(key, 101)


def test_a_limit_that_changes() -> None:
    clock = Clock()
    limits = Limits(clock)
    limits.take_tokens(record(tokens_per_minute=100), 100)
    assert limits.standings(record(tokens_per_minute=1000))[0].remaining == 0  # no present for an edit
    clock.now += 60
    assert limits.standings(record(tokens_per_minute=1000))[0].remaining == 1000
    assert limits.standings(record(tokens_per_minute=10))[0].remaining == 10
    assert limits.standings(record()) == []


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), min_size=1, max_size=40),
)
def test_no_stretch_of_time_has_more_than_flowed_in(capacity: int, asks: list[tuple[float, int]]) -> None:
    bucket, now = Bucket(capacity, 0.0), 0.0
    taken: list[tuple[float, int]] = []
    for pause, amount in asks:
        now += pause
        wait = bucket.wait(amount, now)
        assert (wait == 0) == (bucket.level(now) >= amount)
        if not wait:
            bucket.add(-amount, now)
            taken.append((now, amount))
        elif amount <= capacity:
            assert wait <= 60
    for first, _ in taken:
        for last, _ in taken:
            used = sum(amount for at, amount in taken if first <= at <= last)
            assert used <= capacity + (last - first) * capacity / 60 + 1e-6 or last < first


@pytest.mark.parametrize(
    ("fields", "asked", "allowed", "nearest"),
    [
        ({}, None, True, None),
        ({}, 7, True, 7),
        ({"min": 8, "max": 64}, 7, False, 8),
        ({"min": 8, "max": 64}, 65, False, 64),
        ({"min": 8, "max": 64, "dense": False}, None, False, 64),
        ({"min": 8, "dense": False}, None, False, None),
    ],
)
def test_sparsity(fields: dict[str, Any], asked: int | None, allowed: bool, nearest: int | None) -> None:
    top_k = TopKRange(**fields)
    assert top_k.allows(asked) is allowed
    assert top_k.nearest(asked) == nearest
