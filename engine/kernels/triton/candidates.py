"""The exact top-k of many rows, or of long ones: read a row once, keep candidates, decide among these.

A program takes a row. A sample of it says from which score on, and of scores equal to that from which position on, about
one and a half times as many lie as are wanted. One pass stores what lies there; of so few the k-th largest is found as in
`engine.kernels.triton.select`. If they are fewer than k or more than there is room for, the program searches the whole
row, again and again: right, and slow. So the result is exact whatever the sample says, and it comes in ascending order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.kernel import overlap, turn
from engine.kernels.triton.rows import Rows

MOST_SELECTED = 8192
"""The largest top_k that candidates are kept for."""

SAMPLE = 1024
"""Scores of a sample, if a row has more than there is room for candidates."""

LEAST_ROOM = 1024
"""Candidates that there is room for, at least; else twice as many as are selected."""

PIECE = 2048
"""Scores that a program reads at a time."""

STAGES = 3
"""Pieces whose reads are in flight."""

DEVIATIONS = 5.0
"""The sample is cut so many standard deviations below the rank that is wanted."""

LEAST = -(2**31)
"""What stands for a score that is never selected."""

_LEAST = tl.constexpr(LEAST)
_INFINITY = tl.constexpr(0x7F800000)


def select_among(scores: Tensor, rows: Rows, out: Tensor) -> None:
    """`engine.kernels.triton.select.select` into `out` [T, K] int32, K at most `MOST_SELECTED`."""
    (count, context), width = scores.shape, out.shape[1]
    room = max(LEAST_ROOM, SAMPLE, 2 * int(triton.next_power_of_2(width)))
    places = torch.empty(count, room, dtype=torch.int32, device=scores.device)
    found = torch.empty(count, room, dtype=torch.float32, device=scores.device)
    warps = among_warps(count)
    _among_kernel[(count,)](
        scores, rows.positions, rows.index_top_k, places, found, out, scores.stride(0), width, context, width,
        ROOM=room, SAMPLE=SAMPLE, PIECE=PIECE * warps // 4, DEVIATIONS=DEVIATIONS, LAST=min(room, 512 * warps), STAGES=STAGES, num_warps=warps, **overlap(),
    )  # fmt: skip


def among_warps(count: int) -> int:
    """More for few rows, which have a multiprocessor to themselves."""
    return 4 if count >= 528 else 8 if count >= 264 else 16


def select_slowly(scores: Tensor, rows: Rows, out: Tensor) -> None:
    """The same for K of any size."""
    (count, context), width = scores.shape, out.shape[1]
    _slow_kernel[(count,)](
        scores, rows.positions, rows.index_top_k, out, scores.stride(0), width, context, width, PIECE=4096, num_warps=8,
        **overlap(),
    )  # fmt: skip


@triton.jit
def ordered(scores: tl.tensor) -> tl.tensor:
    """float32 -> int32 in the same order; the lowest int32 of all is left over."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def keys_of(scores: tl.tensor, i: tl.tensor, end: tl.tensor) -> tl.tensor:
    """Integers in the order of the scores; the lowest of all for -inf and for what lies beyond the end."""
    return tl.where((i < end) & (scores != float("-inf")), ordered(scores), _LEAST)


@triton.jit
def _score_of(key: tl.tensor) -> tl.tensor:
    """The score of a key between those of the infinities."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _third(low: tl.tensor, high: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """What cuts the range above low in three."""
    third = ((high - low).to(tl.uint32, bitcast=True) // 3).to(tl.int32, bitcast=True)
    lower = low + third + 1
    return lower, lower + third


@triton.jit
def _narrowed(
    low: tl.tensor, high: tl.tensor, least: tl.tensor, lower: tl.tensor, upper: tl.tensor, many: tl.tensor,
    few: tl.tensor, k: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The range that has the k-th largest, when `many` are >= lower and `few` are >= upper, and how many are >= its low."""
    high = tl.where(few >= k, high, tl.where(many >= k, upper - 1, lower - 1))
    low = tl.where(few >= k, upper, tl.where(many >= k, lower, low))
    least = tl.where(few >= k, few, tl.where(many >= k, many, least))
    return low, high, least


@triton.jit
def _sampled(
    row: tl.tensor, end: tl.tensor, k: tl.tensor, SAMPLE: tl.constexpr, DEVIATIONS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """(key, position): about 1.5 k of the row's pairs are at or above it, and with near certainty k are.

    The row is cut in equal parts, and one score of each is read, somewhere in it.
    """
    i = tl.arange(0, SAMPLE)
    first = (i.to(tl.int64) * end // SAMPLE).to(tl.int32)
    size = ((i + 1).to(tl.int64) * end // SAMPLE).to(tl.int32) - first
    mixed = (i * 40503) ^ (i >> 3)
    at = first + (mixed & 0x3FF) * size // 1024
    keys = keys_of(tl.load(row + at), at, end)
    rank = SAMPLE * (k.to(tl.float32) / end.to(tl.float32))
    wanted = tl.minimum(rank + DEVIATIONS * tl.sqrt(rank) + 2.0, SAMPLE * 1.0).to(tl.int32)
    enough = wanted + wanted // 16
    low = tl.full((), _LEAST, tl.int32)
    high = tl.max(keys, 0)
    least = tl.full((), SAMPLE, tl.int32)
    over = tl.full((), 0, tl.int32)  # how many are > high
    while (least > enough) & (low < high):
        lower, upper = _third(low, high)
        counts = tl.sum((keys >= lower).to(tl.int32) + ((keys >= upper).to(tl.int32) << 16), 0)
        few = counts >> 16
        many = counts & 0xFFFF
        over = tl.where(few >= wanted, over, tl.where(many >= wanted, few, many))
        low, high, least = _narrowed(low, high, least, lower, upper, many, few, wanted)
    place = tl.full((), 0, tl.int32)
    if (least > enough) & (low != _LEAST):
        # Too many are equal: of these the later ones.
        above = tl.sum((keys > low).to(tl.int32), 0)
        tied = keys == low
        before = tl.full((), 0, tl.int32)
        after = end
        while after - before > 1:
            middle = (before + after) // 2
            some = above + tl.sum((tied & (at >= middle)).to(tl.int32), 0)
            before = tl.where(some >= wanted, middle, before)
            after = tl.where(some >= wanted, after, middle)
        place = before
    return low, place


@triton.jit
def _count_through(
    row: tl.tensor, end: tl.tensor, lower: tl.tensor, upper: tl.tensor, PIECE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """How many keys of the whole row are >= lower, and >= upper."""
    many = tl.zeros((PIECE,), tl.int32)
    few = tl.zeros((PIECE,), tl.int32)
    for start in range(0, end, PIECE):
        i = start + tl.arange(0, PIECE)
        keys = keys_of(tl.load(row + i, mask=i < end, other=float("-inf")), i, end)
        many += (keys >= lower).to(tl.int32)
        few += (keys >= upper).to(tl.int32)
    return tl.sum(many, 0), tl.sum(few, 0)


@triton.jit
def _search_through(
    row: tl.tensor, chosen: tl.tensor, end: tl.tensor, k: tl.tensor, PIECE: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Select from the whole row, which is read for each round; how many there are."""
    low = tl.full((), _LEAST, tl.int32)
    high = tl.full((), _INFINITY, tl.int32)
    least = end
    while (least > k) & (low < high):
        lower, upper = _third(low, high)
        many, few = _count_through(row, end, lower, upper, PIECE)
        low, high, least = _narrowed(low, high, least, lower, upper, many, few, k)
    if low == _LEAST:
        spare = tl.full((), 0, tl.int32)
    else:
        least, _ = _count_through(row, end, low, low, PIECE)
        spare = tl.maximum(least - k, 0)
    written = tl.full((), 0, tl.int32)
    for start in range(0, end, PIECE):
        i = start + tl.arange(0, PIECE)
        keys = keys_of(tl.load(row + i, mask=i < end, other=float("-inf")), i, end)
        written, spare = _write(chosen, i, keys, low, written, spare)
    return written


@triton.jit
def _write(
    chosen: tl.tensor, places: tl.tensor, keys: tl.tensor, low: tl.tensor, written: tl.tensor, spare: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Store the places of keys > low, and of those equal to it all but the first `spare`; the two numbers brought on."""
    over = (keys > low).to(tl.int32)
    tied = ((keys == low) & (keys != _LEAST)).to(tl.int32)
    both = (over << 16) + tied
    running = tl.cumsum(both, 0)
    total = tl.sum(both, 0)
    ties = running & 0xFFFF
    slot = written + (running >> 16) + tl.maximum(ties - spare, 0) - 1
    tl.store(chosen + slot, places, mask=(over != 0) | ((tied != 0) & (ties > spare)))
    written += (total >> 16) + tl.maximum((total & 0xFFFF) - spare, 0)
    return written, tl.maximum(spare - (total & 0xFFFF), 0)


@triton.jit
def _fill(chosen: tl.tensor, written: tl.tensor, width: tl.tensor, SIZE: tl.constexpr) -> None:
    """-1 after what is written."""
    for rest in range(written, width, SIZE):
        j = rest + tl.arange(0, SIZE)
        tl.store(chosen + j, tl.full((SIZE,), -1, tl.int32), mask=j < width)


@triton.jit
def _slow_kernel(
    scores: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, out: tl.tensor, scores_row: tl.tensor,
    out_row: tl.tensor, context: tl.tensor, width: tl.tensor, PIECE: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """The best of one row."""
    turn(EARLY)
    t = tl.program_id(0).to(tl.int64)
    end = tl.minimum(tl.load(positions + t) + 1, context)
    k = tl.minimum(tl.load(index_top_k + t), width)
    written = 0
    if (end > 0) & (k > 0):
        written = _search_through(scores + t * scores_row, out + t * out_row, end, k, PIECE)
    _fill(out + t * out_row, written, width, PIECE)


@triton.jit
def _among_kernel(
    scores: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, places: tl.tensor, found: tl.tensor,
    out: tl.tensor, scores_row: tl.tensor, out_row: tl.tensor, context: tl.tensor, width: tl.tensor,
    ROOM: tl.constexpr, SAMPLE: tl.constexpr, PIECE: tl.constexpr, DEVIATIONS: tl.constexpr, LAST: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """The best of one row."""
    turn(EARLY)
    # A prompt's last rows are its longest: they start first.
    t = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    end = tl.minimum(tl.load(positions + t) + 1, context)
    k = tl.minimum(tl.load(index_top_k + t), width)
    chosen = out + t * out_row
    written = 0
    if (end > 0) & (k > 0):
        row = scores + t * scores_row
        own_places = places + t * ROOM
        own_found = found + t * ROOM
        cut = tl.full((), _LEAST, tl.int32)
        place = tl.full((), 0, tl.int32)
        if end > ROOM:
            cut, place = _sampled(row, end, k, SAMPLE, DEVIATIONS)
        # Compared as floats, which is what lies there; -inf is never above what the lowest cut stands for.
        threshold = tl.where(cut == _LEAST, float("-inf"), _score_of(cut))
        place = tl.where(cut == _LEAST, end, place)
        count = tl.full((), 0, tl.int32)
        for start in tl.range(0, end, PIECE, num_stages=STAGES):
            i = start + tl.arange(0, PIECE)
            values = tl.load(row + i, mask=i < context, other=float("-inf"))
            hit = ((values > threshold) | ((values == threshold) & (i >= place))) & (i < end)
            slot = count + tl.cumsum(hit.to(tl.int32), 0) - 1
            kept = hit & (slot < ROOM)
            tl.store(own_places + slot, i, mask=kept)
            tl.store(own_found + slot, values, mask=kept)
            count += tl.sum(hit.to(tl.int32), 0)
        if (count > ROOM) | ((count < k) & (cut != _LEAST)):
            written = _search_through(row, chosen, end, k, PIECE)
        else:
            tl.debug_barrier()  # what other threads of the program stored is read
            j = tl.arange(0, ROOM)
            keys = keys_of(tl.load(own_found + j, mask=j < count, other=float("-inf")), j, count)
            low = cut
            high = tl.max(keys, 0)
            least = count
            while (least > k) & (low < high):
                lower, upper = _third(low, high)
                counts = tl.sum((keys >= lower).to(tl.int32) + ((keys >= upper).to(tl.int32) << 16), 0)
                low, high, least = _narrowed(low, high, least, lower, upper, counts & 0xFFFF, counts >> 16, k)
            # If the last round did not say it, of those equal to low how many are too many.
            if low != _LEAST:
                least = tl.sum((keys >= low).to(tl.int32), 0)
            spare = tl.maximum(least - k, 0)
            for begin in range(0, count, LAST):
                some = begin + tl.arange(0, LAST)
                values = tl.load(own_found + some, mask=some < count, other=float("-inf"))
                at = tl.load(own_places + some, mask=some < count, other=-1)
                written, spare = _write(chosen, at, keys_of(values, some, count), low, written, spare)
    _fill(chosen, written, width, LAST)
