"""Index scores of flat rows over paged keys: eq. (1) of the DeepSeek-V3.2-Exp report (arXiv 2512.02556, section 2).

    I[t,c] = sum_h head_weights[t,h] * relu(query[t,h] . key[c])          c <= positions[t], -inf beyond

A program multiplies one page of keys after another, as [64 keys, d] x [d, rows * heads], so that the sum over the heads
stays within a thread and its neighbours. Products and sums are float32 (IEEE, no tf32); those of 8-bit integers are exact,
since float16 holds the integers and float32 sums of up to 512 products of them.

A row's bits do not depend on the batch, nor on where the blocks of its prompt begin. Scored alone, as decodes are, it may
differ from itself in a block in the last bit: the compiler may fuse other multiplications with additions there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.config import PAGE_SIZE
from engine.errors import EngineError
from engine.kernels.triton.kernel import kernel, overlap, turn
from engine.kernels.triton.rows import Blocks, Rows

_PAGE = tl.constexpr(PAGE_SIZE)
# Added and taken away again, it rounds a small float32 to an integer, ties to even.
_ROUND = tl.constexpr(1.5 * 2**23)

_ASSEMBLY = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)

_PLAIN, _INT8, _FP8 = 0, 1, 2

STAGES = 4
"""Steps whose reads are in flight: of page numbers and of keys, in turn."""
PROMPT_STAGES = 5
"""The same where rows of a prompt share their keys."""
FP8_STAGES, FP8_ROWS = 7, 32
"""The same over FP8 keys if so many rows are read one by one: measured on an H200."""
BLOCK_COLUMNS = 64
"""Rows of a block times heads: the width of one product when rows of a prompt share their keys."""


def block_rows(heads: int) -> int:
    """How many rows of a prompt share the keys that a program reads."""
    return max(1, BLOCK_COLUMNS // _head_columns(heads))


def index_scores(
    query: Tensor, head_weights: Tensor, key_plane: Tensor, rows: Rows, max_context: int, blocks: Blocks | None = None,
    fill: bool = True,
) -> Tensor:  # fmt: skip
    """Scores of the sparse rows; those of dense rows and of padding are not written.

    Args:
        query: [T, H, d] in the keys' dtype; for integer keys any, and quantised here as
            `engine.kernels.interface.int8` says; for FP8 keys float8_e4m3fn
        head_weights: [T, H] float32, constant factors folded in (of FP8 queries also their scales)
        key_plane: [num_pages, 64, d] in the model's numbers, or bytes [num_pages, 64, d + 4] uint8: an
            `Int8KeyLayout`, or an `IndexKeyLayout` if the query is FP8
        rows: the batch
        max_context: no row's position reaches it
        blocks: of at most `block_rows(H)` rows that share their keys, for prompts; none is right for decodes. Rows in
            `blocks.singles` are scored one by one
        fill: whether the rest of a sparse row, beyond its end, becomes -inf; without it only the rest of its last page
            does, which is enough for `engine.kernels.triton.select`

    Returns:
        [T, C] float32, C = max_context rounded up to whole pages
    """
    heads, dim = query.shape[1:]
    form = _form(query, key_plane)
    if not (query.stride(2) == 1 and query.stride(1) == dim and head_weights.stride(1) == 1):
        raise EngineError("an index query's heads lie one after another")
    out = torch.empty(
        len(rows), -(-max_context // PAGE_SIZE) * PAGE_SIZE, dtype=torch.float32, device=query.device
    )
    pages = out.shape[1] // PAGE_SIZE
    if form != _PLAIN and key_plane.stride(0) % 4:
        raise EngineError("pages of 8-bit keys start at multiples of four bytes: their scales are float32")

    def launch(table: Tensor, count: int, size: int, kind: int) -> None:
        columns = _head_columns(heads) * size
        each = _pages_a_program(pages, count)
        stages = STAGES if size == 1 else PROMPT_STAGES
        if form == _FP8 and kind != 2 and count >= FP8_ROWS:
            stages = FP8_STAGES
        _scores_kernel[(count, triton.cdiv(pages, each))](
            query, head_weights, key_plane, rows.block_table, rows.request, rows.positions, rows.index_top_k, table, out,
            query.stride(0), head_weights.stride(0), key_plane.stride(0), key_plane.stride(1), rows.block_table.stride(0),
            out.stride(0), pages, heads, dim,
            ROWS=size, HEADS=_head_columns(heads), DIM=max(32, triton.next_power_of_2(dim)), PAGES=each,
            FORM=form, KIND=kind, FILL=fill, LOOP_STAGES=stages if form == _FP8 else None,
            num_warps=4 if columns <= 128 else 8, num_stages=stages,
            **overlap(),
        )  # fmt: skip

    if blocks is None:
        if len(rows):
            launch(rows.request, len(rows), 1, 0)
        return out
    if blocks.size > block_rows(heads):
        raise EngineError(
            f"blocks of {blocks.size} rows; of {heads} heads at most {block_rows(heads)} can be"
        )
    if len(blocks.singles):
        launch(blocks.singles, len(blocks.singles), 1, 1)
    if len(blocks.table):
        launch(blocks.table, len(blocks.table), block_rows(heads), 2)
    return out


def _form(query: Tensor, key_plane: Tensor) -> int:
    """Which of the layouts a plane has.

    Raises:
        EngineError: none of them.
    """
    dim = query.shape[-1]
    if key_plane.dtype == torch.uint8:
        if key_plane.shape[1:] != (PAGE_SIZE, dim + 4):
            raise EngineError(
                f"a plane of 8-bit keys is [pages, 64, {dim + 4}], not {tuple(key_plane.shape)}"
            )
        return _FP8 if query.dtype == torch.float8_e4m3fn else _INT8
    if key_plane.dtype != query.dtype or key_plane.shape[1:] != (PAGE_SIZE, dim) or key_plane.stride(2) != 1:
        raise EngineError(
            f"a query of {query.dtype} x {dim} and keys {key_plane.dtype} {tuple(key_plane.shape)}"
        )
    return _PLAIN


def _head_columns(heads: int) -> int:
    """Heads, padded to what a matrix unit takes."""
    return max(8, int(triton.next_power_of_2(heads)))


def _pages_a_program(pages: int, programs: int) -> int:
    """Long stretches when rows fill the device by themselves, short ones when they do not."""
    each = 8 if pages < 512 else 16
    while each > 1 and programs * triton.cdiv(pages, each) < 512:
        each //= 2
    return each


@triton.jit
def _numbers(raw: tl.tensor) -> tl.tensor:
    """Bytes n + 128 -> n as float16, through 1024 + byte, whose last bits are the byte."""
    if _ASSEMBLY:
        # Two bytes at a time become two numbers: each beside the upper byte of 1024.
        above = tl.inline_asm_elementwise(
            "{ .reg .b32 u, v; mov.b32 u, 0x64646464; cvt.u32.u16 v, $1; prmt.b32 $0, v, u, 0x4140; }",
            "=r,h", [raw], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        above = (raw.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    return above - 1152.0


@kernel
def _scores_kernel(
    query: tl.tensor, weights: tl.tensor, plane: tl.tensor, block_table: tl.tensor, request: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor, table: tl.tensor,
    out: tl.tensor, query_row: tl.tensor, weight_row: tl.tensor, page_stride: tl.tensor, token_stride: tl.tensor, table_row: tl.tensor, out_row: tl.tensor,
    pages: tl.tensor, heads: tl.constexpr, dim: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PAGES: tl.constexpr, FORM: tl.constexpr,
    KIND: tl.constexpr, FILL: tl.constexpr, LOOP_STAGES: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Up to ROWS rows of one request over PAGES pages.

    KIND: program i takes row i (0), row table[i] (1), or table[i] = (first row, count) (2).
    """
    turn(EARLY)
    block = tl.program_id(0)
    first_page = tl.program_id(1) * PAGES
    if KIND == 0:
        first = block
        count = 1
    elif KIND == 1:
        first = tl.load(table + block)
        count = 1
    else:
        first = tl.load(table + 2 * block)
        count = tl.load(table + 2 * block + 1)
    r = tl.arange(0, ROWS)
    there = r < count
    ends = tl.load(positions + first + r, mask=there, other=-1)
    wanted = there & (ends >= 0) & (tl.load(index_top_k + first + r, mask=there, other=0) > 0)
    ends = tl.where(wanted, ends, -1)
    last = tl.max(ends, 0)
    if last < 0:
        return
    stop = tl.minimum(first_page + PAGES, pages)
    seen = tl.minimum(stop, last // _PAGE + 1)
    token = tl.arange(0, _PAGE)
    at = out + (first + r).to(tl.int64)[None, :] * out_row

    if first_page < seen:
        n = tl.arange(0, ROWS * HEADS)
        d = tl.arange(0, DIM)
        if ROWS % 4 == 0:
            # A thread of a matrix unit holds two neighbours of each eight columns: so all heads of a row.
            own_row = n // (4 * HEADS) * 4 + n // 2 % 4
            head = n // 8 % (HEADS // 2) * 2 + n % 2
        else:
            own_row = n // HEADS
            head = n % HEADS
        own = (own_row < count) & (head < heads)
        row = (first + own_row).to(tl.int64)
        q = tl.load(
            query + row[:, None] * query_row + head[:, None] * dim + d[None, :],
            mask=own[:, None] & (d < dim)[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(weights + row * weight_row + head, mask=own, other=0.0)
        if FORM == 1:
            wide = q.to(tl.float32)
            scale = tl.div_rn(tl.max(tl.abs(wide), 1), 127.0)
            safe = tl.where(scale == 0.0, 1.0, scale)
            numbers = tl.div_rn(wide, tl.broadcast_to(safe[:, None], ROWS * HEADS, DIM))
            q = ((numbers + _ROUND) - _ROUND).to(tl.float16)
            w = w * scale
        half = w * 0.5
        pages_of = block_table + tl.load(request + first).to(tl.int64) * table_row
        # Only a loop with stages of its own reads the keys' scales ahead, which no product takes.
        for page in tl.range(first_page, seen, num_stages=LOOP_STAGES):
            base = plane + tl.load(pages_of + page).to(tl.int64) * page_stride
            if FORM == 0:
                keys = tl.load(
                    base + token[:, None] * token_stride + d[None, :], mask=(d < dim)[None, :], other=0.0
                )
            elif FORM == 1:
                # Four groups of sixteen tokens, each [dim / 4, 16 tokens, 4]: read as they lie, then turned.
                i = tl.arange(0, _PAGE * DIM)
                if dim == DIM:
                    raw = tl.load(base + i)
                    turned = tl.permute(tl.reshape(raw, (4, DIM // 4, 16, 4)), (0, 2, 1, 3))
                    keys = _numbers(tl.reshape(turned, (_PAGE, DIM)))
                else:
                    lies = (token // 16 * 16 * dim + token % 16 * 4)[:, None] + (d // 4 * 64 + d % 4)[None, :]
                    raw = tl.load(base + lies, mask=(d < dim)[None, :], other=128)
                    keys = _numbers(raw)
            else:
                keys = tl.load(
                    (base + token[:, None] * dim + d[None, :]).to(tl.pointer_type(tl.float8e4nv)),
                    mask=(d < dim)[None, :], other=0.0,
                )  # fmt: skip
            products = tl.dot(keys, tl.trans(q), input_precision="ieee")
            # Twice the positive part times half the weight, to the bit: an addition runs faster than a maximum.
            terms = (products + tl.abs(products)) * half[None, :]
            # One order of summing, however rows are grouped: neighbours, then halves, then the rest.
            if ROWS % 4 == 0:
                pairs = tl.sum(tl.reshape(terms, (_PAGE, ROWS // 4, 2, HEADS // 4, 4, 2)), 5)
            else:
                pairs = tl.sum(tl.reshape(terms, (_PAGE, ROWS, 2, HEADS // 4, 1, 2)), 5)
            scores = tl.reshape(tl.sum(tl.sum(pairs, 2), 2), (_PAGE, ROWS))
            if FORM != 0:
                scales = tl.load((base + _PAGE * dim).to(tl.pointer_type(tl.float32)) + token)
                scores = scores * scales[:, None]
            c = token + page * _PAGE
            scores = tl.where(c[:, None] <= ends[None, :], scores, float("-inf"))
            tl.store(at + c[:, None], scores, mask=wanted[None, :])
    if FILL:
        nothing = tl.full((_PAGE, ROWS), float("-inf"), tl.float32)
        for page in range(tl.maximum(first_page, seen), stop):
            tl.store(at + (token + page * _PAGE)[:, None], nothing, mask=wanted[None, :])
