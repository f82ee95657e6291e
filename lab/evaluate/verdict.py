"""The bars for sparse attention, and the verdict whether a figure meets its bar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

Outcome = Literal["met", "met, and the aim", "missed", "nothing to measure"]

LOSS_BARS: dict[int, tuple[float, float]] = {256: (0.05, 0.03), 512: (0.02, 0.01)}
"""top_k -> the largest loss above dense that passes, and the aim, both in nats a token."""
CODE_BAR = 0.02
"""How far below dense's the share of code tasks passed may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """The bars at the default top_k. The keys are the groups of prompts of `faithful`: "all", or "from P" by length.

    Attributes:
        agreement: the least share of dense's tokens that are also sparse's likeliest.
        kl: the largest divergence from dense, nats a token.
        length: the largest relative difference of the mean answer length.
        kept: the least share of the needles found by dense that sparse must find too.
    """

    agreement: dict[str, float]
    kl: dict[str, float]
    length: float
    kept: float


_SHORT = Bars(agreement={"all": 0.945}, kl={"all": 0.013}, length=0.15, kept=0.98)
_LONG = Bars(
    agreement={"from 4096": 0.98, "from 8192": 0.955, "from 16384": 0.935},
    kl={"from 4096": 0.006, "from 8192": 0.015},
    length=0.10,
    kept=0.99,
)


def bars(index_top_k: int) -> Bars:
    """Return the bars of a default top_k: from 2048 on, the contexts are long and the bars are by length."""
    return _LONG if index_top_k >= 2048 else _SHORT


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
