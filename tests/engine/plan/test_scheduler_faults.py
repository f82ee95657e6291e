"""The scheduler and a request whose step fails: nothing that it computed is trusted again."""

from __future__ import annotations

from tests.engine.plan.kit import FAULTY_SEED, Driver, make


def test_a_faulty_request_ends_alone_and_leaves_nothing_in_the_cache() -> None:
    driver = Driver(budget=500)
    prompt = tuple(range(150))
    driver.add(make("a", prompt, 20, seed=FAULTY_SEED), make("b", 70, 20))
    driver.drain()
    assert driver.last["a"].error == "faulty on purpose"
    assert driver.last["b"].finish_reason == "length"
    driver.add(make("c", prompt))
    assert driver.step() == {"c": (0, 150)}  # what a computed is not to be trusted


def test_a_page_shared_with_a_faulty_request_is_not_trusted_again() -> None:
    driver = Driver(budget=500)
    prompt = tuple(range(150))
    driver.add(make("a", prompt, 90))
    driver.step()
    driver.add(make("b", prompt, 90, seed=FAULTY_SEED))
    assert driver.step()["b"] == (128, 22)
    driver.drain()  # a filled more pages after b had failed
    assert driver.last["b"].finish_reason == "error"
    driver.add(make("c", prompt))
    assert driver.step() == {"c": (0, 150)}


def test_pages_of_a_faulty_request_are_wiped_once_and_shared_ones_are_not() -> None:
    driver = Driver(budget=500)
    prompt = tuple(range(150))
    driver.add(make("a", prompt, 90))
    driver.step()
    driver.add(make("b", prompt, 90, seed=FAULTY_SEED))
    driver.drain()  # b shared two pages with a, and had one of its own
    assert len(driver.model.wiped) == len(set(driver.model.wiped)) == 1
    driver.add(make("c", 200, 3))
    driver.drain()
    assert len(driver.model.wiped) == 1
