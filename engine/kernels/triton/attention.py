"""Grouped-query attention of flat rows over a paged cache, dense and sparse rows in one call.

More than 400 lines, because three forms share how rows are split and merged.

    out[t,h,g] = sum_c softmax_c(scale * query[t,h,g] . key[c,h]) value[c,h]

over all c <= positions[t] for a dense row, and over selected[t] for a sparse one. Softmax is the online one of
FlashAttention (arXiv 2205.14135); long rows are split and merged by log-sum-exp (flash-decoding), in float32.

Three forms:

- *decodes*, row by row, dense and sparse: a program is one row, one KV head and one split;
- *dense rows of prompts*, block by block, as `Blocks` says: a program is up to `block_rows(G)` rows of one request at
  consecutive positions, which share what they read, one KV head and one split;
- *sparse rows of prompts*: while their contexts are short, block by block like dense ones, through a mask
  (`engine.kernels.triton.mask`); beyond, row by row, with longer splits, since there are many rows.

What orders a row's sums is its own length and its form, and nothing else: its bits do not depend on what else is in the
batch, on where a prompt's chunks and blocks begin, or on the widths of the batch's tensors. Forms may differ in the last
bits, as their splits and matrix instructions do: a row keeps its bits as long as it keeps its form.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.config import PAGE_SIZE
from engine.errors import EngineError
from engine.kernels.triton.kernel import kernel, overlap, turn
from engine.kernels.triton.mask import is_masked
from engine.kernels.triton.rows import Blocks, Rows

_PAGE = tl.constexpr(PAGE_SIZE)

MOST_SPLITS = 64
"""Of a dense row: what a merge holds."""
MOST_SPARSE_SPLITS = 16
"""Of a sparse row; a merge of so few is cheap."""
ROW_SPLIT = 128
"""Positions in a split of a dense row, row by row; it doubles as often as `MOST_SPLITS` wants."""
SPARSE_SPLIT = 64
"""The same for selected positions: a decode's rows are few, and its time is the longest split's."""
PROMPT_SPARSE_SPLIT = 2048
"""The same in prompts, whose many rows fill the device."""
BLOCK_SPLIT = 1024
"""The same as `ROW_SPLIT`, block by block."""
MOST_BLOCK_SPLITS = 8
"""Of a row in a block: at a multiple of 8 x 1024 positions splits double, and no block goes beyond it."""
BLOCK_PRODUCTS = 128
"""Rows of a block times query heads a KV head: the height of one product."""

_MOST = tl.constexpr(MOST_SPLITS)
_FEW = tl.constexpr(MOST_SPARSE_SPLITS)
_MOST_BLOCK = tl.constexpr(MOST_BLOCK_SPLITS)
_BOTH, _DENSE, _SPARSE = 0, 1, 2  # kinds of rows
_ALL, _LISTED, _TABLE = 0, 1, 2  # rows of a launch: every one, those of a list, those of blocks
_LOG2_E = 1.4426950408889634


def block_rows(group: int) -> int:
    """How many rows of a prompt share what a program reads, of `group` query heads a KV head."""
    return BLOCK_PRODUCTS // group


def attend(
    query: Tensor, kv_plane: Tensor, rows: Rows, selected: Tensor | None, scale: float, max_context: int,
    blocks: Blocks | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of every row; 0 for padding.

    Args:
        query: [T, Hkv, G, D], a row's part of it contiguous
        kv_plane: [num_pages, 64, Hkv, 2, D] in the query's dtype, keys at index 0 and values at 1
        rows: the batch
        selected: [T, K] int32, the positions that sparse rows attend to, -1 for none; without it every row is dense.
            Of a row's, the first index_top_k are read
        scale: of the products
        max_context: no row's position reaches it
        blocks: of at most `block_rows(G)` rows, for prompts; none is right for decodes
        mask: [T, words] int32, the selections of rows in blocks as `engine.kernels.triton.mask.masks` gives them; without
            it all of these gather

    Returns:
        [T, Hkv, G, D] in the query's dtype
    """
    count, kv_heads, group, dim = query.shape
    if kv_plane.shape[1:] != (PAGE_SIZE, kv_heads, 2, dim) or kv_plane.dtype != query.dtype:
        raise EngineError(
            f"a query {tuple(query.shape)} and a cache {tuple(kv_plane.shape)} of {kv_plane.dtype}"
        )
    if query.stride()[1:] != (group * dim, dim, 1) or kv_plane.stride()[2:] != (2 * dim, dim, 1):
        raise EngineError("a row's query and a token's keys and values are contiguous")
    if scale <= 0:
        raise EngineError(f"the scale is {scale}; it must be positive")
    if group > 16:
        raise EngineError(f"{group} query heads a KV head; at most 16 can be")
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not count:
        return out
    dense = min(MOST_SPLITS, triton.cdiv(max_context, ROW_SPLIT))
    width = 0 if selected is None else selected.shape[1]
    splits = max(dense, min(MOST_SPARSE_SPLITS, triton.cdiv(width, SPARSE_SPLIT)))
    call = _Call(query, kv_plane, rows, selected, scale, out, None if selected is None else mask)
    if blocks is None:
        call.by_row(_ALL, None, count, splits)
        return out
    if blocks.size > block_rows(group):
        raise EngineError(
            f"blocks of {blocks.size} rows; of {group} heads at most {block_rows(group)} can be"
        )
    if len(blocks.singles):
        call.by_row(_LISTED, blocks.singles, len(blocks.singles), splits)
    if len(blocks.table):
        call.by_block(blocks, min(MOST_BLOCK_SPLITS, triton.cdiv(max_context, BLOCK_SPLIT)))
        if selected is not None:
            splits = min(MOST_SPARSE_SPLITS, triton.cdiv(width, PROMPT_SPARSE_SPLIT))
            call.by_row(_TABLE, blocks.table, len(blocks.table), splits, blocks.size)
    return out


class _Call:
    """One call's tensors, and its launches."""

    def __init__(
        self, query: Tensor, kv_plane: Tensor, rows: Rows, selected: Tensor | None, scale: float, out: Tensor,
        mask: Tensor | None,
    ) -> None:  # fmt: skip
        self._rows, self._selected, self._out, self._mask = rows, selected, out, mask
        self._scale = scale * _LOG2_E
        self._query, self._plane = query, kv_plane
        _, self._kv_heads, self._group, self._dim = query.shape
        self._padded = max(16, int(triton.next_power_of_2(self._dim)))

    def by_row(self, source: int, listed: Tensor | None, count: int, splits: int, size: int = 1) -> None:
        """All rows, those of a list, or the sparse ones of blocks of at most `size` rows."""
        parts, sums = self._parts(count * size, splits)
        rows, selected = self._rows, self._selected
        prompt = source == _TABLE
        dtype, dim = self._query.dtype, self._padded
        shape = _prompt_shape(dtype, dim) if prompt else _row_shape(dtype, dim, selected is None)
        split = PROMPT_SPARSE_SPLIT if prompt else SPARSE_SPLIT
        kinds = _SPARSE if prompt else _BOTH
        _row_kernel[(count * size, self._kv_heads, splits)](
            self._query, self._plane, rows.block_table, rows.request, rows.positions, rows.index_top_k,
            rows.positions if selected is None else selected, rows.request if listed is None else listed,
            self._out, parts, sums, self._scale, self._query.stride(0), self._plane.stride(0), self._plane.stride(1),
            rows.block_table.stride(0), 0 if selected is None else selected.stride(0), self._width, splits, size,
            HEADS=self._kv_heads, GROUP=self._group, D=self._dim, DIM=self._padded, KEYS=shape[0], SOURCE=source,
            SELECTED=selected is not None, KINDS=kinds, DENSE_SPLIT=ROW_SPLIT, CHOSEN_SPLIT=split,
            MASK=self._mask is not None,
            num_warps=shape[1], num_stages=shape[2], **overlap(),
        )  # fmt: skip
        self._merge(source, listed, count, size, kinds, splits, split, parts, sums)

    def by_block(self, blocks: Blocks, splits: int) -> None:
        """The dense rows in blocks; padding in them, too."""
        count, size = len(blocks.table), blocks.size
        parts, sums = self._parts(count * size, splits)
        rows = self._rows
        shape = _block_shape(self._query.dtype, self._padded)
        _block_kernel[(count, self._kv_heads, splits)](
            self._query, self._plane, rows.block_table, rows.request, rows.positions, rows.index_top_k, blocks.table,
            blocks.table if self._mask is None else self._mask, self._out, parts, sums, self._scale, self._query.stride(0),
            self._plane.stride(0), self._plane.stride(1), rows.block_table.stride(0),
            0 if self._mask is None else self._mask.stride(0), splits, size,
            HEADS=self._kv_heads, GROUP=self._group, D=self._dim, DIM=self._padded, HEIGHT=BLOCK_PRODUCTS,
            KEYS=shape[0], PAGE=PAGE_SIZE, SPARSE=self._selected is not None, MASK=self._mask is not None, DENSE_SPLIT=BLOCK_SPLIT,
            num_warps=shape[1], num_stages=shape[2], **overlap(),
        )  # fmt: skip
        self._merge(_TABLE, blocks.table, count, size, _DENSE, splits, BLOCK_SPLIT, parts, sums)

    @property
    def _width(self) -> int:
        """Of `selected`."""
        return 0 if self._selected is None else self._selected.shape[1]

    def _parts(self, count: int, splits: int) -> tuple[Tensor, Tensor]:
        """Room for what the splits of rows leave: outputs, and the maximum and the sum of each."""
        heads = self._kv_heads * self._group
        held = count if splits > 1 else 0
        options: dict[str, Any] = {"dtype": torch.float32, "device": self._out.device}
        return (
            torch.empty(held, heads, splits, self._dim, **options),
            torch.empty(held, heads, splits, 2, **options),
        )

    def _merge(
        self, source: int, listed: Tensor | None, count: int, size: int, kinds: int, splits: int, split: int,
        parts: Tensor, sums: Tensor,
    ) -> None:  # fmt: skip
        if splits == 1:
            return
        rows = self._rows
        _merge_kernel[(count * size, self._kv_heads * self._group)](
            parts, sums, rows.positions, rows.index_top_k, rows.request if listed is None else listed, self._out,
            splits, self._width, size,
            HEADS=self._kv_heads * self._group, D=self._dim, DIM=self._padded, SOURCE=source,
            SELECTED=self._selected is not None, KINDS=kinds, DENSE_SPLIT=split if kinds == _DENSE else ROW_SPLIT,
            CHOSEN_SPLIT=split, MASK=self._mask is not None, num_warps=2, **overlap(),
        )  # fmt: skip


def _row_shape(dtype: torch.dtype, dim: int, dense: bool) -> tuple[int, int, int]:
    """Keys a step, warps and stages, row by row. A row's bits depend on the first two: no function of the batch."""
    if dtype == torch.float32:
        return 32, 2, 2
    return 64, 2, 3 if dim <= 64 else 5 if dense else 2


def _prompt_shape(dtype: torch.dtype, dim: int) -> tuple[int, int, int]:
    """The same of sparse rows in prompts."""
    return (32, 2, 2) if dtype == torch.float32 else (64, 1, 2) if dim <= 64 else (32, 1, 3)


def _block_shape(dtype: torch.dtype, dim: int) -> tuple[int, int, int]:
    """The same block by block."""
    return (32, 8, 1) if dtype == torch.float32 else (64, 4, 2) if dim <= 64 else (64, 8, 3)


@triton.jit
def _split_of(length: tl.tensor, base: tl.constexpr, most: tl.constexpr) -> tl.tensor:
    """Positions in a split of a row of this length: `base` doubled until there are at most `most` splits."""
    split = base + 0 * length
    while split * most < length:
        split *= 2
    return split


@triton.jit
def _row_of(entry: tl.tensor, source: tl.tensor, size: tl.tensor, SOURCE: tl.constexpr) -> tl.tensor:
    """The row that is a launch's `entry`: itself (0), source[entry] (1), or of a block (2), -1 where that has no more."""
    if SOURCE == 0:
        t = entry
    elif SOURCE == 1:
        t = tl.load(source + entry)
    else:
        block = source + entry // size * 2
        t = tl.where(entry % size < tl.load(block + 1), tl.load(block) + entry % size, -1)
    return t


@triton.jit
def _extent_of(
    t: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, width: tl.tensor, SELECTED: tl.constexpr,
    KINDS: tl.constexpr, DENSE_SPLIT: tl.constexpr, CHOSEN_SPLIT: tl.constexpr, MASK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """How many positions a row attends to (0 for padding, -1 if it is not of these KINDS), its split, if it is sparse.

    KINDS: both (0), dense (1), sparse (2); padding is of every kind.
    """
    length = tl.maximum(tl.load(positions + t) + 1, 0)
    split = _split_of(length, DENSE_SPLIT, _MOST_BLOCK if KINDS == 1 else _MOST)
    sparse = length < 0
    if SELECTED:
        chosen = tl.load(index_top_k + t)
        sparse = chosen > 0
        if MASK and KINDS == 1:
            sparse = sparse & (is_masked(length - 1, chosen) == 0)  # a masked row is split as a dense one
        few = tl.minimum(tl.minimum(chosen, width), length)
        split = tl.where(sparse, _split_of(few, CHOSEN_SPLIT, _FEW), split)
        length = tl.where(sparse, few, length)
    if KINDS == 1:
        length = tl.where(sparse & (length > 0), -1, length)
    if KINDS == 2:
        length = tl.where((sparse == 0) & (length > 0), -1, length)
        if MASK:
            length = tl.where(is_masked(tl.load(positions + t), tl.load(index_top_k + t)), -1, length)
    return length, split, sparse


@kernel
def _row_kernel(
    query: tl.tensor, plane: tl.tensor, block_table: tl.tensor, request: tl.tensor, positions: tl.tensor,
    index_top_k: tl.tensor, selected: tl.tensor, source: tl.tensor, out: tl.tensor, parts: tl.tensor, sums: tl.tensor,
    scale: tl.tensor, query_row: tl.tensor, page_stride: tl.tensor, token_stride: tl.tensor, table_row: tl.tensor,
    selected_row: tl.tensor, width: tl.tensor, splits: tl.tensor, size: tl.tensor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
    SOURCE: tl.constexpr, SELECTED: tl.constexpr, KINDS: tl.constexpr, DENSE_SPLIT: tl.constexpr,
    CHOSEN_SPLIT: tl.constexpr, MASK: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """One row, one KV head, one split."""
    turn(EARLY)
    entry = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    t = _row_of(entry, source, size, SOURCE)
    if t < 0:
        return
    length, split, sparse = _extent_of(
        t, positions, index_top_k, width, SELECTED, KINDS, DENSE_SPLIT, CHOSEN_SPLIT, MASK
    )
    if length < 0:
        return
    begin = part * split
    if (begin >= length) & (part > 0):
        return
    end = tl.minimum(begin + split, length)

    g = tl.arange(0, 16)
    d = tl.arange(0, DIM)
    i = tl.arange(0, KEYS)
    inner = g[:, None] * D + d[None, :]
    own = (g < GROUP)[:, None] & (d < D)[None, :]
    row = t.to(tl.int64)
    q = tl.load(query + row * query_row + head * GROUP * D + inner, mask=own, other=0.0)
    top = tl.full((16,), float("-inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    acc = tl.zeros((16, DIM), tl.float32)
    if begin < end:
        pages = block_table + tl.load(request + t).to(tl.int64) * table_row
        for start in tl.range(begin, end, KEYS):
            at = start + i
            there = at < end
            if SELECTED:
                picked = tl.load(selected + row * selected_row + at, mask=there & sparse, other=-1)
                at = tl.where(sparse, picked, at)
                there = there & (at >= 0)
                at = tl.where(there, at, 0)
            page = tl.load(pages + at // _PAGE, mask=there, other=0).to(tl.int64)
            place = plane + page * page_stride + at % _PAGE * token_stride + head * 2 * D
            kept = there[:, None] & (d < D)[None, :]
            keys = tl.load(place[:, None] + d[None, :], mask=kept, other=0.0)
            values = tl.load(place[:, None] + (D + d)[None, :], mask=kept, other=0.0)
            products = tl.dot(q, tl.trans(keys), input_precision="ieee")
            products = tl.where(there[None, :], products, float("-inf"))
            highest = tl.maximum(top, tl.max(products, 1) * scale)
            base = tl.where(highest == float("-inf"), 0.0, highest)
            weights = tl.exp2(products * scale - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(weights, 1)
            acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
            top = highest
    if length <= split:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + (row * HEADS + head) * GROUP * D + inner, result.to(out.dtype.element_ty), mask=own)
    else:
        place = ((entry.to(tl.int64) * HEADS + head) * GROUP + g) * splits + part
        tl.store(parts + place[:, None] * D + d[None, :], acc, mask=own)
        tl.store(sums + place * 2, top, mask=g < GROUP)
        tl.store(sums + place * 2 + 1, total, mask=g < GROUP)


@triton.jit
def _merged(
    parts: tl.tensor, sums: tl.tensor, place: tl.tensor, count: tl.tensor, D: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What `count` splits from `place` on give together: [DIM]."""
    s = tl.arange(0, WIDTH)
    d = tl.arange(0, DIM)
    there = s < count
    tops = tl.load(sums + (place + s) * 2, mask=there, other=float("-inf"))
    totals = tl.load(sums + (place + s) * 2 + 1, mask=there, other=0.0)
    kept = there[:, None] & (d < D)[None, :]
    accs = tl.load(parts + (place + s)[:, None] * D + d[None, :], mask=kept, other=0.0)
    highest = tl.max(tops, 0)
    weights = tl.exp2(tops - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights * totals, 0)
    return tl.sum(accs * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)


@kernel
def _merge_kernel(
    parts: tl.tensor, sums: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, source: tl.tensor, out: tl.tensor,
    splits: tl.tensor, width: tl.tensor, size: tl.tensor,
    HEADS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, SOURCE: tl.constexpr, SELECTED: tl.constexpr,
    KINDS: tl.constexpr, DENSE_SPLIT: tl.constexpr, CHOSEN_SPLIT: tl.constexpr, MASK: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """One query head of one row that has more than one split."""
    turn(EARLY)
    entry = tl.program_id(0)
    head = tl.program_id(1)
    t = _row_of(entry, source, size, SOURCE)
    if t < 0:
        return
    length, split, _ = _extent_of(
        t, positions, index_top_k, width, SELECTED, KINDS, DENSE_SPLIT, CHOSEN_SPLIT, MASK
    )
    if length <= split:
        return
    place = (entry.to(tl.int64) * HEADS + head) * splits
    count = tl.cdiv(length, split)
    if count <= _FEW:
        result = _merged(parts, sums, place, count, D, DIM, _FEW)
    else:
        result = _merged(parts, sums, place, count, D, DIM, _MOST)
    d = tl.arange(0, DIM)
    tl.store(out + (t.to(tl.int64) * HEADS + head) * D + d, result.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _block_step(
    q: tl.tensor, plane: tl.tensor, pages: tl.tensor, start: tl.tensor, ends: tl.tensor, bits: tl.tensor, sparse: tl.tensor, scale: tl.tensor, page_stride: tl.tensor,
    token_stride: tl.tensor, top: tl.tensor,
    total: tl.tensor, acc: tl.tensor, D: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
    MASK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The keys from `start` on; MASKED where a row may end before their last. MASK: of these what a row's bits say."""
    i = tl.arange(0, KEYS)
    d = tl.arange(0, DIM)
    page = tl.load(pages + start // PAGE).to(tl.int64)
    place = plane + page * page_stride + (start % PAGE + i) * token_stride
    keys = tl.load(place[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    values = tl.load(place[:, None] + (D + d)[None, :], mask=(d < D)[None, :], other=0.0)
    products = tl.dot(q, tl.trans(keys), input_precision="ieee")
    # Before the scale, so that the rest is the same to the bit, fused operations too, whether masked or not.
    if MASKED:
        products = tl.where((start + i)[None, :] <= ends[:, None], products, float("-inf"))
    if MASK:
        word = bits + start // 32
        own = tl.load(word, mask=sparse, other=-1)[:, None]
        if KEYS > 32:
            own = tl.where(i[None, :] < 32, own, tl.load(word + 1, mask=sparse, other=-1)[:, None])
        products = tl.where(((own >> (i % 32)[None, :]) & 1) != 0, products, float("-inf"))
    highest = tl.maximum(top, tl.max(products, 1) * scale)
    base = tl.where(highest == float("-inf"), 0.0, highest) if MASKED or MASK else highest
    weights = tl.exp2(products * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return highest, total, acc


@kernel
def _block_kernel(
    query: tl.tensor, plane: tl.tensor, block_table: tl.tensor, request: tl.tensor, positions: tl.tensor,
    index_top_k: tl.tensor, table: tl.tensor, bits: tl.tensor, out: tl.tensor, parts: tl.tensor, sums: tl.tensor,
    scale: tl.tensor, query_row: tl.tensor, page_stride: tl.tensor, token_stride: tl.tensor, table_row: tl.tensor, bits_row: tl.tensor, splits: tl.tensor, size: tl.tensor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, HEIGHT: tl.constexpr,
    KEYS: tl.constexpr, PAGE: tl.constexpr, SPARSE: tl.constexpr, MASK: tl.constexpr, DENSE_SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """The dense rows of one block, and its masked ones, one KV head, one split. Line m of a product is row m // GROUP, head m % GROUP."""
    turn(EARLY)
    # The last blocks of a prompt have most to do: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    first = tl.load(table + 2 * block)
    count = tl.load(table + 2 * block + 1)
    m = tl.arange(0, HEIGHT)
    d = tl.arange(0, DIM)
    there = m < count * GROUP
    t = first + m // GROUP
    ends = tl.load(positions + t, mask=there, other=-1)
    sparse = there
    if SPARSE:
        chosen = tl.load(index_top_k + t, mask=there, other=0)
        if MASK:
            there = there & ((chosen <= 0) | (ends < 0) | is_masked(ends, chosen))
            sparse = there & (chosen > 0)
        else:
            there = there & ((chosen <= 0) | (ends < 0))
        ends = tl.where(there, ends, -1)
    last = tl.max(ends, 0)
    split = _split_of(last + 1, DENSE_SPLIT, _MOST_BLOCK)
    begin = part * split
    if (begin > last) & (part > 0):
        return
    end = tl.minimum(begin + split, last + 1)
    row = t.to(tl.int64)
    place = (row * HEADS + head) * GROUP + m % GROUP
    own = there[:, None] & (d < D)[None, :]
    q = tl.load(
        query + row[:, None] * query_row + ((head * GROUP + m % GROUP) * D)[:, None] + d[None, :],
        mask=own,
        other=0.0,
    )
    top = tl.full((HEIGHT,), float("-inf"), tl.float32)
    total = tl.zeros((HEIGHT,), tl.float32)
    acc = tl.zeros((HEIGHT, DIM), tl.float32)
    if begin < end:
        pages = block_table + tl.load(request + first).to(tl.int64) * table_row
        mine = plane + head * 2 * D
        # Up to here no row of the block ends; those that are not computed have no end at all.
        common = tl.min(tl.where(ends < 0, last, ends), 0) + 1
        whole = begin + tl.maximum(tl.minimum(common, end) - begin, 0) // KEYS * KEYS
        for start in tl.range(begin, whole, KEYS):
            top, total, acc = _block_step(
                q, mine, pages, start, ends, bits + row * bits_row, sparse, scale, page_stride, token_stride, top, total, acc, D, DIM, KEYS,
                PAGE, False, MASK,
            )  # fmt: skip
        for start in tl.range(whole, end, KEYS):
            top, total, acc = _block_step(
                q, mine, pages, start, ends, bits + row * bits_row, sparse, scale, page_stride, token_stride, top, total, acc, D, DIM, KEYS,
                PAGE, True, MASK,
            )  # fmt: skip
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    single = there & (ends < split) & (part == 0)
    if part == 0:
        zero = tl.where((ends < 0)[:, None], 0.0, result)
        tl.store(
            out + place[:, None] * D + d[None, :], zero.to(out.dtype.element_ty), mask=single[:, None] & own
        )
    if splits > 1:
        several = there & (ends >= split) & (ends >= begin)
        entry = (block * size + m // GROUP).to(tl.int64)
        at = ((entry * HEADS + head) * GROUP + m % GROUP) * splits + part
        tl.store(parts + at[:, None] * D + d[None, :], acc, mask=several[:, None] & own)
        tl.store(sums + at * 2, top, mask=several)
        tl.store(sums + at * 2 + 1, total, mask=several)
