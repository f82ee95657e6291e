"""The picture of a training run: loss and captured attention by step, all layers and the worst."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import msgspec

from engine.distill.train import StepLog


def plot_log(log: Path, picture: Path) -> None:
    """Draw `log` (lines of `StepLog`) as a PNG."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps = [msgspec.json.decode(line, type=StepLog) for line in log.read_bytes().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    at = [s.step for s in steps]
    for axis, title, series in (
        (axes[0], "KL divergence to attention (nats)", [s.loss for s in steps]),
        (axes[1], "attention captured by the best 256", [s.recall for s in steps]),
    ):
        for layer in range(len(series[0])):
            axis.plot(at, [values[layer] for values in series], color="tab:blue", alpha=0.12, linewidth=0.7)
        axis.plot(
            at, [sum(v) / len(v) for v in series], color="tab:blue", linewidth=1.8, label="mean of layers"
        )
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        first_sparse = next((s.step for s in steps if s.stage == "sparse"), None)
        if first_sparse is not None:
            axis.axvline(first_sparse, color="black", linestyle=":", linewidth=1, label="sparse stage")
        axis.legend()
    axes[0].set_yscale("log")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
