"""`dsa bench curve`: hands over to the cost curve, which is a program of its own because it imports torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def curve(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where curve.json and curve.png go.")] = Path(
        "bench"
    ),
    price: Annotated[float, typer.Option(help="USD an hour of the machine.")] = 0.10,
    positions: Annotated[
        str | None,
        typer.Option(
            metavar="N,N", help="Tokens before the step, K is 1024.", show_default="0,1K,2K,4K ... 128K"
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
        bool, typer.Option("--quick", help="A model smaller in everything, once: does the command work?")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="one per core", min=1)
    ] = None,
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time",
            help="One thread, and its CPU time in place of the clock's: for a machine that has other things to do.",
        ),
    ] = False,
) -> None:
    """Cost of a million tokens by position, 0 to 128K, dense and sparse.

    Runs steps of the engine on one layer of DeepSeek-V3.2's shape with random
    weights: prefill and decode, as in the figure of its report. Takes minutes
    and 6 GiB, in which nothing else should run.
    """
    options = {
        "out": out, "price": price, "positions": positions, "chunk": chunk, "streams": streams, "rounds": rounds,
        "device": device, "dtype": dtype, "threads": threads,
    }  # fmt: skip
    command = [sys.executable, "-m", "lab.curve", *(["--quick"] if quick else [])]
    command += ["--cpu-time"] if cpu_time else []
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    # The curve takes this process's place: its output and exit status are its own.
    os.execv(command[0], command)  # noqa: S606 - an argument list that is written here
