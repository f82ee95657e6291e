"""What the forms of top-k share: scores as integers in their order, cuts of a range of these, and writing out what is in.

Numbers of a program come as [J, N, 4]: N groups of four neighbours, J times, in the order of their positions. A thread
reads four neighbours at once, so that sums over the first and the last dimension stay within it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LEAST = -(2**31)
"""What stands for a score that is never selected."""

_LEAST = tl.constexpr(LEAST)
_POPC = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)


@triton.jit
def ordered(scores: tl.tensor) -> tl.tensor:
    """float32 -> int32 in the same order, -0 as +0; the lowest int32 of all is left over."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(key: tl.tensor) -> tl.tensor:
    """The score of a key between those of the infinities."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def keys_of(scores: tl.tensor, i: tl.tensor, end: tl.tensor) -> tl.tensor:
    """Integers in the order of the scores; the lowest of all for -inf and for what lies beyond the end."""
    return tl.where((i < end) & (scores != float("-inf")), ordered(scores), _LEAST)


@triton.jit
def third(low: tl.tensor, high: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """What cuts the range above low in three."""
    size = ((high - low).to(tl.uint32, bitcast=True) // 3).to(tl.int32, bitcast=True)
    lower = low + size + 1
    return lower, lower + size


@triton.jit
def narrowed(
    low: tl.tensor, high: tl.tensor, least: tl.tensor, lower: tl.tensor, upper: tl.tensor, many: tl.tensor,
    few: tl.tensor, k: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The range that has the k-th largest, when `many` are >= lower and `few` are >= upper, and how many are >= its low."""
    high = tl.where(few >= k, high, tl.where(many >= k, upper - 1, lower - 1))
    low = tl.where(few >= k, upper, tl.where(many >= k, lower, low))
    least = tl.where(few >= k, few, tl.where(many >= k, many, least))
    return low, high, least


@triton.jit
def fifths(
    keys: tl.tensor, low: tl.tensor, high: tl.tensor, least: tl.tensor, k: tl.tensor, enough: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """A key that at least k of `keys` [N] reach and at most `enough`, or the k-th largest itself; and how many reach it.

    Four cuts a round, a fifth of the range apart, the last numbers one by one.

    Args:
        keys: all of them
        low: `least` keys are >= low, at least k or all
        high: fewer than k are above it
        least: see `low`
        k: wanted
        enough: how many more than wanted may be left, k or more
    """
    while (least > enough) & (low < high):
        fifth = ((high - low).to(tl.uint32, bitcast=True) // 5).to(tl.int32, bitcast=True)
        first = low + fifth + 1
        second = first + fifth
        third_cut = second + fifth
        fourth = tl.where(fifth == 0, high, third_cut + fifth)
        if keys.shape[0] < 1 << 15:  # two counts fit in one number
            lower = (keys >= first).to(tl.int32) + ((keys >= second).to(tl.int32) << 16)
            upper = (keys >= third_cut).to(tl.int32) + ((keys >= fourth).to(tl.int32) << 16)
            a, b = tl.split(tl.sum(tl.join(lower, upper), 0))
            one = a & 0xFFFF
            two = a >> 16
            three = b & 0xFFFF
            four = b >> 16
        else:
            one = tl.sum((keys >= first).to(tl.int32), 0)
            two = tl.sum((keys >= second).to(tl.int32), 0)
            three = tl.sum((keys >= third_cut).to(tl.int32), 0)
            four = tl.sum((keys >= fourth).to(tl.int32), 0)
        high = tl.where(four >= k, high, tl.where(three >= k, fourth - 1, tl.where(two >= k, third_cut - 1, tl.where(one >= k, second - 1, first - 1))))  # fmt: skip
        low = tl.where(four >= k, fourth, tl.where(three >= k, third_cut, tl.where(two >= k, second, tl.where(one >= k, first, low))))  # fmt: skip
        least = tl.where(four >= k, four, tl.where(three >= k, three, tl.where(two >= k, two, tl.where(one >= k, one, least))))  # fmt: skip
    return low, least


@triton.jit
def tie_cut(keys: tl.tensor, low: tl.tensor, at: tl.tensor, end: tl.tensor, k: tl.tensor) -> tl.tensor:
    """The last position from which on the keys equal to low are enough, with those above, for k."""
    above = tl.sum((keys > low).to(tl.int32), 0)
    tied = keys == low
    before = tl.full((), 0, tl.int32)
    after = end
    while after - before > 1:
        middle = (before + after) // 2
        enough = above + tl.sum((tied & (at >= middle)).to(tl.int32), 0) >= k
        before = tl.where(enough, middle, before)
        after = tl.where(enough, after, middle)
    return before


@triton.jit
def _ones(x: tl.tensor) -> tl.tensor:
    """How many bits are set."""
    if _POPC:
        count = tl.inline_asm_elementwise(
            "popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        count = x - ((x >> 1) & 0x55555555)
        count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
        count = (count + (count >> 4)) & 0x0F0F0F0F
        count = (count * 0x01010101) >> 24
    return count


@triton.jit
def packed(hit: tl.tensor, WORDS: tl.constexpr) -> tl.tensor:
    """[32 WORDS] truths, four neighbours a thread, as [WORDS] int32: 32 neighbours a word, the first in its lowest bit."""
    bits = tl.reshape(hit.to(tl.int32), (WORDS, 8, 4))
    quads = tl.sum(bits << tl.arange(0, 4)[None, None, :], 2)
    return tl.sum(quads << (4 * tl.arange(0, 8))[None, :], 1)


@triton.jit
def counted(words: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """How many bits each word has; how many the words up to it have; and (most of a word, all)."""
    ones = _ones(words)
    running = tl.cumsum(ones, 0)
    return ones, running, tl.max(tl.join(ones, running), 0)


@triton.jit
def words_of(
    hit: tl.tensor, J: tl.constexpr, N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Bits of [J, N, 4], 32 neighbours a word; how many each word has, and the words up to it; most of a word and of all."""
    quads = tl.sum(hit.to(tl.int32) << tl.arange(0, 4)[None, None, :], 2)
    parts = tl.reshape(quads, (J * N // 8, 8))
    words = tl.sum(parts << (4 * tl.arange(0, 8))[None, :], 1)
    ones, running, both = counted(words)
    return words, ones, running, both


@triton.jit
def emit(
    target: tl.tensor, room: tl.tensor, words: tl.tensor, slot: tl.tensor, most: tl.tensor, base: tl.tensor,
    source: tl.tensor, WORDS: tl.constexpr, SOURCE: tl.constexpr,
) -> None:  # fmt: skip
    """Store the places of the bits from each word's slot on, up to `room`: base + bit, or source[base + bit]."""
    first = base + 32 * tl.arange(0, WORDS)
    for _ in range(most):
        place = first + _ones((words & -words) - 1)
        kept = (words != 0) & (slot < room)
        if SOURCE:
            place = tl.load(source + place, mask=kept, other=-1)
        tl.store(target + slot, place, mask=kept)
        slot += 1
        words = words & (words - 1)


@triton.jit
def store_cut(cut: tl.tensor, low: tl.tensor, place: tl.tensor) -> None:
    """(key, position): what is above it, or equal to it from that position on, is selected."""
    tl.store(cut, low)
    tl.store(cut + 1, tl.where(low == _LEAST, 0x7FFFFFFF, place))


@triton.jit
def fill(chosen: tl.tensor, written: tl.tensor, width: tl.tensor, SIZE: tl.constexpr) -> None:
    """-1 after what is written."""
    for rest in range(written, width, SIZE):
        j = rest + tl.arange(0, SIZE)
        tl.store(chosen + j, tl.full((SIZE,), -1, tl.int32), mask=j < width)
