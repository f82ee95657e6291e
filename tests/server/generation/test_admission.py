"""What is let in, and when those who are not may come back, against a clock that moves only when told."""

from __future__ import annotations

import math
import random
from contextlib import ExitStack
from heapq import heappop, heappush
from itertools import count

import pytest

from server.generation.admission import (
    MOST_SECONDS,
    UNKNOWN_SECONDS,
    Admission,
    QueueFullError,
    QueuePlace,
    TooLargeError,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_places_are_bounded_and_come_back() -> None:
    admission = Admission(3)
    with admission.admit(2), pytest.raises(QueueFullError, match="2 of at most 3"), admission.admit(2):
        pass
    with admission.admit(3), pytest.raises(QueueFullError):
        admission.check()
    with pytest.raises(TooLargeError), admission.admit(4):
        pass
    assert admission.admitted == 0


def test_a_place_is_left_once() -> None:
    admission = Admission(4, 100)
    with admission.admit(2, "a", 50) as place:
        assert (admission.admitted, admission.tokens) == (2, 50)
        place.begun()
        place.begun()
        assert (admission.admitted, admission.tokens) == (2, 0)
        place.leave()
        place.leave()
        assert (admission.admitted, admission.tokens) == (0, 0)
    assert (admission.admitted, admission.tokens, dict(admission._held)) == (0, 0, {})


def test_tokens_that_wait_are_bounded() -> None:
    admission = Admission(100, 1000)
    with ExitStack() as stack:
        first = stack.enter_context(admission.admit(1, tokens=900))
        with (
            pytest.raises(QueueFullError, match="900 tokens of prompts wait"),
            admission.admit(1, tokens=200),
        ):
            pass
        stack.enter_context(admission.admit(1, tokens=100))
        with pytest.raises(QueueFullError):
            admission.check()
        first.begun()  # its prompt is computed, though it still runs
        admission.check()
        stack.enter_context(admission.admit(1, tokens=800))
    with admission.admit(1, tokens=5000):  # alone, even one that is larger than the bound
        pass


def test_no_sender_holds_more_than_it_leaves() -> None:
    admission = Admission(9)
    with ExitStack() as stack:

        def fill(sender: str) -> int:
            count = 0
            while True:
                try:
                    stack.enter_context(admission.admit(1, sender))
                except QueueFullError:
                    return count
                count += 1

        assert [fill(sender) for sender in "abc"] == [4, 2, 1]
        assert admission.admitted == 7
        with pytest.raises(TooLargeError, match="at most half"), admission.admit(5, "d"):
            pass
    assert admission._held == {}


def test_small_queues_take_one_of_each() -> None:
    admission = Admission(2)
    with admission.admit(1, "a"), pytest.raises(QueueFullError), admission.admit(1, "a"):
        pass
    with admission.admit(1, "a"), admission.admit(1, "b"):
        assert admission.admitted == 2
    with Admission(1).admit(1, "a"):
        pass


def steady(
    stack: ExitStack, admission: Admission, clock: Clock, seconds: float, rounds: int
) -> list[QueuePlace]:
    """Keep the queue full, one request leaving every so many seconds. Returns those that are in."""
    places = [stack.enter_context(admission.admit(1, tokens=100)) for _ in range(admission.limit)]
    for _ in range(rounds):
        clock.now += seconds
        places.pop(0).leave()
        places.append(stack.enter_context(admission.admit(1, tokens=100)))
    return places


@pytest.mark.parametrize("seconds", [0.5, 2.0, 20.0])
def test_retry_after_is_when_a_place_is_free(seconds: float) -> None:
    clock = Clock()
    admission = Admission(4, clock=clock)
    waits = []
    with ExitStack() as stack:
        steady(stack, admission, clock, seconds, 60)
        for _ in range(6):  # those who are sent away come back one after the other, not all at once
            with pytest.raises(QueueFullError) as caught, admission.admit(1):
                pass
            waits.append(caught.value.retry_after)
    assert waits == pytest.approx([min(max(seconds * n, 1), MOST_SECONDS) for n in range(1, 7)], rel=0.05)


def test_retry_after_follows_the_tokens_that_are_computed() -> None:
    clock = Clock()
    admission = Admission(100, 1000, clock=clock)
    for _ in range(30):
        with admission.admit(1, tokens=1000) as place:
            clock.now += 10  # 100 tokens a second
            place.begun()
    with admission.admit(1, tokens=1000):
        with pytest.raises(QueueFullError) as caught, admission.admit(1, tokens=400):
            pass
        assert caught.value.retry_after == pytest.approx(4, rel=0.05)
        with pytest.raises(QueueFullError) as caught, admission.admit(1, tokens=400):
            pass
        assert caught.value.retry_after == pytest.approx(8, rel=0.05)


def test_who_is_sent_away_before_the_body_is_read_wants_what_others_have() -> None:
    """Else everybody would be told to come back in a second."""
    clock = Clock()
    admission = Admission(100, 1000, clock=clock)
    for _ in range(30):
        with admission.admit(1, tokens=200) as place:
            clock.now += 2  # 100 tokens a second
            place.begun()
    waits = []
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(admission.admit(1, tokens=200))
        for _ in range(3):
            with pytest.raises(QueueFullError) as caught:
                admission.check()
            waits.append(caught.value.retry_after)
    assert waits == pytest.approx([2, 4, 6], rel=0.05)


def test_what_was_promised_is_forgotten_when_it_was_free() -> None:
    clock = Clock()
    admission = Admission(2, clock=clock)
    with ExitStack() as stack:
        places = steady(stack, admission, clock, 2.0, 40)
        for _ in range(10):
            with pytest.raises(QueueFullError), admission.admit(1):
                pass
        for place in places:
            clock.now += 2
            place.leave()
        steady(stack, admission, clock, 2.0, 20)
        with pytest.raises(QueueFullError) as caught, admission.admit(1):
            pass
    assert caught.value.retry_after == pytest.approx(2, rel=0.1)


def test_before_anything_is_known() -> None:
    admission = Admission(1)
    with admission.admit(1), pytest.raises(QueueFullError) as caught:
        admission.check()
    assert caught.value.retry_after == UNKNOWN_SECONDS


@pytest.mark.parametrize(("clients", "attempts"), [(30, 2.5), (60, 3.0), (120, 4.0)])
def test_a_crowd_that_obeys_is_served_without_gaps_and_does_not_come_back_often(
    clients: int, attempts: float
) -> None:
    """All come at once to a queue of 16 prompts and a machine that computes 1.33 of them in a second."""
    clock, chance = Clock(), random.Random(0)
    admission = Admission(256, 1024, clock=clock)
    for _ in range(30):  # a time of work, from which the rate is known
        with admission.admit(1, tokens=64) as place:
            clock.now += 0.75
            place.begun()
    begun, free, tries, order = clock.now, clock.now, 0, count()
    events: list[tuple[float, int, ExitStack | None]] = [(begun, next(order), None) for _ in range(clients)]
    while events:
        clock.now, _, stack = heappop(events)
        if stack is not None:
            stack.close()
            continue
        tries += 1
        stack = ExitStack()
        try:
            admission.check()
            stack.callback(stack.enter_context(admission.admit(1, tokens=64)).begun)
        except QueueFullError as error:
            later = clock.now + math.ceil(error.retry_after) + chance.random()
            heappush(events, (later, next(order), None))
        else:
            free = max(free, clock.now) + 0.75
            heappush(events, (free, next(order), stack))
    assert tries / clients < attempts
    assert (clock.now - begun) / (0.75 * clients) < 1.25
