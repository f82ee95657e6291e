"""The exact top-k of each row in a total order: the higher score first, and of equal scores the later position.

A score becomes an integer of 32 bits in the same order (-0 as +0), and the k-th largest of a stretch of a row is found by
cutting the range of those integers in three and counting; what ties with it is decided by position. A longer row is cut
into stretches whose winners meet in the next round, in the order of their positions, until one stretch is left. So the
selected set is a function of the row alone, and comes in ascending order of position, so that whatever sums over it is
one, too; and no row takes longer than another of its length by much, since nothing is guessed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.errors import EngineError
from engine.kernels.triton.rows import Rows

STRETCH = 8192
"""How many scores one program holds at least, if a row has so many."""

MANY = 256
"""More stretches than this, of all rows, are written out a piece at a time."""
PIECE = 2048
"""Of a stretch: running counts need registers, and these bound how many programs run at once."""

MOST_SELECTED = 8192
"""The largest top_k."""

_LEAST = tl.constexpr(-(2**31))


def select(scores: Tensor, rows: Rows, width: int) -> Tensor:
    """Positions of the `index_top_k` best scores of each row; what lies beyond a row's end does not count.

    Args:
        scores: [T, C] float32; -inf is never selected
        rows: the batch; dense rows and padding select nothing
        width: no row's index_top_k is above it

    Returns:
        [T, K = width] int32, ascending, -1 after a row's last

    Raises:
        EngineError: `width` is above `MOST_SELECTED`.
    """
    if width > MOST_SELECTED:
        raise EngineError(f"top_k is {width}; at most {MOST_SELECTED} can be selected on the GPU")
    count, context = scores.shape
    out = torch.empty(count, width, dtype=torch.int32, device=scores.device)
    if not count or not width:
        return out
    # A round leaves this many of each stretch, a multiple of what one read takes; twice as many come in.
    slots = -(-width // 64) * 64
    longest = max(STRETCH, int(triton.next_power_of_2(2 * slots)))
    places = None  # of the first round: a score lies at its position
    while True:
        block = min(max(int(triton.next_power_of_2(context)), 128), longest)
        stretches = -(-context // block)
        last = stretches == 1
        winners = (
            out if last else torch.empty(count, stretches * slots, dtype=torch.int32, device=scores.device)
        )
        best = scores if last else torch.empty(winners.shape, dtype=torch.float32, device=scores.device)
        _select_kernel[(count, stretches)](
            scores, winners if places is None else places, rows.positions, rows.index_top_k, winners, best,
            scores.stride(0), winners.stride(0), context, width if last else slots, width,
            BLOCK=block, PIECE=min(block, PIECE) if count * stretches > MANY else block, TAIL=min(block, 1024), FIRST=places is None, LAST=last, num_warps=_warps(block),
        )  # fmt: skip
        if last:
            return out
        scores, places, context = best, winners, winners.shape[1]


def _warps(block: int) -> int:
    """32 numbers a thread."""
    return min(max(block // 1024, 1), 32)


@triton.jit
def _ordered(scores: tl.tensor) -> tl.tensor:
    """float32 -> int32 in the same order; the lowest int32 of all is left over."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _read(row: tl.tensor, i: tl.tensor, context: tl.tensor) -> tl.tensor:
    """Scores; bounded by whole pages and not by the row's end, so that reads are 16 bytes wide."""
    return tl.load(row + i, mask=i < context, other=float("-inf"))


@triton.jit
def _keys(scores: tl.tensor, i: tl.tensor, end: tl.tensor) -> tl.tensor:
    """Integers in the order of the scores; the lowest of all for -inf and for what lies beyond the end."""
    return tl.where((i < end) & (scores != float("-inf")), _ordered(scores), _LEAST)


@triton.jit
def _select_kernel(
    scores: tl.tensor, places: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, winners: tl.tensor,
    best: tl.tensor, scores_row: tl.tensor, winners_row: tl.tensor, context: tl.tensor, slots: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, TAIL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
) -> None:  # fmt: skip
    """The best of one stretch of one row.

    FIRST: scores lie at their positions, and the row's end counts; else at `places` (laid out as the scores), and what is
    absent is -inf. LAST: only positions are written, then -1; else scores too, then -inf.
    """
    t = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    chosen = winners + t * winners_row + tl.program_id(1) * slots
    chosen_best = best + t * winners_row + tl.program_id(1) * slots
    length = tl.load(positions + t) + 1
    k = tl.minimum(tl.load(index_top_k + t), width)
    if FIRST:
        end = tl.minimum(length, context)
    else:
        end = tl.where(length > 0, context, 0)
    written = 0
    if (start < end) & (k > 0):
        i = start + tl.arange(0, BLOCK)
        keys = _keys(_read(scores + t * scores_row, i, context), i, end)
        # Invariant: `least` keys are >= low, at least k of them or all; fewer than k are > high.
        low = tl.full((), _LEAST, tl.int32)
        high = tl.full((), 0x7FFFFFFF, tl.int32)
        least = tl.minimum(end - start, BLOCK)
        while (least > k) & (low < high):
            third = ((high - low).to(tl.uint32, bitcast=True) // 3).to(tl.int32, bitcast=True)
            lower = low + third + 1
            upper = lower + third
            counts = tl.sum((keys >= lower).to(tl.int32) + ((keys >= upper).to(tl.int32) << 16), 0)
            few = counts >> 16
            many = counts & 0xFFFF
            high = tl.where(few >= k, high, tl.where(many >= k, upper - 1, lower - 1))
            low = tl.where(few >= k, upper, tl.where(many >= k, lower, low))
            least = tl.where(few >= k, few, tl.where(many >= k, many, least))
        # All keys > low are in the set; of those == low all but the first `spare`, and none if low stands for nothing.
        spare = tl.maximum(least - k, 0)
        for piece in range(start, tl.minimum(start + BLOCK, end), PIECE):
            at = piece + tl.arange(0, PIECE)
            values = _read(scores + t * scores_row, at, context)
            some = _keys(values, at, end)
            over = (some > low).to(tl.int32)
            tied = ((some == low) & (some != _LEAST)).to(tl.int32)
            both = (over << 16) + tied  # neither count exceeds 2^15
            running = tl.cumsum(both, 0)
            total = tl.sum(both, 0)
            ties = running & 0xFFFF
            slot = written + (running >> 16) + tl.maximum(ties - spare, 0) - 1
            mask = (over != 0) | ((tied != 0) & (ties > spare))
            if FIRST:
                place = at
            else:
                place = tl.load(places + t * scores_row + at, mask=mask, other=-1)
            tl.store(chosen + slot, place, mask=mask)
            if LAST == 0:
                tl.store(chosen_best + slot, values, mask=mask)
            written += (total >> 16) + tl.maximum((total & 0xFFFF) - spare, 0)
            spare = tl.maximum(spare - (total & 0xFFFF), 0)
    j = tl.arange(0, TAIL)
    for rest in range(written, slots, TAIL):
        tl.store(chosen + rest + j, tl.full((TAIL,), -1, tl.int32), mask=rest + j < slots)
        if LAST == 0:
            nothing = tl.full((TAIL,), float("-inf"), tl.float32)
            tl.store(chosen_best + rest + j, nothing, mask=rest + j < slots)
