"""Confidence intervals for shares and for paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000
_Z = 1.959964  # the normal quantile of a 95 % interval


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def wilson(right: int, of: int) -> Interval | None:
    """Return Wilson's score interval of a share (E. B. Wilson, JASA 22, 1927); None if `of` is 0."""
    if not of:
        return None
    share, z2 = right / of, _Z * _Z
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(strata: Sequence[Sequence[tuple[float, int]]], seed: int = 0) -> Interval | None:
    """Return the percentile interval of a mean over tokens, by resampling whole texts.

    The tokens of a text depend on each other, so texts are drawn and not tokens. From each stratum as many texts
    are drawn as it has.

    Args:
        strata: for each kind of text, one pair (summed difference, tokens) for each text
        seed: decides the draws

    Returns:
        None if a kind has fewer than two texts, because their variation is not known
    """
    if not strata or any(len(texts) < 2 for texts in strata):
        return None
    generator = np.random.default_rng(seed)
    sums, tokens = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for texts in strata:
        table = np.array(texts, dtype=np.float64)  # [texts, 2]
        drawn = table[generator.integers(0, len(table), (RESAMPLES, len(table)))].sum(1)
        sums += drawn[:, 0]
        tokens += drawn[:, 1]
    low, high = np.quantile(sums / tokens, (0.025, 0.975)).tolist()
    return Interval(low, high)
