"""The paged cache itself: one allocation, and named planes over its pages.

A page holds, for its 64 tokens and every layer, everything that attention will want of them: keys,
values and index keys. So a page is written, shared, evicted and copied as one piece, and its KV can
never be separated from its index keys (parting them is how DSA servers get silent wrong answers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import PAGE_SIZE
from engine.memory.arena import zeros

_ALIGNMENT = 64  # bytes: each plane of a page starts on a cache line


@dataclass(frozen=True)
class PlaneSpec:
    """What one layer stores of one token under `name`: a tensor of `shape` and `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layers: frozenset[int] | None = None  # the layers that have it; None is all

    def on(self, layer: int) -> bool:
        """Whether a layer has this plane."""
        return self.layers is None or layer in self.layers

    @property
    def token_bytes(self) -> int:
        """Bytes a token a layer."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page's part of this plane in one layer, padded to the alignment."""
        return -(-self.token_bytes * PAGE_SIZE // _ALIGNMENT) * _ALIGNMENT


def page_bytes(specs: Sequence[PlaneSpec], num_layers: int) -> int:
    """Bytes of a whole page, over all planes and layers."""
    return sum(spec.page_bytes for layer in range(num_layers) for spec in specs if spec.on(layer))


def _zeros(size: int, device: torch.device) -> Tensor:
    """[size] bytes.

    Zeros and not garbage: a masked position's value is multiplied by a weight of 0, and 0 * NaN is NaN. On the CPU they
    are the system's, which gives a page memory when it is first written: a cache costs what is in use.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=torch.uint8, device=device)
    return zeros(size)


class PagedCache:
    """`num_pages` pages in one allocation; `plane(layer, name)` is a view of them all.

    A plane's pages lie together: a request's pages are taken in runs, and what a layer reads of them then comes from few
    places of memory. (With all planes of a page together, the native kernels waited for memory twice as long.)
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
        """[num_pages, 64, *shape], a view: writing to it writes the cache."""
        return self._planes[layer, name]

    def write(self, layer: int, name: str, pages: Tensor, offsets: Tensor, values: Tensor) -> None:
        """Store row t of `values` [T, *shape] at (pages[t], offsets[t]) [T] int64."""
        self._planes[layer, name][pages, offsets] = values

    def wipe(self, pages: Sequence[int]) -> None:
        """Zero whole pages, all planes and layers of them."""
        for region in self._regions:
            region[list(pages)] = 0

    def repeat(self, count: int) -> None:
        """Make every page after the first `count` a copy of one of those, for measurements over a full cache."""
        for first in range(count, self.num_pages, count):
            pages = min(count, self.num_pages - first)
            for region in self._regions:
                region[first : first + pages] = region[:pages]
