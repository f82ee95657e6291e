"""The exact top-k of each row in a total order: the higher score first, and of equal scores the later position.

A score becomes an integer of 32 bits in the same order (-0 as +0), and the k-th largest of what a program holds is found
by cutting the range of those integers and counting; what ties with it is decided by position. The selected set is a
function of the row alone, and comes in ascending order of position, so that whatever sums over it is one, too.

Four forms:

- *few short rows of which little is selected*: a program holds a whole row;
- *many rows*: `engine.kernels.triton.candidates` reads a row once and decides among few;
- *few rows else*: a row is cut into stretches whose winners meet in the next round, in the order of their positions,
  until one stretch is left;
- *long rows*: `engine.kernels.triton.long_rows` reads a row with many programs, which store a bit a score.

Which is fastest where was measured on an H200 (benchmarks/gpu/log.md). Stretches know no cuts: with these, few rows are
held whole up to `WHOLE_CUT`, and longer ones decided among candidates if they are not long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton import long_rows
from engine.kernels.triton.candidates import MOST_SELECTED, select_among, select_slowly
from engine.kernels.triton.kernel import kernel, overlap, turn
from engine.kernels.triton.order import LEAST, emit, fifths, fill, keys_of, store_cut, tie_cut, words_of
from engine.kernels.triton.rows import Rows

WHOLE = 8192
"""Scores of a row that one program holds where it is the fastest, and ..."""
WHOLE_SELECTED = 512
"""... positions that it then selects, at most."""
WHOLE_CUT = 16384
"""Scores of a row that one program may hold."""

MANY_ROWS = 264
"""So many rows fill the device by themselves: two a multiprocessor."""

LONG = 16384
"""From so many scores on, few rows that select more than `WHOLE_SELECTED` are long, and ..."""
LONG_MANY = 131072
"""... many rows."""

STRETCH = 8192
"""How many scores one program holds at least, if a row has so many."""

MANY = 256
"""More stretches than this, of all rows, are written out a piece at a time."""
PIECE = 2048
"""Of a stretch: running counts need registers, and these bound how many programs run at once."""

_LEAST = tl.constexpr(LEAST)


def select(scores: Tensor, rows: Rows, width: int, cuts: Tensor | None = None) -> Tensor:
    """Positions of the `index_top_k` best scores of each row; what lies beyond a row's end does not count.

    Args:
        scores: [T, C] float32; -inf is never selected
        rows: the batch; dense rows and padding select nothing
        width: no row's index_top_k is above it; above `MOST_SELECTED` it is right, and slow
        cuts: [T, 2] int32, filled where given: the cut of each row that selects, an integer in the order of the scores and
            a position (`engine.kernels.triton.mask` reads it)

    Returns:
        [T, K = width] int32, ascending, -1 after a row's last
    """
    count, context = scores.shape
    out = torch.empty(count, width, dtype=torch.int32, device=scores.device)
    if not count or not width:
        return out
    if width > MOST_SELECTED:
        select_slowly(scores, rows, out, cuts)
    elif WHOLE_SELECTED < width <= long_rows.MOST_SELECTED and context >= (
        LONG if count < MANY_ROWS else LONG_MANY
    ):
        long_rows.select_long(scores, rows, out, cuts)
    elif count >= MANY_ROWS:
        select_among(scores, rows, out, cuts)
    elif context <= WHOLE and width <= WHOLE_SELECTED:
        _select_whole(scores, rows, out, cuts)
    elif cuts is None:
        _select_stretches(scores, rows, out)
    elif context <= WHOLE_CUT:
        _select_whole(scores, rows, out, cuts)
    else:
        select_among(scores, rows, out, cuts)
    return out


def _select_whole(scores: Tensor, rows: Rows, out: Tensor, cuts: Tensor | None) -> None:
    """A program a row."""
    (count, context), width = scores.shape, out.shape[1]
    block = max(int(triton.next_power_of_2(context)), 128)
    warps = whole_warps(block)
    threads = 32 * warps
    _whole_kernel[(count,)](
        scores, rows.positions, rows.index_top_k, out, out if cuts is None else cuts, scores.stride(0), width, context, width,
        BLOCK=block, CUTS=cuts is not None, GROUPS=min(threads, block // 4), BOUND=width <= min(threads, block // 4), num_warps=warps, **overlap(),
    )  # fmt: skip


def whole_warps(block: int) -> int:
    """32 numbers a thread, and of few numbers fewer."""
    return min(max(block // 1024, 2), 32)


def _select_stretches(scores: Tensor, rows: Rows, out: Tensor) -> None:
    """Rounds of stretches."""
    count, context = scores.shape
    width = out.shape[1]
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
            BLOCK=block, PIECE=min(block, PIECE) if count * stretches > MANY else block, TAIL=min(block, 1024), FIRST=places is None, LAST=last, num_warps=min(max(block // 1024, 1), 32),
            **overlap(),
        )  # fmt: skip
        if last:
            return
        scores, places, context = best, winners, winners.shape[1]


@kernel
def _whole_kernel(
    scores: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, out: tl.tensor, cuts: tl.tensor,
    scores_row: tl.tensor, out_row: tl.tensor, context: tl.tensor, width: tl.tensor,
    BLOCK: tl.constexpr, CUTS: tl.constexpr, GROUPS: tl.constexpr, BOUND: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """The best of one row. BOUND: no row selects more than there are GROUPS."""
    turn(EARLY)
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    # Not bounded by the row's end, which is still on its way.
    values = tl.load(scores + t * scores_row + i, mask=i < context, other=float("-inf"))
    k = tl.minimum(tl.load(index_top_k + t), width)
    end = tl.minimum(tl.load(positions + t) + 1, context)
    chosen = out + t * out_row
    written = 0
    if (end > 0) & (k > 0):
        keys = keys_of(values, i, end)
        # A group is what a thread holds, if the compiler lays it out so.
        grouped = tl.reshape(keys, (BLOCK // (4 * GROUPS), GROUPS, 4))
        most = tl.max(tl.max(grouped, 2), 0)
        # Invariant: at least k keys are >= low, or all; fewer than k are > high. `least`, at most so many are >= low.
        if BOUND:
            # Each group has a key at or above the least of the groups' greatest.
            bounds = tl.max(tl.join(~most, most), 0)
            inverted, high = tl.split(bounds)
            low = ~inverted
        else:
            high = tl.max(most, 0)
            low = tl.full((), _LEAST, tl.int32)
        least = end
        low, least = fifths(keys, low, high, least, k, k)
        first = tl.full((), 0, tl.int32)
        if (least > k) & (low != _LEAST):
            first = tie_cut(keys, low, i, end, k)
        at = tl.reshape(i, (BLOCK // (4 * GROUPS), GROUPS, 4))
        hit = (grouped != _LEAST) & ((grouped > low) | ((grouped == low) & (at >= first)))
        words, ones, running, both = words_of(hit, BLOCK // (4 * GROUPS), GROUPS)
        most, written = tl.split(both)
        emit(chosen, k, words, running - ones, most, 0, chosen, BLOCK // 32, False)
        if CUTS:
            store_cut(cuts + 2 * t, low, first)
    fill(chosen, written, width, 4 * GROUPS)


@triton.jit
def _read(row: tl.tensor, i: tl.tensor, context: tl.tensor) -> tl.tensor:
    """Scores; bounded by whole pages and not by the row's end, so that reads are 16 bytes wide."""
    return tl.load(row + i, mask=i < context, other=float("-inf"))


@kernel
def _select_kernel(
    scores: tl.tensor, places: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, winners: tl.tensor,
    best: tl.tensor, scores_row: tl.tensor, winners_row: tl.tensor, context: tl.tensor, slots: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, TAIL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """The best of one stretch of one row.

    FIRST: scores lie at their positions, and the row's end counts; else at `places` (laid out as the scores), and what is
    absent is -inf. LAST: only positions are written, then -1; else scores too, then -inf.
    """
    turn(EARLY)
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
        keys = keys_of(_read(scores + t * scores_row, i, context), i, end)
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
            some = keys_of(values, at, end)
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
