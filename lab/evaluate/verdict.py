"""The bars for sparse attention, and the verdict whether a figure meets its bar."""

from __future__ import annotations

from typing import Literal

import msgspec

Outcome = Literal["met", "met, and the aim", "missed", "nothing to measure"]

LOSS_BARS: dict[int, tuple[float, float]] = {256: (0.05, 0.03), 512: (0.02, 0.01)}
"""top_k -> the largest loss above dense that passes, and the aim, both in nats a token."""
AGREEMENT_BAR, KL_BAR, LENGTH_BAR, KEPT_BAR = 0.945, 0.013, 0.15, 0.98
"""At the default top_k: the least share of dense's tokens that are also sparse's likeliest, the largest divergence from
dense in nats a token, the largest relative difference of the mean answer length, and the least share of the needles found
by dense that sparse must find too."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One bar and its outcome. `value` is the measured figure; None if nothing was measured."""

    what: str
    value: float | None
    bar: float
    aim: float | None
    outcome: Outcome


def at_most(what: str, value: float | None, bar: float, aim: float | None = None) -> Verdict:
    """Judge a figure that should be low."""
    outcome: Outcome = "nothing to measure"
    if value is not None:
        outcome = "missed" if not value <= bar else "met, and the aim" if aim and value <= aim else "met"
    return Verdict(what=what, value=value, bar=bar, aim=aim, outcome=outcome)


def at_least(what: str, value: float | None, bar: float) -> Verdict:
    """Judge a share that should be high."""
    outcome: Outcome = "nothing to measure"
    if value is not None:
        outcome = "met" if value >= bar else "missed"
    return Verdict(what=what, value=value, bar=bar, aim=None, outcome=outcome)
