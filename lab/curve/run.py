"""Measures the cost of a million tokens by position, dense and sparse, on a layer of DeepSeek-V3.2's shape.

A run takes minutes and 6 GiB. Nothing else should run at the same time.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from rich.console import Console

from engine.errors import ConfigError
from engine.step.build import resolve_device, resolve_dtype
from lab.curve.measure import PHASES, CurvePlan, Lab, measure
from lab.curve.report import CurveReport, make, sentences, table
from server.hub.stages import Stages

_POSITIONS = "0,1K,2K,4K,8K,16K,32K,64K,128K"
_QUICK_POSITIONS = "0,256,512,1K,2K,4K"


def run(
    *, command: str, out: Path, price: float, positions: str | None, chunk: int | None, streams: int | None,
    rounds: int | None, quick: bool, device_name: str, dtype: str, threads: int | None, cpu_time: bool,
    fp8: bool | None = None,
) -> CurveReport:  # fmt: skip
    """Measure, print and write; `dsa bench curve --help` describes the arguments.

    Raises:
        EngineError: the device or a setting cannot be used.
        OSError: the results cannot be written.
    """
    try:  # matplotlib is an extra; if it is missing, say so now and not after the measurements
        from lab.curve.plot import draw
    except ImportError:
        raise ConfigError(
            "matplotlib is not installed; the picture needs it: pip install 'dsa-serve[train]'"
        ) from None
    if not price > 0:
        raise ConfigError(f"price is {price:g} USD an hour; it must be above 0")
    device = resolve_device(device_name)
    if cpu_time and (device.type != "cpu" or threads not in (None, 1)):
        raise ConfigError("cpu_time is the time of one CPU thread; leave it out, or --threads and --device")
    if cpu_time or threads is not None:
        torch.set_num_threads(1 if cpu_time else threads or 1)
    plan = CurvePlan(
        positions=_positions(positions or (_QUICK_POSITIONS if quick else _POSITIONS)),
        chunk=chunk or (64 if quick else 512),
        streams=streams or (2 if quick else 16),
        rounds=rounds or (1 if quick else 3),
        quick=quick, device=device, dtype=resolve_dtype(dtype, device), cpu_time=cpu_time,
        fp8=device.type == "cuda" if fp8 is None else fp8,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    console, show = Console(width=200), Stages(quiet_seconds=5)
    try:
        lab = Lab(plan, show)
        points = measure(plan, lab, show)
    except torch.OutOfMemoryError:
        raise ConfigError("the device has too little memory; lower --streams or --positions") from None
    report = make(
        plan, points, command=command, model=lab.settings, parameters=lab.report.num_parameters,
        kernels=lab.kernels, cache_bytes=lab.cache_bytes, price=price, rates=lab.rates,
    )  # fmt: skip
    for phase in PHASES:
        console.print(table(report, phase))
    for sentence in sentences(report):
        console.print(sentence, highlight=False)
    written = out / "curve.json", out / "curve.png"
    written[0].write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    draw(points, price, report.cheaper_from, report.title, written[1])
    console.print(f"{written[0]} and {written[1]} are written", markup=False, soft_wrap=True)
    return report


def _positions(text: str) -> tuple[int, ...]:
    """Read positions such as `0,1K,128K`."""
    try:
        return tuple(
            int(one.strip().upper().removesuffix("K")) * (1024 if one.strip().upper().endswith("K") else 1)
            for one in text.split(",")
        )
    except ValueError:
        raise ConfigError(f"positions is {text!r}; expected numbers such as {_POSITIONS}") from None
