"""The decorator of this package's kernels: `triton.jit`, with a type.

Under TRITON_INTERPRET=1 a kernel runs in NumPy on the CPU instead, which is how it is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime._async_compile import active_mode
from triton.runtime.jit import JITFunction

_COUNTS = ("num_rows", "bias_stride", "chunks", "programs", "num_groups")
"""Arguments that are numbers also where they are 1, and for whose values nothing is compiled anew."""


class _Kernel(JITFunction[Any]):  # type: ignore[misc]
    """A kernel that `compiled_together` can compile without a launch."""

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        compile_only = active_mode.get() is not None
        return lambda *args, **kwargs: self.run(*args, grid=grid, warmup=compile_only, **kwargs)


def kernel(function: Callable[..., Any]) -> Any:
    """`function` as a kernel, launched as `function[grid](...)`, or called by other kernels."""
    if triton.knobs.runtime.interpret:
        return triton.jit(function, do_not_specialize=_COUNTS)
    return _Kernel(function, do_not_specialize=_COUNTS)


@contextmanager
def compiled_together(threads: int) -> Iterator[None]:
    """Inside, nothing is launched: what launches would need is compiled by so many threads, and is ready at the end."""
    with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool):
        yield


def block(size: int) -> int:
    """The power of two that holds `size` numbers."""
    return 1 << max(size - 1, 0).bit_length()


def warps(numbers: int) -> int:
    """How many warps a program over so many numbers takes: 8 numbers a thread, up to 16 warps."""
    return min(max(block(numbers) // 256, 1), 16)


OVERLAP = True
"""Whether launches overlap where the device can; a benchmark turns it off to compare."""


def overlap() -> dict[str, bool]:
    """Options of a launch whose kernel calls `turn(EARLY)` before it reads or writes memory.

    A device of NVIDIA's from Hopper on then makes its programs ready while the kernel before it still computes
    (programmatic dependent launch).
    """
    return {"EARLY": True, "launch_pdl": True} if OVERLAP and _overlaps() else {"EARLY": False}


@cache
def _overlaps() -> bool:
    interpreted = triton.knobs.runtime.interpret
    return (
        not interpreted
        and torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (9, 0)
    )


@triton.jit
def turn(EARLY: tl.constexpr) -> None:
    """Let the next kernel make itself ready, and wait until those before have ended and their writes are seen."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
