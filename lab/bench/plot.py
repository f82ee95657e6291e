"""Draws the results: one line for each server if there are several cases, else bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from lab.bench.results import BenchResults
from lab.bench.suites import Metric


def draw(results: BenchResults, folder: Path) -> Path:
    """Draw SUITE.png; return the file that was written."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn = [metric for metric in results.metrics if metric.drawn]
    figure, axes = plt.subplots(
        1, len(drawn), figsize=(5.2 * len(drawn) + 1, 4.2), layout="constrained", squeeze=False
    )
    for metric, axis in zip(drawn, axes[0], strict=True):
        if len(results.figures) > 1:
            _lines(axis, results, metric)
        else:
            _bars(axis, results, metric)
        axis.set_ylabel(metric.heading)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle(results.title)
    path = folder / f"{results.suite}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _lines(axis: Any, results: BenchResults, metric: Metric) -> None:
    """Draw one line for each server, with quartiles as error bars. The own server's line is thicker."""
    for server in results.servers:
        points = [
            (case, found)
            for case, servers in results.figures.items()
            if (found := servers.get(server.name, {}).get(metric.name)) is not None
        ]
        if not points:
            continue
        medians = [found.median for _, found in points]
        errors = [
            [found.median - found.low for _, found in points],
            [found.high - found.median for _, found in points],
        ]
        own = server.name == results.own
        axis.errorbar(
            [case for case, _ in points], medians, yerr=errors, marker="o", capsize=3, label=server.name,
            linewidth=2.5 if own else 1.3, zorder=3 if own else 2,
        )  # fmt: skip
    cases = list(results.figures)
    axis.set_xscale("log", base=2)
    axis.set_xticks(cases, [f"{case:,}" for case in cases])
    axis.minorticks_off()
    axis.set_xlabel(results.axis)
    axis.legend()


def _bars(axis: Any, results: BenchResults, metric: Metric) -> None:
    """Draw one bar for each server, with quartiles as error bars."""
    for case, servers in results.figures.items():
        found = {name: of[metric.name] for name, of in servers.items() if metric.name in of}
        medians = [spread.median for spread in found.values()]
        errors = [
            [spread.median - spread.low for spread in found.values()],
            [spread.high - spread.median for spread in found.values()],
        ]
        bars = axis.bar(list(found), medians, yerr=errors, capsize=3)
        axis.bar_label(bars, [f"{median:.{metric.digits}f}" for median in medians])
        axis.set_xlabel(f"{results.axis}: {case:,}")
