"""top_k, top_p and min_p: which tokens stay in the race.

Applied one after the other, as vLLM does: top_k on all, top_p on the renormalised rest; min_p is relative to
the best token, so its order does not matter. Equal weights at an edge all stay.

A vocabulary is long and its likely part short. So the edge is looked for among the tokens that have a
noticeable weight, and among all of them only where those do not tell.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.protocol import SamplingParams

NOTICEABLE = np.float32(2.0**-13)
"""Of the best token's weight."""


def runners(weights: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.int64], float]:
    """The tokens that run for themselves, ascending, and the weight of all others if those run too.

    Args:
        weights: [V], in proportion to each token's probability; the largest is 1.
        params: the filters.
    """
    total = float(weights.sum())
    likely = np.flatnonzero(weights > NOTICEABLE)
    if not (0 < params.top_k < len(weights) or params.top_p < 1 or params.min_p > 0):
        return likely, max(0.0, total - float(weights[likely].sum()))
    edge = _edge(weights[likely], total, params)
    if edge is None:
        likely = np.flatnonzero(weights)
        edge = _edge(weights[likely], total, params, all_of_them=True)
    return (likely if edge is None else likely[weights[likely] >= edge]), 0.0


def _edge(
    weights: NDArray[np.float32], total: float, params: SamplingParams, *, all_of_them: bool = False
) -> float | None:
    """The smallest weight that stays; None if these, the largest of all, do not tell.

    Args:
        weights: [N], at least one
        total: over all tokens
        params: the filters
        all_of_them: there are no others but those whose weight is 0; then None is no edge
    """
    ordered = np.sort(weights)[::-1]
    edge = 0.0
    if params.top_k > 0:
        if params.top_k <= len(ordered):
            edge = float(ordered[params.top_k - 1])
            ordered = ordered[: len(ordered) - int(np.searchsorted(ordered[::-1], edge))]
            total = float(ordered.sum())
        elif not all_of_them:
            return None
    if params.top_p < 1:
        sums = np.cumsum(ordered, dtype=np.float64)
        place = int(np.searchsorted(sums, params.top_p * total))
        if place < len(ordered):
            edge = max(edge, float(ordered[place]))
        elif not all_of_them and not edge:
            return None
    if params.min_p > 0:
        edge = max(edge, params.min_p * float(ordered[0]))
    return edge if edge > NOTICEABLE or all_of_them else None
