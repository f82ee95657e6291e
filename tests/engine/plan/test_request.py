"""One request's record: what it plans, and what it makes of a result."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from engine.plan.request import Request
from engine.plan.types import Sampled, ScheduledRequest
from engine.protocol import Delta, SamplingParams, Submit, TokenLogprob


def make(prompt: int = 4, *, max_tokens: int = 8, index_top_k: int | None = None, **sampling: Any) -> Request:
    """A request whose prompt token ids are 100, 101, ..."""
    params = SamplingParams(max_tokens=max_tokens, seed=0, **sampling)
    prompt_token_ids = tuple(range(100, 100 + prompt))
    submit = Submit(
        request_id="r", prompt_token_ids=prompt_token_ids, sampling=params, index_top_k=index_top_k
    )
    return Request(submit, arrival=0, now=10.0)


def logprob(token_id: int, value: float = -1.0) -> TokenLogprob:
    return TokenLogprob(token_id=token_id, logprob=value, rank=1, top=())


def look(request: Request, count: int) -> ScheduledRequest:
    """What the next step of `count` tokens would be, without one in flight."""
    return copy.deepcopy(request).plan(count)


def step(request: Request, count: int, token_id: int | None = None, now: float = 0.0) -> Delta | None:
    """Run `count` tokens; each prompt target's logprob is its row's position, negated."""
    scheduled = request.plan(count)
    prompt = tuple(logprob(t, -float(scheduled.start + i)) for i, t in enumerate(scheduled.prompt_targets))
    result = Sampled(
        token_ids=() if token_id is None else (token_id,),
        logprobs=() if token_id is None else (logprob(token_id),),
        prompt_logprobs=prompt,
    )
    return request.accept(scheduled, result, now)


def test_only_the_last_known_token_is_sampled_from() -> None:
    request = make(5, index_top_k=3)
    chunk = look(request, 4)
    assert (chunk.start, chunk.token_ids, chunk.index_top_k, chunk.sample) == (
        0,
        (100, 101, 102, 103),
        3,
        None,
    )
    assert step(request, 4) is None
    last = look(request, 1)
    assert (last.start, last.token_ids) == (4, (104,))
    assert last.sample is not None
    assert (last.sample.output_index, last.sample.prompt_len) == (0, 5)
    step(request, 1, 7)
    decode = look(request, 1)
    assert (decode.start, decode.token_ids) == (5, (7,))
    assert decode.sample is not None
    assert decode.sample.output_index == 1


@pytest.mark.parametrize(
    ("params", "carried"),
    [
        ({}, False),
        ({"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"repetition_penalty": 0.9}, True),
    ],
)
def test_history_is_carried_only_where_a_penalty_needs_it(params: dict[str, Any], carried: bool) -> None:
    request = make(2, **params)
    step(request, 2, 7)
    sample = look(request, 1).sample
    assert sample is not None
    assert sample.history == ((100, 101, 7) if carried else ())


def test_a_stop_token_ends_the_request_and_is_part_of_it() -> None:
    request = make(2, stop_token_ids=(7, 9))
    going = step(request, 2, 8)
    assert going == Delta(request_id="r", token_ids=(8,), usage=request.usage(0.0))
    last = step(request, 1, 9)
    assert last is not None
    assert (last.token_ids, last.finish_reason) == ((9,), "stop")
    assert last.usage is not None
    assert last.usage.completion_tokens == 2


@pytest.mark.parametrize(("token_id", "reason"), [(8, "length"), (7, "stop")])
def test_the_last_token_allowed_ends_the_request(token_id: int, reason: str) -> None:
    delta = step(make(2, max_tokens=1, stop_token_ids=(7,)), 2, token_id)
    assert delta is not None
    assert delta.finish_reason == reason


def test_an_error_ends_the_request_without_a_token() -> None:
    request = make(2)
    delta = request.accept(request.plan(2), Sampled(token_ids=(3,), error="logits are not finite"), 11.0)
    assert delta is not None
    assert (delta.token_ids, delta.finish_reason, delta.error) == ((), "error", "logits are not finite")
    assert delta.usage is not None
    assert delta.usage.completion_tokens == 0


def test_logprobs_are_passed_on_only_where_asked_for() -> None:
    without, with_ = step(make(2), 2, 8), step(make(2, logprobs=0), 2, 8)
    assert without is not None
    assert with_ is not None
    assert (without.logprobs, with_.logprobs) == (None, (logprob(8),))


def test_usage_tells_the_stages_apart() -> None:
    request = make(3, index_top_k=2)
    request.admit((), 0, 12.0)
    step(request, 2, now=13.0)
    request.preempt()
    request.admit((), 0, 14.0)  # started before: neither the wait nor the hits are counted again
    step(request, 3, 7, now=15.5)
    usage = request.usage(20.0)
    assert (usage.queue_seconds, usage.prefill_seconds, usage.decode_seconds) == (2.0, 3.5, 4.5)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.preemptions, usage.index_top_k) == (
        3,
        1,
        1,
        2,
    )


def test_stages_that_were_not_reached_take_no_time() -> None:
    waiting = make().usage(14.0)
    assert (waiting.queue_seconds, waiting.prefill_seconds, waiting.decode_seconds) == (4.0, 0.0, 0.0)
    request = make()
    request.admit((), 0, 11.0)
    started = request.usage(14.0)
    assert (started.queue_seconds, started.prefill_seconds, started.decode_seconds) == (1.0, 3.0, 0.0)


def test_prompt_logprobs_come_whole_and_once_with_the_first_token() -> None:
    request = make(6, prompt_logprobs=2)
    first = look(request, 3)
    assert (first.prompt_targets, first.prompt_alternatives) == ((101, 102, 103), 2)
    assert step(request, 3) is None
    last = look(request, 3)
    assert (last.prompt_targets, last.prompt_alternatives) == ((104, 105), 2)  # the last row has no target
    delta = step(request, 3, 7)
    assert delta is not None
    assert delta.prompt_logprobs == (None, *(logprob(101 + row, -float(row)) for row in range(5)))
    decode = look(request, 1)
    assert (decode.prompt_targets, decode.prompt_alternatives) == ((), 0)
    delta = step(request, 1, 8)
    assert delta is not None
    assert delta.prompt_logprobs is None


def test_prompt_logprobs_can_begin_late() -> None:
    request = make(6, prompt_logprobs=0, prompt_logprobs_start=4)
    assert request.num_reusable == 3  # row 3 gives what token 4 is scored with
    assert look(request, 3).prompt_targets == ()
    step(request, 3)
    assert look(request, 3).prompt_targets == (104, 105)
    delta = step(request, 3, 7)
    assert delta is not None
    assert delta.prompt_logprobs == (None,) * 4 + (logprob(104, -3.0), logprob(105, -4.0))
    request = make(6, prompt_logprobs=0, prompt_logprobs_start=4)
    assert look(request, 6).prompt_targets == (
        101,
        102,
        103,
        104,
        105,
    )  # a target a row; the first are left out
    delta = step(request, 6, 7)
    assert delta is not None
    assert delta.prompt_logprobs == (None,) * 4 + (logprob(104, -3.0), logprob(105, -4.0))
    delta = step(make(6, prompt_logprobs=0, prompt_logprobs_start=6), 6, 7)
    assert delta is not None
    assert delta.prompt_logprobs == (None,) * 6


def test_a_prompt_of_one_token_has_one_entry() -> None:
    delta = step(make(1, prompt_logprobs=0), 1, 7)
    assert delta is not None
    assert delta.prompt_logprobs == (None,)


def test_recomputed_rows_are_not_reported_twice() -> None:
    request = make(6, prompt_logprobs=0)
    step(request, 3)
    request.preempt()
    assert look(request, 2).prompt_targets == ()  # both rows are known
    step(request, 2)
    assert look(request, 3).prompt_targets == (103, 104, 105)  # row 2 again, then new ones
    step(request, 3)
    delta = step(request, 1, 7)
    assert delta is not None
    assert delta.prompt_logprobs == (None, *(logprob(101 + row, -float(row)) for row in range(5)))
    request.preempt()
    assert look(request, 7).prompt_targets == ()
    delta = step(request, 7, 8)
    assert delta == Delta(request_id="r", token_ids=(8,))


def test_drafts_that_held_are_computed_and_the_others_are_as_if_they_never_were() -> None:
    request = make(3, max_tokens=20, logprobs=0)
    tokens = (7, 8, 9)
    entries = tuple(logprob(t) for t in tokens)
    first = request.plan(3, (7, 8, 5, 5))
    assert (first.token_ids, first.drafts) == ((100, 101, 102, 7, 8, 5, 5), (7, 8, 5, 5))
    delta = request.accept(first, Sampled(token_ids=tokens, logprobs=entries, draft_token_ids=(1, 2)), 0.0)
    assert delta is not None
    assert (delta.token_ids, delta.logprobs) == (tokens, entries)
    assert (request.num_computed, request.num_tokens) == (5, 6)
    assert request.draft(9) == (1, 2)
    assert request.draft(1) == (1,)
    assert request.plan(1, (1,)).token_ids == (9, 1)


def test_nothing_follows_a_stop_token_inside_an_accepted_run() -> None:
    request = make(3, max_tokens=20, stop_token_ids=(8,))
    delta = request.accept(request.plan(3, (7, 8, 9)), Sampled(token_ids=(7, 8, 9, 4)), 0.0)
    assert delta is not None
    assert (delta.token_ids, delta.finish_reason) == ((7, 8), "stop")
    assert delta.usage is not None
    assert delta.usage.completion_tokens == 2
    assert request.num_computed == 4  # the stop token was never computed, as far as anyone is told


@pytest.mark.parametrize(
    ("count", "sampled", "sentence"),
    [
        (1, Sampled(token_ids=(3,), prompt_logprobs=(logprob(101),)), "exactly where they were asked for"),
        (2, Sampled(prompt_logprobs=(logprob(101),)), "exactly where they were asked for"),
        (2, Sampled(token_ids=(3,), prompt_logprobs=(logprob(101),)), "the logprob of each of its tokens"),
        (2, Sampled(token_ids=(3,), logprobs=(logprob(3),)), "0 prompt logprobs for 1 prompt targets"),
        (2, Sampled(token_ids=(3, 4), logprobs=(logprob(3),) * 2), "drafts that held, and one token more"),
    ],
)
def test_a_result_that_does_not_answer_is_refused(count: int, sampled: Sampled, sentence: str) -> None:
    request = make(2, logprobs=0, prompt_logprobs=0)
    with pytest.raises(ValueError, match=sentence):
        request.accept(request.plan(count), sampled, 0.0)
