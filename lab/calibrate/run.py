"""Measures what steps cost on this machine, and writes the file for `dsa serve --cost-calibration`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from engine.config import PAGE_SIZE, EngineConfig, PlainDtype
from engine.errors import ConfigError
from engine.plan.cost import Calibration, Coefficients, calibration_json
from engine.plan.sparsity import is_dense
from engine.step.build import Built, build
from lab.calibrate.fit import fit, modelled
from lab.calibrate.proof import Comparison, compare
from lab.calibrate.steps import Bench, Measured, cases
from server.hub.models import ModelFiles
from server.hub.stages import Stages

QUIET_SECONDS = 5.0
"""The time between two lines of progress."""
_CHECKED = (2048, 8192)
_OUTPUT = 16
_UNITS = {
    "step": "step", "head": "step with logits",
    "lone": "lone row (a decode)", "lone_pair": "  context token, dense", "lone_sparse": "  that is sparse",
    "lone_gathered": "  token gathered", "lone_index_pair": "  context token scored and ranked",
    "chunk": "chunk (of a prompt)", "row": "  row", "pair": "  (row, token) of masked attention",
    "context": "  token brought together", "sparse_row": "  row with index queries",
    "gathered": "  (row, token) gathered", "index_pair": "  (row, token) scored and ranked",
}  # fmt: skip


class CalibrationPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure, and how.

    Attributes:
        files: the model's files
        out: the file to write
        quick: contexts up to 2048 or twice top_k, one round
        context: the longest context to measure; None is 8192, or all positions of the model if they are fewer
        rounds: how often each step is run
        index_top_k: tokens that a row of a sparse step reads; None is the indexer's default
        device, dtype, threads, kv_cache_bytes, token_budget: as in `EngineConfig`
        cpu_time: use one thread, and measure its CPU time instead of the wall clock
    """

    files: ModelFiles
    out: Path
    quick: bool
    context: int | None
    rounds: int
    index_top_k: int | None
    device: str
    dtype: PlainDtype
    threads: int | None
    cpu_time: bool
    kv_cache_bytes: int
    token_budget: int


def run(plan: CalibrationPlan) -> Calibration:
    """Measure, fit, prove and write.

    Raises:
        EngineError: the model, the device or the settings cannot be used.
        OSError: the result cannot be written.
    """
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    if plan.out.is_dir():  # say so now and not after the measurements
        raise ConfigError(f"{plan.out} is a folder; name a file")
    console, show = Console(), Stages(quiet_seconds=QUIET_SECONDS)
    overlay = plan.files.overlay
    try:
        config = EngineConfig(
            weights=str(plan.files.weights), overlay=None if overlay is None else str(overlay), device=plan.device,
            dtype=plan.dtype, threads=1 if plan.cpu_time else plan.threads, kv_cache_bytes=plan.kv_cache_bytes,
            token_budget=plan.token_budget,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        return _measured(plan, build(config, show), console, show)
    except torch.OutOfMemoryError:
        raise ConfigError("the device has too little memory; lower --kv-cache-memory") from None


def _measured(plan: CalibrationPlan, built: Built, console: Console, show: Stages) -> Calibration:
    info, capacity = built.ready.model, built.ready.capacity
    device = torch.device(info.device).type
    index_top_k = plan.index_top_k or (info.indexer.default_index_top_k if info.indexer else None)
    if plan.index_top_k is not None and info.indexer is None:
        raise ConfigError("top_k was given, but this model has no indexer and is always dense; leave it out")
    longest = _longest(plan, info.max_model_len, index_top_k)
    rounds = 1 if plan.quick else plan.rounds
    if plan.cpu_time and device != "cpu":
        raise ConfigError("cpu_time measures steps on the CPU; leave it out, or use device cpu")
    clock = time.process_time if plan.cpu_time else time.perf_counter
    bench = Bench(built.runner, built.cache, info.vocab_size, capacity.token_budget, clock)
    bench.fill(min(1024, longest), show)
    chosen = cases(longest, capacity.num_pages, capacity.token_budget, capacity.max_running, index_top_k)
    assumed = built.costs
    measured = bench.measure(chosen, assumed, rounds, show)
    fitted = [one for one in measured if not one.case.held_out]
    judged = [one for one in measured if one.case.held_out]
    if not judged:
        raise ConfigError("the cache holds too few contexts to measure; give it more with kv_cache_memory")
    coefficients = fit([one.features for one in fitted], [one.seconds for one in fitted])
    errors = [abs(modelled(coefficients, one.features) / one.seconds - 1) for one in judged]
    model = assumed.replace(coefficients)
    console.print(_coefficient_table(coefficients, assumed.coefficients))
    console.print(_error_table(judged, coefficients))
    compared: list[Comparison] = []
    if index_top_k is not None:
        for context in sorted({min(context, longest) for context in _CHECKED}):
            if not is_dense(context - _OUTPUT, index_top_k) and 2 * context <= capacity.num_pages * PAGE_SIZE:
                # A long prompt takes minutes on a small CPU. Its end costs as much per token as its other parts.
                cached = max(0, context - _OUTPUT - 1024) if device == "cpu" else 0
                compared.append(
                    compare(
                        bench, model, index_top_k, context=context, cached=cached, output=_OUTPUT, rounds=rounds,
                        budget=capacity.token_budget, progress=show,
                    )
                )  # fmt: skip
        console.print(_proof_table(compared))
    calibration = Calibration(
        shape=assumed.shape,
        device=device,
        dtype=info.dtype,
        kernels=built.backend,
        coefficients=coefficients,
        steps=len(fitted),
        median_error=statistics.median(errors),
        worst_error=max(errors),
        dense_errors={one.context: one.error for one in compared},
    )
    plan.out.write_bytes(calibration_json(calibration))
    console.print(f"{plan.out} is written; use it with dsa serve --cost-calibration {plan.out}", markup=False, soft_wrap=True)  # fmt: skip
    return calibration


def _longest(plan: CalibrationPlan, positions: int, index_top_k: int | None) -> int:
    """Return the longest context to measure.

    Raises:
        ConfigError: the model has fewer positions, or no context is sparse.
    """
    if plan.context is not None and plan.context > positions:
        raise ConfigError(f"context is {plan.context}, but this model has {positions} positions")
    quick = max(2048, 2 * (index_top_k or 0))
    longest: int = plan.context or min(quick if plan.quick else 8192, positions)
    if index_top_k is not None and index_top_k + 2 * _OUTPUT > longest:
        raise ConfigError(
            f"with top_k {index_top_k} nothing is sparse up to the longest context measured, {longest}; lower top_k or raise context"
        )
    return longest


def _coefficient_table(fitted: Coefficients, assumed: Coefficients) -> Table:
    table = Table("seconds a", "measured", "assumed", title="what a step costs")
    for name, unit in _UNITS.items():
        table.add_row(unit, f"{getattr(fitted, name):.2e}", f"{getattr(assumed, name):.2e}")
    return table


def _error_table(judged: Sequence[Measured], coefficients: Coefficients) -> Table:
    """Make the table of median and worst errors by kind of step. The milliseconds are those of the worst step."""
    table = Table("kind", "steps", "median error", "worst error", "measured ms", "modelled ms")
    table.title = "steps that were not fitted"
    for kind in [*dict.fromkeys(one.case.kind for one in judged), "all"]:
        found = []
        for one in judged:
            if kind in ("all", one.case.kind):
                own = modelled(coefficients, one.features)
                found.append((abs(own / one.seconds - 1), one.seconds, own))
        error, seconds, own = max(found)
        table.add_row(
            kind, str(len(found)), f"{statistics.median(e for e, _, _ in found):.1%}", f"{error:.1%}",
            f"{seconds * 1e3:.1f}", f"{own * 1e3:.1f}",
        )  # fmt: skip
    return table


def _proof_table(compared: Sequence[Comparison]) -> Table:
    table = Table("tokens", "cached", "sparse s", "dense s", "estimated dense s", "error", "decode error")
    table.title = "one request, sparse and dense"
    for one in compared:
        table.add_row(
            str(one.context), str(one.cached), f"{one.sparse.device_seconds:.3f}",
            f"{one.dense.device_seconds:.3f}", f"{one.sparse.dense_seconds:.3f}",
            f"{one.error:+.1%}", f"{one.decode_error:+.1%}",
        )  # fmt: skip
    return table
