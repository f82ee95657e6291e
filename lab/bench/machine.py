"""Describes the machine that the figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

_PACKAGES = ("dsa-serve", "torch", "httpx", "numpy")


def describe() -> dict[str, Any]:
    """Return processor, cores, memory, system, versions and the load averages."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": list(os.getloadavg()),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # this project, run from a folder with its sources
        return None


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process has used so far, with all its threads; Linux only.

    Raises:
        OSError: there is no such process.
    """
    return time.clock_gettime((~pid << 3) | 2)  # how Linux names the CPU clock of another process


def children(pid: int) -> list[int]:
    """Return the processes that the main thread of a process has started; Linux only.

    Raises:
        OSError: there is no such process.
    """
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
