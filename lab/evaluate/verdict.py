"""The bars that sparse attention has to meet, and whether a figure does."""

from __future__ import annotations

from typing import Literal

import msgspec

Outcome = Literal["met", "met, and the aim", "missed", "nothing to measure"]

LOSS_BARS: dict[int, tuple[float, float]] = {256: (0.05, 0.03), 512: (0.02, 0.01)}
"""Of top_k: nats above dense that are let pass, and the aim."""
RETENTION_BARS: dict[int, float] = {256: 0.98}
"""Of top_k: the share of what dense finds that sparse must find too."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One bar and how it went. `value` is what was measured, None where nothing was."""

    what: str
    value: float | None
    bar: float
    aim: float | None
    outcome: Outcome


def at_most(what: str, value: float | None, bar: float, aim: float | None = None) -> Verdict:
    """A figure that should be low."""
    outcome: Outcome = "nothing to measure"
    if value is not None:
        outcome = "missed" if not value <= bar else "met, and the aim" if aim and value <= aim else "met"
    return Verdict(what=what, value=value, bar=bar, aim=aim, outcome=outcome)


def at_least(what: str, value: float | None, bar: float) -> Verdict:
    """A share that should be high."""
    outcome: Outcome = "nothing to measure"
    if value is not None:
        outcome = "met" if value >= bar else "missed"
    return Verdict(what=what, value=value, bar=bar, aim=None, outcome=outcome)
