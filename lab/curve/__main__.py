"""The command line of `dsa bench curve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lab.tool import CpuTimeFlag, DeviceFlag, DtypeFlag, ThreadsFlag, one_of, program, start

app = program()


@app.command()
def curve(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where curve.json and curve.png go.")] = Path(
        "bench"
    ),
    price: Annotated[float, typer.Option(help="Price of the machine, USD an hour.")] = 0.10,
    positions: Annotated[
        str | None,
        typer.Option(
            metavar="N,N", help="Tokens before the step; K is 1024.", show_default="0,1K,2K,4K ... 128K"
        ),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Tokens of a prefill step.", show_default="512", min=1)
    ] = None,
    streams: Annotated[
        int | None, typer.Option(help="Requests of a decode step.", show_default="16", min=1)
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="How often each step is run.", show_default="3", min=1)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model and one round, to see that the command works.")
    ] = False,
    fp8: Annotated[
        bool | None,
        typer.Option(
            "--fp8/--plain",
            help="Weights, cache and index keys in FP8, as DeepSeek serves them, or in --dtype.",
            show_default="--fp8 on a GPU",
        ),
    ] = None,
    device: DeviceFlag = "auto",
    dtype: DtypeFlag = "auto",
    threads: ThreadsFlag = None,
    cpu_time: CpuTimeFlag = False,
) -> None:
    """Cost of a million tokens by position, 0 to 128K, dense and sparse.

    It runs steps of the engine on one layer of DeepSeek-V3.2's shape with random
    weights: prefill and decode, as in the figure of its report. It takes minutes
    and 6 GiB; nothing else should run at the same time.
    """
    one_of("--dtype", dtype)
    from lab.curve.run import run

    run(
        command=ctx.obj, out=out, price=price, positions=positions, chunk=chunk, streams=streams, rounds=rounds,
        quick=quick, device_name=device, dtype=dtype, threads=threads, cpu_time=cpu_time, fp8=fp8,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(start(app, "bench curve"))
