"""The exact top-k of long rows, in three launches: sample, mark, decide.

1. *Sample*: a program a row. From some thousand scores of it: from which score on, and of scores equal to that from which
   position on, lie surely k and not many more.
2. *Mark*: programs over all stretches of all rows. Each score becomes a bit, 32 neighbours a word, so that the order of the
   positions is kept and nothing is added up between programs.
3. *Decide*: a program a row. The words become the positions of the candidates, and of these few the k best are found as in
   `engine.kernels.triton.candidates`.

No program waits for another one that may not run yet. If a sample misled, which 2 rows of a million make happen, the
program of the last launch draws another sample and marks its row itself; if that misleads too, it searches the whole row. So
the result is exact whatever the samples say, a function of the row alone, and in ascending order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.candidates import decide, sampled, search_through
from engine.kernels.triton.kernel import kernel, overlap, turn
from engine.kernels.triton.order import LEAST, counted, emit, fill, packed, score_of, store_cut
from engine.kernels.triton.rows import Rows

MOST_SELECTED = 4096
"""The largest top_k of this form: candidates lie in a program's registers."""

SAMPLE, FEW_SAMPLE = 4096, 8192
"""Scores of a sample, at least; of fewer than `FEW` rows the second number, since each has a multiprocessor to itself."""
FEW = 32
MOST_SAMPLED = 32768

LEAST_ROOM = 4096
"""Candidates that there is room for, at least; else four times as many as are selected."""

DEVIATIONS = 5.0
"""The sample is cut so many standard deviations below the rank that is wanted: 2 rows of a million have too few candidates."""
SECOND_DEVIATIONS = 6.5
"""The same of the second sample."""

_SPARE = 5.0
"""So many standard deviations the room lies above the candidates that a sample makes one expect."""

STRETCH = 4096
"""Scores that a program marks."""
STRETCH_WARPS = 4
WORDS = 4096
"""Words that are turned into positions at a time."""
DECIDE_WARPS = 16

_LEAST = tl.constexpr(LEAST)
_FIRST, _SECOND = tl.constexpr(40503), tl.constexpr(25717)  # where the samples read


class Plan(NamedTuple):
    """Scores of a sample, and candidates that there is room for."""

    sample: int
    room: int


def plan_of(width: int, context: int, count: int) -> Plan:
    """The smallest sample with which the room is hardly ever too small.

    Args:
        width: positions that a row selects
        context: scores of the longest row; a shorter one has fewer candidates of each score in its sample
        count: of rows
    """
    room = max(LEAST_ROOM, 4 * int(triton.next_power_of_2(width)))
    sample = FEW_SAMPLE if count < FEW else SAMPLE
    while sample < MOST_SAMPLED:
        rank = sample * width / context
        taken = 17 / 16 * (rank + _SPARE * rank**0.5 + 2)
        if context <= room or (taken + _SPARE * taken**0.5) * context / sample <= room:
            break
        sample *= 2
    return Plan(sample, room)


def select_long(scores: Tensor, rows: Rows, out: Tensor, cuts: Tensor | None) -> None:
    """`engine.kernels.triton.select.select` into `out` [T, K] int32, K at most `MOST_SELECTED`."""
    (count, context), width = scores.shape, out.shape[1]
    plan = plan_of(width, int(triton.next_power_of_2(context)), count)  # each plan is compiled for itself
    stretches = triton.cdiv(context, STRETCH)
    thresholds = torch.empty(count, 2, dtype=torch.int32, device=scores.device)
    words = torch.empty(count, stretches * (STRETCH // 32), dtype=torch.int32, device=scores.device)
    places = torch.empty(count, plan.room, dtype=torch.int32, device=scores.device)
    sample_warps = 8 if plan.sample <= 4096 else 16
    _sample_kernel[(count,)](
        scores, rows.positions, rows.index_top_k, thresholds, scores.stride(0), width, context,
        ROOM=plan.room, SAMPLE=plan.sample, DEVIATIONS=DEVIATIONS, GROUPS=min(32 * sample_warps, plan.sample // 4), num_warps=sample_warps, **overlap(),
    )  # fmt: skip
    _mark_kernel[(stretches, count)](
        scores, rows.positions, rows.index_top_k, thresholds, words, scores.stride(0), words.stride(0), width, context,
        STRETCH=STRETCH, num_warps=STRETCH_WARPS, **overlap(),
    )  # fmt: skip
    _decide_kernel[(count,)](
        scores, rows.positions, rows.index_top_k, thresholds, words, places, out, out if cuts is None else cuts,
        scores.stride(0), words.stride(0), width, context, width,
        ROOM=plan.room, SAMPLE=plan.sample, DEVIATIONS=SECOND_DEVIATIONS, GROUPS=min(32 * DECIDE_WARPS, plan.sample // 4),
        WORDS=min(WORDS, int(triton.next_power_of_2(words.shape[1]))), STRETCH=STRETCH, CUTS=cuts is not None, num_warps=DECIDE_WARPS, **overlap(),
    )  # fmt: skip


@triton.jit
def _marked(
    values: tl.tensor, i: tl.tensor, end: tl.tensor, cut: tl.tensor, place: tl.tensor, WORDS: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Which scores are candidates, as words; the lowest cut stands for -inf, which is never in."""
    threshold = tl.where(cut == _LEAST, float("-inf"), score_of(cut))
    place = tl.where(cut == _LEAST, end, place)
    return packed(((values > threshold) | ((values == threshold) & (i >= place))) & (i < end), WORDS)


@triton.jit
def _gathered(
    words: tl.tensor, own: tl.tensor, end: tl.tensor, ROOM: tl.constexpr, WORDS: tl.constexpr
) -> tl.tensor:
    """The marked positions, in order, as far as there is room; how many there are."""
    count = tl.full((), 0, tl.int32)
    for first in range(0, end, 32 * WORDS):
        at = first + 32 * tl.arange(0, WORDS)
        some = tl.load(words + first // 32 + tl.arange(0, WORDS), mask=at < end, other=0)
        ones, running, both = counted(some)
        most, total = tl.split(both)
        emit(own, ROOM, some, count + running - ones, most, first, own, WORDS, False)
        count += total
    return count


@kernel
def _sample_kernel(
    scores: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, thresholds: tl.tensor, scores_row: tl.tensor, width: tl.tensor, context: tl.tensor,
    ROOM: tl.constexpr, SAMPLE: tl.constexpr, DEVIATIONS: tl.constexpr, GROUPS: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """From where on a row has candidates; all of a row that there is room for."""
    if EARLY:
        # In this order, so that the kernel after the next one finds the scores written while this one still computes.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    end = tl.minimum(tl.load(positions + t) + 1, context)
    k = tl.minimum(tl.load(index_top_k + t), width)
    cut = tl.full((), _LEAST, tl.int32)
    place = tl.full((), 0, tl.int32)
    if (end > ROOM) & (k > 0):
        cut, place = sampled(scores + t * scores_row, end, k, SAMPLE, DEVIATIONS, _FIRST, GROUPS)
    tl.store(thresholds + 2 * t, cut)
    tl.store(thresholds + 2 * t + 1, place)


@kernel
def _mark_kernel(
    scores: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, thresholds: tl.tensor, words: tl.tensor, scores_row: tl.tensor, words_row: tl.tensor,
    width: tl.tensor, context: tl.tensor, STRETCH: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """The bits of one stretch of one row. Scores are read before the sample's kernel, which wrote none, has ended."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    stretch = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    start = stretch * STRETCH
    end = tl.minimum(tl.load(positions + t) + 1, context)
    live = (start < end) & (tl.minimum(tl.load(index_top_k + t), width) > 0)
    i = start + tl.arange(0, STRETCH)
    values = tl.load(scores + t * scores_row + i, mask=(i < context) & live, other=float("-inf"))
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if live:
        cut = tl.load(thresholds + 2 * t)
        place = tl.load(thresholds + 2 * t + 1)
        word = stretch * (STRETCH // 32) + tl.arange(0, STRETCH // 32)
        tl.store(words + t * words_row + word, _marked(values, i, end, cut, place, STRETCH // 32))


@kernel
def _decide_kernel(
    scores: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, thresholds: tl.tensor, words: tl.tensor, places: tl.tensor, out: tl.tensor, cuts: tl.tensor,
    scores_row: tl.tensor, words_row: tl.tensor, out_row: tl.tensor, context: tl.tensor, width: tl.tensor,
    ROOM: tl.constexpr, SAMPLE: tl.constexpr, DEVIATIONS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, STRETCH: tl.constexpr, CUTS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """The best of one row."""
    turn(EARLY)
    t = tl.program_id(0).to(tl.int64)
    end = tl.minimum(tl.load(positions + t) + 1, context)
    k = tl.minimum(tl.load(index_top_k + t), width)
    chosen = out + t * out_row
    SMALL: tl.constexpr = ROOM // 2
    written = 0
    if (end > 0) & (k > 0):
        row = scores + t * scores_row
        own = places + t * ROOM
        cut = tl.load(thresholds + 2 * t)
        place = tl.load(thresholds + 2 * t + 1)
        count = _gathered(words + t * words_row, own, end, ROOM, WORDS)
        misled = (count > ROOM) | ((count < k) & (cut != _LEAST))
        if misled:
            cut, place = sampled(row, end, k, SAMPLE, DEVIATIONS, _SECOND, GROUPS)
            for start in range(0, end, STRETCH):
                i = start + tl.arange(0, STRETCH)
                values = tl.load(row + i, mask=i < context, other=float("-inf"))
                word = start // 32 + tl.arange(0, STRETCH // 32)
                tl.store(words + t * words_row + word, _marked(values, i, end, cut, place, STRETCH // 32))
            tl.debug_barrier()  # what other threads of the program stored is read
            count = _gathered(words + t * words_row, own, end, ROOM, WORDS)
            misled = (count > ROOM) | ((count < k) & (cut != _LEAST))
        tl.debug_barrier()
        if misled:
            written, low, place = search_through(row, chosen, end, k, STRETCH, STRETCH // 16)
            if CUTS:
                store_cut(cuts + 2 * t, low, place)
        elif count <= SMALL:
            written = decide(row, own, chosen, cuts + 2 * t, count, cut, place, k, SMALL, CUTS)
        else:
            written = decide(row, own, chosen, cuts + 2 * t, count, cut, place, k, ROOM, CUTS)
    fill(chosen, written, width, STRETCH // 4)
