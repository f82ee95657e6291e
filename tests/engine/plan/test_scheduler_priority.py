"""Priorities: who starts first, who gives up a place, and that equal priorities change nothing."""

from __future__ import annotations

import random

import pytest

from tests.engine.plan.kit import Driver, make


def test_waiting_requests_start_in_order_of_priority() -> None:
    driver = Driver(budget=64, max_running=1)
    driver.add(make("a", 4, 2))
    driver.step()
    driver.add(make("b", 4, 1, priority=7), make("c", 4, 1), make("d", 4, 1, priority=7), make("e", 4, 1))
    order = []
    while driver.scheduler.has_work:
        order += [name for name, (start, _) in driver.step().items() if not start]
    assert order == ["c", "e", "b", "d"]


def test_one_of_a_higher_class_takes_the_place_of_the_last() -> None:
    driver = Driver(budget=64, max_running=2)
    driver.add(make("a", 4, 20), make("b", 4, 20, priority=3))
    driver.step()
    driver.add(make("c", 4, 3, priority=-1))
    assert driver.step() == {"c": (0, 4), "a": (4, 1)}
    while "c" not in driver.last:
        assert driver.step().keys() == {"c", "a"}
    assert "b" in driver.step()
    driver.drain()
    usage = driver.last["b"].usage
    assert usage is not None
    assert usage.preemptions == 1


def test_one_of_a_higher_class_takes_the_pages_of_others() -> None:
    driver = Driver(5, budget=256, max_running=4)
    driver.add(make("a", 60, 4), make("b", 150, 30, priority=1))
    driver.step()
    driver.add(make("c", 100, 3))  # it needs 2 pages, and 1 is left
    assert driver.step() == {"a": (60, 1), "c": (0, 100)}
    driver.drain()


def test_the_same_class_takes_nothing() -> None:
    driver = Driver(budget=64, max_running=1)
    driver.add(make("a", 4, 9, priority=2))
    driver.step()
    driver.add(make("b", 4, 1, priority=2))
    while "a" not in driver.last:
        assert driver.step().keys() == {"a"}
    driver.drain()
    assert driver.scheduler.stats().preemptions_total == 0


def test_a_long_prompt_of_a_lower_class_makes_way_without_losing_what_it_computed() -> None:
    driver = Driver(budget=64)
    driver.add(make("a", 250, 2, priority=1))
    assert driver.step() == {"a": (0, 64)}
    driver.add(make("b", 100, 2))
    assert driver.step() == {"b": (0, 64)}
    assert driver.step() == {"b": (64, 36), "a": (64, 28)}
    driver.drain()
    assert driver.scheduler.stats().preemptions_total == 0


@pytest.mark.parametrize("seed", range(12))
def test_priorities_change_no_text(seed: int) -> None:
    rng = random.Random(seed)
    driver = Driver(rng.choice((6, 8)), budget=rng.choice((10, 64)), max_running=rng.choice((1, 3)))
    driver.ahead = seed % 2 == 1
    for number in range(10):
        fields = {"priority": rng.choice((-2, 0, 0, 5)), "seed": rng.randint(0, 1)}
        driver.add(make(f"r{number}", rng.randint(1, 150), rng.randint(1, 120), **fields))
        for _ in range(rng.randint(0, 60)):
            driver.step()
    driver.drain()  # which compares every text with that of a request alone


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_of_one_class_nobody_has_a_first_token_before_who_came_earlier(seed: int, ahead: bool) -> None:
    """Whatever lengths, cached prefixes, paces and preemptions are; in one step several may have theirs."""
    chance = random.Random(seed)
    driver = Driver(
        chance.choice([6, 12, 64]), budget=chance.choice([16, 64, 200]), max_running=chance.choice([2, 4, 12]),
        max_model_len=300, pace=chance.choice([None, 8]),
    )  # fmt: skip
    driver.ahead = ahead
    classes: dict[str, int] = {}
    step_of: dict[str, int] = {}  # of the first token
    step = 0
    while len(classes) < 40 or driver.scheduler.has_work:
        while len(classes) < 40 and chance.random() < 0.5:
            name = f"{chance.choice('abc')}{len(classes):02}"  # three prefixes
            classes[name] = chance.choice([0, 0, 1])
            length = chance.choice([1, 3, 64, 65, 129, 200])
            driver.add(make(name, length, chance.choice([1, 4, 40]), priority=classes[name]))
        driver.step()
        step += 1
        for name, tokens in driver.output.items():
            if tokens:
                step_of.setdefault(name, step)
    assert step_of.keys() == classes.keys()
    for one in (0, 1):
        steps = [step_of[name] for name in classes if classes[name] == one]
        assert steps == sorted(steps)
