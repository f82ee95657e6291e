"""Selections as bits: which positions each row of a prompt selects, for attention that passes over the others' keys.

Where a context is few times as long as a selection, reading all of it once for a block of rows and leaving out what a row
did not select is cheaper than gathering each row's selection. The result is the same sum in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.kernel import kernel, overlap, turn
from engine.kernels.triton.order import keys_of, packed
from engine.kernels.triton.rows import Rows

_MOST_TIMES, _BASE, _TIMES = (
    10,
    1536,
    4,
)  # of `reach`: measured on an H200 for 256 and 2,048 selected positions
_MOST_TIMES_, _BASE_, _TIMES_ = tl.constexpr(_MOST_TIMES), tl.constexpr(_BASE), tl.constexpr(_TIMES)
_WORDS = 32  # a program
_BESIDE = 128  # rows of a block, at most


def reach(index_top_k: int) -> int:
    """Up to how many positions a row that selects so many attends through a mask; a longer one gathers.

    Gathering costs a row what it selects; a mask, what it could select.
    """
    return min(_MOST_TIMES * index_top_k, _BASE + _TIMES * index_top_k)


@triton.jit
def _reach(index_top_k: tl.tensor) -> tl.tensor:
    """`reach` on the device."""
    return tl.minimum(index_top_k * _MOST_TIMES_, index_top_k * _TIMES_ + _BASE_)


@triton.jit
def is_masked(position: tl.tensor, index_top_k: tl.tensor) -> tl.tensor:
    """Whether a sparse row of a prompt attends through a mask: a function of the row alone."""
    return (position < _reach(index_top_k)) & (index_top_k > 0)


def masks(scores: Tensor, rows: Rows, cuts: Tensor, width: int) -> Tensor:
    """The bits of the rows that `is_masked`.

    Args:
        scores: [T, C] float32, C a multiple of 64
        rows: the batch
        cuts: [T, 2] int32, from `engine.kernels.triton.select`
        width: no row's index_top_k is above it

    Returns:
        [T, W] int32, W enough for masked rows and those of a block with one; bit c % 32 of word c / 32 is position c's.
        Words beyond a row's own, and other rows', are not written
    """
    count, context = scores.shape
    words = min(context // 32, triton.cdiv(reach(width) + _BESIDE, 32 * _WORDS) * _WORDS)
    out = torch.empty(count, words, dtype=torch.int32, device=scores.device)
    if count:
        _mask_kernel[(count, triton.cdiv(words, _WORDS))](
            scores, rows.positions, rows.index_top_k, cuts, out, scores.stride(0), words, context,
            WORDS=_WORDS, num_warps=4, **overlap(),
        )  # fmt: skip
    return out


@kernel
def _mask_kernel(
    scores: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, cuts: tl.tensor, out: tl.tensor,
    scores_row: tl.tensor, words: tl.tensor, context: tl.tensor, WORDS: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Some words of one row."""
    turn(EARLY)
    t = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * WORDS
    position = tl.load(positions + t)
    chosen = tl.load(index_top_k + t)
    if (32 * first <= position) & is_masked(position, chosen):
        word = first + tl.arange(0, WORDS)
        at = 32 * first + tl.arange(0, 32 * WORDS)
        values = tl.load(scores + t * scores_row + at, mask=at < context, other=float("-inf"))
        keys = keys_of(values, at, position + 1)
        low = tl.load(cuts + 2 * t)
        from_here = tl.load(cuts + 2 * t + 1)
        hit = (keys > low) | ((keys == low) & (at >= from_here))
        tl.store(out + t * words + word, packed(hit, WORDS), mask=word < words)
