"""What lies between a layer's fused product and its attention: bias, head norms, rotation, and the cache write."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.kernel import UNFUSED, block, kernel, overlap, row_sums, turn, warps


def rotate_and_store(
    product: Tensor,
    positions: Tensor,
    pages: Tensor,
    offsets: Tensor,
    rotation: tuple[Tensor, Tensor],
    plane: Tensor,
    *,
    bias: Tensor | None = None,
    head_norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Queries of T rows, and their keys and values stored in the paged cache.

    A head's dims i and i + n/2 are a pair of the rotation (arXiv 2104.09864, half-split): with c, s of the row's position
    (x_i, x_{i+n/2}) -> (x_i c_i - x_{i+n/2} s_i, x_{i+n/2} c_i + x_i s_i); dims from n on, and values, pass through. Each
    step is computed in float32 and rounded to the product's dtype, as torch's operations are.

    Args:
        product: [T, (Hq + 2 Hkv) D], query heads, key heads, value heads; a row's numbers contiguous
        positions: [T] integers; a row below 0 is padding: nothing is written for it, its query neither
        pages: [T] integers, where the row's entry goes
        offsets: [T] integers, likewise
        rotation: cos and sin [positions, n / 2] float32 of every position, n up to D (`RotaryTable.all`)
        plane: [pages, S, Hkv, 2, D], as `PagedCache.plane` gives it
        bias: [(Hq + 2 Hkv) D], added next
        head_norms: weights [D] of an RMS norm of each query head and of each key head, before the rotation (Qwen3's,
            arXiv 2505.09388)
        eps: of those norms

    Returns:
        [T, Hkv, G = Hq / Hkv, D] in the dtype of product
    """
    cos, sin = rotation
    kv_heads, dim = plane.shape[2], plane.shape[4]
    query_heads = product.shape[1] // dim - 2 * kv_heads
    group = query_heads // kv_heads
    query = torch.empty(len(product), kv_heads, group, dim, dtype=product.dtype, device=product.device)
    if not len(product):
        return query
    query_norm, key_norm = (product, product) if head_norms is None else head_norms
    heads, width = block(group + 2), block(dim)
    _rotate_and_store[(len(product), kv_heads)](
        product, product if bias is None else bias, query_norm, key_norm, cos, sin, positions, pages, offsets,
        plane, query, product.stride(0), plane.stride(0), plane.stride(1), eps,
        QUERY_HEADS=query_heads, KV_HEADS=kv_heads, DIM=dim, HALF=cos.shape[1],
        HEAD_BLOCK=heads, DIM_BLOCK=width, BIAS=bias is not None, NORMS=head_norms is not None,
        num_warps=warps(heads * width), **overlap(), **UNFUSED,
    )  # fmt: skip
    return query


@kernel
def _head(
    product: tl.tensor,
    bias: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    at: tl.tensor,
    dim: tl.tensor,
    part: tl.tensor,
    mask: tl.tensor,
    eps: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BIAS: tl.constexpr,
    NORMS: tl.constexpr,
) -> tl.tensor:
    """Numbers at `at` [heads, dims], with bias and norm, float32 that the product's dtype holds.

    A head's numbers are all there, in whatever order.
    """
    dtype = product.dtype.element_ty
    own = tl.load(product + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        own = (own + bias).to(dtype).to(tl.float32)
    if NORMS:
        root = tl.rsqrt(row_sums(own * own) / DIM + eps)
        gain = tl.load(query_norm + dim + part * 0, mask=mask & (part < GROUP), other=0.0).to(tl.float32)
        gain += tl.load(key_norm + dim + part * 0, mask=mask & (part == GROUP), other=0.0).to(tl.float32)
        normed = ((own * root).to(dtype).to(tl.float32) * gain).to(dtype).to(tl.float32)
        own = tl.where(part <= GROUP, normed, own)
    return own


@kernel
def _rotate_and_store(
    product: tl.tensor,
    bias: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    pages: tl.tensor,
    offsets: tl.tensor,
    plane: tl.tensor,
    query: tl.tensor,
    row_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    eps: tl.tensor,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    NORMS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a row and KV head: the query heads that share it, its key, its value."""
    turn(EARLY)
    rotate_one(
        product, bias, query_norm, key_norm, cos, sin, positions, pages, offsets, plane, query,
        row_stride, page_stride, slot_stride, eps, tl.program_id(0).to(tl.int64), tl.program_id(1),
        QUERY_HEADS, KV_HEADS, DIM, HALF, HEAD_BLOCK, DIM_BLOCK, BIAS, NORMS,
    )  # fmt: skip


@kernel
def rotate_one(
    product: tl.tensor,
    bias: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    pages: tl.tensor,
    offsets: tl.tensor,
    plane: tl.tensor,
    query: tl.tensor,
    row_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    eps: tl.tensor,
    row: tl.tensor,
    kv: tl.tensor,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    NORMS: tl.constexpr,
) -> None:
    """One row and KV head."""
    GROUP: tl.constexpr = QUERY_HEADS // KV_HEADS
    position = tl.load(positions + row).to(tl.int64)
    if position >= 0:
        part = tl.arange(0, HEAD_BLOCK)[:, None]
        dim = tl.arange(0, DIM_BLOCK)[None, :]
        mask = (part < GROUP + 2) & (dim < DIM)
        head = tl.where(part < GROUP, kv * GROUP + part, QUERY_HEADS + kv + (part - GROUP) * KV_HEADS)
        partner = tl.where(dim < HALF, dim + HALF, tl.where(dim < 2 * HALF, dim - HALF, dim))
        own_bias = 0.0
        other_bias = 0.0
        if BIAS:
            own_bias = tl.load(bias + head * DIM + dim, mask=mask, other=0.0).to(tl.float32)
            other_bias = tl.load(bias + head * DIM + partner, mask=mask, other=0.0).to(tl.float32)
        at = row * row_stride + head * DIM
        own = _head(
            product, own_bias, query_norm, key_norm, at + dim, dim, part, mask, eps,
            GROUP, DIM, BIAS, NORMS,
        )  # fmt: skip
        other = _head(
            product, other_bias, query_norm, key_norm, at + partner, partner, part, mask, eps,
            GROUP, DIM, BIAS, NORMS,
        )  # fmt: skip
        pair = tl.where(dim < HALF, dim, dim - HALF)
        turns = dim < 2 * HALF
        c = tl.load(cos + position * HALF + pair, mask=turns, other=1.0)
        s = tl.load(sin + position * HALF + pair, mask=turns, other=0.0)
        s = tl.where(dim < HALF, -s, s)
        turned = tl.where(turns & (part <= GROUP), own * c + other * s, own).to(product.dtype.element_ty)
        tl.store(
            query + ((row * KV_HEADS + kv) * GROUP + part) * DIM + dim, turned, mask=mask & (part < GROUP)
        )
        slot = tl.load(pages + row).to(tl.int64) * page_stride + tl.load(offsets + row) * slot_stride
        tl.store(
            plane + slot + (kv * 2 + part - GROUP) * DIM + dim,
            turned.to(plane.dtype.element_ty),
            mask=mask & (part >= GROUP),
        )
