"""`python -m lab.inspect PATH`: a program of its own because it imports torch; started by `dsa inspect`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from engine.errors import EngineError
from engine.step.build import resolve_device, resolve_dtype
from lab.inspect.report import Devices, Wanted, inspect, render


def main() -> None:
    """Read the arguments, print the report, leave with 1 where there is a fault in the model's files."""
    parser = argparse.ArgumentParser(prog="dsa inspect")
    parser.add_argument("path", type=Path)
    parser.add_argument("--overlay", type=Path)
    parser.add_argument("--context", type=int)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--devices", type=int)
    parser.add_argument("--device-memory", type=int, help="bytes of each")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--weight-dtype", default="auto", choices=("auto", "plain", "fp8"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    described = options.devices is not None or options.device_memory is not None
    devices = _devices(options.devices, options.device_memory)
    dtype, weights = options.dtype, options.weight_dtype
    found = resolve_device("auto")
    if dtype == "auto":
        plain = torch.bfloat16 if described else resolve_dtype("auto", found)
        dtype = str(plain).removeprefix("torch.")
    if weights == "auto" and not described and found.type == "cpu":
        weights = "plain"  # as the engine does there
    wanted = Wanted(options.context, options.concurrency, dtype, options.kv_cache_dtype, weights)
    try:
        report: dict[str, Any] = inspect(options.path, options.overlay, wanted, devices)
    except EngineError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    sys.stdout.write((json.dumps(report, indent=2) if options.json else render(report)) + "\n")


def _devices(count: int | None, memory: int | None) -> Devices:
    """As described; what is not, as found here."""
    found = torch.cuda.device_count()
    if memory is None:
        memory = (
            min(torch.cuda.mem_get_info(i)[1] for i in range(found))
            if found
            else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        )
    return Devices(count or found or 1, memory)


if __name__ == "__main__":
    main()
