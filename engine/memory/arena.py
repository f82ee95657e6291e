"""CPU memory in the system's huge pages, for weights and caches.

A processor that streams through small pages must look up the address of each one. On a virtual machine, weights in
huge pages were read twice as fast.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_HUGE = 2 << 20
_LINE = 64


def zeros(num_bytes: int) -> Tensor:
    """Return [num_bytes] uint8 of zeros on the CPU. A page takes memory when it is first written."""
    # Huge pages begin at multiples of their size, so the memory must, too.
    region = mmap.mmap(-1, num_bytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # without huge pages, small pages work as well
        region.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + num_bytes]


class Arena:
    """Memory for many tensors, made by `zeros`. Each tensor begins on a cache line."""

    def __init__(self, sizes: list[int]) -> None:
        """Reserve memory for tensors of `sizes` bytes."""
        self._left = zeros(sum(-(-size // _LINE) * _LINE for size in sizes))

    def take(self, size: int) -> Tensor:
        """Return the memory of the next tensor: [size] uint8."""
        taken = self._left[:size]
        self._left = self._left[-(-size // _LINE) * _LINE :]
        return taken
