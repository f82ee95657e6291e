"""Filters and penalties against few-line definitions; draws against their distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import SampleSpec
from engine.protocol import SamplingParams
from engine.sampler import exponential_noise, kept, penalised, sample, token_logprob, token_logprobs


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
def distributions(draw: st.DrawFn) -> torch.Tensor:
    weights = draw(st.lists(st.integers(1, 50), min_size=1, max_size=40))
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


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
def test_filters_equal_their_definition(probs: torch.Tensor, top_k: int, top_p: float, min_p: float) -> None:
    params = SamplingParams(max_tokens=1, seed=0, top_k=top_k, top_p=top_p, min_p=min_p)
    mask = kept(probs, params)
    left = set(range(len(probs))) if mask is None else set(mask.nonzero().flatten().tolist())
    assert left == plain_filter(probs.tolist(), top_k, top_p, min_p)
    assert left


def test_a_nucleus_wider_than_the_first_guess_is_exact() -> None:
    probs = torch.full((5000,), 1 / 5000, dtype=torch.float64)
    probs[:2000] *= 1.2
    probs /= probs.sum()
    mask = kept(probs, SamplingParams(max_tokens=1, seed=0, top_p=0.4))
    assert mask is not None
    assert set(mask.nonzero().flatten().tolist()) == set(range(2000))  # equal ones at the edge all stay


def test_penalties_by_hand() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5, 0.0])
    history = (0, 1, 2, 2, 3)  # prompt 0 1, output 2 2 3
    out = penalised(
        logits,
        spec(history, prompt_len=2, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25),
    )
    expected = [1.0, -4.0, 0.5 - 0.5 - 0.5, 0.25 - 0.5 - 0.25, 0.0]
    torch.testing.assert_close(out, torch.tensor(expected))
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5, 0.0]  # the caller's row is left alone
    biased = penalised(logits, spec(logit_bias=((4, 100.0), (0, -3.0))))
    assert biased.tolist() == [-1.0, -2.0, 1.0, 0.5, 100.0]


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


def test_noise_differs_by_seed_and_index_and_is_positive() -> None:
    firsts = {float(exponential_noise(seed, index, 3)[0]) for seed in range(20) for index in range(20)}
    assert len(firsts) == 400
    noise = exponential_noise(2**64 - 1, 2**40, 100_000)
    assert float(noise.min()) > 0
    assert abs(float(noise.mean()) - 1) < 0.02
    assert torch.equal(noise, exponential_noise(2**64 - 1, 2**40, 100_000))


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
