"""Dense attention of prompts over cached latents in the multi-head form: keys and values of each head are made first.

    [k | w][c, h] = expand[h] @ latent[c];  s = scale * query[t, h] . [k | shared key[c]]
    out[t, h] = sum_c softmax_c(s) w[c, h]  over all c <= positions[t]

A row and a token cost n + p + v multiply-adds a head here, and 2r + p in the absorbed form: 3.4 times fewer at
DeepSeek-V3.2's sizes (arXiv 2405.04434, section 2.1). A token costs r (n + v) more, once for all rows of a step. Three
launches a round of `ExpandedPlan`: latents are gathered from their pages, keys and values are made of them, and blocks of
rows attend. Softmax is the online one of FlashAttention (arXiv 2205.14135). A row that needs several rounds keeps its
maximum, its sum and its output in float32 between them: the same steps in the same order as in one round, so a row's bits
depend neither on the rounds nor on what else is in the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.config import PAGE_SIZE
from engine.errors import EngineError
from engine.kernels.triton.expanded_plan import STEP, ExpandedPlan
from engine.kernels.triton.kernel import block, kernel, overlap, turn
from engine.kernels.triton.rows import Rows
from engine.memory.blocks import BLOCK
from engine.memory.layouts import LatentLayout

_PAGE = tl.constexpr(PAGE_SIZE)
_BLOCK = tl.constexpr(BLOCK)
_LOG2_E = 1.4426950408889634


class _Shape(NamedTuple):
    """Of a launch; a row's bits depend on it, so it is no function of the batch."""

    width: int  # keys a step, or outputs a program
    warps: int
    stages: int


def block_rows(dtype: torch.dtype) -> int:
    """The rows of a block, for the plan."""
    return 32 if dtype == torch.float32 else 128


def workspace_bytes(
    tokens: int, rows: int, heads: int, nope: int, value: int, rank: int, rope: int, item: int
) -> int:
    """Bytes that `attend_expanded` takes for itself: a round's keys and values, and what rows keep between rounds.

    Args:
        tokens: of a round
        rows: of a step
        heads: H, of this rank
        nope: n, plain dims of a head
        value: v, its value dims
        rank: r, of the latents
        rope: p, rotated dims
        item: bytes of a number
    """
    return tokens * (heads * (nope + value) + rank + rope) * item + 4 * rows * heads * (value + 2)


def attend_expanded(
    query: Tensor,
    plane: Tensor,
    rows: Rows,
    plan: ExpandedPlan,
    expand: Tensor,
    rank: int,
    scale: float,
    out: Tensor,
) -> None:
    """Attend with the dense rows of a plan's blocks over all positions up to their own.

    Args:
        query: [T, H, n + p], rotated; rows may be apart
        plane: [pages, 64, bytes] uint8 as in `engine.memory.layouts.LatentLayout`, or [pages, 64, r + p] of numbers
        rows: the batch; padding and sparse rows are left out
        plan: on the query's device
        expand: [H, n + v, r] in the query's dtype
        rank: r
        scale: of the softmax
        out: [T, H, v] in the query's dtype, contiguous; other rows are left as they are

    Raises:
        EngineError: the tensors do not fit together.
    """
    count, heads, width = query.shape
    value = out.shape[2]
    nope = expand.shape[1] - value
    rope = width - nope
    stored = LatentLayout(rank, rope).token_bytes if plane.dtype == torch.uint8 else rank + rope
    if (
        expand.shape != (heads, nope + value, rank)
        or plane.shape[2] != stored
        or out.shape != (count, heads, value)
    ):
        raise EngineError(
            f"queries {tuple(query.shape)}, an expansion {tuple(expand.shape)}, tokens of {plane.shape[2]} and outputs "
            f"{tuple(out.shape)} are not of one layer"
        )
    if (
        query.stride()[1:] != (width, 1)
        or plane.stride(2) != 1
        or not out.is_contiguous()
        or not expand.is_contiguous()
    ):
        raise EngineError("a row's query, a token, the expansion and the output are contiguous")
    if scale <= 0:
        raise EngineError(f"the scale is {scale}; it must be positive")
    blocks = plan.blocks.shape[1]
    if not plan.rounds or not blocks:
        return
    options: dict[str, Any] = {"dtype": query.dtype, "device": query.device}
    latents = torch.empty(plan.tokens, rank, **options)
    keys = torch.empty(plan.tokens, rope, **options)
    made = torch.empty(plan.tokens, heads * (nope + value), **options)
    kept = count if plan.rounds > 1 else 0
    parts = torch.empty(kept, heads, value, dtype=torch.float32, device=query.device)
    sums = torch.empty(kept, heads, 2, dtype=torch.float32, device=query.device)
    product, attention = _product_shape(query.dtype), _attend_shape(query.dtype, nope, value)
    outputs = heads * (nope + value)
    for pages, table in zip(plan.pages, plan.blocks, strict=True):
        _gather[(len(pages),)](
            plane, rows.block_table, pages, latents, keys, plane.stride(0), plane.stride(1), rows.block_table.stride(0),
            RANK=rank, RANK_BLOCK=block(rank), ROPE=rope, ROPE_BLOCK=block(rope), FP8=plane.dtype == torch.uint8,
            num_warps=4, **overlap(),
        )  # fmt: skip
        _expand[(triton.cdiv(outputs, product.width), plan.tokens // STEP)](
            latents, expand, pages, made, outputs,
            RANK=rank, TOKENS=STEP, OUTPUTS=product.width, INNER=min(64, max(16, block(rank))),
            WHOLE=rank % 64 == 0 and outputs % product.width == 0,
            num_warps=product.warps, num_stages=product.stages, **overlap(),
        )  # fmt: skip
        _attend[(blocks, heads)](
            query, made, keys, table, rows.positions, rows.index_top_k, out, parts, sums, scale * _LOG2_E, query.stride(0), outputs,
            HEADS=heads, NOPE=nope, NOPE_BLOCK=max(16, block(nope)), ROPE=rope, ROPE_BLOCK=max(16, block(rope)),
            VALUE=value, VALUE_BLOCK=max(16, block(value)), HEIGHT=plan.size, KEYS=attention.width, SEVERAL=plan.rounds > 1,
            num_warps=attention.warps, num_stages=attention.stages, **overlap(),
        )  # fmt: skip


def _product_shape(dtype: torch.dtype) -> _Shape:
    return _Shape(64, 8, 1) if dtype == torch.float32 else _Shape(256, 8, 3)


def _attend_shape(dtype: torch.dtype, nope: int, value: int) -> _Shape:
    if dtype == torch.float32:
        return _Shape(32, 4, 1)
    return _Shape(64, 8, 3 if max(block(nope), block(value)) <= 128 else 2)


@kernel
def _gather(
    plane: tl.tensor, block_table: tl.tensor, pages: tl.tensor, latents: tl.tensor, keys: tl.tensor, page_stride: tl.tensor,
    slot_stride: tl.tensor, table_row: tl.tensor,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROPE: tl.constexpr, ROPE_BLOCK: tl.constexpr, FP8: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """A page's latents and shared keys as plain numbers."""
    turn(EARLY)
    place = tl.program_id(0).to(tl.int64)
    request = tl.load(pages + 2 * place)
    if request < 0:
        return
    number = tl.load(pages + 2 * place + 1)
    page = tl.load(block_table + request.to(tl.int64) * table_row + number).to(tl.int64)
    at = tl.arange(0, RANK_BLOCK)[None, :]
    turned = tl.arange(0, ROPE_BLOCK)[None, :]
    dtype = latents.dtype.element_ty
    SLOTS: tl.constexpr = 16
    for first in tl.static_range(0, _PAGE, SLOTS):
        slot = first + tl.arange(0, SLOTS)[:, None]
        source = plane + page * page_stride + slot * slot_stride
        token = place * _PAGE + slot
        if FP8:
            scales = source + RANK
            rope = scales + 4 * ((RANK + _BLOCK - 1) // _BLOCK)
            numbers = tl.load((source + at).to(tl.pointer_type(tl.float8e4nv)), mask=at < RANK, other=0.0)
            bits = tl.zeros([SLOTS, RANK_BLOCK], tl.int32)
            for byte in tl.static_range(4):
                one = tl.load(scales + 4 * (at // _BLOCK) + byte, mask=at < RANK, other=0).to(tl.int32)
                bits = bits | (one << (8 * byte))
            latent = (numbers.to(tl.float32) * bits.to(tl.float32, bitcast=True)).to(dtype)
            low = tl.load(rope + 2 * turned, mask=turned < ROPE, other=0).to(tl.int32)
            high = tl.load(rope + 2 * turned + 1, mask=turned < ROPE, other=0).to(tl.int32)
            key = (((high << 8) | low) << 16).to(tl.float32, bitcast=True).to(dtype)
        else:
            latent = tl.load(source + at, mask=at < RANK, other=0.0).to(dtype)
            key = tl.load(source + RANK + turned, mask=turned < ROPE, other=0.0).to(dtype)
        tl.store(latents + token * RANK + at, latent, mask=at < RANK)
        tl.store(keys + token * ROPE + turned, key, mask=turned < ROPE)


@kernel
def _expand(
    latents: tl.tensor, expand: tl.tensor, pages: tl.tensor, made: tl.tensor, outputs: tl.tensor,
    RANK: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr, WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """made = latents @ expand^T: some tokens, some outputs of all heads."""
    turn(EARLY)
    part = tl.program_id(1).to(tl.int64)
    if tl.load(pages + 2 * part * (TOKENS // _PAGE)) < 0:
        return
    token = part * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, INNER)
    left = latents + token[:, None] * RANK + k[None, :]
    right = expand + output[:, None].to(tl.int64) * RANK + k[None, :]
    acc = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in tl.range(0, RANK, INNER):
        if WHOLE:
            x = tl.load(left + start)
            w = tl.load(right + start)
        else:
            x = tl.load(left + start, mask=(start + k)[None, :] < RANK, other=0.0)
            w = tl.load(
                right + start, mask=((start + k)[None, :] < RANK) & (output[:, None] < outputs), other=0.0
            )
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    place = made + token[:, None] * outputs + output[None, :]
    if WHOLE:
        tl.store(place, acc.to(made.dtype.element_ty))
    else:
        tl.store(place, acc.to(made.dtype.element_ty), mask=(output < outputs)[None, :])


@triton.jit
def _step(
    q: tl.tensor, turned: tl.tensor, made: tl.tensor, keys: tl.tensor, start: tl.tensor, ends: tl.tensor, scale: tl.tensor,
    token_stride: tl.tensor, top: tl.tensor, total: tl.tensor, acc: tl.tensor,
    NOPE: tl.constexpr, NOPE_BLOCK: tl.constexpr, ROPE: tl.constexpr, ROPE_BLOCK: tl.constexpr, VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The KEYS positions from `start` on, which lie from `made` and `keys` on; MASKED: not every row sees them all."""
    i = tl.arange(0, KEYS)[:, None]
    n = tl.arange(0, NOPE_BLOCK)[None, :]
    p = tl.arange(0, ROPE_BLOCK)[None, :]
    v = tl.arange(0, VALUE_BLOCK)[None, :]
    place = made + i * token_stride
    if NOPE == NOPE_BLOCK:
        plain = tl.load(place + n)
    else:
        plain = tl.load(place + n, mask=n < NOPE, other=0.0)
    if ROPE == ROPE_BLOCK:
        shared = tl.load(keys + i * ROPE + p)
    else:
        shared = tl.load(keys + i * ROPE + p, mask=p < ROPE, other=0.0)
    if VALUE == VALUE_BLOCK:
        values = tl.load(place + NOPE + v)
    else:
        values = tl.load(place + NOPE + v, mask=v < VALUE, other=0.0)
    products = tl.dot(q, tl.trans(plain), input_precision="ieee")
    products = tl.dot(turned, tl.trans(shared), products, input_precision="ieee")
    if MASKED:
        products = tl.where((start + tl.arange(0, KEYS))[None, :] <= ends[:, None], products, float("-inf"))
    highest = tl.maximum(top, tl.max(products, 1) * scale)
    base = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
    weights = tl.exp2(products * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return highest, total, acc


@kernel
def _attend(
    query: tl.tensor, made: tl.tensor, keys: tl.tensor, table: tl.tensor, positions: tl.tensor, index_top_k: tl.tensor,
    out: tl.tensor, parts: tl.tensor, sums: tl.tensor, scale: tl.tensor, query_row: tl.tensor, token_stride: tl.tensor,
    HEADS: tl.constexpr, NOPE: tl.constexpr, NOPE_BLOCK: tl.constexpr, ROPE: tl.constexpr, ROPE_BLOCK: tl.constexpr,
    VALUE: tl.constexpr, VALUE_BLOCK: tl.constexpr, HEIGHT: tl.constexpr, KEYS: tl.constexpr, SEVERAL: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """The dense rows of one block, one head, over what a round has of their context."""
    turn(EARLY)
    line = table + 5 * tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(line)
    base = tl.load(line + 2).to(tl.int64)
    begin = tl.load(line + 3)
    end = tl.load(line + 4)
    if begin >= end:
        return
    m = tl.arange(0, HEIGHT)
    there = m < tl.load(line + 1)
    t = first + m
    ends = tl.load(positions + t, mask=there, other=-1)
    there = there & (ends >= 0) & (tl.load(index_top_k + t, mask=there, other=0) <= 0)
    ends = tl.where(there, ends, -1)
    last = tl.max(ends, 0)
    if last < begin:
        return
    end = tl.minimum(end, last + 1)

    n = tl.arange(0, NOPE_BLOCK)[None, :]
    p = tl.arange(0, ROPE_BLOCK)[None, :]
    v = tl.arange(0, VALUE_BLOCK)[None, :]
    row = t.to(tl.int64)[:, None]
    own = query + row * query_row + head * (NOPE + ROPE)
    q = tl.load(own + n, mask=there[:, None] & (n < NOPE), other=0.0)
    turned = tl.load(own + NOPE + p, mask=there[:, None] & (p < ROPE), other=0.0)
    top = tl.full((HEIGHT,), float("-inf"), tl.float32)
    total = tl.zeros((HEIGHT,), tl.float32)
    acc = tl.zeros((HEIGHT, VALUE_BLOCK), tl.float32)
    place = row * HEADS + head
    stored = there[:, None] & (v < VALUE)
    if SEVERAL:
        if begin > 0:
            side = t.to(tl.int64) * HEADS + head
            top = tl.load(sums + 2 * side, mask=there, other=float("-inf"))
            total = tl.load(sums + 2 * side + 1, mask=there, other=0.0)
            acc = tl.load(parts + place * VALUE + v, mask=stored, other=0.0)
    # Up to here no row of the block ends; those that are not computed have no end at all.
    common = tl.min(tl.where(there, ends, last), 0) + 1
    whole = begin + tl.maximum(tl.minimum(common, end) - begin, 0) // KEYS * KEYS
    made += head * (NOPE + VALUE)
    behind = base - begin  # from a position to its place in the round
    for start in tl.range(begin, whole, KEYS):
        top, total, acc = _step(
            q, turned, made + (behind + start) * token_stride, keys + (behind + start) * ROPE, start, ends, scale, token_stride,
            top, total, acc, NOPE, NOPE_BLOCK, ROPE, ROPE_BLOCK, VALUE, VALUE_BLOCK, KEYS, False,
        )  # fmt: skip
    for start in tl.range(whole, end, KEYS):
        top, total, acc = _step(
            q, turned, made + (behind + start) * token_stride, keys + (behind + start) * ROPE, start, ends, scale, token_stride,
            top, total, acc, NOPE, NOPE_BLOCK, ROPE, ROPE_BLOCK, VALUE, VALUE_BLOCK, KEYS, True,
        )  # fmt: skip
    if SEVERAL:
        if end <= last:
            side = t.to(tl.int64) * HEADS + head
            tl.store(sums + 2 * side, top, mask=there)
            tl.store(sums + 2 * side + 1, total, mask=there)
            tl.store(parts + place * VALUE + v, acc, mask=stored)
            return
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + place * VALUE + v, result.to(out.dtype.element_ty), mask=stored)
