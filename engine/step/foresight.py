"""Draws a token under a grammar without its mask, where a look at a few tokens tells what the draw under the mask would be.

A mask says of every token of the vocabulary whether it may come, and takes as long as hundreds of questions about one token.
But a model that knows the format mostly draws a token that may come, and the race (`engine.step.race`) is such that a winner
among all tokens is a winner among fewer. So llama.cpp draws first, asks the grammar about this token, and draws again under
the mask if it may not come. With filters that gives other probabilities than to mask first: tokens that may not come take a
share of `top_p`. Here it is told only what is certain: the token is always the one of the draw under the mask, else None.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engine.plan.types import SampleSpec
from engine.protocol import SamplingParams
from engine.step.filters import NOTICEABLE, likely_tokens, restricts, weights_of
from engine.step.race import REST, exponential_noise

_TRIES = 8
"""So many of the best tokens are asked for, and so many winners of the race; if none of them may come, the mask is computed."""

_CHECKED = (1, 6, 20)
"""The filters are judged by so many of the best tokens: first by few, as each question takes microseconds."""

_MARGIN = 1e-5
"""By less of itself a sum of float32 may differ from another of the same numbers in another order."""


def foresee(logits: NDArray[np.float32], spec: SampleSpec, allows: Callable[[int], bool]) -> int | None:
    """The token that a draw from `logits` under the mask gives; None if only the mask can tell.

    Args:
        logits: [V], penalised
        spec: how to draw
        allows: whether the mask allows a token; takes microseconds
    """
    params = spec.params
    best = int(logits.argmax())
    barred = 0
    while not allows(best):
        if barred == _TRIES:
            return None
        logits = logits if barred else logits.copy()  # the caller's row is left alone
        logits[best] = -np.inf
        barred += 1
        best = int(logits.argmax())
    if params.temperature == 0:
        return best
    weights = weights_of(logits, params.temperature)  # those under the mask, whose best token this is
    likely = likely_tokens(weights)
    own = weights[likely]
    keys = own / exponential_noise(params.seed, spec.output_index, likely)
    known = {best: True}

    def may(place: int) -> bool:
        token = int(likely[place])
        if token not in known:
            known[token] = allows(token)
        return known[token]

    total = float(weights.sum())
    rest = max(0.0, total - float(own.sum())) + _MARGIN * total
    gates: list[_Gate] = []
    noise = 0.0
    if not restricts(params, len(weights)):
        noise = exponential_noise(params.seed, spec.output_index, REST)[0]
    for _ in range(min(_TRIES, len(likely))):
        winner = int(keys.argmax())
        if may(winner):
            if noise:
                passed = rest / noise <= keys[winner] or None
            else:
                passed = _passes(gates, own, winner, rest, params, may)
            if passed is None:
                return None
            if passed:
                return int(likely[winner])
        keys[winner] = -1.0
    return None


def _passes(
    gates: list[_Gate],
    weights: NDArray[np.float32],
    place: int,
    rest: float,
    params: SamplingParams,
    may: Callable[[int], bool],
) -> bool | None:
    """Whether a place passes the filters; ask about more tokens only if those asked before do not tell."""
    for level, checked in enumerate(_CHECKED):
        if level == len(gates):
            gates.append(_Gate(weights, rest, params, may, checked))
        passed = gates[level].passes(place)
        if passed is not None:
            return passed
    return None


class _Gate:
    """Which likely tokens surely pass the filters, and which surely do not.

    Args:
        weights: [N], of the likely tokens
        rest: the weight of all other tokens, or more
        params: the filters
        may: whether the mask allows a place in `weights`
        checked: of so many of the best places this is asked. Others may or may not come
    """

    def __init__(
        self,
        weights: NDArray[np.float32],
        rest: float,
        params: SamplingParams,
        may: Callable[[int], bool],
        checked: int,
    ) -> None:
        self._weights, self._params = weights, params
        self._top_k = params.top_k or len(weights)
        if checked == 1:
            best = [int(weights.argmax())]
        else:
            best = np.argsort(-weights, kind="stable")[:checked].tolist()
        self._allowed = [place for place in best if may(place)]
        self._barred = [place for place in best if not may(place)]
        others = rest if not params.top_k else min(rest, params.top_k * float(NOTICEABLE))
        mass = sum(weights[self._allowed[: self._top_k]].tolist())
        most = float(weights.sum()) * (1 + _MARGIN) - sum(weights[self._barred].tolist()) + others
        self._least, self._most = params.top_p * mass, params.top_p * most
        # No other tokens pass if the likely fill one of the filters.
        self._only_likely = (
            params.min_p > NOTICEABLE
            or 0 < params.top_k <= len(self._allowed)
            or (1 - params.top_p) * mass > params.top_p * others
        )

    def passes(self, place: int) -> bool | None:
        """Whether a place that the mask allows passes; None: that depends on tokens that were not asked for."""
        if not self._only_likely:
            return None
        weights, own = self._weights, self._weights[place]
        if own < self._params.min_p:
            return False
        before = [weights[one] for one in self._allowed if weights[one] > own]
        if len(before) >= self._top_k or float(sum(before)) > self._most * (1 + _MARGIN):
            return False
        above = weights[weights > own]
        barred = [weights[one] for one in self._barred if weights[one] > own]
        if len(above) - len(barred) >= self._top_k:
            return None
        most_before = float(above.sum()) * (1 + _MARGIN) - float(sum(barred))
        return True if most_before < self._least else None
