"""How long a prompt will wait for its first token, by how long others waited lately.

By the mean rate alone, half of all waits are longer than told: a step takes as long as its decodes need, too, and machines
have other work. So each wait is compared with what the mean said when it began, and `seconds` takes the mean times the
largest of the last `LAST` ratios. While the machine goes on as it did, the next wait is longer with a chance of 1 in
`LAST` + 1, whatever ratios are distributed like: so often the newest of equal ones is the largest (the argument of conformal
prediction; Vovk, Gammerman and Shafer, "Algorithmic learning in a random world", 2005).
"""

from __future__ import annotations

from collections import deque

LAST = 200
"""So many waits are remembered."""

ENOUGH = 100
UNKNOWN_FACTOR = 1.25
"""The factor is at least this while fewer than `ENOUGH` waits are known: what waits of a steady machine scatter by."""

UNSEEN = 1.05
"""A client waits so many times as long as the server sees: connections and its own work come on top (measured under overload)."""

MOST_FACTOR = 3.0
"""The largest ratio that counts: an engine that stopped for a while says nothing of one that runs."""

NEAR = 0.5
"""Only waits of at least this part of the bound are compared: near zero, one step is many times the mean."""


class Forecast:
    """The factor between the mean wait and the one that nearly all stay below."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=LAST)

    @property
    def factor(self) -> float:
        """At least 1: a queue that went faster than the mean is luck."""
        least = 1.0 if len(self._ratios) >= ENOUGH else UNKNOWN_FACTOR
        return min(max(*self._ratios, least), MOST_FACTOR) if self._ratios else least

    def seconds(self, mean: float) -> float:
        """How long nearly all clients wait, in seconds, whose wait is `mean` by the mean rate."""
        return mean * self.factor * UNSEEN

    def compare(self, mean: float, took: float, bound: float) -> None:
        """Note a wait that has ended.

        Args:
            mean: what the mean rate said when it began, in seconds.
            took: how long it was.
            bound: the longest that is let in.
        """
        if self.seconds(mean) >= NEAR * bound:
            self._ratios.append(took / mean)
