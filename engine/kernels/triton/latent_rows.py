"""What lies between the products of a layer of latent attention, in two launches.

`store_tokens` follows the products of the hidden state: it normalises the latent, rotates the shared key, writes both
into the cache, normalises the query's latent, and writes the index key. `rotate_queries` follows the products of the
query's latent: it rotates the queries, and makes the index queries and their head weights. The numbers are those of
`engine.attention.mla`, `engine.attention.precision` and `engine.attention.indexer`, rounded where torch's operations
round; only the sums of the norms and of the Hadamard transform have an order of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from engine.errors import EngineError
from engine.kernels.interface.fp8 import ACTIVATION_FLOOR, CACHE_FLOOR
from engine.kernels.triton.index_key import (
    CODES,
    KeyForm,
    check_form,
    e4m3,
    query_some,
    scale_part,
    store_some,
)
from engine.kernels.triton.kernel import UNFUSED, block, kernel, overlap, turn
from engine.memory.blocks import BLOCK, E4M3
from engine.memory.layouts import LatentLayout

_HEADS = 32  # of a layer's queries, a program
_INDEX_HEADS = 16
_BLOCK = tl.constexpr(BLOCK)

Rotation = tuple[Tensor, Tensor]


class IndexKeyPart(NamedTuple):
    """The index keys of a layer's rows, and where they go.

    Attributes:
        key: [T, d], projected; a row's numbers contiguous
        norm_weight: [d], of the layer norm
        norm_bias: [d]
        eps: of that norm
        rotation: cos and sin [positions, n / 2] float32 of every position
        plane: [pages, 64, d], or [pages, 64, d + 4] uint8 in fp8
        form: of the plane, plain or fp8
        interleaved: dims 2i and 2i + 1 are a pair of the rotation, not i and i + n/2
    """

    key: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    rotation: Rotation
    plane: Tensor
    form: KeyForm
    interleaved: bool = False


class IndexQueryPart(NamedTuple):
    """The index queries of a layer's rows.

    Attributes:
        query: [T, H d], projected; a row's numbers contiguous
        head_weights: [T, H], projected; likewise
        scale: of the head weights, all constant factors
        rotation: as in `IndexKeyPart`
        form: what the keys are in, plain or fp8
        interleaved: as in `IndexKeyPart`
    """

    query: Tensor
    head_weights: Tensor
    scale: float
    rotation: Rotation
    form: KeyForm
    interleaved: bool = False


def store_tokens(
    kv: Tensor,
    norm: Tensor,
    eps: float,
    rotation: Rotation,
    positions: Tensor,
    pages: Tensor,
    offsets: Tensor,
    plane: Tensor,
    *,
    interleaved: bool,
    query_latent: tuple[Tensor, Tensor, float] | None = None,
    index: IndexKeyPart | None = None,
) -> Tensor | None:
    """Write [rms_norm(latent) | rotate(key)] of T rows into the cache, and their index keys.

    Args:
        kv: [T, r + p], the latent and the shared key as projected; a row's numbers contiguous
        norm: [r], weight of the latent's norm
        eps: of that norm
        rotation: cos and sin [positions, p / 2] float32 of every position (`RotaryTable.all`)
        positions: [T] integers; nothing is written for a row below 0
        pages: [T] integers, where the row's entry goes
        offsets: [T] integers, likewise
        plane: [pages, 64, bytes] uint8 as in `engine.memory.layouts.LatentLayout`, or [pages, 64, r + p] of numbers
        interleaved: the shared key's dims 2i and 2i + 1 are a pair of the rotation, not i and i + p/2
        query_latent: the query's latent as projected [T, r_q], the weight [r_q] and the eps of its norm; None: none
        index: the layer's index keys; None: it has no indexer

    Returns:
        the normalised latent of the queries [T, r_q], of padding too; None without one

    Raises:
        EngineError: the plane does not hold such tokens.
    """
    rows, rank, rope = len(kv), norm.shape[0], kv.shape[1] - norm.shape[0]
    cos, sin = rotation
    fp8 = plane.dtype == torch.uint8
    width = LatentLayout(rank, rope).token_bytes if fp8 else rank + rope
    if plane.shape[-1] != width or plane.stride(-1) != 1 or 2 * cos.shape[1] != rope:
        raise EngineError(
            f"a plane of {tuple(plane.shape)} and a rotation of {2 * cos.shape[1]} dims are not for latents of {rank} + {rope}"
        )
    projected, weight, latent_eps = (kv, norm, 0.0) if query_latent is None else query_latent
    size = 0 if query_latent is None else projected.shape[1]
    normed = torch.empty(rows, size, dtype=kv.dtype, device=kv.device)
    result = None if query_latent is None else normed
    key = index
    if key is None:
        key = IndexKeyPart(kv, norm, norm, 0.0, rotation, plane, "plain")
    dim = 0 if index is None else key.key.shape[1]
    if index is not None:
        check_form(dim, key.form)
    if not rows:
        return result
    index_width = block(max(dim, 1))
    _store_tokens[(rows, 3)](
        kv, norm, cos, sin, positions, pages, offsets, plane, kv.stride(0), plane.stride(0), plane.stride(1), eps, CACHE_FLOOR,
        projected, weight, normed, projected.stride(0), latent_eps,
        key.key, key.norm_weight, key.norm_bias, *key.rotation, key.plane, *scale_part(key.plane, key.form), rows,
        key.key.stride(0), key.plane.stride(0), key.plane.stride(1), key.eps, max(dim, 1) ** -0.5, ACTIVATION_FLOOR,
        RANK=rank, RANK_BLOCK=block(rank), HALF=rope // 2, HALF_BLOCK=block(rope // 2), INTERLEAVED=interleaved, FP8=fp8,
        SIZE=size, SIZE_BLOCK=block(max(size, 1)), LATENT=query_latent is not None,
        DIM=dim, DIM_BLOCK=index_width, LOG_DIM=index_width.bit_length() - 1, INDEX_HALF=key.rotation[0].shape[1],
        INDEX_INTERLEAVED=key.interleaved, FORM=CODES[key.form], INDEX=index is not None,
        num_warps=4, **overlap(), **UNFUSED,
    )  # fmt: skip
    return result


def rotate_queries(
    query: Tensor,
    positions: Tensor,
    rotation: Rotation,
    *,
    interleaved: bool,
    turned: Tensor | None = None,
    index: IndexQueryPart | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Rotate the last p dims of each head in place, and make the index queries.

    Args:
        query: [T, H, n + p], rows and heads may be apart; it is changed
        positions: [T] integers; a row below 0 is left as it is
        rotation: cos and sin [positions, p / 2] float32 of every position
        interleaved: dims 2i and 2i + 1 are a pair of the rotation, not i and i + p/2
        turned: [T, H, p], written too, with what `query` has then; rows and heads may be apart; None: nowhere
        index: the layer's index queries; None: none are made

    Returns:
        as `engine.kernels.triton.index_key.queries`, or None without `index`

    Raises:
        EngineError: the numbers of a head do not lie together.
    """
    rows, heads, width = query.shape
    cos, sin = rotation
    half = cos.shape[1]
    other = query[..., width - 2 * half :] if turned is None else turned
    if query.stride(2) != 1 or other.stride(2) != 1 or other.shape != (rows, heads, 2 * half):
        raise EngineError(
            f"queries {tuple(query.shape)} and their rotated part {tuple(other.shape)} are not those of {2 * half} rotated dims"
        )
    part = index
    if part is None:
        part = IndexQueryPart(query, query, 1.0, rotation, "plain")
    index_heads = 0 if index is None else part.head_weights.shape[1]
    dim = 1 if index is None else part.query.shape[1] // index_heads
    if index is not None:
        check_form(dim, part.form)
    dtype = torch.uint8 if part.form == "fp8" else torch.int8 if part.form == "int8" else query.dtype
    out = torch.empty(rows, index_heads, dim, dtype=dtype, device=query.device)
    weights = torch.empty(rows, index_heads, dtype=torch.float32, device=query.device)
    if rows:
        index_width = block(dim)
        parts = -(-heads // _HEADS)
        _rotate_queries[(rows, parts + -(-index_heads // _INDEX_HEADS))](
            query, other, cos, sin, positions, query.stride(0), query.stride(1), other.stride(0), other.stride(1),
            part.query, part.head_weights, *part.rotation, out, weights, rows, part.query.stride(0),
            part.head_weights.stride(0), part.scale, dim**-0.5, ACTIVATION_FLOOR,
            HEADS=heads, NOPE=width - 2 * half, HALF=half, HALF_BLOCK=block(half), INTERLEAVED=interleaved, BOTH=turned is not None,
            PARTS=parts, PART=_HEADS, INDEX_HEADS=index_heads, INDEX_PART=_INDEX_HEADS, DIM=dim, DIM_BLOCK=index_width,
            LOG_DIM=index_width.bit_length() - 1, INDEX_HALF=part.rotation[0].shape[1], INDEX_INTERLEAVED=part.interleaved,
            FORM=CODES[part.form], INDEX=index is not None,
            num_warps=4, **overlap(), **UNFUSED,
        )  # fmt: skip
    if index is None:
        return None
    return (out.view(E4M3) if part.form == "fp8" else out), weights


@kernel
def _normed(
    x: tl.tensor, weight: tl.tensor, at: tl.tensor, eps: tl.tensor, dtype: tl.constexpr, SIZE: tl.constexpr
) -> tl.tensor:
    """x / sqrt(mean(x^2) + eps) * weight of [numbers] float32, rounded to `dtype` as `rms_norm` rounds."""
    root = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    gain = tl.load(weight + at, mask=at < SIZE, other=0.0)
    rounded = (x * root).to(dtype).to(tl.float32)
    return (rounded * gain.to(tl.float32)).to(dtype).to(tl.float32)


@kernel
def _turned_pairs(
    source: tl.tensor, cos: tl.tensor, sin: tl.tensor, mask: tl.tensor, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr
) -> tl.tuple:  # fmt: skip
    """(first, second) of each pair, rotated, float32 that the source's dtype holds, and where they lie behind `source`.

    Args:
        source: pointers [heads, 1]; nothing is read where the mask [heads, 1] is false
        cos: pointers [1], the row's
        sin: likewise
    """
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    inside = pair < HALF
    if INTERLEAVED:
        low = 2 * pair
        high = 2 * pair + 1
    else:
        low = pair
        high = pair + HALF
    dtype = source.dtype.element_ty
    first = tl.load(source + low, mask=mask & inside, other=0.0).to(tl.float32)
    second = tl.load(source + high, mask=mask & inside, other=0.0).to(tl.float32)
    c = tl.load(cos + pair, mask=inside, other=1.0)
    s = tl.load(sin + pair, mask=inside, other=0.0)
    return (
        (first * c - second * s).to(dtype).to(tl.float32),
        (second * c + first * s).to(dtype).to(tl.float32),
        low,
        high,
    )


@kernel
def _store_bfloat16(place: tl.tensor, x: tl.tensor, mask: tl.tensor) -> None:
    """Float32 numbers as the two bytes each of bfloat16, rounded to the nearest, ties to even, at any address."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    tl.store(place, (bits & 0xFF).to(tl.uint8), mask=mask)
    tl.store(place + 1, ((bits >> 8) & 0xFF).to(tl.uint8), mask=mask)


@kernel
def _store_latent(
    kv: tl.tensor, norm: tl.tensor, cos: tl.tensor, sin: tl.tensor, place: tl.tensor, eps: tl.tensor, floor: tl.tensor,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
    FP8: tl.constexpr,
) -> None:  # fmt: skip
    """One token: the latent at `kv` and the shared key behind it, stored at `place`."""
    at = tl.arange(0, RANK_BLOCK)
    dtype = kv.dtype.element_ty
    x = tl.load(kv + at, mask=at < RANK, other=0.0).to(tl.float32)
    x = _normed(x, norm, at, eps, dtype, RANK)
    one = tl.full([1, 1], 1, tl.int1)
    key = kv + RANK + tl.zeros([1, 1], tl.int32)
    first, second, low, high = _turned_pairs(key, cos, sin, one, INTERLEAVED, HALF, HALF_BLOCK)
    inside = tl.arange(0, HALF_BLOCK)[None, :] < HALF
    if FP8:
        LENGTH: tl.constexpr = min(_BLOCK, RANK_BLOCK)
        PARTS: tl.constexpr = RANK_BLOCK // LENGTH
        SCALES: tl.constexpr = (RANK + _BLOCK - 1) // _BLOCK
        parts = tl.reshape(x, (PARTS, LENGTH))
        bytes_, scale = e4m3(parts, tl.max(tl.abs(parts), 1, keep_dims=True), floor)
        tl.store(place + at, tl.reshape(bytes_, (RANK_BLOCK,)), mask=at < RANK)
        part = tl.arange(0, PARTS)[:, None]
        bits = scale.to(tl.int32, bitcast=True)
        for byte in tl.static_range(4):
            number = ((bits >> (8 * byte)) & 0xFF).to(tl.uint8)
            tl.store(place + RANK + 4 * part + byte, number, mask=part < SCALES)
        rope = place + RANK + 4 * SCALES
        _store_bfloat16(rope + 2 * low, first, inside)
        _store_bfloat16(rope + 2 * high, second, inside)
    else:
        stored = place.dtype.element_ty
        tl.store(place + at, x.to(stored), mask=at < RANK)
        tl.store(place + RANK + low, first.to(stored), mask=inside)
        tl.store(place + RANK + high, second.to(stored), mask=inside)


@kernel
def _store_tokens(
    kv: tl.tensor, norm: tl.tensor, cos: tl.tensor, sin: tl.tensor, positions: tl.tensor, pages: tl.tensor, offsets: tl.tensor,
    plane: tl.tensor, row_stride: tl.tensor, page_stride: tl.tensor, slot_stride: tl.tensor, eps: tl.tensor, floor: tl.tensor,
    latent: tl.tensor, latent_norm: tl.tensor, normed: tl.tensor, latent_stride: tl.tensor, latent_eps: tl.tensor,
    index_key: tl.tensor, index_norm: tl.tensor, index_bias: tl.tensor, index_cos: tl.tensor, index_sin: tl.tensor,
    index_plane: tl.tensor, scales: tl.tensor, scale_page_stride: tl.tensor, num_rows: tl.tensor, index_key_stride: tl.tensor,
    index_page_stride: tl.tensor, index_slot_stride: tl.tensor, index_eps: tl.tensor, hadamard_scale: tl.tensor,
    index_floor: tl.tensor,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
    FP8: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, LATENT: tl.constexpr,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, LOG_DIM: tl.constexpr, INDEX_HALF: tl.constexpr,
    INDEX_INTERLEAVED: tl.constexpr, FORM: tl.constexpr, INDEX: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """A program a row's latent and shared key, its query latent, or its index key."""
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part == 0:
        position = tl.load(positions + row).to(tl.int64)
        if position >= 0:
            slot = tl.load(pages + row).to(tl.int64) * page_stride + tl.load(offsets + row) * slot_stride
            _store_latent(
                kv + row * row_stride, norm, cos + position * HALF, sin + position * HALF, plane + slot, eps, floor,
                RANK, RANK_BLOCK, HALF, HALF_BLOCK, INTERLEAVED, FP8,
            )  # fmt: skip
    elif part == 1:
        if LATENT:
            at = tl.arange(0, SIZE_BLOCK)
            dtype = normed.dtype.element_ty
            x = tl.load(latent + row * latent_stride + at, mask=at < SIZE, other=0.0).to(tl.float32)
            x = _normed(x, latent_norm, at, latent_eps, dtype, SIZE)
            tl.store(normed + row * SIZE + at, x.to(dtype), mask=at < SIZE)
    else:
        if INDEX:
            store_some(
                index_key, index_norm, index_bias, index_cos, index_sin, positions, pages, offsets, index_plane, scales,
                scale_page_stride, num_rows, index_key_stride, index_page_stride, index_slot_stride, index_eps,
                hadamard_scale, index_floor,
                DIM, DIM_BLOCK, LOG_DIM, INDEX_HALF, INDEX_INTERLEAVED, FORM, 1, row + tl.zeros([1, 1], tl.int64),
            )  # fmt: skip


@kernel
def _rotate_queries(
    query: tl.tensor, turned: tl.tensor, cos: tl.tensor, sin: tl.tensor, positions: tl.tensor, row_stride: tl.tensor,
    head_stride: tl.tensor, turned_row: tl.tensor, turned_head: tl.tensor,
    index_query: tl.tensor, head_weights: tl.tensor, index_cos: tl.tensor, index_sin: tl.tensor, out: tl.tensor,
    weights: tl.tensor, num_rows: tl.tensor, index_row_stride: tl.tensor, weight_stride: tl.tensor,
    weight_scale: tl.tensor, hadamard_scale: tl.tensor, index_floor: tl.tensor,
    HEADS: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
    BOTH: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, INDEX_HEADS: tl.constexpr, INDEX_PART: tl.constexpr,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, LOG_DIM: tl.constexpr, INDEX_HALF: tl.constexpr,
    INDEX_INTERLEAVED: tl.constexpr, FORM: tl.constexpr, INDEX: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """A program some heads of a row, or some of its index heads."""
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part < PARTS:
        position = tl.load(positions + row).to(tl.int64)
        if position >= 0:
            head = part * PART + tl.arange(0, PART)[:, None]
            mask = head < HEADS
            place = query + row * row_stride + head * head_stride + NOPE
            first, second, low, high = _turned_pairs(
                place, cos + position * HALF, sin + position * HALF, mask, INTERLEAVED, HALF, HALF_BLOCK
            )
            mask = mask & (tl.arange(0, HALF_BLOCK)[None, :] < HALF)
            dtype = query.dtype.element_ty
            tl.store(place + low, first.to(dtype), mask=mask)
            tl.store(place + high, second.to(dtype), mask=mask)
            if BOTH:
                place = turned + row * turned_row + head * turned_head
                tl.store(place + low, first.to(turned.dtype.element_ty), mask=mask)
                tl.store(place + high, second.to(turned.dtype.element_ty), mask=mask)
    else:
        if INDEX:
            index_head = (part - PARTS) * INDEX_PART + tl.arange(0, INDEX_PART)[:, None]
            query_some(
                index_query, head_weights, index_cos, index_sin, positions, out, weights, num_rows, index_row_stride,
                weight_stride, weight_scale, hadamard_scale, index_floor,
                INDEX_HEADS, DIM, DIM_BLOCK, LOG_DIM, INDEX_HALF, INDEX_INTERLEAVED, FORM, INDEX_PART,
                row + tl.zeros([INDEX_PART, 1], tl.int64), index_head,
            )  # fmt: skip
