"""How much of a prompt may join a step of decodes: the more it is, the longer every stream waits for its token.

A step that computes prompt tokens beside decodes takes at most `SLOWDOWN` times what a step of decodes will take
once all that is here decodes, by the cost model. So the tokens of a running stream keep coming while prompts
arrive. A fixed chunk cannot have both: what hardly shows beside 32 streams stops a single one, and what suits that
one makes the prompts of 32 crawl. (Sarathi-Serve, arXiv 2403.02310, chunks prompts for the same reason.) And where
many prompts wait, the measure is their common pace: to keep the first stream at the pace that it had alone would
let it end before the last prompt is read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import NamedTuple

from engine.plan.cost import CostModel
from engine.protocol import IndexTopK

SLOWDOWN = 4.0
"""Of a step, against decodes alone. Below 5, so that there is room for the model's error."""


class Place(NamedTuple):
    """Where a request's next row is."""

    position: int
    index_top_k: IndexTopK


Pace = Callable[[Iterable[Place], Iterable[Place], Place, int], int]
"""Prompt tokens, from a place on (third), that may join decodes at some places (first), while those that will decode
soon are to begin at others (second): at least 1, at most the number given."""

_STEP = 16
"""Chunks are multiples of it, unless they are as long as may be."""


LEAST = 32
"""Prompt tokens that always may join: fewer are hardly faster, and a prompt must not wait for good."""


class CostPace:
    """The pace that a cost model gives."""

    def __init__(self, model: CostModel) -> None:
        self._model = model

    def __call__(self, decodes: Iterable[Place], soon: Iterable[Place], prompt: Place, at_most: int) -> int:
        """See `Pace`."""
        model, c = self._model, self._model.coefficients
        now, later = (
            sum(model.modelled_rows(1, *place).actual for place in places) for places in (decodes, soon)
        )
        alone = c.step + c.head + now

        def added(rows: int) -> float:
            return model.modelled_rows(rows, *prompt).actual

        allowed = SLOWDOWN * (alone + later) - alone
        if at_most <= LEAST or added(at_most) <= allowed:
            return at_most
        counts = range(LEAST, at_most, _STEP)
        return counts[max(1, bisect_right(counts, allowed, key=added)) - 1]
