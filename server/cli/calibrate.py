"""`dsa calibrate`: hands over to the calibration, which is a program of its own because it imports torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer


def calibrate(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write what was measured.")],
    model: Annotated[
        str,
        typer.Argument(help="A name that dsa can fetch, a .gguf file, or a folder with config.json."),
    ] = "smollm2-135m-instruct",
    overlay: Annotated[
        Path | None,
        typer.Option(
            help="A lightning indexer to lay over the model.", metavar="FILE", show_default="the model's own"
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Contexts up to 2048, each step once: a first impression.")
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(help="Longest context to measure.", show_default="8192, or all of the model's", min=128),
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each step is run.", min=1)] = 2,
    top_k: Annotated[
        int | None, typer.Option(help="Of sparse steps.", show_default="the indexer's default", min=1)
    ] = None,
    device: Annotated[
        str, typer.Option(help="As dsa serve will have it: auto, cpu, cuda or cuda:N.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Likewise: auto, float32 or bfloat16.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Likewise: CPU threads.", show_default="one per core", min=1)
    ] = None,
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time",
            help="One thread, and its CPU time in place of the clock's: for a machine that has other things to do.",
        ),
    ] = False,
    kv_cache_memory: Annotated[
        str, typer.Option(help="Memory for the contexts that are measured.", metavar="SIZE")
    ] = "1GiB",
    token_budget: Annotated[int, typer.Option(help="Tokens of the largest step.", min=64)] = 512,
) -> None:
    """Measure what steps cost on this machine, for dsa serve --cost-calibration.

    Runs prefill chunks and decodes, sparse and dense, at several contexts and
    batch sizes, fits the cost model to them, and says how well it explains
    steps that were not fitted, and the time of a dense request from that of a
    sparse one. Takes minutes, in which nothing else should run.
    """
    from server.hub.models import ModelError, resolve
    from server.hub.sizes import SizeError, parse_size
    from server.hub.stages import Stages

    if dtype not in ("auto", "float32", "bfloat16"):
        _fail(f"--dtype is {dtype!r}; expected one of auto, float32, bfloat16", 2)
    try:
        memory = parse_size(kv_cache_memory, "--kv-cache-memory")
        with Stages() as stages:
            files = resolve(model, overlay=overlay, report=stages)
    except SizeError as error:
        _fail(str(error), 2)
    except ModelError as error:
        _fail(str(error), 1)
    options = {
        "weights": files.weights, "overlay": files.overlay, "out": out, "context": context, "rounds": rounds,
        "top-k": top_k, "device": device, "dtype": dtype, "threads": threads, "kv-cache-bytes": memory,
        "token-budget": token_budget,
    }  # fmt: skip
    command = [sys.executable, "-m", "lab.calibrate", *(["--quick"] if quick else [])]
    command += ["--cpu-time"] if cpu_time else []
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    # The calibration takes this process's place: its output and exit status are its own.
    os.execv(command[0], command)  # noqa: S606 - an argument list that is written here


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
