"""Draws the floors of `dsa inspect --roofline`: cost by position, and what the steps at the last position consist of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

_COLOURS = {"dense": "tab:orange", "sparse": "tab:blue"}
_MOST = 8


def draw(found: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw the `roofline` object of a report, and write the PNG `path`."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained", height_ratios=(3, 2))
    for place, phase in enumerate(("prefill", "decode")):
        mine = [one for one in found["steps"] if one["phase"] == phase]
        axis, shares = axes[0, place], axes[1, place]
        left: dict[str, float] = {}
        for kind in dict.fromkeys(one["attention"] for one in mine):
            curve = [one for one in mine if one["attention"] == kind]
            axis.plot(
                [one["position"] / 1024 for one in curve], [one["usd_per_million"] for one in curve],
                marker="o", markersize=4, color=_COLOURS[kind], label=kind,
            )  # fmt: skip
            left[kind] = 0.0
            operations = sorted(curve[-1]["operations"], key=lambda one: -float(one["seconds"]))
            for one in operations[:_MOST]:
                shares.barh([kind], [1e3 * one["seconds"]], left=[left[kind]], edgecolor="white")
                if one["seconds"] > 0.08 * max(step["seconds"] for step in mine):
                    shares.bar_label(
                        shares.containers[-1], labels=[one["name"]], label_type="center", fontsize=6
                    )
                left[kind] += 1e3 * one["seconds"]
        axis.set_title(f"{phase}, floor")
        axis.set_xlabel("position (K is 1024 tokens)")
        axis.set_ylabel(f"USD a million tokens, at {found['usd_per_hour']:g} USD an hour in all")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
        shares.set_xlabel(f"ms a step at {mine[-1]['position']:,}: its {_MOST} longest operations")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
