"""The decorator of this package's kernels: `triton.jit`, with a type.

Under TRITON_INTERPRET=1 a kernel runs in NumPy on the CPU instead, which is how it is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

_COUNTS = ("num_rows", "bias_stride", "chunks", "programs", "num_groups")
"""Arguments that are numbers also where they are 1, and for whose values nothing is compiled anew."""


def kernel(function: Callable[..., Any]) -> Any:
    """`function` as a kernel, launched as `function[grid](...)`, or called by other kernels."""
    return triton.jit(function, do_not_specialize=_COUNTS)


def block(size: int) -> int:
    """The power of two that holds `size` numbers."""
    return 1 << max(size - 1, 0).bit_length()


def warps(numbers: int) -> int:
    """How many warps a program over so many numbers takes: 8 numbers a thread, up to 16 warps."""
    return min(max(block(numbers) // 256, 1), 16)
