"""Kernels of absorbed latent attention: any head counts, ranks and dtypes, and what goes before and after any form.

`engine.kernels.triton.latent_attention` says what they compute, and launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.config import PAGE_SIZE
from engine.kernels.triton.kernel import kernel, turn

_PAGE = tl.constexpr(PAGE_SIZE)


@kernel
def locate_kernel(
    block_table: tl.tensor, request: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, selected: tl.tensor,
    tokens: tl.tensor, table_row: tl.tensor, selected_row: tl.tensor, tokens_row: tl.tensor, width: tl.tensor,
    SIZE: tl.constexpr, EVERY: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """A sparse row's selected positions, `SIZE` of them, become tokens: page times 64 plus offset.

    With `EVERY`, all rows are written, and what a row does not attend to is -1.
    """
    turn(EARLY)
    t = tl.program_id(0)
    i = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    last = tl.load(positions + t)
    chosen = tl.load(index_top_k + t)
    sparse = (last >= 0) & (chosen > 0)
    if EVERY:
        end = tl.where(sparse, tl.minimum(tl.minimum(chosen, width), last + 1), 0)
        position = tl.load(selected + t.to(tl.int64) * selected_row + i, mask=i < end, other=-1)
        there = position >= 0
        pages = block_table + tl.load(request + t).to(tl.int64) * table_row
        page = tl.load(pages + position // _PAGE, mask=there, other=0)
        token = tl.where(there, page * _PAGE + position % _PAGE, -1)
        tl.store(tokens + t.to(tl.int64) * tokens_row + i, token, mask=i < width)
    elif sparse:
        position = tl.load(selected + t.to(tl.int64) * selected_row + i, mask=i < width, other=-1)
        pages = block_table + tl.load(request + t).to(tl.int64) * table_row
        at = tl.maximum(position, 0)
        token = tl.load(pages + at // _PAGE) * _PAGE + at % _PAGE
        token = tl.where(position < 0, -1 - token, token)
        tl.store(tokens + t.to(tl.int64) * tokens_row + i, token, mask=i < width)


@kernel
def items_kernel(
    positions: tl.tensor, index_top_k: tl.tensor, source: tl.tensor, items: tl.tensor, num_rows: tl.tensor,
    first: tl.tensor, ROWS: tl.constexpr, MOST: tl.constexpr, BASE: tl.constexpr, LISTED: tl.constexpr,
    EVERY: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """List the splits of dense rows: `items` [1 + N, 4] is their number; then each one's row, part, begin and end.

    The part is -1 if it is its row's only one.
    """
    turn(EARLY)
    e = tl.arange(0, ROWS)
    there = e < num_rows
    row = tl.load(source + e, mask=there, other=0) if LISTED else first + e
    length, split = _dense_extent(row, there, positions, index_top_k, MOST, BASE, EVERY)
    own = tl.where(length < 0, 0, tl.maximum((length + split - 1) // split, 1))  # padding writes its zeros
    before = tl.cumsum(own, 0) - own
    tl.store(items, tl.sum(own, 0))
    for part in range(tl.max(own, 0)):
        place = items + (1 + before + part) * 4
        begin = part * split
        mask = part < own
        tl.store(place, row, mask=mask)
        tl.store(place + 1, tl.where(length <= split, -1, e * MOST + part), mask=mask)
        tl.store(place + 2, begin, mask=mask)
        tl.store(place + 3, tl.minimum(begin + split, length), mask=mask)


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
def sparse_kernel(
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
def dense_kernel(
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
def merge_kernel(
    parts: tl.tensor, sums: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, source: tl.tensor, out: tl.tensor,
    width: tl.tensor, splits: tl.tensor, each: tl.tensor, first: tl.tensor,
    HEADS: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr,
    SPARSE: tl.constexpr, LISTED: tl.constexpr, EVERY: tl.constexpr, EACH_HEADS: tl.constexpr, MERGED: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """EACH_HEADS heads of one row that has more than one split: sum_s 2^lse_s part_s / sum_s 2^lse_s, MERGED splits at a time."""
    turn(EARLY)
    entry = tl.program_id(0)
    first_head = tl.program_id(1) * EACH_HEADS
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
    i = tl.arange(0, MERGED)
    d = tl.arange(0, RANK_BLOCK)
    base = entry.to(tl.int64) * splits
    for head in range(first_head, tl.minimum(first_head + EACH_HEADS, HEADS)):
        lse = tl.load(sums + (base + s) * HEADS + head, mask=s < count, other=float("-inf"))
        top = tl.max(lse, 0)
        total = tl.sum(tl.exp2(lse - top), 0)
        result = tl.zeros((RANK_BLOCK,), tl.float32)
        for start in range(0, count, MERGED):
            inside = start + i < count
            place = (base + start + i) * HEADS + head
            weights = tl.exp2(tl.load(sums + place, mask=inside, other=float("-inf")) - top)
            own = tl.load(
                parts + place[:, None] * RANK + d[None, :],
                mask=inside[:, None] & (d < RANK)[None, :],
                other=0.0,
            )
            result += tl.sum(own * weights[:, None], 0)
        result = result / total
        at = out + (t.to(tl.int64) * HEADS + head) * RANK
        tl.store(at + d, result.to(out.dtype.element_ty), mask=d < RANK)
