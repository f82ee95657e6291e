"""The command line of `dsa inspect`."""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from engine.config import WeightDtype
from lab.inspect.ceilings import CEILINGS, Ceilings, ceilings_of
from lab.tool import OverlayFlag, fail, find, one_of, program, size, start
from server.hub.models import ModelError, held_files, resolve
from server.hub.repository import parse_name
from server.hub.stages import Stages

if TYPE_CHECKING:
    from lab.inspect.report import Devices

app = program()
PRESETS = ("deepseek-v3.2",)
"""Published configs that come with the engine, so that a model can be inspected before it is fetched."""


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A name that dsa can fetch, a .gguf file, a folder with config.json (weights may be missing), "
            f"a config.json, org/name of the Hugging Face hub (of which only the config is fetched), or the published config {PRESETS[0]}."
        ),
    ],
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of one request.", show_default="all positions of the model", min=1),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 1,
    devices: Annotated[
        int | None, typer.Option(help="How many devices.", show_default="those of this machine", min=1)
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of each, such as 80GiB.", metavar="SIZE", show_default="that of this machine"
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Number format of loaded weights: auto, float32 or bfloat16.")
    ] = "auto",
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            help="Number format of the cache: auto (that of the weights), float32, bfloat16 or fp8."
        ),
    ] = "auto",
    weight_dtype: Annotated[
        str,
        typer.Option(
            help="Number format of weights stored in FP8: auto (plain on a CPU, else fp8), fp8, or plain (--dtype)."
        ),
    ] = "auto",
    overlay: OverlayFlag = None,
    roofline: Annotated[
        bool,
        typer.Option(
            "--roofline",
            help="Also say the least time of each operation and the least cost of a million tokens, by position. "
            "A decode step has --concurrency requests; --devices is tensor parallelism.",
        ),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            help=f"The device of --roofline: {', '.join(CEILINGS)}.", show_default="that of this machine"
        ),
    ] = None,
    chunk: Annotated[int, typer.Option(help="Tokens of a prefill step of --roofline.", min=1)] = 512,
    price: Annotated[float, typer.Option(help="USD an hour of one device, for --roofline.")] = 2.0,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw --roofline into this PNG.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model is and needs, without loading it.

    It reads config and headers, and prints architecture, parameters, bytes of the
    weights and of the cache, and whether they fit. The exit status is 1 if files
    are damaged or missing.
    """
    one_of("--dtype", dtype)
    one_of("--kv-cache-dtype", kv_cache_dtype, ("auto", "float32", "bfloat16", "fp8"))
    stored: WeightDtype = one_of("--weight-dtype", weight_dtype, get_args(WeightDtype))
    memory = None if device_memory is None else size("--device-memory", device_memory)
    path, overlay = _files(model, overlay)
    import torch

    from engine.kernels import native
    from engine.step.build import resolve_device, resolve_dtype
    from lab.inspect.report import Wanted, render
    from lab.inspect.report import inspect as look
    from lab.inspect.roofline import Asked

    described = devices is not None or memory is not None
    found = resolve_device("auto")
    plainly = dtype == kv_cache_dtype == "auto" and not (described or roofline or plot is not None)
    compiled = plainly and found.type == "cpu" and native.library() is not None
    if dtype == "auto":
        plain = torch.bfloat16 if described else resolve_dtype("auto", found)
        dtype = str(plain).removeprefix("torch.")
    if stored == "auto" and not described and found.type == "cpu":
        stored = "plain"  # the engine does the same on a CPU
    wanted = Wanted(context, concurrency, dtype, kv_cache_dtype, stored, native=compiled)
    if roofline or plot is not None:
        asked = Asked(concurrency, chunk, sys.maxsize if context is None else context, price)
        wanted = replace(wanted, roofline=(_ceilings(gpu), asked))
    report = look(path, overlay, wanted, _devices(devices, memory))
    if plot is not None:
        _draw(report, plot)
    sys.stdout.write((json.dumps(report, indent=2) if as_json else render(report)) + "\n")


def _ceilings(gpu: str | None) -> Ceilings:
    """Return what the device of `--gpu` can do, or that of this machine."""
    import torch

    if gpu is None:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine's CPU"
        return ceilings_of(name) or fail(f"the ceilings of {name} are not known; name a device with --gpu")
    return CEILINGS[one_of("--gpu", gpu.upper(), tuple(CEILINGS))]


def _draw(report: Mapping[str, Any], path: Path) -> None:
    try:
        from lab.inspect.plot import draw
    except ImportError:
        fail("matplotlib is not installed; --plot needs it: pip install 'dsa-serve[train]'")
    draw(report["roofline"], report["model"], path)


def _files(model: str, overlay: Path | None) -> tuple[Path, Path | None]:
    """Return the path to read and the overlay. The path is a config, a folder (weights may be missing) or a file."""
    path = Path(model).expanduser().absolute()
    if model in PRESETS:
        configs = importlib.resources.files("engine").joinpath("models", "mla", "configs")
        return Path(str(configs.joinpath(f"{model}.json"))), overlay
    if path.suffix == ".json" or (path / "config.json").is_file():
        beside = path / "indexer.safetensors"
        return path, beside if overlay is None and beside.is_file() else overlay
    if (name := parse_name(model)) is not None and name.choice is None and not path.exists():
        with contextlib.suppress(ModelError), Stages() as stages:
            found = resolve(model, overlay=overlay, report=stages, config_only=True)
            whole = held_files(name)  # the hub's config is enough, and better are weights that are there
            return (found.weights / "config.json", overlay) if whole is None else (whole, found.overlay)
    files = find(model, overlay)
    return files.weights, files.overlay


def _devices(count: int | None, memory: int | None) -> Devices:
    """Return the devices as the flags describe them. What the flags leave out is taken from this machine."""
    import torch

    from lab.inspect.report import Devices

    found = torch.cuda.device_count()
    if memory is None:
        memory = (
            min(torch.cuda.mem_get_info(i)[1] for i in range(found))
            if found
            else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        )
    return Devices(count or found or 1, memory)


if __name__ == "__main__":
    sys.exit(start(app, "inspect"))
