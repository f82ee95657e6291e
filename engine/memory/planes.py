"""The paged cache: one allocation, and named planes over its pages. `engine.plan.pages` decides who holds a page.

A page holds, for its 64 tokens and every layer, everything that attention reads of them: keys, values and index keys.
So these are written, shared and evicted together, and KV is never separated from its index keys. (Servers with DSA
that separate them give wrong answers without an error.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import PAGE_SIZE
from engine.memory.arena import zeros

_ALIGNMENT = 64  # bytes: a page's part of a plane starts on a cache line


@dataclass(frozen=True)
class PlaneSpec:
    """What one layer stores for one token under `name`: a tensor of `shape` and `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layers: frozenset[int] | None = None  # the layers that have the plane; None: all

    def on(self, layer: int) -> bool:
        """Whether `layer` has this plane."""
        return self.layers is None or layer in self.layers

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page's part of this plane in one layer, padded to the alignment."""
        return -(-self.token_bytes * PAGE_SIZE // _ALIGNMENT) * _ALIGNMENT


def page_bytes(specs: Sequence[PlaneSpec], num_layers: int) -> int:
    """Bytes of a whole page, over all planes and layers."""
    return sum(spec.page_bytes for layer in range(num_layers) for spec in specs if spec.on(layer))


def _zeros(size: int, device: torch.device) -> Tensor:
    """Return [size] uint8 of zeros.

    A masked position's value is multiplied by a weight of 0, and 0 * NaN is NaN, so memory must not start as garbage.
    On the CPU a page takes memory when it is first written, so a cache takes only what is in use.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=torch.uint8, device=device)
    return zeros(size)


class PagedCache:
    """`num_pages` pages in one allocation; `plane(layer, name)` is a view of one plane of all pages.

    All pages of one plane lie together. A request takes pages in runs, so a layer reads them from few places of memory.
    (When all planes of one page lay together, the native kernels waited for memory twice as long.)
    """

    def __init__(
        self, num_pages: int, specs: Sequence[PlaneSpec], num_layers: int, device: torch.device
    ) -> None:
        self.num_pages = num_pages
        self.page_bytes = page_bytes(specs, num_layers)
        storage = _zeros(num_pages * self.page_bytes, device)
        self._regions: list[Tensor] = []  # [num_pages, bytes of a page in one plane] uint8 each
        self._planes: dict[tuple[int, str], Tensor] = {}
        offset = 0
        for layer in range(num_layers):
            for spec in specs:
                if not spec.on(layer):
                    continue
                size, used = spec.page_bytes, spec.token_bytes * PAGE_SIZE
                region = storage[offset : offset + num_pages * size].view(num_pages, size)
                flat = region[:, :used].view(spec.dtype)
                self._regions.append(region)
                self._planes[layer, spec.name] = flat.view(num_pages, PAGE_SIZE, *spec.shape)
                offset += num_pages * size

    def plane(self, layer: int, name: str) -> Tensor:
        """Return a plane of all pages: [num_pages, 64, *shape], a view. Writing to it writes the cache."""
        return self._planes[layer, name]

    def write(self, layer: int, name: str, pages: Tensor, offsets: Tensor, values: Tensor) -> None:
        """Store row t of `values` [T, *shape] at (pages[t], offsets[t]) [T] int64."""
        self._planes[layer, name][pages, offsets] = values

    def wipe(self, pages: Sequence[int]) -> None:
        """Zero whole pages, in all planes and layers."""
        for region in self._regions:
            region[list(pages)] = 0

    def repeat(self, count: int) -> None:
        """Copy the first `count` pages to all later pages, again and again, to measure with a full cache."""
        for first in range(count, self.num_pages, count):
            pages = min(count, self.num_pages - first)
            for region in self._regions:
                region[first : first + pages] = region[:pages]
