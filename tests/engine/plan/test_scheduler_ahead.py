"""Plans that are made before the results of those before them are known: examples of each rule.

Any history with and without them is in test_scheduler.py.
"""

from __future__ import annotations

from engine.plan.types import PENDING
from tests.engine.plan.kit import Driver, make, reference


def test_a_step_planned_ahead_has_pending_tokens_and_skips_who_is_about_to_end() -> None:
    driver = Driver()
    driver.add(make("a", 3, 3), make("b", 2, 2), make("c", 1, 1))
    scheduler, model = driver.scheduler, driver.model
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    assert first is not None
    assert second is not None
    assert [(s.request_id, s.token_ids, s.start) for s in second.requests] == [
        ("a", (PENDING,), 3), ("b", (PENDING,), 2),
    ]  # fmt: skip
    assert [s.sample.output_index for s in second.requests if s.sample is not None] == [1, 1]
    scheduler.apply(first, model.run(first), 0.0)
    third = scheduler.schedule(0.0)
    assert third is not None
    assert [s.request_id for s in third.requests] == ["a"]
    scheduler.apply(second, model.run(second), 0.0)
    assert scheduler.schedule(0.0) is None  # "a" draws its last token in the third
    scheduler.apply(third, model.run(third), 0.0)
    assert not scheduler.has_work


def test_a_request_that_ends_or_is_aborted_in_flight_frees_its_pages_at_once() -> None:
    stopping = next(
        submit for seed in range(99) if reference(submit := make("a", 3, 9, seed=seed, stop_token_ids=(3,)))[1] == "stop"
    )  # fmt: skip
    driver = Driver()
    driver.ahead = True
    driver.add(stopping)
    while not driver.last:
        driver.step()
    assert driver.in_flight, "its next row is in flight"
    assert driver.scheduler.stats().pages_used == 0
    driver.add(make("b", 70, 5))
    driver.step()
    driver.abort("b")
    assert driver.in_flight
    assert driver.scheduler.stats().pages_used == 0
    driver.add(make("c", 130, 3))
    driver.drain()


def test_no_step_is_planned_ahead_that_needs_a_preemption() -> None:
    driver = Driver(3, max_model_len=192)
    driver.add(make("a", 60, 60), make("b", 60, 60))
    driver.ahead = True
    driver.drain()
    assert driver.scheduler.stats().preemptions_total > 0
