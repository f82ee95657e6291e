"""What tests of every folder use."""

from __future__ import annotations

import ctypes
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout."""


def gpus() -> int:
    """How many GPUs NVIDIA's driver gives this process; torch, which would say it too, is not imported."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    ready = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if ready else 0
