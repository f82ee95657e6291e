"""How many prompt tokens may join a step of decodes. With more of them, every stream waits longer for its next token.

By the cost model, a step with prompt tokens and decodes takes at most `SLOWDOWN` times as long as a step in which
every request that is here decodes. So running streams keep getting tokens while prompts arrive (Sarathi-Serve,
arXiv 2403.02310, chunks prompts for the same reason). A chunk of fixed size does not work: a size that 32 streams
hardly notice stops a single stream, and a size that suits a single stream makes the prompts of 32 too slow. The
limit counts prompts that still wait as decodes: if it kept the first stream as fast as it was alone, that stream
would end before the last prompt is read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import NamedTuple

from engine.plan.cost import CostModel
from engine.protocol import IndexTopK

SLOWDOWN = 4.0
"""A step may take so many times as long as decodes alone. It is below 5, which leaves room for the model's error."""


class Place(NamedTuple):
    """The position of a request's next row, and the request's sparsity."""

    position: int
    index_top_k: IndexTopK


Pace = Callable[[Iterable[Place], Iterable[Place], Place, int], int]
"""(places of decodes, places where further requests will begin to decode, place of the next prompt token, most) -> how
many prompt tokens may join the decodes: at least 1, at most `most`."""

_STEP = 16
"""A chunk that the pace limits has `LEAST` tokens plus a multiple of this."""


LEAST = 32
"""So many prompt tokens may always join: fewer are hardly faster, and a prompt must not wait forever."""


class CostPace:
    """A `Pace` by a cost model."""

    def __init__(self, model: CostModel) -> None:
        self._model = model

    def __call__(self, decodes: Iterable[Place], soon: Iterable[Place], prompt: Place, at_most: int) -> int:
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
