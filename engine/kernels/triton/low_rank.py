"""The sparse adapter (`engine.layers.low_rank`): x A^T B^T, added to the rows that read a selection.

One launch: each program makes the short product of its rows again, which costs less than a second launch and the way
through memory. Rows come in blocks of 16 whatever their number, so a row's result does not depend on its company.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from engine.kernels.triton.kernel import block, kernel

_ROWS = 16
_OUTPUTS = 128


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Tensor) -> None:
    """y_t += (x_t A^T) B^T where rows[t], in place; other rows keep their bits.

    Sums in float32 (of float32 numbers without TF32), rounded where torch's operations round: the short product, the
    correction and y.

    Args:
        y: [T, out], a row's numbers contiguous
        x: [T, in], likewise, of the same dtype
        a: [r, in], r up to 256
        b: [out, r]
        rows: [T] bool, or any integers, 0 where it does not apply
    """
    if not len(y):
        return
    outputs, inputs = y.shape[1], x.shape[1]
    grid = (-(-len(y) // _ROWS), -(-outputs // _OUTPUTS))
    _add_low_rank[grid](
        y, x, a, b, rows, len(y), y.stride(0), x.stride(0),
        INPUTS=inputs, OUTPUTS=outputs, RANK=len(a), RANK_BLOCK=max(block(len(a)), 16),
        ROW_BLOCK=_ROWS, OUT_BLOCK=_OUTPUTS, IN_BLOCK=min(max(block(inputs), 16), 128 if x.dtype.itemsize < 4 else 32), num_warps=4, num_stages=3,
    )  # fmt: skip


@kernel
def _add_low_rank(
    y: tl.tensor,
    x: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    flags: tl.tensor,
    num_rows: tl.tensor,
    y_stride: tl.tensor,
    x_stride: tl.tensor,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
) -> None:
    """A program a block of rows and a block of outputs."""
    row = tl.program_id(0).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    applies = tl.load(flags + row, mask=row < num_rows, other=0) != 0
    if tl.max(applies.to(tl.int32), 0) != 0:
        out = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
        rank = tl.arange(0, RANK_BLOCK)
        short = tl.zeros([ROW_BLOCK, RANK_BLOCK], dtype=tl.float32)
        for start in range(0, INPUTS, IN_BLOCK):
            into = start + tl.arange(0, IN_BLOCK)
            own = tl.load(
                x + row[:, None] * x_stride + into[None, :],
                mask=applies[:, None] & (into < INPUTS)[None, :],
                other=0.0,
            )
            down = tl.load(
                a + rank[None, :] * INPUTS + into[:, None],
                mask=(rank < RANK)[None, :] & (into < INPUTS)[:, None],
                other=0.0,
            )
            short = tl.dot(own, down, short, input_precision="ieee")
        up = tl.load(
            b + out[None, :] * RANK + rank[:, None],
            mask=(rank < RANK)[:, None] & (out < OUTPUTS)[None, :],
            other=0.0,
        )
        change = tl.dot(short.to(up.dtype), up, input_precision="ieee").to(up.dtype)
        place = y + row[:, None] * y_stride + out[None, :]
        mask = applies[:, None] & (out < OUTPUTS)[None, :]
        before = tl.load(place, mask=mask, other=0.0)
        after = before.to(tl.float32) + change.to(tl.float32)
        tl.store(place, after.to(before.dtype), mask=mask)
