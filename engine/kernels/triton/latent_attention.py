"""Absorbed latent attention of flat rows over a paged cache: selected positions, and dense decodes.

More than 400 lines, because two forms share how rows are split and merged.

    out[t,h] = sum_c softmax_c(scale * query[t,h] . c) c[:r],   c = [latent r | rotated shared key p]

over selected[t] for a sparse row and over all c <= positions[t] for a dense one (multi-head latent attention in its absorbed
form, arXiv 2405.04434, section 2.1). All heads of a row read the same c, so a program takes up to `MOST_HEADS` of them.
Softmax is the online one of FlashAttention (arXiv 2205.14135). Long rows are split and merged by log-sum-exp
(flash-decoding), in float32 and in a fixed order; there are no atomic additions.

Two forms:

- *sparse rows*, decodes and prompts: a program is one row, one block of heads and one split of what is selected;
- *dense rows*, decodes: as many programs as the device has multiprocessors divide the splits of all rows among themselves,
  since nobody knows before a replay which rows are dense, and how long.

How a row is split depends on its own length and on the number of rows of the launch, which in a captured graph is that of
its bucket. So the same row has the same bits in any company and at any place of a batch of one size, and may differ in the
last bits between sizes.

FP8 latents lie as `engine.memory.layouts.LatentLayout` says. They are dequantised to the query's dtype, and the products are
of that dtype with float32 sums.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.config import PAGE_SIZE
from engine.errors import EngineError
from engine.kernels.triton.kernel import block, kernel, overlap, turn
from engine.kernels.triton.rows import Rows
from engine.memory.layouts import LatentLayout

MOST_HEADS = 64
"""Heads of one program: more do not fit a multiprocessor's registers."""
MOST_DENSE_SPLITS = 64
"""Of a dense row; `MOST_DENSE_PARTS` bounds them, too."""
MOST_DENSE_PARTS = 512
"""Dense rows of a launch times splits of each: float32 results wait to be merged, 134 MB at 128 heads of rank 512."""
MOST_SPARSE_SPLITS = 32
"""Of a sparse row."""
DENSE_SPLIT = 512
"""Positions in a split of a dense row; it doubles as often as the number of splits wants."""
SPARSE_PROGRAMS = 132
"""Sparse rows are split while the launch has no more programs than this: multiprocessors of an H100 or H200."""
ROWS_AT_ONCE = 1024
"""Dense rows of a launch; a batch with more takes several."""

_PAGE = tl.constexpr(PAGE_SIZE)
_ASSEMBLY = tl.constexpr(not triton.knobs.runtime.interpret)
_LOG2_E = 1.4426950408889634


class LatentShape(NamedTuple):
    """Of a program: heads, positions a step, warps, stages of loads."""

    heads: int
    keys: int
    warps: int
    stages: int


def shape_of(dtype: torch.dtype, heads: int, fp8: bool) -> LatentShape:
    """What a program takes of `heads` heads. No function of the batch: a row's bits depend on it."""
    if dtype == torch.float32:
        return LatentShape(16, 16, 4, 1)
    taken = min(MOST_HEADS, max(16, block(heads)))
    return LatentShape(taken, 64, 8, 3 if fp8 else 2)


def attend_latents(
    query: Tensor, plane: Tensor, rows: Rows, selected: Tensor | None, rank: int, scale: float, max_context: int,
    singles: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of every sparse row, and of dense rows; 0 for padding.

    Args:
        query: [T, H, r + p] bfloat16 or float32, its plain part already multiplied with the head's key expansion
        plane: [num_pages, 64, token_bytes] uint8 as `LatentLayout(r, p)` lays it out, or [num_pages, 64, r + p] of
            floating point; a token's part of it is contiguous
        rows: the batch
        selected: [T, K] int32, the positions that sparse rows attend to, ascending, then -1 for none; of a row's, the first
            index_top_k are read. None: every row is dense, whatever its index_top_k
        rank: r, a multiple of 4 if the plane is uint8
        scale: of the products, positive
        max_context: no row's position reaches it
        singles: [M] int32, the dense rows to compute. None: all of them

    Returns:
        [T, H, r] in the query's dtype. Dense rows that `singles` leaves out are not written if `selected` is given
    """
    count, heads, width = query.shape
    rope = width - rank
    fp8 = plane.dtype == torch.uint8
    stored = LatentLayout(rank, rope).token_bytes if fp8 else width
    if not 0 < rank < width or (fp8 and rank % 4):
        raise EngineError(
            f"a latent of {rank} in a query of {width} numbers; a multiple of 4 below it can be"
        )
    if plane.dim() != 3 or plane.shape[1:] != (PAGE_SIZE, stored) or plane.stride(2) != 1:
        raise EngineError(
            f"a query {tuple(query.shape)} of rank {rank} needs a cache [pages, {PAGE_SIZE}, {stored}], "
            f"but it is {tuple(plane.shape)} of {plane.dtype}"
        )
    if query.stride()[1:] != (width, 1):
        raise EngineError("a row's query is contiguous")
    if scale <= 0:
        raise EngineError(f"the scale is {scale}; it must be positive")
    listed = singles is not None and selected is None
    make = query.new_zeros if listed else query.new_empty  # nobody else would write its padding
    out = make(count, heads, rank)
    call = _Call(query, plane, rows, rank, scale, out)
    if selected is not None and count:
        call.sparse(selected)
    for start in range(0, count if singles is None else len(singles), ROWS_AT_ONCE):
        if singles is None:
            call.dense(None, start, min(count - start, ROWS_AT_ONCE), max_context, selected is None)
        else:
            part = singles[start : start + ROWS_AT_ONCE]
            call.dense(part, 0, len(part), max_context, selected is None)
    return out


def sparse_splits(count: int, blocks: int, width: int, keys: int) -> int:
    """Splits of `width` selected positions, in a launch of `count` rows and `blocks` blocks of heads each."""
    splits = 1
    while (
        splits < MOST_SPARSE_SPLITS
        and 2 * splits * count * blocks <= SPARSE_PROGRAMS
        and splits * keys < width
    ):
        splits *= 2
    return splits


def dense_splits(count: int, max_context: int) -> int:
    """The most splits of a dense row, in a launch of `count` rows of at most `max_context` positions."""
    splits = 1
    while (
        splits < MOST_DENSE_SPLITS
        and 2 * splits * count <= MOST_DENSE_PARTS
        and splits * DENSE_SPLIT < max_context
    ):
        splits *= 2
    return splits


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


class _Call:
    """One call's tensors, and its launches."""

    def __init__(
        self, query: Tensor, plane: Tensor, rows: Rows, rank: int, scale: float, out: Tensor
    ) -> None:
        self._query, self._plane, self._rows, self._out = query, plane, rows, out
        self._scale = scale * _LOG2_E
        self._heads, self._rank = query.shape[1], rank
        self._fp8 = plane.dtype == torch.uint8
        self._shape = shape_of(query.dtype, self._heads, self._fp8)
        self._blocks = triton.cdiv(self._heads, self._shape.heads)

    def sparse(self, selected: Tensor) -> None:
        """All sparse rows, and padding."""
        rows, (count, width) = self._rows, selected.shape
        splits = sparse_splits(count, self._blocks, width, self._shape.keys)
        each = triton.cdiv(triton.cdiv(width, splits), self._shape.keys) * self._shape.keys
        parts, sums = self._parts(count, splits)
        _sparse_kernel[(count * splits * self._blocks,)](
            self._query, self._plane, rows.block_table, rows.request, rows.positions, rows.index_top_k, selected,
            self._out, parts, sums, self._scale, self._query.stride(0), self._plane.stride(0), self._plane.stride(1),
            rows.block_table.stride(0), selected.stride(0), width, splits, each, **self._constants(), **overlap(),
        )  # fmt: skip
        if splits > 1:
            _merge_kernel[(count, self._heads)](
                parts, sums, rows.positions, rows.index_top_k, rows.positions, self._out, width, splits, each, 0,
                HEADS=self._heads, RANK=self._rank, RANK_BLOCK=block(self._rank), SPLITS=splits, MOST=0,
                SPARSE=True, LISTED=False, EVERY=False, num_warps=2, **overlap(),
            )  # fmt: skip

    def dense(self, listed: Tensor | None, first: int, count: int, max_context: int, every: bool) -> None:
        """The dense ones among `listed`, or among `count` rows from `first` on, or `every` one; padding, too."""
        rows = self._rows
        splits = dense_splits(count, max_context)
        parts, sums = self._parts(count, splits)
        source = rows.positions if listed is None else listed
        programs = min(_multiprocessors(self._out.device), count * splits * self._blocks)
        _dense_kernel[(programs,)](
            self._query, self._plane, rows.block_table, rows.request, rows.positions, rows.index_top_k, source,
            self._out, parts, sums, self._scale, self._query.stride(0), self._plane.stride(0), self._plane.stride(1),
            rows.block_table.stride(0), count, first, ROWS=block(count), MOST=splits, BASE=DENSE_SPLIT,
            LISTED=listed is not None, EVERY=every, **self._constants(), **overlap(),
        )  # fmt: skip
        if splits > 1:
            _merge_kernel[(count, self._heads)](
                parts, sums, rows.positions, rows.index_top_k, source, self._out, 0, splits, DENSE_SPLIT, first,
                HEADS=self._heads, RANK=self._rank, RANK_BLOCK=block(self._rank), SPLITS=splits, MOST=splits,
                SPARSE=False, LISTED=listed is not None, EVERY=every, num_warps=2, **overlap(),
            )  # fmt: skip

    def _constants(self) -> dict[str, Any]:
        """What both forms are compiled for."""
        shape, rope = self._shape, self._query.shape[2] - self._rank
        return {
            "HEADS": self._heads, "RANK": self._rank, "ROPE": rope, "RANK_BLOCK": max(16, block(self._rank)),
            "ROPE_BLOCK": max(16, block(rope)), "HEADS_BLOCK": shape.heads, "KEYS": shape.keys, "FP8": self._fp8,
            "APART": self._query.dtype == torch.bfloat16, "num_warps": shape.warps, "num_stages": shape.stages,
        }  # fmt: skip

    def _parts(self, count: int, splits: int) -> tuple[Tensor, Tensor]:
        """Room for what the splits of rows leave: outputs [rows, splits, H, r], and the log2 of each one's sum."""
        held = count if splits > 1 else 0
        options: dict[str, Any] = {"dtype": torch.float32, "device": self._out.device}
        return (
            torch.empty(held, splits, self._heads, self._rank, **options),
            torch.empty(held, splits, self._heads, **options),
        )


@triton.jit
def _touch(place: tl.tensor) -> None:
    """Ask for the cache lines at these addresses; nothing waits for them."""
    if _ASSEMBLY:
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [place.to(tl.int64)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _numbers(
    place: tl.tensor, dtype: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, RANK_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr, FP8: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """The tokens at `place` [KEYS]: latents [KEYS, RANK_BLOCK] and rotated keys [KEYS, ROPE_BLOCK], in `dtype`."""
    KEYS: tl.constexpr = place.shape[0]
    d = tl.arange(0, RANK_BLOCK)
    p = tl.arange(0, ROPE_BLOCK)
    # A mask of what is a constant costs the load its width: only where there is something to mask.
    if FP8:
        WIDTH: tl.constexpr = min(RANK_BLOCK, 128)
        SCALES: tl.constexpr = RANK_BLOCK // WIDTH
        STORED: tl.constexpr = (RANK + 127) // 128
        b = tl.arange(0, SCALES)
        at = (place + RANK).to(tl.pointer_type(tl.float32))[:, None] + b[None, :]
        raw = place.to(tl.pointer_type(tl.float8e4nv))[:, None] + d[None, :]
        if SCALES == STORED:
            scales = tl.load(at)
        else:
            scales = tl.load(at, mask=(b < STORED)[None, :], other=0.0)
        if RANK == RANK_BLOCK:
            values = tl.load(raw)
        else:
            values = tl.load(raw, mask=(d < RANK)[None, :], other=0.0)
        wide = tl.reshape(values, (KEYS, SCALES, WIDTH)).to(tl.float32) * scales[:, :, None]
        latents = tl.reshape(wide.to(dtype), (KEYS, RANK_BLOCK))
        rotated = (place + (RANK + 4 * STORED)).to(tl.pointer_type(tl.bfloat16))[:, None] + p[None, :]
    else:
        if RANK == RANK_BLOCK:
            latents = tl.load(place[:, None] + d[None, :]).to(dtype)
        else:
            latents = tl.load(place[:, None] + d[None, :], mask=(d < RANK)[None, :], other=0.0).to(dtype)
        rotated = (place + RANK)[:, None] + p[None, :]
    if ROPE == ROPE_BLOCK:
        keys = tl.load(rotated).to(dtype)
    else:
        keys = tl.load(rotated, mask=(p < ROPE)[None, :], other=0.0).to(dtype)
    return latents, keys


@triton.jit
def _split(
    t: tl.tensor, heads: tl.tensor, begin: tl.tensor, end: tl.tensor, alone: tl.tensor, part: tl.tensor,
    query: tl.tensor, plane: tl.tensor, pages: tl.tensor, selected: tl.tensor, out: tl.tensor, parts: tl.tensor,
    sums: tl.tensor, scale: tl.tensor, query_row: tl.tensor, page_stride: tl.tensor, token_stride: tl.tensor,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, RANK_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, KEYS: tl.constexpr, FP8: tl.constexpr, APART: tl.constexpr, SPARSE: tl.constexpr,
) -> None:  # fmt: skip
    """One row and one block of heads, from `begin` to `end`: to `out` if it is `alone`, else to its `part`.

    `pages` is the request's line of the page table, `selected` the row's.
    """
    h = heads * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    d = tl.arange(0, RANK_BLOCK)
    p = tl.arange(0, ROPE_BLOCK)
    i = tl.arange(0, KEYS)
    own = h < HEADS
    place = query + t.to(tl.int64) * query_row + h * (RANK + ROPE)
    q = tl.load(place[:, None] + d[None, :], mask=own[:, None] & (d < RANK)[None, :], other=0.0)
    q_rope = tl.load(place[:, None] + (RANK + p)[None, :], mask=own[:, None] & (p < ROPE)[None, :], other=0.0)
    top = tl.full((HEADS_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS_BLOCK,), tl.float32)
    acc = tl.zeros((HEADS_BLOCK, RANK_BLOCK), tl.float32)
    for start in tl.range(begin, end, KEYS):
        at = start + i
        there = at < end
        if SPARSE:
            at = tl.load(selected + at, mask=there, other=-1)
            there = at >= 0
        # Beyond the end the first token is read, which is finite and weighs nothing.
        at = tl.where(there, at, 0)
        page = tl.load(pages + at // _PAGE).to(tl.int64)
        latents, keys = _numbers(
            plane + page * page_stride + at % _PAGE * token_stride, q.dtype, RANK, ROPE, RANK_BLOCK, ROPE_BLOCK,
            FP8,
        )  # fmt: skip
        rotated = tl.dot(q_rope, tl.trans(keys), input_precision="ieee")
        products = tl.dot(q, tl.trans(latents), input_precision="ieee")
        products = tl.where(there[None, :], (rotated + products) * scale, float("-inf"))
        if APART:
            # A branch that is always taken: without it the compiler sees one product feed the other, lays all warps
            # along the heads, and lets each half of them compute all of the first product.
            weights = tl.zeros((HEADS_BLOCK, KEYS), latents.dtype)
            shrink = tl.full((HEADS_BLOCK,), 1.0, tl.float32)
            if scale > 0:
                highest = tl.maximum(top, tl.max(products, 1))
                base = tl.where(highest == float("-inf"), 0.0, highest)
                wide = tl.exp2(products - base[:, None])
                shrink = tl.exp2(top - base)
                total = total * shrink + tl.sum(wide, 1)
                weights = wide.to(latents.dtype)
                top = highest
        else:
            highest = tl.maximum(top, tl.max(products, 1))
            base = tl.where(highest == float("-inf"), 0.0, highest)
            wide = tl.exp2(products - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(wide, 1)
            weights = wide.to(latents.dtype)
            top = highest
        acc = tl.dot(weights, latents, acc * shrink[:, None], input_precision="ieee")
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    kept = own[:, None] & (d < RANK)[None, :]
    if alone:
        row = t.to(tl.int64) * HEADS + h
        tl.store(out + row[:, None] * RANK + d[None, :], result.to(out.dtype.element_ty), mask=kept)
    else:
        row = part.to(tl.int64) * HEADS + h
        tl.store(parts + row[:, None] * RANK + d[None, :], result, mask=kept)
        tl.store(sums + row, top + tl.log2(total), mask=own)


@kernel
def _sparse_kernel(
    query: tl.tensor, plane: tl.tensor, block_table: tl.tensor, request: tl.tensor, positions: tl.tensor,
    index_top_k: tl.tensor, selected: tl.tensor, out: tl.tensor, parts: tl.tensor, sums: tl.tensor, scale: tl.tensor,
    query_row: tl.tensor, page_stride: tl.tensor, token_stride: tl.tensor, table_row: tl.tensor,
    selected_row: tl.tensor, width: tl.tensor, splits: tl.tensor, each: tl.tensor,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, RANK_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, KEYS: tl.constexpr, FP8: tl.constexpr, APART: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """One row, one block of heads, one split. Neighbours read the same tokens: they meet in the cache."""
    turn(EARLY)
    BLOCKS: tl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    program = tl.program_id(0)
    heads = program % BLOCKS
    part = program // BLOCKS % splits
    t = program // BLOCKS // splits
    length = tl.maximum(tl.load(positions + t) + 1, 0)
    chosen = tl.load(index_top_k + t)
    if (length > 0) & (chosen <= 0):
        return
    length = tl.minimum(tl.minimum(chosen, width), length)
    begin = part * each
    if (begin >= length) & (part > 0):
        return
    pages = block_table + tl.load(request + t).to(tl.int64) * table_row
    _split(
        t, heads, begin, tl.minimum(begin + each, length), length <= each, t * splits + part, query, plane, pages,
        selected + t.to(tl.int64) * selected_row, out, parts, sums, scale, query_row, page_stride, token_stride,
        HEADS, RANK, ROPE, RANK_BLOCK, ROPE_BLOCK, HEADS_BLOCK, KEYS, FP8, APART, True,
    )  # fmt: skip


@triton.jit
def _dense_extent(
    t: tl.tensor, there: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, MOST: tl.constexpr,
    BASE: tl.constexpr, EVERY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Of rows [ROWS]: how many positions they attend to, -1 if they are sparse, and how long a split is."""
    length = tl.maximum(tl.load(positions + t, mask=there, other=-1) + 1, 0)
    chosen = 0 * length if EVERY else tl.load(index_top_k + t, mask=there, other=1)
    split = BASE + 0 * length
    for _ in tl.static_range(16):
        split = tl.where(split * MOST < length, split * 2, split)
    sparse = (chosen > 0) & (length > 0)
    return tl.where(sparse | (there == 0), -1, length), split


@kernel
def _dense_kernel(
    query: tl.tensor, plane: tl.tensor, block_table: tl.tensor, request: tl.tensor, positions: tl.tensor,
    index_top_k: tl.tensor, source: tl.tensor, out: tl.tensor, parts: tl.tensor, sums: tl.tensor, scale: tl.tensor,
    query_row: tl.tensor, page_stride: tl.tensor, token_stride: tl.tensor, table_row: tl.tensor, num_rows: tl.tensor,
    first: tl.tensor, ROWS: tl.constexpr, MOST: tl.constexpr, BASE: tl.constexpr, LISTED: tl.constexpr,
    EVERY: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, RANK_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, KEYS: tl.constexpr, FP8: tl.constexpr, APART: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """A share of all pairs of a split and a block of heads; programs take them in turns."""
    turn(EARLY)
    BLOCKS: tl.constexpr = (HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    e = tl.arange(0, ROWS)
    there = e < num_rows
    row = tl.load(source + e, mask=there, other=0) if LISTED else first + e
    length, split = _dense_extent(row, there, positions, index_top_k, MOST, BASE, EVERY)
    own = tl.where(length < 0, 0, tl.maximum((length + split - 1) // split, 1))  # padding writes its zeros
    upto = tl.cumsum(own, 0)
    for item in tl.range(tl.program_id(0), tl.sum(own, 0) * BLOCKS, tl.num_programs(0)):
        index = item // BLOCKS
        entry = tl.sum((upto <= index).to(tl.int32), 0)
        mine = e == entry
        part = index - tl.sum(tl.where(e < entry, own, 0), 0)
        t = tl.sum(tl.where(mine, row, 0), 0)
        size = tl.sum(tl.where(mine, split, 0), 0)
        end = tl.sum(tl.where(mine, length, 0), 0)
        pages = block_table + tl.load(request + t).to(tl.int64) * table_row
        begin = part * size
        _split(
            t, item % BLOCKS, begin, tl.minimum(begin + size, end), end <= size, entry * MOST + part, query, plane,
            pages, pages, out, parts, sums, scale, query_row, page_stride, token_stride,
            HEADS, RANK, ROPE, RANK_BLOCK, ROPE_BLOCK, HEADS_BLOCK, KEYS, FP8, APART, False,
        )  # fmt: skip


@kernel
def _merge_kernel(
    parts: tl.tensor, sums: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, source: tl.tensor, out: tl.tensor,
    width: tl.tensor, splits: tl.tensor, each: tl.tensor, first: tl.tensor,
    HEADS: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr,
    SPARSE: tl.constexpr, LISTED: tl.constexpr, EVERY: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """One head of one row that has more than one split: sum_s 2^lse_s part_s / sum_s 2^lse_s."""
    turn(EARLY)
    entry = tl.program_id(0)
    head = tl.program_id(1)
    t = tl.load(source + entry) if LISTED else first + entry
    length = tl.maximum(tl.load(positions + t) + 1, 0)
    chosen = 0 * length if EVERY else tl.load(index_top_k + t)
    size = each + 0 * length
    if SPARSE:
        length = tl.where(chosen > 0, tl.minimum(tl.minimum(chosen, width), length), 0)
    else:
        length = tl.where(chosen > 0, 0, length)
        while size * MOST < length:
            size *= 2
    if length <= size:
        return
    count = tl.cdiv(length, size)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, RANK_BLOCK)
    place = (entry.to(tl.int64) * splits + s) * HEADS + head
    lse = tl.load(sums + place, mask=s < count, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, 0))
    own = tl.load(
        parts + place[:, None] * RANK + d[None, :], mask=(s < count)[:, None] & (d < RANK)[None, :], other=0.0
    )
    result = tl.sum(own * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + (t.to(tl.int64) * HEADS + head) * RANK + d, result.to(out.dtype.element_ty), mask=d < RANK)
