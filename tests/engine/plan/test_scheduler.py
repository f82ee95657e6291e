"""The scheduler: examples of each rule, then any history at all. See the kit for what each step checks."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.plan.pace import Place
from engine.plan.prefix import sha256
from engine.plan.scheduler import Scheduler
from engine.plan.types import Sampled, StepResult
from engine.protocol import Submit
from tests.engine.plan.kit import FAULTY_SEED, Driver, FakeModel, make


def usage_of(driver: Driver, name: str) -> tuple[int, int]:
    usage = driver.last[name].usage
    assert usage is not None
    return usage.cached_tokens, usage.preemptions


def test_the_budget_is_spent_exactly_and_in_order_of_arrival() -> None:
    driver = Driver(budget=64, max_running=3)
    driver.add(*(make(name, 100) for name in "abcd"))
    assert driver.step() == {"a": (0, 64)}
    assert driver.step() == {"a": (64, 36), "b": (0, 28)}
    assert driver.step() == {"a": (100, 1), "b": (28, 63)}
    assert driver.step() == {"a": (101, 1), "b": (91, 9), "c": (0, 54)}
    assert driver.step() == {"a": (102, 1), "b": (100, 1), "c": (54, 46)}  # room, but three run already
    assert driver.step() == {"b": (101, 1), "c": (100, 1), "d": (0, 62)}
    driver.drain()


def test_a_long_prompt_never_stalls_the_decodes() -> None:
    driver = Driver(budget=8)
    driver.add(make("a", 5, 30), make("b", 3, 30))
    driver.step()
    driver.add(make("z", 100, 2))
    for step in range(15):  # and z, though it arrived last, gets all that is left
        assert driver.step() == {"a": (5 + step, 1), "b": (3 + step, 1), "z": (6 * step, 6)}
    driver.drain()


def test_beside_decodes_prompts_keep_the_pace_and_alone_they_do_not() -> None:
    driver = Driver(budget=64, pace=10)
    driver.add(make("a", 70, 20))
    assert driver.step() == {"a": (0, 64)}  # nobody waits for a token
    driver.add(make("b", 15, 2), make("c", 30, 2))
    assert driver.step() == {"a": (64, 6), "b": (0, 15), "c": (0, 30)}
    driver.add(make("d", 15, 2), make("e", 30, 2))
    assert driver.step() == {"a": (70, 1), "b": (15, 1), "c": (30, 1), "d": (0, 10)}
    assert driver.step() == {"a": (71, 1), "d": (10, 5), "e": (0, 5)}  # together no more than the pace
    assert driver.step() == {"a": (72, 1), "d": (15, 1), "e": (5, 10)}
    driver.drain()


def test_the_pace_is_asked_for_where_prompts_and_decodes_meet() -> None:
    asked = []

    def pace(decodes: Iterable[Place], soon: Iterable[Place], prompt: Place, at_most: int) -> int:
        asked.append((list(decodes), list(soon), prompt, at_most))
        return 40

    scheduler = Scheduler(
        64, token_budget=100, max_running=4, max_model_len=4096, prefix_caching=False, pace=pace
    )
    model = FakeModel()

    def step() -> None:
        plan = scheduler.schedule(0.0)
        assert plan is not None
        scheduler.apply(plan, model.run(plan), 0.0)

    for submit in (make("a", 30, 9, index_top_k=20), make("b", 90, 9)):
        scheduler.add(submit, 0.0)
        model.add(submit)
    step()  # a, and the beginning of b
    assert asked == []
    step()
    assert asked == [([Place(30, 20)], [Place(90, None)], Place(70, None), 99)]
    step()  # nothing but decodes
    scheduler.add(late := make("c", 50, 9, index_top_k=7), 0.0)
    model.add(late)
    step()
    assert asked[1:] == [([Place(32, 20), Place(91, None)], [Place(50, 7)], Place(0, 7), 98)]


def test_the_head_of_the_queue_is_never_overtaken() -> None:
    driver = Driver(5, budget=200)
    driver.add(make("a", 100, 40))
    driver.step()
    driver.add(make("b", 250, 2), make("c", 1, 1))  # b needs 4 pages of the 3 that are left
    while "a" not in driver.last:
        assert driver.step().keys() == {"a"}
    assert driver.step() == {"b": (0, 200)}
    assert driver.step() == {"b": (200, 50), "c": (0, 1)}
    driver.drain()


def test_a_request_starts_only_where_its_whole_prompt_finds_pages() -> None:
    driver = Driver(5, budget=130)
    driver.add(make("a", 120, 5), make("b", 200, 5))  # 2 pages, and 4 of the 3 that are left
    while "a" not in driver.last:
        assert driver.step().keys() == {"a"}
    driver.drain()
    assert driver.scheduler.stats().preemptions_total == 0


def test_who_arrived_last_is_preempted_and_resumes_from_its_own_pages() -> None:
    driver = Driver(5, budget=256, max_running=3)
    driver.add(make("a", 60, 10), make("b", 64, 80), make("c", 65, 80))
    driver.step()
    assert driver.step().keys() == {"a", "b", "c"}  # 1 + 2 + 2 pages: all taken
    while driver.scheduler.stats().preemptions_total == 0:
        work = driver.step()
    assert work == {"a": (64, 1), "b": (68, 1)}  # a's second page; c gave up both of its own
    assert [r.request_id for r in driver.scheduler._waiting] == ["c"]
    assert driver.scheduler.stats().pages_cached + driver.scheduler.stats().pages_free == 1
    while "a" not in driver.last:
        assert "c" not in driver.step()
    work = driver.step()
    assert work["c"] == (64, 6)  # its full page was still cached; the rest is recomputed
    driver.drain()
    assert (usage_of(driver, "a"), usage_of(driver, "b")) == ((0, 0), (0, 0))
    assert usage_of(driver, "c") == (0, driver.scheduler.stats().preemptions_total)
    stats = driver.scheduler.stats()
    assert stats.decode_tokens_total == 9 + 79 + 79  # the first token of each comes with its prompt
    assert stats.prefill_tokens_total > 60 + 64 + 65  # recomputation is prefill, outputs included


def test_a_request_preempts_itself_if_it_arrived_last() -> None:
    driver = Driver(3, budget=256)
    driver.add(make("a", 65, 60), make("b", 63, 60))
    driver.step()
    driver.step()
    assert driver.step() == {"a": (66, 1)}
    driver.drain()
    assert usage_of(driver, "b") == (0, 1)


def test_a_cached_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    driver = Driver(budget=500)
    prompt = tuple(range(128))
    for name, start in (("a", 0), ("b", 64)):  # b needs logits, so its last page is computed again
        driver.add(make(name, prompt))
        assert driver.step() == {name: (start, 128 - start)}
        driver.drain()
    driver.add(make("c", (*prompt, 7)))
    assert driver.step() == {"c": (128, 1)}
    driver.drain()
    assert [usage_of(driver, name)[0] for name in "abc"] == [0, 64, 128]
    stats = driver.scheduler.stats()
    assert (stats.prefix_queries_total, stats.prefix_hits_total) == (128 + 128 + 129, 64 + 128)


def test_pages_filled_while_decoding_are_cached() -> None:
    driver = Driver(budget=500)
    driver.add(make("a", 60, 80))
    driver.drain()
    driver.add(make("b", (*driver.model.known["a"], 1)))
    assert driver.step() == {"b": (128, 13)}


@pytest.mark.parametrize(
    ("first", "second", "options"),
    [
        ({"index_top_k": 50}, {"index_top_k": 51}, {}),
        ({"index_top_k": 50}, {}, {}),
        ({}, {"prompt_logprobs": 0}, {}),
        ({}, {}, {"prefix_caching": False}),
    ],
    ids=["index_top_k", "dense", "prompt logprobs", "switched off"],
)
def test_a_prefix_is_not_reused(first: Any, second: Any, options: Any) -> None:
    driver = Driver(budget=500, **options)
    prompt = tuple(range(150))
    driver.add(make("a", prompt, **first))
    driver.drain()
    driver.add(make("b", prompt, **second))
    assert driver.step() == {"b": (0, 150)}
    driver.drain()
    assert driver.scheduler.stats().prefix_hits_total == 0
    if options:
        assert driver.scheduler.stats().pages_cached == 0


@pytest.mark.parametrize(("start", "cached"), [(64, 0), (65, 64), (128, 64), (129, 128), (150, 128)])
def test_a_prefix_is_reused_before_the_first_prompt_logprob(start: int, cached: int) -> None:
    driver = Driver(budget=500)
    prompt = tuple(range(150))
    driver.add(make("a", prompt))
    driver.drain()
    driver.add(make("b", prompt, prompt_logprobs=0, prompt_logprobs_start=start))
    assert driver.step() == {"b": (cached, 150 - cached)}


def test_two_requests_that_compute_the_same_page_at_once_do_not_clash() -> None:
    driver = Driver(budget=500)
    driver.add(make("a", tuple(range(100))), make("b", tuple(range(100))))
    assert driver.step() == {"a": (0, 100), "b": (0, 100)}
    driver.drain()
    assert driver.scheduler.stats().pages_cached == 1


def test_abort_frees_pages_at_once_wherever_the_request_is() -> None:
    driver = Driver(4, budget=70)
    assert driver.scheduler.abort("nobody", 0.0) is None
    driver.add(make("a", 130, 20), make("b", 130, 20))
    driver.step()
    driver.abort("b")  # waits
    driver.abort("a")  # in the middle of its prompt
    assert driver.scheduler.stats().pages_used == 0
    driver.add(make("c", 3), make("d", 5), make("e", 200))
    driver.step()
    assert [d.request_id for d in driver.scheduler.abort_all(9.0)] == ["c", "d", "e"]
    assert not driver.scheduler.has_work
    assert driver.scheduler.schedule(9.0) is None


@pytest.mark.parametrize(
    ("submit", "sentence"),
    [
        (make("a", 3), "'a' is in use"),
        (make("b", 200, 57), r"are 257 tokens together, but max_model_len is 256"),
        (make("b", 190, 4), r"may need 4 pages, but the cache has 3"),
        (make("b", ()), "at least 1 prompt token and 1 output token, not 0 and 4"),
        (make("b", 3, 0), "not 3 and 0"),
        (make("b", 3, index_top_k=0), "index_top_k must be at least 1, not 0"),
    ],
)
def test_what_can_never_run_is_refused(submit: Submit, sentence: str) -> None:
    driver = Driver(3, max_model_len=256)
    driver.add(make("a", 189, 4))  # just fits: its last token is never computed
    with pytest.raises(ValueError, match=sentence):
        driver.scheduler.add(submit, 0.0)
    driver.drain()


def test_plans_and_results_must_match() -> None:
    with pytest.raises(ValueError, match=r"max_running \(4\) must be between 1 and token_budget \(3\)"):
        Driver(budget=3)
    scheduler = Driver().scheduler
    scheduler.add(make("a", 3), 0.0)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    ahead = scheduler.schedule(0.0)
    assert ahead is not None
    with pytest.raises(RuntimeError, match="2 plans are in flight"):
        scheduler.schedule(0.0)
    with pytest.raises(RuntimeError, match="only the first plan in flight"):
        scheduler.apply(ahead, StepResult(sampled=(Sampled(token_ids=(1,)),)), 0.0)
    with pytest.raises(ValueError, match="0 entries for 1 requests"):
        scheduler.apply(plan, StepResult(sampled=()), 0.0)
    result = StepResult(sampled=(Sampled(token_ids=(1,)),))
    scheduler.apply(plan, result, 0.0)
    with pytest.raises(RuntimeError, match="only the first plan in flight"):
        scheduler.apply(plan, result, 0.0)


def test_under_heavy_load_nothing_is_lost_however_often_it_is_preempted() -> None:
    preemptions, hits, held = 0, 0, 0
    for seed in range(30):
        rng = random.Random(seed)
        driver = Driver(
            rng.choice((6, 7, 8)),
            budget=rng.choice((10, 64, 150)),
            max_running=rng.choice((3, 4)),
            draft_tokens=seed % 3 * 2,
            pace=(None, 1, 30)[seed % 4 % 3],
        )
        driver.ahead = seed % 2 == 1
        for number in range(10):
            stride, length = rng.randint(1, 4), rng.randint(1, 150)
            prompt = tuple(i * stride % 7 for i in range(length))
            fields = {
                "prompt_logprobs": rng.choice((None, None, 0)),
                "index_top_k": rng.choice((None, None, 100)),
            }
            driver.add(make(f"r{number}", prompt, rng.randint(1, 234), seed=rng.randint(0, 1), **fields))
            for _ in range(rng.randint(0, 60)):
                driver.step()
            if rng.random() < 0.1 and (alive := list(driver.scheduler._requests)):
                driver.abort(rng.choice(alive))
        driver.drain()
        preemptions += driver.scheduler.stats().preemptions_total
        hits += driver.scheduler.stats().prefix_hits_total
        held += sum(driver.scheduler.stats().draft_lengths_total[1:])
    assert held > 1000
    assert preemptions > 100
    assert hits > 5000


submits = st.builds(
    lambda stride, length, **fields: make("?", tuple(i * stride % 7 for i in range(length)), **fields),
    stride=st.sampled_from([1, 1, 2, 3]),  # which of a few prompts, and how much of it
    length=st.one_of(st.integers(40, 260), st.sampled_from([1, 63, 64, 65, 128, 192])),
    max_tokens=st.one_of(st.integers(80, 120), st.integers(1, 120)),
    index_top_k=st.sampled_from([None, None, None, 20, 70, 128, 200, 300]),
    seed=st.sampled_from([0, 0, 0, 0, 1, FAULTY_SEED]),
    priority=st.sampled_from([0, 0, 0, -2, 1, 5]),
    stop_token_ids=st.sampled_from([(), (), (), (3,)]),
    prompt_logprobs=st.sampled_from([None, None, None, 1]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    logprobs=st.sampled_from([None, 0]),
)


class Histories(RuleBasedStateMachine):
    """Any history of arrivals, aborts and steps, with few pages, small budgets and bad hashes."""

    @initialize(
        num_pages=st.sampled_from([6, 7, 9]),  # one request needs up to 6
        budget=st.sampled_from([64, 200, 30, 4]),
        max_running=st.sampled_from([4, 3, 2, 1]),
        prefix_caching=st.sampled_from([True, True, True, False]),
        hash_bytes=st.sampled_from([32, 32, 32, 1, 0]),
        draft_tokens=st.sampled_from([0, 1, 4]),
        lookup=st.sampled_from([False, False, True]),
        pace=st.sampled_from([None, None, 1, 40]),
        ahead=st.booleans(),
    )
    def start(self, hash_bytes: int, ahead: bool, **options: Any) -> None:
        self.driver = Driver(hash_function=lambda data: sha256(data)[:hash_bytes], **options)
        self.driver.ahead = ahead
        self.added = 0

    @rule(burst=st.lists(submits, min_size=1, max_size=4))
    def add(self, burst: list[Submit]) -> None:
        for submit in burst:
            self.added += 1
            self.driver.add(msgspec.structs.replace(submit, request_id=f"r{self.added}"))

    @precondition(lambda self: self.driver.scheduler.has_work)
    @rule(steps=st.sampled_from([1, 5, 50, 400]))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.driver.step()

    @precondition(lambda self: self.driver.scheduler.has_work)
    @rule(order=st.integers(0, 5))
    def abort(self, order: int) -> None:
        alive = list(self.driver.scheduler._requests)
        if order < len(alive):
            self.driver.abort(alive[order])

    @invariant()
    def checked(self) -> None:
        if hasattr(self, "driver"):
            self.driver.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.drain()


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=40, stateful_step_count=12, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
