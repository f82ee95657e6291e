"""The sparse adapter (`engine.layers.low_rank`): x A^T B^T, added to the rows that read a selection.

A's rows stand below those of the weight that x is multiplied with anyway, so the short product s = x A^T is there already.
What is left is s B^T: a launch of its own, as the matrix unit's bits are not those of sums that another kernel could do
row by row.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from engine.kernels.triton.kernel import block, kernel, overlap, turn

_ROWS = 16
_OUTPUTS = 128


class Correction(NamedTuple):
    """s B^T of the rows that it applies to.

    Attributes:
        short: [T, r], a row's numbers contiguous
        up: [out, r] contiguous, B
        rows: [T] bool, or any integers, 0 where it does not apply
    """

    short: Tensor
    up: Tensor
    rows: Tensor


def add_low_rank(y: Tensor, fix: Correction) -> None:
    """y_t += s_t B^T where rows[t], in place; other rows keep their bits.

    Sums in float32 (of float32 numbers without TF32), rounded where torch's operations round: the correction and y. Rows
    come in blocks of 16 whatever their number, so a row's result does not depend on its company.

    Args:
        y: [T, out], a row's numbers contiguous
        fix: of the same dtype, r up to 256
    """
    if not len(y):
        return
    outputs, rank = fix.up.shape
    grid = (-(-len(y) // _ROWS), -(-outputs // _OUTPUTS))
    _add_low_rank[grid](
        y, fix.short, fix.up, fix.rows, len(y), y.stride(0), fix.short.stride(0),
        OUTPUTS=outputs, RANK=rank, RANK_BLOCK=max(block(rank), 16), ROW_BLOCK=_ROWS, OUT_BLOCK=_OUTPUTS, num_warps=4, **overlap(),
    )  # fmt: skip


@kernel
def _add_low_rank(
    y: tl.tensor,
    short: tl.tensor,
    up: tl.tensor,
    flags: tl.tensor,
    num_rows: tl.tensor,
    y_stride: tl.tensor,
    short_stride: tl.tensor,
    OUTPUTS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a block of rows and a block of outputs."""
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    applies = tl.load(flags + row, mask=row < num_rows, other=0) != 0
    if tl.max(applies.to(tl.int32), 0) != 0:
        out = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
        rank = tl.arange(0, RANK_BLOCK)
        own = tl.load(
            short + row[:, None] * short_stride + rank[None, :],
            mask=applies[:, None] & (rank < RANK)[None, :],
            other=0.0,
        )
        wide = tl.load(
            up + out[None, :] * RANK + rank[:, None],
            mask=(rank < RANK)[:, None] & (out < OUTPUTS)[None, :],
            other=0.0,
        )
        change = tl.dot(own, wide, input_precision="ieee").to(wide.dtype)
        place = y + row[:, None] * y_stride + out[None, :]
        mask = applies[:, None] & (out < OUTPUTS)[None, :]
        before = tl.load(place, mask=mask, other=0.0)
        after = before.to(tl.float32) + change.to(tl.float32)
        tl.store(place, after.to(before.dtype), mask=mask)
