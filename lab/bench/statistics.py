"""Medians with quartiles, and how one server compares with the best of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

Better = Literal["more", "less"]


class Spread(msgspec.Struct, frozen=True):
    """Of `count` samples."""

    median: float
    low: float  # the first quartile
    high: float  # the third
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """Median and quartiles, linear between samples; None of nothing."""
    if not values:
        return None
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high, len(values))


def advantage(own: Spread | None, others: Mapping[str, Spread | None], better: Better) -> float | None:
    """How many times better the own median is than the best of the others: above 1 is better.

    Args:
        own: what is compared
        others: name -> what it is compared with; those without figures are left out
        better: whether more or less is better

    Returns:
        None where there is nothing to compare
    """
    medians = [other.median for other in others.values() if other is not None]
    if own is None or not medians:
        return None
    best, worse = (own.median, max(medians)) if better == "more" else (min(medians), own.median)
    return best / worse if worse > 0 else None
