"""Now and then a step over rows looks at its selections (`engine.kernels.interface.selection`).

A look in every step would add a launch for each layer to steps whose launches are what they cost. A weight or a kernel that
went bad stays bad, so one step in `SECONDS` launches the kernels of its graph one by one, and looks. Its numbers are the graph's.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine.kernels.interface.selection import watched
from engine.kernels.triton.rows import Rows

SECONDS = 10.0
MOST_ROWS = 64
"""Of a step, from its end: each needs a bool for each position of the context."""


class Audit:
    """When to look."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, seconds: float = SECONDS) -> None:
        """The first look is at the first step. `clock` is in seconds."""
        self._clock, self._seconds = clock, seconds
        self._next = -float("inf")

    def due(self) -> bool:
        """Whether this step is looked at; then the next is so many seconds away."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


def look(flaws: Tensor, selected: Tensor, rows: Rows, context: int) -> None:
    """Add the flaws of the last `MOST_ROWS` rows' selections.

    Args:
        flaws: [T] int32
        selected: [T or more, K] int32, -1 for none; rows after T are padding
        rows: as many; dense rows select nothing
        context: no position reaches it
    """
    last = slice(max(0, len(flaws) - MOST_ROWS), len(flaws))
    positions, top_k = rows.positions[last].long(), rows.index_top_k[last].long()
    _, found = watched(
        selected[last].long().unsqueeze(1), positions.unsqueeze(1), top_k.unsqueeze(1), context
    )
    flaws[last] |= torch.where(top_k > 0, found.squeeze(1), 0)
