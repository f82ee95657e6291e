"""How much of a prompt may join a step of decodes: the more it is, the longer every stream waits for its token.

A step that computes prompt tokens beside decodes takes at most `SLOWDOWN` times what the decodes alone would
take, by the cost model, so that the tokens of a running stream keep coming while prompts arrive. A fixed chunk
cannot have both: what hardly shows beside 32 streams stops a single one, and what suits that one makes the
prompts of 32 crawl. (Sarathi-Serve, arXiv 2403.02310, chunks prompts for the same reason.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import NamedTuple

from engine.config import PAGE_SIZE
from engine.cost import CostModel

SLOWDOWN = 4.0
"""Of a step, against its decodes alone. Below 5, so that there is room for the model's error."""


class Place(NamedTuple):
    """Where a request's next row is."""

    position: int
    top_k: int | None  # None: dense


Pace = Callable[[Iterable[Place], Place, int], int]
"""Prompt tokens, from a place on, that may join decodes at some places: at least 1, at most the number given."""

_STEP = 16
"""Chunks are multiples of it, unless they are as long as may be."""


class CostPace:
    """The pace that a cost model gives. At least a page, so that a prompt never waits for good."""

    def __init__(self, model: CostModel) -> None:
        self._model = model

    def __call__(self, decodes: Iterable[Place], prompt: Place, at_most: int) -> int:
        """See `Pace`."""
        model, c = self._model, self._model.coefficients
        alone = c.step + c.head + sum(model.modelled_rows(1, *place).actual for place in decodes)

        def added(rows: int) -> float:
            return model.modelled_rows(rows, *prompt).actual

        allowed = (SLOWDOWN - 1) * alone
        if at_most <= PAGE_SIZE or added(at_most) <= allowed:
            return at_most
        counts = range(PAGE_SIZE, at_most, _STEP)
        return counts[max(1, bisect_right(counts, allowed, key=added)) - 1]
