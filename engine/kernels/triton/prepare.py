"""All that lies between a layer's fused product and its scores, of few rows, in one launch.

It is what `engine.kernels.triton.rotation` and `engine.kernels.triton.index_key` do in three, to the bit: a launch costs
more than so few rows do. Their sums have one order, and no product is fused with an addition (`UNFUSED`), so that the
bits do not depend on how a compiler lays a kernel out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from engine.kernels.interface.fp8 import ACTIVATION_FLOOR
from engine.kernels.triton.index_key import CODES, KeyForm, check_form, query_some, scale_part, store_some
from engine.kernels.triton.kernel import UNFUSED, block, kernel, overlap, turn
from engine.kernels.triton.rotation import rotate_one

_PLAIN = tl.constexpr(0)


class IndexPart(NamedTuple):
    """What a layer's indexer adds to its fused product, and where its keys go.

    Attributes:
        query: [T, H d], projected; a row's numbers contiguous, here and below
        key: [T, d], projected
        head_weights: [T, H], projected
        norm_weight: [d], of the keys' layer norm
        norm_bias: [d]
        eps: of that norm
        scale: of the head weights, all constant factors
        rotation: cos and sin [positions, n / 2] float32 of every position
        plane: [pages, 64, d], or [pages, 64, d + 4] uint8 in int8
        form: of the plane, plain or int8
    """

    query: Tensor
    key: Tensor
    head_weights: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    scale: float
    rotation: tuple[Tensor, Tensor]
    plane: Tensor
    form: KeyForm


def prepare(
    product: Tensor,
    positions: Tensor,
    pages: Tensor,
    offsets: Tensor,
    rotation: tuple[Tensor, Tensor],
    plane: Tensor,
    index: IndexPart,
    *,
    bias: Tensor | None = None,
    head_norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotate_and_store`, `store_keys` and `queries` (in the plain form).

    Args:
        product: as in `rotate_and_store`, and all up to `plane`, and from `bias` on
        positions: [T] integers
        pages: [T] integers
        offsets: [T] integers
        rotation: of queries and keys
        plane: of keys and values
        index: the indexer's part
        bias: of the product
        head_norms: of queries and keys
        eps: of those norms

    Returns:
        queries [T, Hkv, G, D]; index queries [T, H, d] in their product's dtype; head weights [T, H] float32
    """
    cos, sin = rotation
    index_cos, index_sin = index.rotation
    rows, heads = index.head_weights.shape
    kv_heads, dim = plane.shape[2], plane.shape[4]
    query_heads = product.shape[1] // dim - 2 * kv_heads
    group, index_dim = query_heads // kv_heads, index.key.shape[1]
    check_form(index_dim, index.form)
    device = product.device
    query = torch.empty(rows, kv_heads, group, dim, dtype=product.dtype, device=device)
    index_query = torch.empty(rows, heads, index_dim, dtype=index.query.dtype, device=device)
    weights = torch.empty(rows, heads, dtype=torch.float32, device=device)
    if not rows:
        return query, index_query, weights
    query_norm, key_norm = (product, product) if head_norms is None else head_norms
    width = block(index_dim)
    _prepare[(rows, kv_heads + 2)](
        product, product if bias is None else bias, query_norm, key_norm, cos, sin, positions, pages, offsets, plane, query,
        product.stride(0), plane.stride(0), plane.stride(1), eps,
        index.query, index.key, index.head_weights, index.norm_weight, index.norm_bias, index_cos, index_sin,
        index.plane, *scale_part(index.plane, index.form), index_query, weights, rows,
        index.query.stride(0), index.key.stride(0), index.head_weights.stride(0), index.plane.stride(0),
        index.plane.stride(1), index.eps, index.scale, ACTIVATION_FLOOR,
        QUERY_HEADS=query_heads, KV_HEADS=kv_heads, DIM=dim, HALF=cos.shape[1], HEAD_BLOCK=block(group + 2),
        DIM_BLOCK=block(dim), BIAS=bias is not None, NORMS=head_norms is not None,
        INDEX_HEADS=heads, INDEX_DIM=index_dim, INDEX_BLOCK=width, LOG_DIM=width.bit_length() - 1,
        INDEX_HALF=index_cos.shape[1], FORM=CODES[index.form], HEADS_BLOCK=block(heads), num_warps=4, **overlap(), **UNFUSED,
    )  # fmt: skip
    return query, index_query, weights


@kernel
def _prepare(
    product: tl.tensor, bias: tl.tensor, query_norm: tl.tensor, key_norm: tl.tensor, cos: tl.tensor, sin: tl.tensor,
    positions: tl.tensor, pages: tl.tensor, offsets: tl.tensor, plane: tl.tensor, query: tl.tensor,
    row_stride: tl.tensor, page_stride: tl.tensor,
    slot_stride: tl.tensor, eps: tl.tensor,
    index_query: tl.tensor, index_key: tl.tensor, head_weights: tl.tensor, norm_weight: tl.tensor, norm_bias: tl.tensor,
    index_cos: tl.tensor, index_sin: tl.tensor, index_plane: tl.tensor, scales: tl.tensor, scale_page_stride: tl.tensor,
    index_out: tl.tensor, weights_out: tl.tensor, num_rows: tl.tensor, index_query_stride: tl.tensor,
    index_key_stride: tl.tensor, head_weight_stride: tl.tensor, index_page_stride: tl.tensor,
    index_slot_stride: tl.tensor, index_eps: tl.tensor, weight_scale: tl.tensor, floor: tl.tensor,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr, BIAS: tl.constexpr, NORMS: tl.constexpr,
    INDEX_HEADS: tl.constexpr, INDEX_DIM: tl.constexpr, INDEX_BLOCK: tl.constexpr, LOG_DIM: tl.constexpr,
    INDEX_HALF: tl.constexpr, FORM: tl.constexpr, HEADS_BLOCK: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """A program a row and KV head, its index key, or its index queries."""
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part < KV_HEADS:
        rotate_one(
            product, bias, query_norm, key_norm, cos, sin, positions, pages, offsets, plane, query,
            row_stride, page_stride, slot_stride, eps, row, part,
            QUERY_HEADS, KV_HEADS, DIM, HALF, HEAD_BLOCK, DIM_BLOCK, BIAS, NORMS,
        )  # fmt: skip
    elif part == KV_HEADS:
        store_some(
            index_key, norm_weight, norm_bias, index_cos, index_sin, positions, pages, offsets, index_plane, scales,
            scale_page_stride, num_rows, index_key_stride, index_page_stride, index_slot_stride, index_eps, 1.0, floor,
            INDEX_DIM, INDEX_BLOCK, LOG_DIM, INDEX_HALF, False, FORM, 1, row + tl.zeros([1, 1], tl.int64),
        )  # fmt: skip
    else:
        head = tl.arange(0, HEADS_BLOCK)[:, None]
        query_some(
            index_query, head_weights, index_cos, index_sin, positions, index_out, weights_out, num_rows,
            index_query_stride, head_weight_stride, weight_scale, 1.0, floor,
            INDEX_HEADS, INDEX_DIM, INDEX_BLOCK, LOG_DIM, INDEX_HALF, False, _PLAIN, HEADS_BLOCK,
            row + tl.zeros([HEADS_BLOCK, 1], tl.int64), head,
        )  # fmt: skip
