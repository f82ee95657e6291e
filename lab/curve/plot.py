"""Draws the curves: prefill and decode side by side, dense and sparse in each, as in the published figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from lab.curve.measure import ATTENTION, PHASES, CurvePoint
from lab.inspect.roofline import Phase

_COLOURS = {"dense": "tab:orange", "sparse": "tab:blue"}


def draw(
    points: Sequence[CurvePoint],
    price: float,
    crossovers: Mapping[Phase, float | None],
    title: str,
    path: Path,
) -> None:
    """Draw the curves, and write the PNG `path`. `price` is in USD an hour."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, phase in zip(axes, PHASES, strict=True):
        for attention in ATTENTION:
            curve = sorted(
                (p for p in points if (p.phase, p.attention) == (phase, attention)), key=lambda p: p.position
            )
            at, costs = [p.position / 1024 for p in curve], [p.usd(price) for p in curve]
            axis.plot(at, costs, marker="o", markersize=4, color=_COLOURS[attention], label=attention)
            lows = [p.usd(price) * min(p.seconds) / _median(p) for p in curve]
            highs = [p.usd(price) * max(p.seconds) / _median(p) for p in curve]
            axis.fill_between(at, lows, highs, color=_COLOURS[attention], alpha=0.2, linewidth=0)
        crossed = crossovers[phase]
        if crossed is not None:
            axis.axvline(crossed / 1024, color="black", linestyle=":", linewidth=1)
            axis.text(
                crossed / 1024, axis.get_ylim()[1] * 0.97, f"  sparse is cheaper from {crossed / 1024:.1f}K",
                fontsize=9, va="top",
            )  # fmt: skip
        axis.set_title(phase)
        axis.set_xlabel("position (K is 1024 tokens)")
        if at[-1] >= 64:
            ticks = range(0, int(at[-1]) + 1, 16)
            axis.set_xticks(ticks, [f"{tick}K" for tick in ticks])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(loc="center right")
    axes[0].set_ylabel(f"USD a million tokens, at {price:g} USD an hour")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _median(point: CurvePoint) -> float:
    return point.token_seconds * point.tokens
