"""The command line of `dsa calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lab.tool import (
    CpuTimeFlag,
    DeviceFlag,
    DtypeFlag,
    ModelFlag,
    OverlayFlag,
    ThreadsFlag,
    find,
    one_of,
    program,
    size,
    start,
)
from server.hub.models import DEFAULT_MODEL

app = program()


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON file to write.")],
    model: ModelFlag = DEFAULT_MODEL,
    overlay: OverlayFlag = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only contexts up to 2048, and each step once.")
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(help="Longest context to measure.", show_default="8192, or all of the model's", min=128),
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each step is run.", min=1)] = 2,
    top_k: Annotated[
        int | None,
        typer.Option(help="Tokens that sparse steps read.", show_default="the indexer's default", min=1),
    ] = None,
    device: DeviceFlag = "auto",
    dtype: DtypeFlag = "auto",
    threads: ThreadsFlag = None,
    cpu_time: CpuTimeFlag = False,
    kv_cache_memory: Annotated[
        str, typer.Option(help="Memory for the contexts that are measured.", metavar="SIZE")
    ] = "1GiB",
    token_budget: Annotated[int, typer.Option(help="Tokens of the largest step.", min=64)] = 512,
) -> None:
    """Measure what steps cost on this machine, for dsa serve --cost-calibration.

    It runs prefill chunks and decodes, sparse and dense, at several contexts and
    batch sizes, and fits the cost model to them. Then it prints how far the model
    is off on steps that were not fitted, and on a request that runs sparse and
    dense. It takes minutes; nothing else should run at the same time. Use the
    device, number format and threads of your dsa serve.
    """
    kind, memory = one_of("--dtype", dtype), size("--kv-cache-memory", kv_cache_memory)
    files = find(model, overlay)
    from lab.calibrate.run import CalibrationPlan, run

    run(
        CalibrationPlan(
            files=files, out=out, quick=quick, context=context, rounds=rounds, index_top_k=top_k, device=device,
            dtype=kind, threads=threads, cpu_time=cpu_time, kv_cache_bytes=memory, token_budget=token_budget,
        )
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(start(app, "calibrate"))
