"""Medians with quartiles, and the ratio of one server to the best of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

Better = Literal["more", "less"]


class Spread(msgspec.Struct, frozen=True):
    """Median and quartiles of `count` samples."""

    median: float
    low: float  # the first quartile
    high: float  # the third quartile
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """Compute median and quartiles, linear between samples; None if there are no values."""
    if not values:
        return None
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high, len(values))


def advantage(own: Spread | None, others: Mapping[str, Spread | None], better: Better) -> float | None:
    """Compute how many times better the own median is than the best of the others; above 1 is better.

    Args:
        own: the own server's figure
        others: name -> another server's figure; servers without a figure are left out
        better: whether more or less is better

    Returns:
        None if there is nothing to compare
    """
    medians = [other.median for other in others.values() if other is not None]
    if own is None or not medians:
        return None
    best, worse = (own.median, max(medians)) if better == "more" else (min(medians), own.median)
    return best / worse if worse > 0 else None
