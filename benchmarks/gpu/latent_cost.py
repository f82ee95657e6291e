"""What a million tokens of DeepSeek-V3.2 cost by position, from the measured steps of one of its layers.

    python -m benchmarks.gpu.latent_cost [FILE] [--price 2] [--layers 61] [--write]

FILE is what `benchmarks.gpu.latent_step` wrote. It prints a table; with `--write` the table goes into docs/measured.md, and
a picture beside it.

A step of the whole model is taken as `layers` times the measured layer, and for decodes the head, measured apart. 16 streams
on 16 of the 256 experts, 8 a token, give a layer as many visits to each expert as a GPU has in a group of 16 that divide the
experts and have 16 streams each, which is how such models are served: attention by data parallelism, experts by expert
parallelism. So the price is that of one GPU. Left out: sending rows to experts and back (all-to-all), and sampling. The
first three layers, whose MLP is dense, are counted as the others.
"""

from __future__ import annotations

import argparse
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.curve import MEASURED, put
from engine.checkpoint.quantisation import published_in_blocks
from engine.models import read_config
from lab.curve.measure import ATTENTION, Attention, CurvePoint
from lab.inspect.ceilings import Ceilings, ceilings_of
from lab.inspect.roofline import Phase, floor
from lab.inspect.work import HeldModel

FILE = Path(__file__).parent / "latent_step.json"
PICTURE = MEASURED.parent / "latent_cost.png"
BEGIN, END = "<!-- latent cost: begin -->", "<!-- latent cost: end -->"
WIDTH = 118
K = 1024
LAYERS, PRICE = 61, 2.0
GPU_BYTES = 141_000_000_000
PHASES: tuple[Phase, ...] = ("decode", "prefill")
PUBLISHED: Mapping[tuple[Phase, Attention], Mapping[int, float]] = {
    ("prefill", "dense"): {0: 0.05, 32 * K: 0.20, 64 * K: 0.36, 128 * K: 0.665},
    ("prefill", "sparse"): {0: 0.06, 32 * K: 0.12, 64 * K: 0.14, 128 * K: 0.187},
    ("decode", "dense"): {0: 0.07, 32 * K: 0.59, 64 * K: 1.11, 128 * K: 2.15},
    ("decode", "sparse"): {0: 0.10, 32 * K: 0.17, 64 * K: 0.20, 128 * K: 0.25},
}
"""USD a million tokens by position, read off figure 3 of arXiv 2512.02556 to some 3 %: H800 at 2 USD a GPU-hour. Dense is
DeepSeek-V3.1-Terminus, sparse DeepSeek-V3.2."""
ARTICLE = 2.30, 0.30
"""USD a million tokens at 128K, dense and sparse, as articles about DeepSeek-V3.2 quote the figure."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The file of `benchmarks.gpu.latent_step`; other fields are not needed here."""

    points: list[CurvePoint]
    model: dict[str, Any]  # the config of the measured model, of one layer
    machine: str
    head_seconds: float = 0.0  # of the head for the decode's streams; it is no part of a point's seconds


@dataclass(frozen=True)
class Cost:
    """A measured layer, and what it costs in a whole model."""

    phase: Phase
    attention: Attention
    context: int  # tokens of a request when the step ends
    tokens: int  # rows of the step
    layer_seconds: float
    floor_seconds: float | None  # of the layer; None: the device's ceilings are not known
    usd: float  # a million tokens


def read(path: Path = FILE) -> Measured:
    """Read the measurements.

    Raises:
        SystemExit: there is no such file, or it holds something else.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Measured)
    except OSError as error:
        raise SystemExit(
            f"error: {path} cannot be read ({error.strerror}); python -m benchmarks.gpu.latent_step --out DIR writes it"
        ) from None
    except msgspec.DecodeError as error:
        raise SystemExit(f"error: {path} is not a file of benchmarks.gpu.latent_step: {error}") from None


def held(measured: Measured) -> HeldModel:
    """Return how the measured model was held: FP8 weights and cache if its config says so."""
    shape = read_config(measured.model, "config.json").shape(None)
    fp8 = bool(measured.model.get("quantization_config"))
    return HeldModel(
        shape, 1, torch.bfloat16, "fp8" if fp8 else "bfloat16", published_in_blocks if fp8 else lambda name: False
    )  # fmt: skip


def costs(measured: Measured, layers: int = LAYERS, price: float = PRICE) -> list[Cost]:
    """Compute the cost of every measured point, by phase, context and attention.

    Where only dense was measured, sparse is the same computation, because the context is not longer than a selection.
    """
    model, device = held(measured), ceilings_of(measured.machine)
    top_k = model.shape.index_top_k
    found: list[Cost] = []
    for point in measured.points:
        rows = point.tokens if point.phase == "prefill" else 1
        context = point.position + rows
        layer = statistics.median(point.seconds)
        step = layers * layer + (measured.head_seconds if point.phase == "decode" else 0.0)
        usd = step / point.tokens * 1e6 / 3600 * price
        selects = None if point.attention == "dense" else top_k
        least = _floor(model, device, point, selects)
        found.append(Cost(point.phase, point.attention, context, point.tokens, layer, least, usd))
        if point.attention == "dense" and top_k is not None and context <= top_k:
            found.append(Cost(point.phase, "sparse", context, point.tokens, layer, least, usd))
    return sorted(
        found, key=lambda one: (PHASES.index(one.phase), one.context, ATTENTION.index(one.attention))
    )


def _floor(model: HeldModel, device: Ceilings | None, point: CurvePoint, top_k: int | None) -> float | None:
    if device is None:
        return None
    return floor(model, device, point.phase, point.position, point.tokens, top_k, head=False).seconds


def table(found: Sequence[Cost], phase: Phase) -> list[str]:
    """Make the table of one phase, in Markdown."""
    lines = [
        "| context | dense ms a layer (x floor) | sparse ms a layer (x floor) | dense USD | sparse USD "
        "| published: dense | sparse |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    mine = [one for one in found if one.phase == phase]
    for context in dict.fromkeys(one.context for one in mine):
        pair = {one.attention: one for one in mine if one.context == context}
        both = [pair.get(kind) for kind in ATTENTION]
        lines.append("| " + " | ".join([
            f"{context:,}", *(_milliseconds(one) for one in both),
            *("" if one is None else f"{one.usd:.3f}" for one in both),
            *(_published(phase, kind, context) for kind in ATTENTION),
        ]) + " |")  # fmt: skip
    return lines


def _milliseconds(one: Cost | None) -> str:
    if one is None:
        return ""
    ratio = "" if one.floor_seconds is None else f" ({one.layer_seconds / one.floor_seconds:.1f})"
    return f"{1e3 * one.layer_seconds:.3f}{ratio}"


def _published(phase: Phase, attention: Attention, context: int) -> str:
    known = PUBLISHED[phase, attention]
    near = min(known, key=lambda position: abs(position - context))
    return f"{known[near]:g}" if abs(near - context) <= K else ""


def needed_bytes(measured: Measured, context: int, streams: int, layers: int = LAYERS) -> tuple[int, int]:
    """Return the bytes of (weights, cache) of a GPU that has `layers` such layers, and `streams` requests of `context`."""
    model = held(measured)
    layer = outside = 0
    for name, weight in model.table().items():
        if name.startswith("layers."):
            layer += model.weight(weight)[0]
        else:
            outside += model.weight(weight)[0]
    latent, key = model.shape.cache[model.cache]
    return layers * layer + outside, streams * context * (layers * latent + layers * key)


def text(measured: Measured, found: Sequence[Cost], layers: int, price: float) -> str:
    """Make the tables, and the sentences before them."""
    streams = next(one.tokens for one in found if one.phase == "decode")
    longest = max(one.context for one in found if one.phase == "decode")
    weights, cache = needed_bytes(measured, longest, streams, layers)
    fits = "more than" if weights + cache > GPU_BYTES else "within"
    said = (
        f"One layer on one {measured.machine}, times {layers}, at {price:g} USD an hour: USD a million tokens. Decode: "
        f"{streams} streams, the head ({1e3 * measured.head_seconds:.2f} ms) added; prefill: a chunk of "
        f"{next((one.tokens for one in found if one.phase == 'prefill'), 0)} tokens. Weights of {layers} such layers and the "
        f"cache of {streams} x {longest:,} tokens would take {weights / 1e9:.0f} + {cache / 1e9:.0f} GB, {fits} the "
        f"{GPU_BYTES / 1e9:.0f} GB of an H200. Published: figure 3 of arXiv 2512.02556, H800 at 2 USD an hour, read off the "
        f"plot; articles quote it as {ARTICLE[0]:.2f} and {ARTICLE[1]:.2f} at 128K."
    )
    lines = textwrap.wrap(said, WIDTH, break_on_hyphens=False)
    for phase in PHASES:
        if any(one.phase == phase for one in found):
            lines += ["", f"**{phase}**", "", *table(found, phase)]
            lines += ["", *textwrap.wrap(_sentence(found, phase), WIDTH)]
    return "\n".join(lines)


def _sentence(found: Sequence[Cost], phase: Phase) -> str:
    """Say what selecting saves at the longest context that was measured both ways, and how a sparse token's cost grows."""
    usd = {(one.attention, one.context): one.usd for one in found if one.phase == phase}
    both = [context for kind, context in usd if kind == "sparse" and ("dense", context) in usd]
    if not both:
        return ""
    last = max(both)
    said = (
        f"At {last:,} a dense token costs {usd['dense', last] / usd['sparse', last]:.1f} times a sparse one"
    )
    if ("sparse", 8 * K) in usd and last > 8 * K:
        grown = [usd[kind, last] / usd[kind, 8 * K] for kind in ("sparse", "dense")]
        said += f"; from {8 * K:,} on it grew {grown[0]:.2f} times sparse, {grown[1]:.2f} times dense"
    cheaper = [context for context in sorted(both) if usd["sparse", context] < usd["dense", context]]
    return said + (f". Sparse is cheaper from {cheaper[0]:,} on." if cheaper else ".")


def draw(found: Sequence[Cost], title: str, path: Path) -> None:
    """Draw cost by context, prefill and decode, with the published figure dashed; write the PNG `path`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, phase in zip(axes, ("prefill", "decode"), strict=True):
        for attention, colour in (("dense", "tab:orange"), ("sparse", "tab:blue")):
            curve = [one for one in found if (one.phase, one.attention) == (phase, attention)]
            axis.plot(
                [one.context / K for one in curve], [one.usd for one in curve],
                marker="o", markersize=4, color=colour, label=attention,
            )  # fmt: skip
            known = PUBLISHED[phase, attention]  # type: ignore[index]
            axis.plot(
                [position / K for position in known], list(known.values()),
                linestyle="--", marker="x", markersize=4, color=colour, alpha=0.6, label=f"{attention}, published (H800)",
            )  # fmt: skip
        axis.set_title(phase)
        axis.set_xlabel("context (K is 1024 tokens)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left", fontsize=8)
    axes[0].set_ylabel("USD a million tokens")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or write them and the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.latent_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", type=Path, nargs="?", default=FILE)
    parser.add_argument("--price", type=float, default=PRICE, help="USD an hour of one GPU")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--write", action="store_true", help="into docs/measured.md and docs/latent_cost.png")
    asked = parser.parse_args(arguments)
    if not asked.price > 0 or asked.layers < 1:
        parser.error("--price must be above 0, and --layers at least 1")
    measured = read(asked.file)
    found = costs(measured, asked.layers, asked.price)
    made = text(measured, found, asked.layers, asked.price)
    if not asked.write:
        print(made)
        return
    put(MEASURED, made, BEGIN, END)
    title = f"DeepSeek-V3.2, {asked.layers} x one measured layer, {measured.machine} at {asked.price:g} USD an hour"
    draw(found, title, PICTURE)


if __name__ == "__main__":
    main()
