"""The floor of a model's steps on a device: the least time of each operation, added up, and what a million tokens cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import ConfigError
from engine.protocol import IndexTopK
from lab.inspect.ceilings import Ceilings
from lab.inspect.work import HeldModel, Operation, StepRows, operations

Phase = Literal["decode", "prefill"]
_SHORT = 0.005
"""Operations with a smaller share of a step have no row of their own in the text."""


@dataclass(frozen=True)
class Asked:
    """What steps to look at, and what a device costs."""

    streams: int  # requests of a decode step
    chunk: int  # tokens of a prefill step
    context: int  # the last position is at most this
    price: float  # USD an hour of one device

    def __post_init__(self) -> None:
        if not self.price > 0:
            raise ConfigError(f"price is {self.price:g} USD an hour; it must be above 0")


@dataclass(frozen=True)
class Floor:
    """The least time of a step."""

    phase: Phase
    attention: Literal["dense", "sparse"]
    position: int  # tokens of each request before the step
    tokens: int  # rows of the step
    operations: tuple[Operation, ...]
    device: Ceilings

    @property
    def seconds(self) -> float:
        """The sum over operations: one ends before the next begins."""
        return sum(one.seconds(self.device) for one in self.operations)

    def usd(self, price_an_hour: float) -> float:
        """Return the cost of a million tokens, if all devices together cost `price_an_hour` USD."""
        return self.seconds / self.tokens * 1e6 / 3600 * price_an_hour


def floor(
    held: HeldModel,
    device: Ceilings,
    phase: Phase,
    position: int,
    tokens: int,
    top_k: IndexTopK,
    *,
    head: bool = True,
) -> Floor:
    """Return the floor of one step.

    Args:
        held: the model
        device: what each device can do
        phase: decode: a row of each of `tokens` requests, and logits. prefill: `tokens` rows of one request in the
            middle of its prompt, without logits
        position: tokens of each request before the step
        tokens: rows of the step
        top_k: tokens that a row selects; None: attention is dense
        head: whether a decode computes logits
    """
    rows = (
        StepRows(tokens, 1, position, top_k, tokens if head else 0)
        if phase == "decode"
        else StepRows(1, tokens, position, top_k)
    )
    made = tuple(operations(held, rows))
    return Floor(phase, "dense" if top_k is None else "sparse", position, tokens, made, device)


def floors(held: HeldModel, device: Ceilings, asked: Asked) -> list[Floor]:
    """Return the floors at all positions, dense and, if the model has an indexer, sparse."""
    found = []
    kinds = [None] if held.shape.index_top_k is None else [None, held.shape.index_top_k]
    steps: tuple[tuple[Phase, int, int], ...]
    steps = (("decode", asked.streams, 1), ("prefill", asked.chunk, asked.chunk))
    for phase, tokens, rows in steps:
        at = positions(min(asked.context, held.shape.max_positions - rows))
        found += [floor(held, device, phase, one, tokens, top_k) for one in at for top_k in kinds]
    return found


def positions(last: int) -> list[int]:
    """Return 0, 1K, 2K, 4K and so on, up to `last`; K is 1024.

    Raises:
        ConfigError: the model has fewer positions than a chunk.
    """
    if last < 0:
        raise ConfigError("a chunk is longer than the model's positions; lower --chunk")
    return [0, *(1 << n for n in range(10, max(10, last.bit_length())) if 1 << n <= last)]


def report(held: HeldModel, device: Ceilings, asked: Asked) -> dict[str, Any]:
    """Make the `roofline` object of the JSON report."""
    price = asked.price * held.devices
    return {
        "device": {
            "name": device.name, "source": device.source, "memory_bytes_per_second": device.memory,
            "bf16_flops": device.bf16, "fp8_flops": device.fp8, "float32_flops": device.float32,
            "link_bytes_per_second": device.link,
        },
        "devices": held.devices,
        "usd_per_hour": price,
        "weights": "fp8" if any(held.weight(one)[1] == "fp8" for one in held.shape.table.values()) else held.plain,
        "cache": held.cache,
        "steps": [
            {
                "phase": one.phase, "attention": one.attention, "position": one.position, "tokens": one.tokens,
                "seconds": one.seconds, "tokens_per_second": one.tokens / one.seconds,
                "usd_per_million": one.usd(price),
                "operations": [_operation(operation, device) for operation in one.operations],
            }
            for one in floors(held, device, asked)
        ],
    }  # fmt: skip


def _operation(one: Operation, device: Ceilings) -> dict[str, Any]:
    return {
        "name": one.name, "layers": one.layers, "bytes": round(one.num_bytes),
        "flops": {kind: round(count) for kind, count in one.flops.items()}, "sent_bytes": round(one.sent),
        "seconds": one.seconds(device), "bound": one.bound(device),
    }  # fmt: skip


def render(found: Mapping[str, Any]) -> str:
    """Format the object as tables: cost by position, then the operations of the last position."""
    device, steps = found["device"], found["steps"]
    fp8 = "no FP8" if device["fp8_flops"] is None else f"{device['fp8_flops'] / 1e12:,.0f} FP8"
    lines = [
        f"Floor on {found['devices']} x {device['name']}: {device['memory_bytes_per_second'] / 1e12:.3g} TB/s, "
        f"{device['bf16_flops'] / 1e12:,.0f} TFLOP/s bf16, {fp8} ({device['source']}).",
        f"Weights in {found['weights']}, cache in {found['cache']}, {found['usd_per_hour']:g} USD an hour in all. "
        "No step can take less; a real one takes more.",
    ]
    for phase in ("decode", "prefill"):
        mine = [one for one in steps if one["phase"] == phase]
        kinds = list(dict.fromkeys(one["attention"] for one in mine))
        what = "requests, one token each" if phase == "decode" else "tokens of one prompt"
        lines += ["", f"{phase}: {mine[0]['tokens']} {what}"]
        units = ("ms a step", "tok/s", "USD/M")
        rows = [["position", *(f"{kind} {unit}" for unit in units for kind in kinds)]]
        for position in dict.fromkeys(one["position"] for one in mine):
            at = [one for one in mine if one["position"] == position]
            rows.append([
                f"{position:,}", *(f"{1e3 * one['seconds']:.3f}" for one in at),
                *(f"{one['tokens_per_second']:,.0f}" for one in at), *(f"{one['usd_per_million']:.4f}" for one in at),
            ])  # fmt: skip
        lines += aligned(rows)
        for one in mine[-len(kinds) :]:
            lines += ["", f"{phase}, {one['attention']}, at {one['position']:,}, on one device"]
            lines += aligned(_operations(one))
    return "\n".join(lines)


def _operations(step: Mapping[str, Any]) -> list[list[str]]:
    """Make a table of a step's operations, the longest first. Short ones are one row."""
    rows = [["operation", "layers", "MB", "GFLOP", "us", "ms in all", "share", "bound by"]]
    short = 0.0
    for one in sorted(step["operations"], key=lambda one: -float(one["seconds"])):
        share = one["seconds"] / step["seconds"]
        if share < _SHORT:
            short += one["seconds"]
            continue
        rows.append([
            one["name"], str(one["layers"]), f"{one['bytes'] / 1e6:,.2f}", f"{sum(one['flops'].values()) / 1e9:,.2f}",
            f"{1e6 * one['seconds'] / one['layers']:,.1f}", f"{1e3 * one['seconds']:.3f}", f"{share:.1%}", one["bound"],
        ])  # fmt: skip
    rest = ["all others", "", "", "", "", f"{1e3 * short:.3f}", f"{short / step['seconds']:.1%}", ""]
    return [*rows, rest]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows as lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
