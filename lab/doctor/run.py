"""Examines this machine: what it has, which backends pass, how fast it is, what is missing.

`python -P -m lab.doctor.run FILE` writes it as JSON. It needs no package of the command line, which `dsa doctor` does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError
from engine.kernels import native
from engine.kernels.choice import choose_backend
from engine.step.build import resolve_device, resolve_dtype
from lab.doctor.conformance import CheckJob, Finding, examine, jobs_of
from lab.doctor.machine import advice, describe
from lab.doctor.rates import rates


def examination(
    show: Callable[[str, int, int], None], *, conformance: bool = True, measured: bool = True
) -> dict[str, Any]:
    """Examine this machine.

    Args:
        show: gets the progress: a stage, how much of it is done, of how much
        conformance: whether to check kernels
        measured: whether to measure rates

    Returns:
        machine: see `lab.doctor.machine.describe`.
        chosen: device, dtype and backend that `dsa serve` would choose.
        conformance: a verdict for each backend and device.
        rates: for each device, see `lab.doctor.rates.rates`.
        advice: sentences about what is missing.
        passed: whether what `dsa serve` would use passes; None without `conformance`.
        seconds: how long this took.
    """
    began = time.monotonic()
    machine = describe()
    chosen = choice()
    jobs = plan(machine) if conformance else []
    show("checking kernels", 0, len(jobs))
    ended: list[CheckJob] = []

    def told(job: CheckJob, verdict: Finding) -> None:
        ended.append(job)
        show("checking kernels", len(ended), len(jobs))

    verdicts = examine(jobs, told)
    devices = ["cpu", *(device["device"] for device in machine["gpu"]["devices"])] if measured else []
    found: dict[str, dict[str, float]] = {}
    for number, device in enumerate(devices):
        show("measuring rates", number, len(devices))
        found[device] = rates(torch.device(device))
    show("measuring rates", len(devices), len(devices))
    return {
        "machine": machine,
        "chosen": chosen,
        "conformance": [asdict(one) | {"passed": one.passed} for one in verdicts],
        "rates": found,
        "advice": advice(machine),
        "passed": healthy(chosen, verdicts) if conformance else None,
        "seconds": time.monotonic() - began,
    }


def choice() -> dict[str, str]:
    """What `dsa serve` would choose here, for a llama model, if no flag says otherwise."""
    device = resolve_device("auto")
    dtype = str(resolve_dtype("auto", device, compiled=True)).removeprefix("torch.")
    return {"device": str(device), "dtype": dtype, "backend": choose_backend("auto", device).name}


def plan(machine: dict[str, Any]) -> list[CheckJob]:
    """The jobs for every backend that can run here: on the CPU, and on one GPU of each kind."""
    jobs = [*jobs_of("reference", "cpu"), *jobs_of("torch", "cpu")]
    if native.missing() is None:
        jobs += jobs_of("native", "cpu")
    kinds: dict[str, str] = {}
    for device in machine["gpu"]["devices"]:
        kinds.setdefault(device["name"], device["device"])
    for device in kinds.values():
        jobs += jobs_of("torch", device)
        if machine["gpu"]["triton_missing"] is None:
            jobs += jobs_of("triton", device)
    return jobs


def healthy(chosen: dict[str, str], verdicts: Sequence[Finding]) -> bool:
    """Whether the chosen backend passed. Beside Triton's rows torch computes the models that have no such step.

    Raises:
        ConfigError: the chosen backend was not checked.
    """
    needed = {chosen["backend"]} | ({"torch"} if chosen["backend"] == "triton" else set())
    place = torch.device(chosen["device"]).type
    own = [one for one in verdicts if one.backend in needed and torch.device(one.device).type == place]
    if {one.backend for one in own} != needed:
        raise ConfigError(f"the backend {chosen['backend']} was not checked on {chosen['device']}")
    return all(one.passed for one in own)


def main(arguments: Sequence[str]) -> int:
    """Write an examination into the file that is named; return the exit status of `dsa doctor`."""
    found = examination(lambda stage, done, total: print(stage, done, "of", total, flush=True))  # noqa: T201
    Path(arguments[0]).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return int(found["passed"] is False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
