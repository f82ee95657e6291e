"""The report of a run: JSON with the time of every measured step, tables, and a few sentences."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from rich.table import Table

from lab.curve.measure import PHASES, CurvePlan, CurvePoint, crossover, growth
from lab.inspect.ceilings import Ceilings
from lab.inspect.roofline import Phase

LOW, HIGH = 8 * 1024, 128 * 1024
"""The aim: between these positions the cost of sparse decode grows less than twofold."""


class CurveReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is needed to draw the curve again, also at another price."""

    command: str
    quick: bool  # the model was much smaller, so the figures mean nothing
    model: dict[str, Any]  # its config
    parameters: int
    machine: str
    device: str
    dtype: str
    threads: int
    cpu_time: bool  # whether seconds are the process's CPU time, not wall clock time
    torch: str
    kernels: str
    cache_bytes: int
    price_an_hour: float  # USD
    chunk: int
    streams: int
    points: tuple[CurvePoint, ...]
    cheaper_from: dict[Phase, float | None]  # see `crossover`
    fp8: bool = False  # whether weights, cache and index keys were in FP8
    floor_of: str | None = None  # the rates that floors were computed from

    @property
    def title(self) -> str:
        """The title of the picture."""
        what = "a small random model" if self.quick else "one layer of DeepSeek-V3.2's shape, random weights"
        return (
            f"Cost of a million tokens by position: {what}\n{self.machine}, "
            f"{'CPU time of one thread' if self.cpu_time else f'{self.threads} threads'}, "
            f"{'FP8' if self.fp8 else self.dtype}; "
            f"prefill in chunks of {self.chunk}, decode of {self.streams} streams"
        )


def make(
    plan: CurvePlan, points: Sequence[CurvePoint], *, command: str, model: dict[str, Any], parameters: int, kernels: str,
    cache_bytes: int, price: float, rates: Ceilings,
) -> CurveReport:  # fmt: skip
    """Make the report of a run."""
    return CurveReport(
        command=command, quick=plan.quick, model=model, parameters=parameters, machine=_machine(plan.device),
        device=str(plan.device), dtype=str(plan.dtype).removeprefix("torch."), threads=torch.get_num_threads(), cpu_time=plan.cpu_time,
        torch=str(torch.__version__), kernels=kernels, cache_bytes=cache_bytes, price_an_hour=price,
        chunk=plan.chunk, streams=plan.streams, points=tuple(points),
        fp8=plan.fp8, floor_of=_rates(rates),
        cheaper_from={phase: crossover(points, phase, int(model["index_topk"])) for phase in PHASES},
    )  # fmt: skip


def table(report: CurveReport, phase: Phase) -> Table:
    """Make the table of one phase: seconds and cost by position."""
    made = Table(
        "position", "dense s a step", "sparse s a step", "dense ms a token", "sparse ms a token",
        "dense x floor", "sparse x floor", "dense USD/M", "sparse USD/M", "dense / sparse", "sparse rows attend by",
    )  # fmt: skip
    tokens = next(p.tokens for p in report.points if p.phase == phase)
    made.title = f"{phase}: {tokens} tokens a step, {report.price_an_hour:g} USD an hour"
    mine = {(p.attention, p.position): p for p in report.points if p.phase == phase}
    for position in sorted({position for _, position in mine}):
        dense, sparse = mine["dense", position], mine["sparse", position]
        made.add_row(
            f"{position:,}",
            *(f"{statistics.median(p.seconds):.4g}" for p in (dense, sparse)),
            *(f"{p.token_seconds * 1e3:.3g}" for p in (dense, sparse)),
            *("" if p.over_floor is None else f"{p.over_floor:.1f}" for p in (dense, sparse)),
            *(f"{p.usd(report.price_an_hour):.3g}" for p in (dense, sparse)),
            f"{dense.token_seconds / sparse.token_seconds:.2f}", ", ".join(sparse.forms),
        )  # fmt: skip
    return made


def sentences(report: CurveReport) -> list[str]:
    """Say in sentences what the curve shows."""
    said = []
    measured = {p.position for p in report.points}
    for phase in PHASES:
        if {LOW, HIGH} <= measured:
            dense, sparse = (growth(report.points, phase, a, LOW, HIGH) for a in ("dense", "sparse"))
            said.append(
                f"{phase}: a token at {HIGH:,} costs {sparse:.2f} times one at {LOW:,} sparse, {dense:.2f} times dense"
            )
        crossed = report.cheaper_from[phase]
        said.append(
            f"{phase}: dense is the cheaper one as far as was measured"
            if crossed is None
            else f"{phase}: sparse is cheaper from a context of {crossed:,.0f} tokens"
        )
    if report.floor_of is not None:
        said.append(f"the floor is the least time of each operation, added up: {report.floor_of}")
    return said


def _rates(rates: Ceilings) -> str:
    fp8 = "" if rates.fp8 is None else f", FP8 {rates.fp8 / 1e12:,.4g}"
    return (
        f"{rates.name} ({rates.source}), {rates.memory / 1e9:,.4g} GB/s, TFLOP/s bf16 {rates.bf16 / 1e12:,.4g}{fp8}, "
        f"float32 {rates.float32 / 1e12:,.4g}"
    )


def _machine(device: torch.device) -> str:
    """Return the name of the processor, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name
            )
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"
