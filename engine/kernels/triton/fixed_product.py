"""Products whose rows have the same bits in any company: y = x W^T, for `batch_invariant`.

A library takes another kernel for another number of rows, and cuts K in parts if there are few. Here each output is one sum
over K in order, in steps of one size, with the outputs as the height of the matrix unit's product, 64 a warp group, whatever
the number of rows is. That only decides how many rows a program has. Whether the bits are then equal is for the device to
say: `row_blocks` asks it (so does `engine.kernels.triton.product`).
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.kernel import kernel, overlap, turn

ROW_BLOCKS = (16, 64, 128)
"""Rows of a program, by the number of rows."""
ONE = (64,)
"""The same where a device gives other bits with other numbers of rows."""
_WIDE_ROWS = 128
"""With so many rows a program has twice as many outputs and warps: they read x and W less often."""


def row_blocks(weight: Tensor) -> tuple[int, ...]:
    """`ROW_BLOCKS` if a device's products have the same bits with each of them, by some random rows; else `ONE`.

    Args:
        weight: [out, in] contiguous, of a model
    """
    generator = torch.Generator(weight.device).manual_seed(0)
    size = (ROW_BLOCKS[-1], weight.shape[1])
    drawn = torch.randn(size, generator=generator, device=weight.device)
    spread = torch.randn(size, generator=generator, device=weight.device).mul(2).exp()
    spread[::2] = 1  # every second row has numbers of many sizes, as a model's may
    x = (drawn * spread).to(weight.dtype)
    wanted = fixed_linear(x, weight, blocks=ROW_BLOCKS[-1:])
    for block in ROW_BLOCKS[:-1]:
        if not torch.equal(fixed_linear(x, weight, blocks=(block,)), wanted):
            return ONE
    return ROW_BLOCKS


def fixed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    blocks: tuple[int, ...] = ONE,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + bias, in float32, rounded once.

    Args:
        x: [T, in], a row's numbers contiguous
        weight: [out, in] contiguous, of the dtype of x
        bias: [out]
        blocks: what `row_blocks` gave
        dtype: of the result; None: that of x

    Returns:
        [T, out]
    """
    rows, inputs = x.shape
    outputs = len(weight)
    y = torch.empty(rows, outputs, dtype=dtype or x.dtype, device=x.device)
    if not rows:
        return y
    row_block = next((block for block in blocks if block >= rows), blocks[-1])
    wide = row_block >= _WIDE_ROWS
    out_block = 128 if wide else 64
    exact = x.dtype == torch.float32
    _fixed_linear[(-(-outputs // out_block), -(-rows // row_block))](
        x, weight, weight if bias is None else bias, y, rows, x.stride(0),
        INPUTS=inputs, OUTPUTS=outputs, ROW_BLOCK=row_block, OUT_BLOCK=out_block, STEP=32 if exact else 64,
        BIAS=bias is not None, num_warps=8 if wide else 4, num_stages=2 if exact else 4, **overlap(),
    )  # fmt: skip
    return y


@kernel
def _fixed_linear(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, y: tl.tensor, num_rows: tl.tensor, x_row: tl.tensor,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ROW_BLOCK: tl.constexpr, OUT_BLOCK: tl.constexpr, STEP: tl.constexpr,
    BIAS: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """A program some outputs and some rows."""
    turn(EARLY)
    out = tl.program_id(0) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    row = tl.program_id(1).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    known, inside = out < OUTPUTS, row < num_rows
    k = tl.arange(0, STEP)
    tile_at = weight + out.to(tl.int64)[:, None] * INPUTS + k[None, :]
    own_at = x + row[:, None] * x_row + k[None, :]
    sums = tl.zeros([OUT_BLOCK, ROW_BLOCK], dtype=tl.float32)
    for step in tl.range(0, INPUTS, STEP):
        there = (step + k < INPUTS)[None, :]
        tile = tl.load(tile_at + step, mask=known[:, None] & there, other=0.0)
        own = tl.load(own_at + step, mask=inside[:, None] & there, other=0.0)
        sums = tl.dot(tile, tl.trans(own), sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias + out, mask=known, other=0.0).to(tl.float32)[:, None]
    place = y + row[None, :] * OUTPUTS + out[:, None]
    tl.store(place, sums.to(y.dtype.element_ty), mask=inside[None, :] & known[:, None])
