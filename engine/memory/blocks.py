"""FP8 numbers with shared scales: what a block is, and how blocks become plain numbers. The kernels make FP8 numbers.

DeepSeek-V3 (arXiv 2412.19437, section 3.3.2) has two sizes of block: a weight has one scale for each 128 x 128 block,
and an activation or cached vector has one for each 128 consecutive numbers of a row. Numbers are multiplied with
their scale (`weight_scale_inv` in checkpoints). Blocks at the edge may be smaller; they have a scale, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from engine.errors import EngineError

BLOCK = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # the largest number; there are no infinities, and 0x7f and 0xff are NaN


def num_blocks(size: int, block: int = BLOCK) -> int:
    """How many blocks a dimension of `size` numbers has, the one at the edge included."""
    return -(-size // block)


@dataclass(frozen=True)
class BlockWeight:
    """A weight that stays in FP8: [out, in], or [n, out, in] for n weights of one shape."""

    values: Tensor  # [..., out, in] float8_e4m3fn
    scales: Tensor  # [..., ceil(out / 128), ceil(in / 128)] float32

    def __post_init__(self) -> None:
        wanted = (
            *self.values.shape[:-2],
            num_blocks(self.values.shape[-2]),
            num_blocks(self.values.shape[-1]),
        )
        if tuple(self.scales.shape) != wanted:
            raise EngineError(
                f"a weight of shape {list(self.values.shape)} has scales of shape {list(self.scales.shape)}, "
                f"but its blocks are {list(wanted)}"
            )

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight: that of `values`."""
        return self.values.shape

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, scales included."""
        return self.values.nbytes + self.scales.nbytes

    def __getitem__(self, index: Tensor | int) -> BlockWeight:
        """Return one or some of n weights: [n, out, in] -> [out, in] or [m, out, in]."""
        return BlockWeight(self.values.view(torch.uint8)[index].view(E4M3), self.scales[index])

    def numel(self) -> int:
        """How many numbers the weight has, without the scales."""
        return self.values.numel()

    def view(self, *shape: int) -> BlockWeight:
        """View [n * out, in] as [n, out, in]. `shape` is that of `Tensor.view`.

        Raises:
            EngineError: a block would belong to two weights.
        """
        values = self.values.view(*shape)
        if values.shape[-1] != self.shape[-1] or values.shape[-2] % BLOCK:
            raise EngineError(f"{list(self.shape)} in blocks of {BLOCK} cannot be viewed as {list(shape)}")
        return BlockWeight(
            values, self.scales.view(*values.shape[:-2], values.shape[-2] // BLOCK, self.scales.shape[-1])
        )

    def rows(self, start: int, stop: int) -> BlockWeight:
        """Return a view of outputs `start` to `stop - 1` of every weight.

        Raises:
            EngineError: it would cut a block.
        """
        first, last = _span(start, stop, self.shape[-2])
        return BlockWeight(self.values[..., start:stop, :], self.scales[..., first:last, :])

    def columns(self, start: int, stop: int) -> BlockWeight:
        """Return a view of inputs `start` to `stop - 1` of every weight.

        Raises:
            EngineError: it would cut a block.
        """
        first, last = _span(start, stop, self.shape[-1])
        return BlockWeight(self.values[..., start:stop], self.scales[..., first:last])

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return the plain weight, by `dequantise_blocks`."""
        return dequantise_blocks(self.values, self.scales, dtype)


def _span(start: int, stop: int, size: int) -> tuple[int, int]:
    """Return the blocks of numbers `start` to `stop - 1` out of `size`, as (first, one after the last)."""
    if not 0 <= start < stop <= size or start % BLOCK or (stop % BLOCK and stop != size):
        raise EngineError(f"{start} to {stop} of {size} numbers are not whole blocks of {BLOCK}")
    return start // BLOCK, num_blocks(stop)


def dequantise_blocks(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute w[i, j] = values[i, j] * scales[i // 128, j // 128], rounded once, to `dtype`.

    Args:
        values: [..., out, in] float8_e4m3fn
        scales: [..., ceil(out / 128), ceil(in / 128)] float32
        dtype: float32 or bfloat16

    Returns:
        [..., out, in]
    """
    rows, columns = values.shape[-2:]
    spread = scales.repeat_interleave(BLOCK, dim=-1)[..., :columns]
    spread = spread.repeat_interleave(BLOCK, dim=-2)[..., :rows, :]
    return product(values, spread, dtype)


def dequantise_rows(values: Tensor, scales: Tensor, dtype: torch.dtype, block: int = BLOCK) -> Tensor:
    """Compute x[..., j] = values[..., j] * scales[..., j // block], rounded once, to `dtype`.

    Args:
        values: [..., n] float8_e4m3fn
        scales: [..., ceil(n / block)] float32
        dtype: float32 or bfloat16
        block: consecutive numbers that share a scale

    Returns:
        [..., n]
    """
    return product(values, scales.repeat_interleave(block, dim=-1)[..., : values.shape[-1]], dtype)


def product(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute values * scales, correctly rounded to `dtype` (float32 or bfloat16).

    The exact product has up to 4 + 24 significant bits. A product that is rounded to float32 and then to bfloat16 is
    rounded twice. That is wrong if the float32 number lies in the middle between two bfloat16 numbers. So such a number
    is moved off the middle, to the side of the exact product. Scales that are powers of two never need this.
    """
    rounded = values.float() * scales
    if dtype is not torch.bfloat16:
        return rounded.to(dtype)
    middle = (rounded.view(torch.int32) & 0xFFFF) == 0x8000
    if bool(middle.any()):
        at = rounded[middle]
        exact = values[middle].double() * scales.expand_as(rounded)[middle].double()
        side = torch.sign(exact - at.double()).float() * torch.inf  # NaN where the product was exact
        rounded[middle] = torch.where(side.isnan(), at, torch.nextafter(at, side))
    return rounded.bfloat16()


Matrix: TypeAlias = Tensor | BlockWeight
"""[out, in], or [n, out, in] for n weights of one shape; plain or in FP8 blocks."""
