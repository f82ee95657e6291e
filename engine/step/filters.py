"""The filters top_k, top_p and min_p: which tokens stay in the race (`engine.step.race`).

The filters apply one after the other, as in vLLM: top_k to all tokens, top_p to the renormalised rest. min_p is
relative to the best token, so its order does not matter. Tokens with equal weights at an edge all stay.

A vocabulary is long, but few of its tokens are likely. So the edge is searched among the tokens with a
noticeable weight, and among all tokens only if these do not contain it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.protocol import SamplingParams

NOTICEABLE = np.float32(2.0**-13)
"""A token is noticeable if its weight is more than this; the best token's weight is 1."""


def weights_of(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """The tokens' probabilities in proportion to the best one's, [V]: exp((logit - best) / temperature)."""
    weights: NDArray[np.float32] = logits - logits.max()
    with np.errstate(over="ignore"):  # near temperature 0 all other exponents overflow to -inf
        weights /= np.float32(temperature)
    np.exp(weights, out=weights)  # in place: a new array of this size costs as much as the exponentials
    return weights


def likely_tokens(weights: NDArray[np.float32]) -> NDArray[np.int64]:
    """The ids of the noticeable tokens, ascending."""
    return np.flatnonzero(weights > NOTICEABLE)


def restricts(params: SamplingParams, vocab_size: int) -> bool:
    """Whether any filter may remove a token."""
    return 0 < params.top_k < vocab_size or params.top_p < 1 or params.min_p > 0


def runners(
    weights: NDArray[np.float32], params: SamplingParams, vocab_size: int | None = None
) -> tuple[NDArray[np.int64], float]:
    """Return the tokens that race one by one, and the weight of all others if these race too.

    Args:
        weights: [V], in proportion to each token's probability; the largest is 1.
        params: the filters.
        vocab_size: all tokens; None: these are all.

    Returns:
        (places [N] ascending, the summed weight of the others; 0 if the filters removed them).
    """
    total = float(weights.sum())
    likely = likely_tokens(weights)
    if not restricts(params, vocab_size or len(weights)):
        return likely, max(0.0, total - float(weights[likely].sum()))
    edge = _edge(weights[likely], total, params)
    if edge is None:
        likely = np.flatnonzero(weights)
        edge = _edge(weights[likely], total, params, all_of_them=True)
    return (likely if edge is None else likely[weights[likely] >= edge]), 0.0


def _edge(
    weights: NDArray[np.float32], total: float, params: SamplingParams, *, all_of_them: bool = False
) -> float | None:
    """The smallest weight that stays; None if the edge is not among `weights`.

    Args:
        weights: [N], the largest weights; at least one
        total: the sum of all tokens' weights
        params: the filters
        all_of_them: `weights` has all tokens except those with weight 0; then None means that all stay
    """
    if all_of_them and 0 < params.top_k < len(weights):  # to sort all takes ten times as long
        weights = weights[weights >= np.partition(weights, -params.top_k)[-params.top_k]]
    ordered = np.sort(weights)[::-1]
    edge, least = 0.0, total
    if params.top_k > 0:
        if params.top_k <= len(ordered):
            edge = float(ordered[params.top_k - 1])
            ordered = ordered[: len(ordered) - int(np.searchsorted(ordered[::-1], edge))]
            least = total = float(ordered.sum())
        elif not all_of_them:  # top_k keeps all these, and others: between no weight and all that is left
            least = float(ordered.sum())
            if params.top_p == 1:
                return None
    if params.top_p < 1:
        sums = np.cumsum(ordered, dtype=np.float64)
        place, last = np.searchsorted(sums, (params.top_p * least, params.top_p * total)).tolist()
        if place == last < len(ordered):
            edge = max(edge, float(ordered[place]))
        elif not all_of_them and (not edge or place != last):
            return None
    if params.min_p > 0:
        edge = max(edge, params.min_p * float(ordered[0]))
    return edge if edge > NOTICEABLE or all_of_them else None
