"""FP8 numbers with shared scales: what a block is, and how it becomes plain numbers again.

Two granularities, both of DeepSeek-V3 (arXiv 2412.19437, section 3.3.2): a weight has one scale for each
128 x 128 block, an activation or cached vector one for each 128 consecutive numbers of a row. A scale is
what to multiply with (`weight_scale_inv` in checkpoints). Edge blocks are smaller; theirs count all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import EngineError

BLOCK = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # the largest finite number; there are no infinities, and 0x7f and 0xff are NaN


def num_blocks(size: int, block: int = BLOCK) -> int:
    """Blocks along a dimension, the one at the edge included."""
    return -(-size // block)


@dataclass(frozen=True)
class BlockWeight:
    """A weight that stays in FP8: [out, in] numbers, or [n, out, in] of n weights of one shape."""

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
        """Of the weight that it stands for."""
        return self.values.shape

    @property
    def num_bytes(self) -> int:
        """In memory, scales included."""
        return self.values.nbytes + self.scales.nbytes

    def __getitem__(self, index: Tensor | int) -> BlockWeight:
        """One or some of n weights: [n, out, in] -> [out, in] or [m, out, in]."""
        return BlockWeight(self.values.view(torch.uint8)[index].view(E4M3), self.scales[index])

    def numel(self) -> int:
        """Numbers, scales not counted."""
        return self.values.numel()

    def view(self, *shape: int) -> BlockWeight:
        """[n * out, in] as [n, out, in], n weights that lie one below the other; `shape` as `Tensor.view` has it.

        Raises:
            EngineError: a block would belong to two of them.
        """
        values = self.values.view(*shape)
        if values.shape[-1] != self.shape[-1] or values.shape[-2] % BLOCK:
            raise EngineError(f"{list(self.shape)} in blocks of {BLOCK} cannot be viewed as {list(shape)}")
        return BlockWeight(
            values, self.scales.view(*values.shape[:-2], values.shape[-2] // BLOCK, self.scales.shape[-1])
        )

    def rows(self, start: int, stop: int) -> BlockWeight:
        """Outputs `start` to `stop - 1` of every weight, whole blocks; a view.

        Raises:
            EngineError: it would cut a block.
        """
        first, last = _span(start, stop, self.shape[-2])
        return BlockWeight(self.values[..., start:stop, :], self.scales[..., first:last, :])

    def columns(self, start: int, stop: int) -> BlockWeight:
        """Inputs `start` to `stop - 1` of every weight, whole blocks; a view; errors as `rows`."""
        first, last = _span(start, stop, self.shape[-1])
        return BlockWeight(self.values[..., start:stop], self.scales[..., first:last])

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The plain weight, see `dequantise_blocks`."""
        return dequantise_blocks(self.values, self.scales, dtype)


def _span(start: int, stop: int, size: int) -> tuple[int, int]:
    """The blocks of numbers `start` to `stop - 1` of `size`: (first, one after the last)."""
    if not 0 <= start < stop <= size or start % BLOCK or (stop % BLOCK and stop != size):
        raise EngineError(f"{start} to {stop} of {size} numbers are not whole blocks of {BLOCK}")
    return start // BLOCK, num_blocks(stop)


def dequantise_blocks(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """w[i, j] = values[i, j] * scales[i // 128, j // 128], rounded once, to `dtype`.

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
    """x[..., j] = values[..., j] * scales[..., j // block], rounded once, to `dtype`.

    Args:
        values: [..., n] float8_e4m3fn
        scales: [..., ceil(n / block)] float32

    Returns:
        [..., n]
    """
    return product(values, scales.repeat_interleave(block, dim=-1)[..., : values.shape[-1]], dtype)


def product(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scales, correctly rounded to `dtype` (float32 or bfloat16).

    The exact product has up to 4 + 24 significant bits. Rounded to float32 and from there to bfloat16 it
    would be rounded twice, which errs where the first step lands in the middle between two bfloat16
    numbers. So what landed there is moved off the middle, to the side where the exact product lies.
    Scales that are powers of two never need it.
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
