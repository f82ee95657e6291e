"""Filters and penalties against few-line definitions; draws against their distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.plan.types import SampleSpec
from engine.protocol import SMALLEST_TEMPERATURE, SamplingParams
from engine.step.filters import runners
from engine.step.sampler import (
    best_tokens,
    best_tokens_by_sum,
    penalised,
    sample,
    token_logprob,
    token_logprobs,
)


def spec(
    history: tuple[int, ...] = (), prompt_len: int = 0, output_index: int = 0, **params: object
) -> SampleSpec:
    settings_ = {"max_tokens": 1, "seed": 0, **params}
    return SampleSpec(
        params=SamplingParams(**settings_),  # type: ignore[arg-type]
        output_index=output_index,
        prompt_len=prompt_len,
        history=history,
    )


@st.composite
def distributions(draw: st.DrawFn) -> NDArray[np.float32]:
    """Weights that are exact in float32, whatever is summed."""
    weights = draw(st.lists(st.integers(1, 50), min_size=1, max_size=40))
    return np.array(weights, dtype=np.float32) / np.float32(64)


def plain_filter(probs: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The definition, by sorting."""
    left = sorted(range(len(probs)), key=lambda i: -probs[i])
    if top_k:
        edge = probs[left[min(top_k, len(left)) - 1]]
        left = [i for i in left if probs[i] >= edge]
    if top_p < 1:
        total, mass = 0.0, sum(probs[i] for i in left)
        for i in left:
            total += probs[i]
            if total >= top_p * mass - 1e-12:
                edge = probs[i]
                break
        left = [i for i in left if probs[i] >= edge]
    return {i for i in left if probs[i] >= min_p * max(probs)}


@given(
    probs=distributions(),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.37, 0.61, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.13, 0.71]),
)
def test_filters_equal_their_definition(
    probs: NDArray[np.float32], top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(max_tokens=1, seed=0, top_k=top_k, top_p=top_p, min_p=min_p)
    left, rest = runners(probs, params)
    assert set(left.tolist()) == plain_filter(probs.tolist(), top_k, top_p, min_p)
    assert rest == 0


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ({"top_p": 1 - 2e-6}, 3000),  # the few that are likely do not reach it
        ({"top_k": 2000}, 3000),  # equal ones at the edge all stay
        ({"min_p": 1e-8}, 3000),
        ({"min_p": 1e-8, "top_k": 400, "top_p": 0.5}, 400),
        ({"top_p": 0.25}, 400),
        ({"min_p": 1e-3}, 400),
        ({"min_p": 1e-3, "top_k": 9000}, 400),
        ({"top_k": 400, "top_p": 0.999}, 400),
    ],
)
def test_an_edge_among_the_unlikely_is_found_too(filters: dict[str, float], count: int) -> None:
    weights = np.repeat(np.array([2.0**-14, 1.0, 2.0**-40], dtype=np.float32), [2600, 400, 1000])
    left, rest = runners(weights, SamplingParams(max_tokens=1, seed=0, **filters))  # type: ignore[arg-type]
    assert (len(left), rest) == (count, 0.0)


def test_without_filters_all_run_the_unlikely_as_one() -> None:
    weights = np.array([1.0, 2.0**-14, 0.5, 2.0**-15, 0.0], dtype=np.float32)
    left, rest = runners(weights, SamplingParams(max_tokens=1, seed=0))
    assert left.tolist() == [0, 2]
    assert rest == pytest.approx(2.0**-14 + 2.0**-15)


def test_penalties_by_hand() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.5, 0.0], dtype=np.float32)
    history = (0, 1, 2, 2, 3)  # prompt 0 1, output 2 2 3
    out = penalised(
        logits,
        spec(history, prompt_len=2, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25),
    )
    expected = [1.0, -4.0, 0.5 - 0.5 - 0.5, 0.25 - 0.5 - 0.25, 0.0]
    assert out.tolist() == expected
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5, 0.0]  # the caller's row is left alone
    biased = penalised(logits, spec(logit_bias=((4, 100.0), (0, -3.0))))
    assert biased.tolist() == [-1.0, -2.0, 1.0, 0.5, 100.0]


def test_stop_tokens_wait_for_the_least_length() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 9.0]])
    wishes: dict[str, Any] = {"stop_token_ids": (3, 1), "min_tokens": 2, "logit_bias": ((3, 50.0),)}
    for temperature in (0.0, 1.0):
        drawn = [
            sample(logits, [spec(output_index=index, top_k=1, temperature=temperature, **wishes)])[0].token_id
            for index in range(4)
        ]
        assert drawn == [2, 2, 3, 3]


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().unsqueeze(0)
    counts = [0] * 4
    for index in range(4000):
        (drawn,) = sample(logits, [spec(output_index=index, seed=7)])
        assert drawn.token_id is not None
        counts[drawn.token_id] += 1
    chi_square = sum((c - 4000 * p) ** 2 / (4000 * p) for c, p in zip(counts, probs.tolist(), strict=True))
    assert chi_square < 16.3  # p = 0.001 at 3 degrees of freedom; the seed is fixed, so this never flakes


def test_the_smallest_temperature_draws_the_likeliest() -> None:
    logits = torch.tensor([[0.5, 3.0, 2.9999998, -7.0]])
    for filters in ({}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.1}):
        assert sample(logits, [spec(temperature=SMALLEST_TEMPERATURE, **filters)])[0].token_id == 1


def test_temperature_sharpens() -> None:
    logits = torch.tensor([[1.0, 0.0]])
    cold = sum(sample(logits, [spec(temperature=0.25, output_index=i)])[0].token_id or 0 for i in range(1000))
    assert abs(cold / 1000 - 1 / (1 + math.exp(4))) < 0.01


@settings(max_examples=30)
@given(seed=st.integers(0, 2**64 - 1), index=st.integers(0, 10_000), other=st.integers(0, 5))
def test_a_draw_depends_on_its_own_row_seed_and_index_only(seed: int, index: int, other: int) -> None:
    generator = torch.Generator().manual_seed(other)
    rows = torch.randn(6, 300, generator=generator)
    mine = rows[3:4].clone()
    own = spec(seed=seed, output_index=index, temperature=1.3, top_p=0.9)
    (alone,) = sample(mine, [own])
    together = sample(rows, [spec(seed=1), spec(temperature=0), spec(seed=2, top_k=3), own, spec(), spec()])
    assert together[3] == alone


def test_the_last_digits_of_the_logits_do_not_change_the_draw() -> None:
    """Another batch gives a row other last digits: with 49152 tokens that must not move each edge between them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(49152, generator=generator) * 3
    changed = 0
    for index in range(400):
        near = logits + 1e-5 * torch.randn(49152, generator=generator)
        one, other = (sample(x.unsqueeze(0), [spec(seed=3, output_index=index)])[0] for x in (logits, near))
        changed += one.token_id != other.token_id
    assert changed == 0


@pytest.mark.parametrize("choose", [best_tokens, best_tokens_by_sum])
def test_best_tokens_and_finite_rows_are_what_torch_says_of_every_number(
    choose: Callable[[torch.Tensor], tuple[list[int], list[bool]]],
) -> None:
    logits = torch.randn(9, 1000, generator=torch.Generator().manual_seed(0))
    logits[1, 7], logits[2, 7], logits[3, 7] = math.nan, math.inf, -math.inf
    logits[4, 7], logits[4, 8] = math.inf, -math.inf
    logits[5] = 3e38  # finite, but no sum of it
    logits[6, [3, 500]] = 100.0  # the first of two
    logits[7] = -3e38
    tokens, finite = choose(logits)
    assert finite == torch.isfinite(logits).all(-1).tolist()
    good = [0, 5, 6, 7, 8]
    assert [tokens[row] for row in good] == logits[good].argmax(-1).tolist()
    assert tokens[6] == 3


def test_a_row_that_is_not_finite_fails_alone() -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = math.nan
    first, bad, last = sample(logits, [spec(temperature=0), spec(), spec(temperature=0)])
    assert bad.token_id is None
    assert bad.error is not None
    assert "not finite" in bad.error
    assert first.token_id == last.token_id == 0


def test_a_zero_probability_token_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    # -inf is what a mask leaves; the engine's own logits are finite, so go through the filter instead.
    logits[0, 1] = -1e30
    drawn = {sample(logits, [spec(output_index=i)])[0].token_id for i in range(300)}
    assert drawn == {0, 2}


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.tensor([3.0, 1.0, 2.0])
    (drawn,) = sample(logits.unsqueeze(0), [spec(temperature=0, logprobs=2, logit_bias=((1, 100.0),))])
    assert drawn.token_id == 1
    assert drawn.logprob is not None
    assert drawn.logprob.rank == 3
    assert abs(drawn.logprob.logprob - (1 - math.log(sum(math.exp(x) for x in (3, 1, 2))))) < 1e-6
    assert [token for token, _ in drawn.logprob.top] == [0, 2]
    assert token_logprob(logits, 0, 0).top == ()


def test_many_rows_at_once_are_the_rows_one_by_one() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 3
    tokens = [0, 49, 7, 7, 20, 1, 30]
    expected = logits.double().log_softmax(-1)
    for row, entry in enumerate(token_logprobs(logits, tokens, 3)):
        assert entry == token_logprob(logits[row], tokens[row], 3)
        assert entry.logprob == pytest.approx(expected[row, tokens[row]].item(), abs=1e-5)
        assert entry.rank == int((expected[row] > expected[row, tokens[row]]).sum()) + 1
        best = expected[row].topk(3)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_named_tokens_are_reported_in_place_of_the_likeliest() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(3))
    named, plain = sample(
        logits, [spec(temperature=0, logprobs=0, logprob_token_ids=(7, 3)), spec(temperature=0, logprobs=2)]
    )
    expected = logits.log_softmax(-1)
    assert named.logprob is not None
    assert [token for token, _ in named.logprob.top] == [7, 3]
    assert [value for _, value in named.logprob.top] == pytest.approx(expected[0, [7, 3]].tolist())
    assert named.logprob.logprob == pytest.approx(float(expected[0].max()))
    assert plain.logprob is not None
    assert len(plain.logprob.top) == 2
