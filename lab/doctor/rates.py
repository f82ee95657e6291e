"""Measures how fast a device moves and multiplies numbers. Rates are of the best of several runs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

SECONDS = 0.4
"""About the time that a rate is measured for."""
_GPU_BYTES = 1 << 31
_CPU_BYTES = 1 << 28
_GPU_SIZE, _CPU_SIZE = 8192, 1024


def rates(device: torch.device) -> dict[str, float]:
    """Measure a device.

    Args:
        device: the CPU, or a CUDA device

    Returns:
        bytes or operations a second. `copy`: bytes read and written together; `read`: bytes that a sum reads;
        `bf16`, `fp8`, `float32`: operations of a matrix product, two for each multiplication. `fp8` is missing where
        the device or torch has no such product; on a GPU `float32` is not measured.
    """
    size = _CPU_SIZE
    num_bytes = _CPU_BYTES
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        size = _GPU_SIZE if free > 4 << 30 else 2048
        num_bytes = min(_GPU_BYTES, free // 8)
    found = _moved(device, num_bytes)
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        name = {torch.bfloat16: "bf16", torch.float32: "float32"}[dtype]
        found[name] = _multiplied(device, size, dtype)
    if (fp8 := _multiplied_fp8(device, size)) is not None:
        found["fp8"] = fp8
    return found


def _moved(device: torch.device, num_bytes: int) -> dict[str, float]:
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return {
        "copy": 2 * source.nbytes / _best(lambda: target.copy_(source), device),
        "read": source.nbytes / _best(lambda: source.sum(), device),
    }


def _multiplied(device: torch.device, size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / _best(lambda: torch.mm(a, b.T, out=out), device)


def _multiplied_fp8(device: torch.device, size: int) -> float | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return None
    one = torch.ones((), device=device)
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))

    def product() -> Tensor:
        return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)

    try:
        return 2.0 * size**3 / _best(product, device)
    except (RuntimeError, TypeError, ValueError):  # a build of torch without it
        return None


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call."""
    call()
    _finish(device)
    best = float("inf")
    until = time.perf_counter() + SECONDS
    for _ in range(200):
        began = time.perf_counter()
        call()
        _finish(device)
        now = time.perf_counter()
        best = min(best, now - began)
        if now > until:
            break
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
