"""Draws a training run: loss and captured attention by step, of all layers; the worst layer is marked."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import msgspec

from lab.distill.train import StepLog


def plot_log(log: Path, picture: Path, index_top_k: int) -> None:
    """Draw `log` (lines of `StepLog`) as a PNG. `index_top_k` is the recipe's `report_top_k`, for a title."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps = [msgspec.json.decode(line, type=StepLog) for line in log.read_bytes().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    at = [s.step for s in steps]
    for axis, title, series, worst_of in (
        (axes[0], "KL divergence to attention (nats)", [s.loss for s in steps], max),
        (axes[1], f"attention captured by the best {index_top_k}", [s.recall for s in steps], min),
    ):
        layers = list(zip(*series, strict=True))
        tails = [sum(values[-50:]) for values in layers]
        worst = tails.index(worst_of(tails)) if tails else None
        for layer, values in enumerate(layers):
            marked = {"color": "tab:red", "alpha": 0.6, "label": f"worst layer: {layer}"}
            other = {"color": "tab:blue", "alpha": 0.12}
            axis.plot(at, values, linewidth=0.7, **(marked if layer == worst else other))
        mean = [sum(values) / len(values) for values in series]
        axis.plot(at, mean, color="tab:blue", linewidth=1.8, label="mean of layers")
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        first_sparse = next((s.step for s in steps if s.stage == "sparse"), None)
        if first_sparse is not None:
            axis.axvline(first_sparse, color="black", linestyle=":", linewidth=1, label="sparse stage")
        if steps:
            axis.legend()
    axes[0].set_yscale("log")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
