"""Cost of a million tokens by position, dense and sparse, on a layer of DeepSeek-V3.2's shape.

Started by `dsa bench curve`; alone it is `python -m lab.curve`. Takes minutes and 6 GiB, in which nothing else
should run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from rich.console import Console

from engine.errors import ConfigError, EngineError
from engine.step.build import resolve_device, resolve_dtype
from lab.curve.measure import PHASES, Lab, Plan, measure
from lab.curve.report import Report, make, sentences, table
from lab.progress import Lines

_POSITIONS = "0,1K,2K,4K,8K,16K,32K,64K,128K"
_QUICK_POSITIONS = "0,256,512,1K,2K,4K"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    options = parser().parse_args(arguments)
    options.command = shlex.join(
        ["python", "-m", "lab.curve", *(sys.argv[1:] if arguments is None else arguments)]
    )
    try:
        run(options)
    except torch.OutOfMemoryError:
        error: object = "the device has too little memory; lower --streams or --positions"
    except (EngineError, OSError) as fault:
        error = fault
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
    return 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m lab.curve", description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--out", type=Path, required=True, help="folder for curve.json and curve.png")
    add("--price", type=float, default=0.10, metavar="USD", help="an hour of the machine (%(default)s)")
    add("--positions", metavar="LIST", help=f"tokens before the step, K is 1024 ({_POSITIONS})")
    add("--chunk", type=int, help="tokens of a prefill step (512)")
    add("--streams", type=int, help="requests of a decode step (16)")
    add("--rounds", type=int, help="times that each step is run (3)")
    add("--quick", action="store_true", help="a model smaller in everything, once: does the command work?")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="(%(default)s)")
    add("--threads", type=int, help="CPU threads")
    add(
        "--cpu-time",
        action="store_true",
        help="one thread, and its CPU time in place of the clock's: for a machine that has other things to do",
    )
    return made


def run(options: argparse.Namespace) -> Report:
    """Measure as the options say.

    Raises:
        EngineError: the device or the settings.
        OSError: the results cannot be written.
    """
    try:  # an extra, and better missed now than after the measurements
        from lab.curve.plot import draw
    except ImportError:
        raise ConfigError(
            "matplotlib is not installed; the picture needs it: pip install 'dsa-serve[train]'"
        ) from None
    if not options.price > 0:
        raise ConfigError(f"price is {options.price:g} USD an hour; it must be above 0")
    quick: bool = options.quick
    device = resolve_device(options.device)
    if options.cpu_time and (device.type != "cpu" or options.threads not in (None, 1)):
        raise ConfigError("cpu_time is the time of one CPU thread; leave it out, or --threads and --device")
    threads = 1 if options.cpu_time else options.threads
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        torch.set_num_threads(threads)
    plan = Plan(
        positions=_positions(options.positions or (_QUICK_POSITIONS if quick else _POSITIONS)),
        chunk=options.chunk if options.chunk is not None else 64 if quick else 512,
        streams=options.streams if options.streams is not None else 2 if quick else 16,
        rounds=options.rounds if options.rounds is not None else 1 if quick else 3,
        quick=quick, device=device, dtype=resolve_dtype(options.dtype, device), cpu_time=options.cpu_time,
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    console, show = Console(width=160), Lines()
    lab = Lab(plan, show)
    points = measure(plan, lab, show)
    report = make(
        plan, points, command=options.command, model=lab.settings, parameters=lab.report.num_parameters,
        kernels=lab.kernels, cache_bytes=lab.cache_bytes, price=options.price,
    )  # fmt: skip
    for phase in PHASES:
        console.print(table(report, phase))
    for sentence in sentences(report):
        console.print(sentence, highlight=False)
    written = options.out / "curve.json", options.out / "curve.png"
    written[0].write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    draw(points, options.price, report.cheaper_from, report.title, written[1])
    console.print(f"{written[0]} and {written[1]} are written", markup=False, soft_wrap=True)
    return report


def _positions(text: str) -> tuple[int, ...]:
    """`0,1K,128K` as numbers."""
    try:
        return tuple(
            int(one.strip().upper().removesuffix("K")) * (1024 if one.strip().upper().endswith("K") else 1)
            for one in text.split(",")
        )
    except ValueError:
        raise ConfigError(f"positions is {text!r}; expected numbers such as {_POSITIONS}") from None


if __name__ == "__main__":
    sys.exit(main())
