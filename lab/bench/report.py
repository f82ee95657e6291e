"""Prints the results as a table for a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lab.bench.results import BenchResults
from lab.bench.statistics import Spread

_WIDE = 100
"""A terminal with so many columns has room for quartiles."""


def show(console: Console, results: BenchResults) -> None:
    """Print the table and the remarks."""
    console.print(table(results, quartiles=console.width >= _WIDE))
    for remark in results.remarks:
        console.print(remark, highlight=False, soft_wrap=True)


def table(results: BenchResults, *, quartiles: bool) -> Table:
    """Make the table: a row for each case and server.

    It has medians, the first metric's quartiles, and the ratio of the own server to the best of the others.
    """
    several = len(results.servers) > 1
    made = Table(
        title=results.title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    made.add_column(results.axis, justify="right")
    made.add_column("server", no_wrap=True)
    for metric in results.metrics:
        made.add_column(metric.heading, justify="right")
    memory = any(sample.peak_memory_bytes for sample in results.samples)
    if memory:
        made.add_column("peak MiB", justify="right")
    first = results.metrics[0]
    if several:
        made.add_column("× best other", justify="right")
    for case, servers in results.figures.items():
        for i, (name, found) in enumerate(servers.items()):
            cells = [
                _cell(found.get(metric.name), metric.digits, quartiles=quartiles and metric is first)
                for metric in results.metrics
            ]
            if memory:
                cells.append(_memory(results, case, name))
            if several:
                ratio = results.ratios.get(case, {}).get(first.name)
                cells.append(f"{ratio:.2f}" if ratio is not None and name == results.own else "")
            made.add_row(
                f"{case:,}" if i == 0 else "", name, *cells, style="bold" if name == results.own else None
            )
        made.add_section()
    turns = {sample.turn for sample in results.samples}
    made.caption = f"medians of {len(turns)} rounds" + (f"; × best other: {first.heading}" if several else "")
    made.caption_justify = "left"
    return made


def _cell(spread: Spread | None, digits: int, *, quartiles: bool) -> str:
    if spread is None:
        return "-"
    median = f"{spread.median:,.{digits}f}"
    # Square brackets are markup to rich.
    return (
        median
        if spread.count == 1 or not quartiles
        else f"{median} \\[{spread.low:,.{digits}f}-{spread.high:,.{digits}f}]"
    )


def _memory(results: BenchResults, case: int, server: str) -> str:
    peaks = [
        sample.peak_memory_bytes
        for sample in results.samples
        if (sample.case, sample.server) == (case, server) and sample.peak_memory_bytes is not None
    ]
    return f"{max(peaks) / (1 << 20):,.0f}" if peaks else "-"
