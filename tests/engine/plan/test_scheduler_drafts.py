"""The scheduler with drafts: they take what is left, and only what held is kept."""

from __future__ import annotations

from tests.engine.plan.kit import Driver, make, reference


def test_drafts_come_after_every_known_token_and_in_order_of_arrival() -> None:
    driver = Driver(budget=12, draft_tokens=3)
    driver.model.drafting.random = lambda: 1.0  # type: ignore[method-assign]
    driver.add(make("a", 3, 40), make("b", 3, 40))
    assert driver.step() == {"a": (0, 3), "b": (0, 3)}
    assert driver.drafts == {}  # nothing was proposed yet
    assert driver.step() == {"a": (3, 1), "b": (3, 1)}
    assert [len(driver.drafts[name]) for name in "ab"] == [3, 3]
    driver.add(make("c", 10, 40))
    assert driver.step() == {"a": (7, 1), "b": (7, 1), "c": (0, 10)}  # each gained 4 tokens in one step
    assert driver.drafts == {}  # the known tokens left no room
    driver.step()
    assert [len(driver.drafts[name]) for name in "abc"] == [3, 3, 3]
    driver.drain()


def test_drafts_stop_before_the_last_token_and_end_at_a_stop_token() -> None:
    driver = Driver(budget=64, draft_tokens=5)
    driver.model.drafting.random = lambda: 1.0  # type: ignore[method-assign]
    driver.add(make("a", 3, 4))
    driver.step()
    driver.step()
    assert len(driver.drafts["a"]) == 2  # 3 tokens were left, and a step draws one more than it accepts
    assert driver.last["a"].finish_reason == "length"
    text, _ = reference(make("b", 3, 20))
    driver.add(make("b", 3, 20, stop_token_ids=(text[3],)))
    driver.step()
    driver.step()  # accepts past the stop token, which hides what follows it
    assert driver.last["b"].finish_reason == "stop"
    assert driver.output["b"] == list(text[: text.index(text[3]) + 1])
    driver.drain()


def test_drafts_preempt_nobody_and_give_back_pages_that_they_did_not_need() -> None:
    driver = Driver(3, budget=128, draft_tokens=4)
    driver.model.drafting.random = lambda: 0.0  # type: ignore[method-assign] # every draft is wrong
    driver.add(make("a", 62, 30), make("b", 60, 4))
    driver.step()
    driver.step()
    assert len(driver.drafts["a"]) == 4  # one on the last page that is left
    assert driver.scheduler.stats().pages_used == 2  # given back
    driver.step()
    driver.step()
    assert "b" in driver.last
    driver.add(make("c", 60, 30), make("d", 1, 30))
    driver.drain()
    assert driver.scheduler.stats().draft_lengths_total[1:] == (0, 0, 0, 0)


def test_only_as_many_drafts_as_pages_are_left() -> None:
    driver = Driver(2, budget=128, draft_tokens=4)
    driver.model.drafting.random = lambda: 1.0  # type: ignore[method-assign]
    driver.add(make("a", 61, 30), make("b", 30, 30))
    driver.step()
    driver.step()
    assert [len(driver.drafts[name]) for name in "ab"] == [2, 4]  # a's own page has room for 2
    driver.drain()


def test_a_prefix_is_made_of_tokens_that_held() -> None:
    driver = Driver(budget=256, draft_tokens=4)
    driver.add(make("a", 60, 80))
    driver.drain()
    driver.add(make("b", (*driver.model.known["a"], 1)))
    assert driver.step() == {"b": (128, 13)}
    driver.drain()


def test_lookup_drafts_from_the_text_itself() -> None:
    driver = Driver(budget=64, draft_tokens=3, lookup=True)
    driver.add(make("a", (5, 6, 7, 8, 5, 6), 3))
    assert driver.step() == {"a": (0, 6)}
    assert driver.drafts == {"a": (7, 8)}  # already after the prompt; the last token allowed is not drafted
    driver.drain()
