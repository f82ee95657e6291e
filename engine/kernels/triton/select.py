"""The exact top-k of each row in a total order: the higher score first, and of equal scores the later position.

A score becomes an integer of 32 bits in the same order (-0 as +0), and the k-th largest of a row is found by halving the
range of those integers and counting; what ties with it is decided by position. So the selected set is a function of the
row alone, and it comes in ascending order of position, so that whatever sums over it is one, too.

Rows up to `ONE_PROGRAM` are held in one program's registers. Longer ones take three launches: a sample of the row gives a
threshold that is safely low, a pass over the row keeps the candidates above it, stretch by stretch, and the halving runs
over these. A bad guess is seen from the count of candidates, and costs time only: the halving then reads the whole row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.rows import Rows

ONE_PROGRAM = 16384
"""The longest context that one program holds."""

_LEAST = tl.constexpr(-(2**31))


def select(scores: Tensor, rows: Rows, width: int) -> Tensor:
    """Positions of the `index_top_k` best scores of each row; of what lies beyond a row's end nothing is read.

    Args:
        scores: [T, C] float32; -inf is never selected
        rows: the batch; dense rows and padding select nothing
        width: no row's index_top_k is above it

    Returns:
        [T, K = width] int32, ascending, -1 after a row's last
    """
    count, context = scores.shape
    out = torch.empty(count, width, dtype=torch.int32, device=scores.device)
    if not count or not width:
        return out
    block = min(max(triton.next_power_of_2(context), 128), ONE_PROGRAM)
    tail = min(triton.next_power_of_2(width), 1024)
    _whole_kernel[(count,)](
        scores, rows.positions, rows.index_top_k, out, scores.stride(0), context, width,
        BLOCK=block, HELD=context <= block, TAIL=tail, num_warps=_warps(block),
    )  # fmt: skip
    return out


def _warps(block: int) -> int:
    """16 to 32 numbers a thread."""
    return min(max(block // 1024, 1), 16)


@triton.jit
def _ordered(scores: tl.tensor):
    """float32 -> int32 in the same order, and -inf lowest but one: the lowest of all is free for what is not there."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _keys(row: tl.tensor, at: tl.tensor, end: tl.tensor):
    """Keys of the positions `at`, the lowest of all beyond the end and for -inf."""
    scores = tl.load(row + at, mask=at < end, other=float("-inf"))
    return tl.where(scores == float("-inf"), _LEAST, _ordered(scores))


@triton.jit
def _middle(low: tl.tensor, high: tl.tensor):
    """Half-way between two int32, rounded up, without overflow."""
    return (low >> 1) + (high >> 1) + ((low | high) & 1)


@triton.jit
def _fill(row: tl.tensor, begin: tl.tensor, end: tl.tensor, TAIL: tl.constexpr):
    """-1 from `begin` to `end`."""
    i = tl.arange(0, TAIL)
    for start in range(begin, end, TAIL):
        tl.store(row + start + i, tl.full((TAIL,), -1, tl.int32), mask=start + i < end)


@triton.jit
def _whole_kernel(
    scores: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, out: tl.tensor, scores_row: tl.tensor, context: tl.tensor, width: tl.tensor,
    BLOCK: tl.constexpr, HELD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One row a program. HELD: all of it in registers; else BLOCK numbers at a time, read again for each count."""
    t = tl.program_id(0).to(tl.int64)
    row = scores + t * scores_row
    chosen = out + t * width
    end = tl.minimum(tl.load(positions + t) + 1, context)
    k = tl.minimum(tl.load(index_top_k + t), width)
    if (end <= 0) | (k <= 0):
        _fill(chosen, 0, width, TAIL)
        return
    i = tl.arange(0, BLOCK)
    keys = _keys(row, i, end)
    if HELD:
        low = tl.min(tl.where(keys == _LEAST, 0x7FFFFFFF, keys), 0)
        high = tl.max(keys, 0)
        real = tl.sum((keys != _LEAST).to(tl.int32), 0)
    else:
        lows = tl.where(keys == _LEAST, 0x7FFFFFFF, keys)
        highs = keys
        reals = (keys != _LEAST).to(tl.int32)
        for start in range(BLOCK, end, BLOCK):
            more = _keys(row, start + i, end)
            lows = tl.minimum(lows, tl.where(more == _LEAST, 0x7FFFFFFF, more))
            highs = tl.maximum(highs, more)
            reals += (more != _LEAST).to(tl.int32)
        low = tl.min(lows, 0)
        high = tl.max(highs, 0)
        real = tl.sum(reals, 0)

    # Invariant: at least k keys are >= low, fewer than k are > high; `exact` as soon as just k are >= low.
    exact = real <= k
    low = tl.where(exact, _LEAST + 1, low)
    while (low < high) & (exact == 0):
        middle = _middle(low, high)
        if HELD:
            above = tl.sum((keys >= middle).to(tl.int32), 0)
        else:
            counts = (keys >= middle).to(tl.int32)
            for start in range(BLOCK, end, BLOCK):
                counts += (_keys(row, start + i, end) >= middle).to(tl.int32)
            above = tl.sum(counts, 0)
        if above >= k:
            low = middle
            exact = above == k
        else:
            high = middle - 1
    # Now all keys > low are in the set; of those == low the later ones, as many as are missing.
    if exact:
        spare = 0
    elif HELD:
        spare = tl.sum((keys >= low).to(tl.int32), 0) - k
    else:
        counts = (keys >= low).to(tl.int32)
        for start in range(BLOCK, end, BLOCK):
            counts += (_keys(row, start + i, end) >= low).to(tl.int32)
        spare = tl.sum(counts, 0) - k
    written = 0
    for start in range(0, end, BLOCK):
        if HELD:
            some = keys
        else:
            some = _keys(row, start + i, end)
        over = some > low
        tied = some == low
        # Both running counts in one: neither exceeds BLOCK.
        running = tl.cumsum((over.to(tl.int32) << 16) + tied.to(tl.int32), 0)
        ties = running & 0xFFFF
        place = (running >> 16) + tl.maximum(ties - spare, 0)
        tl.store(chosen + written + place - 1, start + i, mask=over | (tied & (ties > spare)))
        total = tl.max(running, 0)
        found = total & 0xFFFF
        written += (total >> 16) + tl.maximum(found - spare, 0)
        spare = tl.maximum(spare - found, 0)
    _fill(chosen, written, width, TAIL)
