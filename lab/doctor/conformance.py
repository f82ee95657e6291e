"""Runs conformance checks in processes of their own: a kernel that crashes or hangs is told, and nothing else suffers.

`python -P -m lab.doctor.conformance JSON` is such a process. It prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

SECONDS = 45.0
"""The most that a process may take. The first launch of a Triton kernel compiles it."""
GROUPS: dict[str, tuple[str, ...]] = {
    "rows": ("attention", "selection"),
    "scores": ("index scores (bf16)", "index scores (int8)", "index scores (fp8)"),
    "pointwise": ("norms", "gate", "adapter", "rotation and cache", "index keys", "index queries"),
    "sampling": ("sampling",),
}
"""Checks of Triton's kernels that one process makes. Each process compiles what it needs."""


class CheckJob(NamedTuple):
    """What one process checks.

    Attributes:
        backend: of `engine.kernels.choice.BACKENDS`
        device: where it computes
        group: for `triton`, one of `GROUPS`; empty for the others
    """

    backend: str
    device: str
    group: str = ""


@dataclass(frozen=True)
class Finding:
    """What became of one or several jobs of a backend on a device."""

    backend: str
    device: str
    checks: int  # how many passed
    seconds: float
    failures: tuple[str, ...]  # a sentence each

    @property
    def passed(self) -> bool:
        """Whether something was checked, and nothing failed."""
        return bool(self.checks) and not self.failures


def jobs_of(backend: str, device: str) -> list[CheckJob]:
    """The processes that check a backend on a device."""
    if backend == "triton":
        return [CheckJob(backend, device, group) for group in GROUPS]
    return [CheckJob(backend, device)]


def examine(
    jobs: Sequence[CheckJob], told: Callable[[CheckJob, Finding], None], seconds: float = SECONDS
) -> list[Finding]:
    """Run the jobs, as many at once as there are cores; return a verdict for each (backend, device).

    Args:
        jobs: what to check
        told: called, from any thread, when a job has ended
        seconds: the most that a job may take
    """

    def run(job: CheckJob) -> Finding:
        verdict = _run(job, seconds)
        told(job, verdict)
        return verdict

    with ThreadPoolExecutor(max(1, min(len(jobs), os.cpu_count() or 1))) as pool:
        found = list(pool.map(run, jobs))
    together: dict[tuple[str, str], list[Finding]] = {}
    for one in found:
        together.setdefault((one.backend, one.device), []).append(one)
    return [
        Finding(
            *place,
            checks=sum(one.checks for one in parts),
            seconds=max(one.seconds for one in parts),
            failures=tuple(failure for one in parts for failure in one.failures),
        )
        for place, parts in together.items()
    ]


def _run(job: CheckJob, seconds: float) -> Finding:
    began = time.monotonic()
    command = [sys.executable, "-P", "-m", "lab.doctor.conformance", json.dumps(job)]
    # The child finds this project where this process found it, even if that is a checkout.
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return _failed(job, began, f"the checks did not end within {seconds:.0f} s")
    try:
        said = json.loads(done.stdout.splitlines()[-1])
        checks, failures = int(said["checks"]), tuple(map(str, said["failures"]))
    except (IndexError, KeyError, TypeError, ValueError):
        return _failed(job, began, _end_of(done.returncode, done.stderr))
    return Finding(job.backend, job.device, checks, time.monotonic() - began, failures)


def _failed(job: CheckJob, began: float, why: str) -> Finding:
    where = f"{job.group}: " if job.group else ""
    return Finding(job.backend, job.device, 0, time.monotonic() - began, (where + why,))


def _end_of(code: int, errors: str) -> str:
    """Say how a process ended that has no result."""
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    lines = [line for line in errors.splitlines() if line.strip()]
    return f"the process ended with status {code}: {lines[-1] if lines else 'it said nothing'}"


Check = tuple[str, Callable[[], None]]


def check(job: CheckJob) -> dict[str, object]:
    """Make the checks of one job, in this process. The result is what the process prints."""
    import torch

    from lab.doctor.tiles import ConformanceError

    device = torch.device(job.device)
    checks = _row_checks(job.group, device) if job.backend == "triton" else _tile_checks(job.backend, device)
    passed, failures = 0, []
    for name, run in checks:
        try:
            run()
            passed += 1
        except ConformanceError as error:
            failures.append(f"{name}: {error}")
        except Exception as error:
            first = str(error).splitlines()
            failures.append(f"{name}: {type(error).__name__}: {first[0] if first else ''}")
    return {"checks": passed, "failures": failures}


def _tile_checks(backend: str, device: torch.device) -> list[Check]:
    from engine.kernels import native
    from engine.kernels.choice import load_backend
    from lab.doctor import tiles

    kernels = load_backend(backend)
    native.set_threads(
        min(2, os.cpu_count() or 1)
    )  # more than torch has here: threads share the work of a call
    checks: list[Check] = [("known answer", partial(known, kernels, device)) for known in tiles.KNOWN]
    if backend == "reference":
        return checks  # all others are compared with it
    checks += [
        (str(dtype).removeprefix("torch."), partial(one, kernels, tiles.TileCase(shape, dtype, dims), device))
        for dtype in tiles.TOLERANCE
        for shape, dims in tiles.CASES
        for one in (tiles.check_tile, tiles.check_latents, tiles.check_fp8)
    ]
    return checks


def _row_checks(group: str, device: torch.device) -> list[Check]:
    import torch

    from lab.doctor import pointwise, rows

    table = rows.CHECKS | pointwise.CHECKS
    return [(name, partial(table[name], device, torch.bfloat16)) for name in GROUPS[group]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the checks of the job that the command line has, and print the result."""
    (text,) = sys.argv[1:] if arguments is None else arguments
    sys.stdout.write(json.dumps(check(CheckJob(*json.loads(text)))) + "\n")


if __name__ == "__main__":
    main()
