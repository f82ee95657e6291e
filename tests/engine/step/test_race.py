"""The race: each token's random number, and the token that wins with it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from engine.step.race import exponential_noise, race

ALL = np.arange(5)


def splitmix64(key: int, counter: int) -> int:
    """The generator's output number `counter` from its definition."""
    mask = 2**64 - 1
    z = (key + counter * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_generator_is_the_published_one() -> None:
    # The first outputs of SplitMix64 from seed 0, as its reference implementation prints them.
    assert [splitmix64(0, n) for n in (1, 2, 3)] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F
    ]  # fmt: skip
    noise = exponential_noise(3, 4, np.array([0, 1, 49151, -1]))
    key = int.from_bytes(
        hashlib.sha256((3).to_bytes(8, "little") + (4).to_bytes(8, "little")).digest()[:8], "little"
    )
    for value, token in zip(noise, (0, 1, 49151, 2**64 - 1), strict=True):
        assert value == pytest.approx(-np.log(((splitmix64(key, token) >> 11) + 0.5) / 2**53), rel=1e-12)


def test_noise_differs_by_seed_index_and_token_and_is_exponential() -> None:
    firsts = {
        float(value)
        for seed in range(20)
        for index in range(20)
        for value in exponential_noise(seed, index, np.arange(3))
    }
    assert len(firsts) == 1200
    noise = exponential_noise(2**64 - 1, 2**40, np.arange(100_000))
    assert noise.min() > 0
    ordered = np.sort(noise)
    distance = np.abs((1 - np.exp(-ordered)) - np.arange(100_000) / 100_000).max()
    assert distance < 1.63 / 100_000**0.5  # Kolmogorov and Smirnov at p = 0.01; the seed is fixed


def test_a_tokens_number_does_not_depend_on_who_else_runs() -> None:
    some = np.array([5, 70, 900])
    assert exponential_noise(1, 2, some).tolist() == exponential_noise(1, 2, np.arange(1000))[some].tolist()


@pytest.mark.parametrize("alone", [5, 3, 1])
def test_everybody_wins_as_often_as_it_should(alone: int) -> None:
    """Each token wins as often, whether all tokens run alone, or those from `alone` on run as one."""
    weights = np.array([0.4, 0.2, 0.2, 0.15, 0.05], dtype=np.float32)
    rest = float(weights[alone:].sum())
    wins = np.bincount([race(weights, ALL[:alone], rest, 7, index) for index in range(8000)], minlength=5)
    expected = 8000 * weights
    assert ((wins - expected) ** 2 / expected).sum() < 18.5  # p = 0.001 at 4 degrees of freedom; a fixed seed


def test_the_winner_is_the_largest_ratio_and_a_filtered_token_never_wins() -> None:
    weights = np.array([0.4, 0.2, 0.2, 0.15, 0.05], dtype=np.float32)
    for index in range(300):
        assert race(weights, ALL, 0.0, 3, index) == int((weights / exponential_noise(3, index, ALL)).argmax())
        assert race(weights, np.array([1, 4]), 0.0, 3, index) in (1, 4)


def test_a_rest_of_nobody_wins_nothing() -> None:
    weights = np.array([1.0, 0.0, 0.0], dtype=np.float32)
    assert {race(weights, np.array([0]), 1e9, 0, index) for index in range(50)} == {0}
