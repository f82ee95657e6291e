"""Draws the results: loss above dense, needles by depth and context, captured attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from lab.evaluate.loss import LossResult
from lab.evaluate.needles import NeedlesResult, grid
from lab.evaluate.results import EvalResults, RecallResult


def draw(results: EvalResults, index_top_ks: list[int], folder: Path) -> list[Path]:
    """Draw eval.loss.png, eval.needles.png and eval.recall.png for the parts that are done; return the files written."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figures = {}
    if results.loss is not None:
        figures["loss"] = _loss(plt, results.loss, index_top_ks)
    if results.needles is not None and results.needles.needles:
        figures["needles"] = _needles(plt, results.needles)
    if results.recall is not None and results.recall.top_k:
        figures["recall"] = _recall(plt, results.recall, index_top_ks)
    drawn = []
    for name, figure in figures.items():
        path = folder / f"eval.{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        drawn.append(path)
    return drawn


def _loss(plt: Any, result: LossResult, index_top_ks: list[int]) -> Any:
    """Draw bars with intervals, by kind of text and by position."""
    figure, axis = plt.subplots(figsize=(11, 4), layout="constrained")
    names = list(result.rows["dense"])
    width = 0.8 / len(index_top_ks)
    for i, k in enumerate(index_top_ks):
        rows = [result.rows[str(k)][name] for name in names]
        values = [row.above_dense for row in rows]
        spans = [row.interval or (row.above_dense, row.above_dense) for row in rows]
        errors = [
            [max(0.0, value - low) for value, (low, _) in zip(values, spans, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, spans, strict=True)],
        ]
        at = [n + (i - (len(index_top_ks) - 1) / 2) * width for n in range(len(names))]
        axis.bar(at, values, width, yerr=errors, capsize=3, label=f"top_k {k}", error_kw={"linewidth": 0.8})
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(names)), names)
    axis.set_title(f"loss above dense beyond position {result.beyond} (nats a token, 95 %)")
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    return figure


def _needles(plt: Any, result: NeedlesResult) -> Any:
    """Draw a grid of depth and context for each setting, side by side."""
    names = list(result.accuracy)
    depths = sorted({needle.depth for needle in result.needles})
    contexts = sorted({needle.context for needle in result.needles})
    size = (2.2 + 0.75 * len(contexts) * len(names), 2.0 + 0.36 * len(depths))
    figure, axes = plt.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        cells = grid(result.needles, name)
        shares = [[cells.get((depth, context)) for context in contexts] for depth in depths]
        values = [[float("nan") if s is None or s.value is None else s.value for s in row] for row in shares]
        axis.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                if share is not None:
                    axis.text(x, y, f"{share.right}/{share.of}", ha="center", va="center", fontsize=8)
        total = result.accuracy[name]["all"]
        title = "dense" if name == "dense" else f"sparse, top_k {name}"
        axis.set_title(f"{title}: {total.right} of {total.of}")
        axis.set_xticks(range(len(contexts)), [str(context) for context in contexts])
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set_xlabel("context (tokens)")
    axes[0][0].set_ylabel("depth of the needle")
    return figure


def _recall(plt: Any, result: RecallResult, index_top_ks: list[int]) -> Any:
    """Draw the captured attention of indexer, oracle and window, by layer and by position."""
    own = [k for k in index_top_ks if str(k) in result.top_k]
    figure, axes = plt.subplots(
        len(own), 2, figsize=(11, 3.6 * len(own)), layout="constrained", squeeze=False
    )
    starts = [str(edge) for edge in result.edges]
    for (by_layer, by_position), k in zip(axes, own, strict=True):
        of_k = result.top_k[str(k)]
        for name, captured, colour in (
            ("oracle", of_k.oracle, "tab:green"),
            ("indexer", of_k.indexer, "tab:blue"),
            ("window and 4 sinks", of_k.window, "tab:gray"),
        ):
            by_layer.plot(captured.by_layer, color=colour, label=name, marker=".")
            values = [float("nan") if value is None else value for value in captured.by_position]
            by_position.plot(starts, values, color=colour, label=name, marker=".")
        by_layer.set_xlabel("layer")
        by_position.set_xlabel("positions from")
        for axis in (by_layer, by_position):
            axis.set_title(f"dense attention captured, top_k {k}")
            axis.grid(alpha=0.3)
            axis.legend()
    return figure
