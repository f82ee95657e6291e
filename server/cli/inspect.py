"""`dsa inspect`: hands over to the inspection, which is a program of its own because it imports torch."""

from __future__ import annotations

import importlib.resources
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

PRESETS = ("deepseek-v3.2",)
"""Published configs that come with the engine, so that a model's needs can be read before it is fetched."""


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A name that dsa can fetch, a .gguf file, a folder with config.json (weights may be missing), "
            f"a config.json, or the published config {PRESETS[0]}."
        ),
    ],
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of one request.", show_default="all positions of the model", min=1),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 1,
    devices: Annotated[
        int | None, typer.Option(help="How many devices.", show_default="what is found", min=1)
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(help="Memory of each, as 80GiB.", metavar="SIZE", show_default="what is found"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the loaded weights: auto, float32 or bfloat16.")] = "auto",
    kv_cache_dtype: Annotated[
        str, typer.Option(help="Of the cache: auto (as the weights), float32, bfloat16 or fp8.")
    ] = "auto",
    weight_dtype: Annotated[
        str,
        typer.Option(help="Of weights stored in FP8: auto (fp8 but on a CPU), fp8, or plain (in --dtype)."),
    ] = "auto",
    overlay: Annotated[
        Path | None,
        typer.Option(
            help="A lightning indexer to lay over the model.", metavar="FILE", show_default="the model's own"
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model is and needs, without loading it.

    Reads config and headers: architecture, parameters, bytes of the weights and
    of the cache, and whether they fit. Exit code 1 if the files are damaged or
    something is missing.
    """
    from server.hub.models import ModelError, resolve
    from server.hub.sizes import SizeError, parse_size
    from server.hub.stages import Stages

    for name, value, allowed in (
        ("--dtype", dtype, ("auto", "float32", "bfloat16")),
        ("--kv-cache-dtype", kv_cache_dtype, ("auto", "float32", "bfloat16", "fp8")),
        ("--weight-dtype", weight_dtype, ("auto", "plain", "fp8")),
    ):
        if value not in allowed:
            _fail(f"{name} is {value!r}; expected one of {', '.join(allowed)}", 2)
    try:
        memory = None if device_memory is None else parse_size(device_memory, "--device-memory")
        path = Path(model).expanduser().absolute()
        if model in PRESETS:
            path = Path(
                str(importlib.resources.files("engine").joinpath("models", "mla", "configs", f"{model}.json"))
            )
        elif path.suffix != ".json" and not (path / "config.json").is_file():
            with Stages() as stages:
                files = resolve(model, overlay=overlay, report=stages)
            path, overlay = files.weights, files.overlay
        elif overlay is None and (path / "indexer.safetensors").is_file():
            overlay = path / "indexer.safetensors"
    except SizeError as error:
        _fail(str(error), 2)
    except ModelError as error:
        _fail(str(error), 1)
    options = {
        "overlay": overlay, "context": context, "concurrency": concurrency, "devices": devices,
        "device-memory": memory, "dtype": dtype, "kv-cache-dtype": kv_cache_dtype,
        "weight-dtype": weight_dtype,
    }  # fmt: skip
    command = [sys.executable, "-m", "lab.inspect", *(["--json"] if json else [])]
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    # The inspection takes this process's place: its output and exit status are its own.
    os.execv(command[0], [*command, "--", str(path)])  # noqa: S606 - an argument list that is written here


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
