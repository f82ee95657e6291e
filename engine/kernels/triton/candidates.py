"""The exact top-k of many rows, or of long ones: read a row once, keep candidates, decide among these.

A program takes a row. A sample of it says from which score on, and of scores equal to that from which position on, about
one and a half times as many lie as are wanted. One pass stores what lies there; of so few the k-th largest is found as in
`engine.kernels.triton.select`. If they are fewer than k or more than there is room for, the program searches the whole
row, again and again: right, and slow. So the result is exact whatever the sample says, and it comes in ascending order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.kernel import kernel, overlap, turn
from engine.kernels.triton.order import (
    LEAST,
    emit,
    fifths,
    fill,
    keys_of,
    narrowed,
    score_of,
    store_cut,
    third,
    tie_cut,
    words_of,
)
from engine.kernels.triton.rows import Rows

MOST_SELECTED = 8192
"""The largest top_k that candidates are kept for."""

SAMPLE = 1024
"""Scores of a sample, at least, if a row has more than there is room for candidates."""

LEAST_ROOM = 1024
"""Candidates that there is room for, at least; else at least twice as many as are selected."""

DEVIATIONS = 5.0
"""The sample is cut so many standard deviations below the rank that is wanted."""

_SPARE = 4.0
"""So many standard deviations the room lies above the candidates that a sample makes one expect: 1 row of 30,000."""

MIX = tl.constexpr(40503)
"""Where a sample reads, see `sampled`."""

_LEAST = tl.constexpr(LEAST)
_INFINITY = tl.constexpr(0x7F800000)


def select_among(scores: Tensor, rows: Rows, out: Tensor, cuts: Tensor | None) -> None:
    """`engine.kernels.triton.select.select` into `out` [T, K] int32, K at most `MOST_SELECTED`."""
    (count, context), width = scores.shape, out.shape[1]
    # For the next power of two: each pair is compiled for itself.
    sample, room = sample_of(width, int(triton.next_power_of_2(context)))
    places = torch.empty(count, room, dtype=torch.int32, device=scores.device)
    shape = shape_of(count, width)
    _among_kernel[(count,)](
        scores, rows.positions, rows.index_top_k, places, out, out if cuts is None else cuts, scores.stride(0), width, context, width,
        ROOM=room, SAMPLE=sample, PIECE=shape.piece, DEVIATIONS=DEVIATIONS, THREADS=32 * shape.warps, STAGES=shape.stages, CUTS=cuts is not None,
        num_warps=shape.warps, **overlap(), **({} if shape.registers is None else {"maxnreg": shape.registers}),
    )  # fmt: skip


class Reading(NamedTuple):
    """Of a program: scores that are read at a time, warps, and pieces whose reads are in flight."""

    piece: int
    warps: int
    stages: int
    registers: int | None = None  # a thread, at most


def shape_of(count: int, width: int) -> Reading:
    """What was fastest on an H200. Few rows have a multiprocessor to themselves, and so more warps."""
    if count >= 1024 and width <= 512:
        return Reading(2048, 2, 1)
    if count >= 384:
        return Reading(4096, 4, 1) if count >= 1024 else Reading(2048, 4, 3)
    return Reading(4096, 4, 1) if count >= 132 else Reading(16384, 16, 1)


def sample_of(width: int, context: int) -> tuple[int, int]:
    """(scores of a sample, room for candidates): the least with which the room is hardly ever too small.

    Args:
        width: positions that a row selects
        context: scores of the longest row; a shorter one has fewer candidates of each score in its sample
    """
    least = max(LEAST_ROOM, SAMPLE, 2 * int(triton.next_power_of_2(width)))
    sample, room = SAMPLE, least
    for sample, room in ((SAMPLE << i, max(least, SAMPLE << i) << j) for j in range(3) for i in range(3)):
        rank = sample * width / context
        taken = 17 / 16 * (rank + 5.0 * rank**0.5 + 2)
        if context <= room or (taken + _SPARE * taken**0.5) * context / sample <= room:
            break
    return sample, room


def select_slowly(scores: Tensor, rows: Rows, out: Tensor, cuts: Tensor | None) -> None:
    """The same for K of any size."""
    (count, context), width = scores.shape, out.shape[1]
    _slow_kernel[(count,)](
        scores, rows.positions, rows.index_top_k, out, out if cuts is None else cuts, scores.stride(0), width, context, width, PIECE=4096, CUTS=cuts is not None, num_warps=8,
        **overlap(),
    )  # fmt: skip


@triton.jit
def sampled(
    row: tl.tensor, end: tl.tensor, k: tl.tensor, SAMPLE: tl.constexpr, DEVIATIONS: tl.constexpr, MIX: tl.constexpr, GROUPS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """(key, position): about 1.5 k of the row's pairs are at or above it, and with near certainty k are.

    The row is cut in equal parts, and one score of each is read, somewhere in it: MIX, an odd number, says where. GROUPS
    is how many groups the sample has, of which a thread holds some; at most a quarter of SAMPLE.
    """
    i = tl.arange(0, SAMPLE)
    first = (i.to(tl.int64) * end // SAMPLE).to(tl.int32)
    size = ((i + 1).to(tl.int64) * end // SAMPLE).to(tl.int32) - first
    mixed = (i * MIX) ^ (i >> 3)
    at = first + (mixed & 0x3FF) * size // 1024
    keys = keys_of(tl.load(row + at), at, end)
    rank = SAMPLE * (k.to(tl.float32) / end.to(tl.float32))
    wanted = tl.minimum(rank + DEVIATIONS * tl.sqrt(rank) + 2.0, SAMPLE * 1.0).to(tl.int32)
    enough = wanted + wanted // 16
    # Each group has a key at or above the least of the groups' greatest.
    most = tl.max(tl.reshape(keys, (SAMPLE // GROUPS, GROUPS)), 0)
    inverted, high = tl.split(tl.max(tl.join(~most, most), 0))
    low = tl.where(wanted <= GROUPS, ~inverted, _LEAST)
    low, least = fifths(keys, low, high, tl.full((), SAMPLE, tl.int32), wanted, enough)
    place = tl.full((), 0, tl.int32)
    if (least > enough) & (low != _LEAST):
        place = tie_cut(keys, low, at, end, wanted)  # too many are equal: of these the later ones
    return low, place


@triton.jit
def _count_through(
    row: tl.tensor, end: tl.tensor, lower: tl.tensor, upper: tl.tensor, place: tl.tensor, PIECE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """How many keys of the whole row are >= lower, if equal only from `place` on, and how many are >= upper."""
    many = tl.zeros((PIECE,), tl.int32)
    few = tl.zeros((PIECE,), tl.int32)
    for start in range(0, end, PIECE):
        i = start + tl.arange(0, PIECE)
        keys = keys_of(tl.load(row + i, mask=i < end, other=float("-inf")), i, end)
        many += ((keys > lower) | ((keys == lower) & (i >= place))).to(tl.int32)
        few += (keys >= upper).to(tl.int32)
    return tl.sum(many, 0), tl.sum(few, 0)


@triton.jit
def search_through(
    row: tl.tensor, chosen: tl.tensor, end: tl.tensor, k: tl.tensor, PIECE: tl.constexpr, GROUPS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Select from the whole row, which is read for each round; how many there are, and the cut: key and position."""
    low = tl.full((), _LEAST, tl.int32)
    high = tl.full((), _INFINITY, tl.int32)
    least = end
    while (least > k) & (low < high):
        lower, upper = third(low, high)
        many, few = _count_through(row, end, lower, upper, 0, PIECE)
        low, high, least = narrowed(low, high, least, lower, upper, many, few, k)
    before = tl.full((), 0, tl.int32)
    after = end
    if (least > k) & (low != _LEAST):
        while after - before > 1:
            middle = (before + after) // 2
            many, _ = _count_through(row, end, low, low, middle, PIECE)
            before = tl.where(many >= k, middle, before)
            after = tl.where(many >= k, after, middle)
    written = tl.full((), 0, tl.int32)
    for start in range(0, end, PIECE):
        i = start + tl.arange(0, PIECE)
        keys = keys_of(tl.load(row + i, mask=i < end, other=float("-inf")), i, end)
        hit = (keys != _LEAST) & ((keys > low) | ((keys == low) & (i >= before)))
        written += _put(chosen, hit, written, k, start, row, PIECE, GROUPS, False)
    return written, low, before


@triton.jit
def _put(
    target: tl.tensor, hit: tl.tensor, written: tl.tensor, room: tl.tensor, base: tl.tensor, source: tl.tensor,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, SOURCE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`emit` of [SIZE] hits after what is written; how many there are."""
    words, ones, running, both = words_of(
        tl.reshape(hit, (SIZE // (4 * GROUPS), GROUPS, 4)), SIZE // (4 * GROUPS), GROUPS
    )
    most, total = tl.split(both)
    emit(target, room, words, written + running - ones, most, base, source, SIZE // 32, SOURCE)
    return total


@triton.jit
def decide(
    row: tl.tensor, own: tl.tensor, chosen: tl.tensor, cuts: tl.tensor, count: tl.tensor, cut: tl.tensor, place: tl.tensor, k: tl.tensor,
    ROOM: tl.constexpr, CUTS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Store the k best of `count` candidates, at most ROOM; how many there are.

    Args:
        row: the row's scores
        own: positions of the candidates, ascending: of all scores at or above `cut`, if equal only from `place` on
        chosen: where the positions go
        cuts: where the row's cut goes, if CUTS
        count: of candidates
        cut: a key, or the lowest of all: then the candidates are all scores above -inf
        place: see `own`
        k: wanted
    """
    j = tl.arange(0, ROOM)
    at = tl.load(own + j, mask=j < count, other=0)
    keys = keys_of(tl.load(row + at, mask=j < count, other=float("-inf")), j, count)
    low, least = fifths(keys, cut, tl.max(keys, 0), count, k, k)
    first = tl.full((), 0, tl.int32)
    if (least > k) & (low != _LEAST):
        first = tie_cut(keys, low, j, count, k)
    hit = (keys != _LEAST) & ((keys > low) | ((keys == low) & (j >= first)))
    tl.store(chosen + tl.cumsum(hit.to(tl.int32), 0) - 1, at, mask=hit)
    if CUTS:
        # Of those equal to the sample's cut, the earlier ones are not even candidates.
        from_here = tl.load(own + first)
        store_cut(cuts, low, tl.where(low == cut, tl.maximum(from_here, place), from_here))
    return tl.minimum(least, k)


@kernel
def _slow_kernel(
    scores: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, out: tl.tensor,
    cuts: tl.tensor, scores_row: tl.tensor, out_row: tl.tensor, context: tl.tensor, width: tl.tensor, PIECE: tl.constexpr, CUTS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """The best of one row."""
    turn(EARLY)
    t = tl.program_id(0).to(tl.int64)
    end = tl.minimum(tl.load(positions + t) + 1, context)
    k = tl.minimum(tl.load(index_top_k + t), width)
    written = 0
    if (end > 0) & (k > 0):
        written, low, place = search_through(
            scores + t * scores_row, out + t * out_row, end, k, PIECE, PIECE // 16
        )
        if CUTS:
            store_cut(cuts + 2 * t, low, place)
    fill(out + t * out_row, written, width, PIECE)


@kernel
def _among_kernel(
    scores: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, places: tl.tensor, out: tl.tensor, cuts: tl.tensor,
    scores_row: tl.tensor, out_row: tl.tensor, context: tl.tensor, width: tl.tensor,
    ROOM: tl.constexpr, SAMPLE: tl.constexpr, PIECE: tl.constexpr, DEVIATIONS: tl.constexpr, THREADS: tl.constexpr,
    STAGES: tl.constexpr, CUTS: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """The best of one row."""
    turn(EARLY)
    # A prompt's last rows are its longest: they start first.
    t = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    end = tl.minimum(tl.load(positions + t) + 1, context)
    k = tl.minimum(tl.load(index_top_k + t), width)
    chosen = out + t * out_row
    PIECE_GROUPS: tl.constexpr = min(THREADS, PIECE // 4)
    ROOM_GROUPS: tl.constexpr = min(THREADS, ROOM // 4)
    written = 0
    if (end > 0) & (k > 0):
        row = scores + t * scores_row
        own = places + t * ROOM
        cut = tl.full((), _LEAST, tl.int32)
        place = tl.full((), 0, tl.int32)
        if end > ROOM:
            cut, place = sampled(row, end, k, SAMPLE, DEVIATIONS, MIX, min(THREADS, SAMPLE // 4))
        # Compared as floats, which is what lies there; the lowest cut stands for -inf, which is never in.
        threshold = tl.where(cut == _LEAST, float("-inf"), score_of(cut))
        place = tl.where(cut == _LEAST, end, place)
        count = tl.full((), 0, tl.int32)
        for start in tl.range(0, end, PIECE, num_stages=STAGES):
            i = start + tl.arange(0, PIECE)
            values = tl.load(row + i, mask=i < context, other=float("-inf"))
            hit = ((values > threshold) | ((values == threshold) & (i >= place))) & (i < end)
            count += _put(own, hit, count, ROOM, start, row, PIECE, PIECE_GROUPS, False)
        if (count > ROOM) | ((count < k) & (cut != _LEAST)):
            written, low, place = search_through(row, chosen, end, k, PIECE, PIECE_GROUPS)
            if CUTS:
                store_cut(cuts + 2 * t, low, place)
        else:
            tl.debug_barrier()  # what other threads of the program stored is read
            written = decide(row, own, chosen, cuts + 2 * t, count, cut, place, k, ROOM, CUTS)
    fill(chosen, written, width, 4 * ROOM_GROUPS)
