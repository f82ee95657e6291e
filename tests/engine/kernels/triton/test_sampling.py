"""Sampling on the device against the CPU's: the same numbers, the same tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl

from engine.kernels.triton import race
from engine.kernels.triton.kernel import kernel
from engine.kernels.triton.sampling import DrawRows, Needs, count_tokens, draw
from engine.step.device_sampler import needs_of, table
from engine.step.masking import TokenMasks
from engine.step.race import exponential_noise, stream_key
from engine.step.sampler import sample
from lab.doctor.pointwise import check_draws, draw_on, draw_rows, sample_spec


def normal(rows: int, vocab: int, spread: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


@kernel
def _numbers(
    keys: tl.tensor,
    ids: tl.tensor,
    bits: tl.tensor,
    noise: tl.tensor,
    count: tl.constexpr,
    width: tl.constexpr,
) -> None:
    at = tl.arange(0, width)
    key = tl.load(keys + tl.program_id(0))
    own = tl.load(ids + at, mask=at < count, other=0)
    place = tl.program_id(0) * count + at
    hashes = race.hashed(key.to(tl.uint64, bitcast=True), own.to(tl.uint64, bitcast=True))
    tl.store(bits + place, hashes.to(tl.int64, bitcast=True), mask=at < count)
    tl.store(noise + place, race.noise(key, own), mask=at < count)


def test_the_random_numbers_are_the_same_bits(device: torch.device) -> None:
    ids = np.concatenate((np.arange(3000), [49151, 151935, -1, (1 << 40) + 5, (1 << 40) + 151935]))
    places = [(0, 0), (2**64 - 1, 7), (123456789, 2**40), (5, 131071)]
    keys = np.array([stream_key(*place) for place in places], dtype=np.uint64)
    bits = torch.empty(len(places), len(ids), dtype=torch.int64, device=device)
    noise = torch.empty(len(places), len(ids), dtype=torch.float64, device=device)
    _numbers[(len(places),)](
        torch.from_numpy(keys.view(np.int64)).to(device), torch.from_numpy(ids).to(device), bits, noise,
        count=len(ids), width=4096,
    )  # fmt: skip
    for i, place in enumerate(places):
        z = keys[i] + ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        assert (bits[i].cpu().numpy().view(np.uint64) == z ^ (z >> np.uint64(31))).all()
        expected = exponential_noise(*place, ids)
        steps = noise[i].cpu().numpy().view(np.int64) - expected.view(np.int64)
        assert np.abs(steps).max() <= 1  # of the logarithm, in the last digit


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**9},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"top_p": 1 - 2e-6},
    {"min_p": 0.05},
    {"min_p": 1e-8},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.95},
    {"top_k": 2000, "top_p": 0.5, "min_p": 0.01},
    {"top_k": 10**9, "top_p": 0.8},
]


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_every_filter_draws_as_the_cpu(spread: float, device: torch.device) -> None:
    """From all equal, over a crowd of noticeable tokens, to few."""
    specs = [
        sample_spec(seed=11, output_index=i, temperature=(1.0, 0.3, 2.5)[(i + round(spread)) % 3], **filters)
        for i, filters in enumerate(FILTERS)
    ]
    check_draws(normal(len(specs), 5000, spread), specs, device)


def test_more_candidates_than_are_kept(device: torch.device) -> None:
    specs = [sample_spec(seed=i, **FILTERS[i]) for i in (0, 2, 4, 6, 9, 10)]
    check_draws(normal(len(specs), 10_000, 0.5), specs, device)


def test_a_crowd_without_filters(device: torch.device) -> None:
    """Too many noticeable tokens to be kept, and beside them others that win a second race now and then."""
    logits = torch.full((12, 17_000), -8.9)  # 2^-12.8 of the best
    logits[:, 9000:] = -9.2  # 2^-13.3
    logits[:, 100] = 0.0
    specs = [sample_spec(seed=21, output_index=i) for i in range(11)] + [sample_spec(seed=1, temperature=0)]
    check_draws(logits, specs, device)
    tokens = draw_on(logits, specs, device).tokens
    assert 0 < int((tokens >= 9000).sum()) < 11


def test_a_whole_vocabulary(device: torch.device) -> None:
    specs = [
        sample_spec(seed=5, temperature=0.8, logprobs=3),
        sample_spec(seed=5, temperature=0),
        sample_spec(seed=6, top_p=0.95, top_k=64, logprobs=0),
    ]
    check_draws(normal(3, 151_936, 3.0), specs, device)


def test_temperature_zero_is_the_first_of_the_best(device: torch.device) -> None:
    logits = normal(3, 9000, 1.0)
    logits[0, [8999, 4096, 5000]] = 30.0
    logits[2] = 1.5
    check_draws(
        logits,
        [
            sample_spec(temperature=0, top_k=5),
            sample_spec(temperature=0, top_p=0.1),
            sample_spec(temperature=0),
        ],
        device,
    )
    assert draw_on(logits, [sample_spec(temperature=0)] * 3, device).tokens.tolist()[::2] == [4096, 0]


def test_a_temperature_near_zero_and_logits_far_apart(device: torch.device) -> None:
    logits = normal(4, 700, 10.0)
    logits[1, :350] = -3e38
    logits[2] = -3e38
    specs = [
        sample_spec(temperature=1e-6),
        sample_spec(temperature=0.5),
        sample_spec(top_k=3),
        sample_spec(temperature=1e-6, top_p=0.5),
    ]
    check_draws(logits, specs, device)


def test_the_rest_wins_as_often_as_on_the_cpu(device: torch.device) -> None:
    """Many tokens that are hardly likely each: their second race comes out the same."""
    logits = torch.full((24, 6000), -9.5)  # 2^-13.7 of the best
    logits[:, 100] = 0.0
    specs = [sample_spec(seed=3, output_index=i) for i in range(24)]
    check_draws(logits, specs, device)
    tokens = draw_on(logits, specs, device).tokens
    assert 3 < int((tokens != 100).sum()) < 20


def test_penalties_and_bias(device: torch.device) -> None:
    generator = np.random.default_rng(0)
    specs = []
    for i in range(12):
        history = tuple(generator.integers(0, 300, 80).tolist())
        penalties: dict[str, Any] = [
            {"repetition_penalty": 1.3},
            {"presence_penalty": 0.7, "frequency_penalty": -0.4},
            {"repetition_penalty": 0.8, "presence_penalty": -2.0, "frequency_penalty": 0.1},
            {},
        ][i % 4]
        bias = ((3, 1.5), (4200, -4.0), (3, 0.25)) if i % 3 == 0 else ()
        specs.append(
            sample_spec(
                history,
                prompt_len=i * 8,
                output_index=i,
                temperature=i % 2,
                logit_bias=bias,
                logprobs=2,
                **penalties,
            )
        )
    logits = normal(12, 4300, 2.0)
    before = logits.clone()
    check_draws(logits, specs, device)
    assert torch.equal(logits, before)


def test_a_drawn_token_is_counted_for_the_next_draw(device: torch.device) -> None:
    first = [
        sample_spec((1, 2, 2), prompt_len=1, frequency_penalty=1.0),
        sample_spec(),
        sample_spec((4,), 1, presence_penalty=0.5),
    ]
    rows = draw_rows(first, 10, device)
    count_tokens(rows, torch.tensor([2, 5, 4], device=device))
    assert rows.history.tolist() == [[0, 1, 6, 0, 0, 0, 0, 0, 0, 0], [0] * 10, [0, 0, 0, 0, 3, 0, 0, 0, 0, 0]]


def test_rows_that_are_not_finite_are_marked_and_harm_no_other(device: torch.device) -> None:
    logits = normal(6, 5000, 2.0)
    logits[0, 4500], logits[1, 0], logits[2, 4999] = math.nan, math.inf, -math.inf
    logits[4] = math.nan
    specs = [
        sample_spec(),
        sample_spec(top_k=3),
        sample_spec(temperature=0, logprobs=1),
        sample_spec(logprobs=1),
        sample_spec(top_p=0.5),
        sample_spec(top_p=0.5),
    ]
    check_draws(logits, specs, device)


@pytest.mark.parametrize("vocab", [1, 2, 4096, 4097])
def test_odd_sizes(vocab: int, device: torch.device) -> None:
    specs = [
        sample_spec(logprobs=5),
        sample_spec(top_k=2, logprobs=5),
        sample_spec(temperature=0, logprobs=1),
        sample_spec(top_p=0.6),
    ]
    check_draws(normal(4, vocab, 1.0), specs, device)


def test_padding_rows_are_greedy_and_count_nothing(device: torch.device) -> None:
    own = sample_spec((1, 1), 1, seed=3, frequency_penalty=0.5)
    history = torch.zeros(1, 300, dtype=torch.int32, device=device)
    rows = DrawRows(
        table=torch.from_numpy(table([own], [0], 4)).to(device),
        bias_ids=torch.zeros(4, 1, dtype=torch.int32, device=device),
        bias_values=torch.zeros(4, 1, device=device),
        history=history,
        masks=torch.full((4, 1), -1, dtype=torch.int32, device=device),
        mask_of=torch.full((4,), -1, dtype=torch.int32, device=device),
    )
    logits = normal(4, 300, 2.0).to(device)
    tokens = draw(logits, rows, Needs()).tokens
    assert torch.equal(tokens[1:], logits[1:].argmax(-1))
    count_tokens(rows, tokens)
    assert int(history.sum()) == 2


def masks_of(allowed: list[set[int] | None], vocab: int) -> TokenMasks:
    """A mask for each row that has a set of tokens."""
    own = [tokens for tokens in allowed if tokens is not None]
    bits = np.zeros((len(own), -(-vocab // 32) * 32), dtype=np.uint8)
    for row, tokens in enumerate(own):
        bits[row, sorted(tokens)] = 1
    of = np.array([-1 if tokens is None else 0 for tokens in allowed], dtype=np.int32)
    of[of >= 0] = np.arange(len(own))
    return TokenMasks(np.packbits(bits, axis=1, bitorder="little").view(np.int32), of)


@pytest.mark.parametrize("vocab", [33, 5000, 12_345])
def test_masked_rows_draw_what_their_mask_allows(vocab: int, device: torch.device) -> None:
    """One token, few, those of a single chunk, nearly all; beside rows without a mask."""
    most = set(range(vocab)) - {0, vocab - 1}
    few = {1, vocab // 2, vocab - 1}
    allowed = [{7}, {7}, few, few, most, most, None, None, set(range(8, 30)), few]
    specs = [
        sample_spec(seed=1, temperature=0),
        sample_spec(seed=2),
        sample_spec(seed=3, temperature=0, logprobs=3),
        sample_spec(seed=4, top_k=5, top_p=0.9),
        sample_spec(seed=5, temperature=0.7, logprobs=0),
        sample_spec(seed=6, min_p=0.2),
        sample_spec(seed=7),
        sample_spec(seed=8, temperature=0),
        sample_spec(seed=9, top_k=2, logit_bias=((9, 3.0), (31, 90.0))),
        sample_spec((1, 1, 2), 1, seed=10, presence_penalty=1.5, temperature=0.5),
    ]
    logits = normal(len(specs), vocab, 2.0)
    masks = masks_of(allowed, vocab)
    check_draws(logits, specs, device, masks)
    tokens = draw_on(logits, specs, device, masks).tokens.tolist()
    assert all(own is None or token in own for own, token in zip(allowed, tokens, strict=True))
    unmasked = [row for row, own in enumerate(allowed) if own is None]
    alone = draw_on(logits[unmasked], [specs[row] for row in unmasked], device).tokens.tolist()
    assert [tokens[row] for row in unmasked] == alone


def test_a_mask_hides_no_fault(device: torch.device) -> None:
    logits = normal(2, 700, 1.0)
    logits[0, 5] = math.nan
    masks = masks_of([{1}, {1}], 700)
    assert draw_on(logits, [sample_spec(), sample_spec()], device, masks).finite.tolist() == [False, True]


def test_no_rows(device: torch.device) -> None:
    assert draw_on(torch.zeros(0, 50), [], device).tokens.shape == (0,)


def test_logits_in_bfloat16_and_rows_apart(device: torch.device) -> None:
    logits = normal(3, 900, 2.0).bfloat16()
    wide = torch.cat((logits, torch.full((3, 3), math.nan, dtype=torch.bfloat16)), dim=1).to(device)
    specs = [
        sample_spec(seed=1),
        sample_spec(seed=2, top_p=0.8, presence_penalty=0.5),
        sample_spec(temperature=0),
    ]
    ours = draw(wide[:, :900], draw_rows(specs, 900, device), needs_of(specs))
    assert ours.tokens.tolist() == [one.token_id for one in sample(logits.float(), specs)]


def test_a_row_draws_the_same_again_in_other_company_and_with_more_launches(device: torch.device) -> None:
    logits = normal(5, 5000, 1.0)
    specs = [
        sample_spec(seed=1, logprobs=2),
        sample_spec(seed=2, top_p=0.7),
        sample_spec(temperature=0),
        sample_spec(seed=4, top_k=30, logprobs=2),
        sample_spec((3, 3), seed=5, frequency_penalty=0.5),
    ]
    whole = draw_on(logits, specs, device)
    everything = Needs(alternatives=2)
    assert whole.logprobs is not None
    for row, one in enumerate(specs):
        alone = draw_on(logits[row : row + 1], [one], device)
        assert alone.tokens[0] == whole.tokens[row]
        if alone.logprobs is not None:
            assert alone.logprobs[0] == whole.logprobs[row]
        more = draw(logits[row : row + 1].to(device), draw_rows([one], 5000, device), everything)
        assert more.tokens[0] == whole.tokens[row]
    again = draw_on(logits, specs, device)
    assert torch.equal(again.tokens, whole.tokens)
    assert again.logprobs is not None
    assert torch.equal(again.logprobs, whole.logprobs)
