"""Measure what steps cost on this machine and write it down for `dsa serve --cost-calibration`.

Started by `dsa calibrate`; alone it is `python -m lab.calibrate`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from engine.config import PAGE_SIZE, EngineConfig
from engine.errors import ConfigError, EngineError
from engine.plan.cost import Calibration, Coefficients, calibration_json
from engine.plan.sparsity import is_dense
from engine.step.build import build
from lab.calibrate.fit import fit, modelled
from lab.calibrate.proof import Comparison, compare
from lab.calibrate.steps import Bench, Measured, cases
from lab.progress import Lines

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, fit, prove, write; the exit status."""
    options = parser().parse_args(arguments)
    try:
        run(options)
    except torch.OutOfMemoryError:
        error: object = "the device has too little memory; lower --kv-cache-memory"
    except (EngineError, OSError, ValueError) as fault:
        error = fault
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
    return 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m lab.calibrate", description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--weights", type=Path, required=True, help="checkpoint: .gguf file or folder")
    add("--overlay", type=Path, help="an indexer to lay over it")
    add("--out", type=Path, required=True, help="file to write")
    add("--top-k", type=int, help="of the sparse steps (the indexer's default)")
    add("--context", type=int, help="longest context to measure (8192, or all positions of the model)")
    add("--rounds", type=int, default=2, help="times that each step is run (%(default)s)")
    add("--quick", action="store_true", help="contexts up to 2048 or twice top_k, one round")
    add("--kv-cache-bytes", type=int, default=1 << 30, help="(%(default)s)")
    add("--token-budget", type=int, default=512, help="(%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="(%(default)s)")
    add("--threads", type=int, help="CPU threads")
    add(
        "--cpu-time",
        action="store_true",
        help="one thread, and its CPU time in place of the clock's: for a machine that has other things to do",
    )
    return made


def run(options: argparse.Namespace) -> Calibration:
    """Calibrate as the options say.

    Raises:
        EngineError: the model, the device or the settings.
        OSError: the result cannot be written.
    """
    if options.rounds < 1:
        raise ConfigError(f"rounds must be at least 1, not {options.rounds}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.out.is_dir():  # better missed now than after the measurements
        raise ConfigError(f"{options.out} is a folder; name a file")
    console, show = Console(), Lines()
    built = build(
        EngineConfig(
            weights=str(options.weights),
            overlay=None if options.overlay is None else str(options.overlay),
            device=options.device,
            dtype=options.dtype,
            threads=1 if options.cpu_time else options.threads,
            kv_cache_bytes=options.kv_cache_bytes,
            token_budget=options.token_budget,
        ),
        show,
    )
    info, capacity = built.ready.model, built.ready.capacity
    device = torch.device(info.device).type
    top_k = options.top_k or (info.indexer.default_index_top_k if info.indexer else None)
    if options.top_k is not None and info.indexer is None:
        raise ConfigError("top_k was given, but this model has no indexer and is always dense; leave it out")
    longest = _longest(options, info.max_model_len, top_k)
    rounds = 1 if options.quick else options.rounds
    if options.cpu_time and device != "cpu":
        raise ConfigError("cpu_time measures steps on the CPU; leave it out, or use device cpu")
    clock = time.process_time if options.cpu_time else time.perf_counter
    bench = Bench(built.runner, built.cache, info.vocab_size, capacity.token_budget, clock)
    bench.fill(min(1024, longest), show)
    chosen = cases(longest, capacity.num_pages, capacity.token_budget, capacity.max_running, top_k)
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
    if top_k is not None:
        for context in sorted({min(context, longest) for context in _CHECKED}):
            if not is_dense(context - _OUTPUT, top_k) and 2 * context <= capacity.num_pages * PAGE_SIZE:
                # A long prompt takes minutes on a small CPU; its end costs as much a token as the rest of it.
                cached = max(0, context - _OUTPUT - 1024) if device == "cpu" else 0
                compared.append(
                    compare(
                        bench, model, top_k, context=context, cached=cached, output=_OUTPUT, rounds=rounds,
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
    options.out.write_bytes(calibration_json(calibration))
    console.print(f"{options.out} is written; use it with dsa serve --cost-calibration {options.out}", markup=False, soft_wrap=True)  # fmt: skip
    return calibration


def _longest(options: argparse.Namespace, positions: int, top_k: int | None) -> int:
    """The longest context to measure."""
    if options.context is not None and options.context > positions:
        raise ConfigError(f"context is {options.context}, but this model has {positions} positions")
    quick = max(2048, 2 * (top_k or 0))
    longest: int = options.context or min(quick if options.quick else 8192, positions)
    if top_k is not None and top_k + 2 * _OUTPUT > longest:
        raise ConfigError(
            f"with top_k {top_k} nothing is sparse up to the longest context measured, {longest}; lower top_k or raise context"
        )
    return longest


def _coefficient_table(fitted: Coefficients, assumed: Coefficients) -> Table:
    table = Table("seconds a", "measured", "assumed", title="what a step costs")
    for name, unit in _UNITS.items():
        table.add_row(unit, f"{getattr(fitted, name):.2e}", f"{getattr(assumed, name):.2e}")
    return table


def _error_table(judged: Sequence[Measured], coefficients: Coefficients) -> Table:
    """Median and worst error by kind of step; in milliseconds the worst step itself."""
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


if __name__ == "__main__":
    sys.exit(main())
