"""Which part of the model a rank holds, and how ranks sum their results. Knows neither processes nor networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.checkpoint.part import Slice

if TYPE_CHECKING:
    from torch import Tensor


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Ranks:
    """This process among those that compute one model together (tensor parallelism, arXiv 1909.08053).

    Attributes:
        rank: 0 to count - 1; 0 is the engine process
        count: how many ranks there are
        sum: this rank's tensor -> the sum of all ranks' tensors, the same to the last bit on every rank
    """

    rank: int = 0
    count: int = 1
    sum: Callable[[Tensor], Tensor] = _as_it_is

    def share(self, size: int) -> range:
        """This rank's part of the indices 0 to `size` - 1, split evenly in order; `count` must divide `size`."""
        each = size // self.count
        return range(self.rank * each, (self.rank + 1) * each)

    def part(self, dim: int, size: int) -> Slice | None:
        """This rank's part of a tensor with length `size` along `dim`; None is the whole tensor."""
        if self.count == 1:
            return None
        share = self.share(size)
        return Slice(dim, share.start, share.stop)


ALONE = Ranks()
"""A model on one device."""
