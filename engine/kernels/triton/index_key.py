"""The indexer's vectors: keys normalised, rotated, quantised and stored, and queries made ready for the scorer.

Three forms, each as the plain functions have it:

- plain: numbers of the plane's dtype
- int8: `engine.kernels.interface.int8` in `engine.memory.layouts.Int8KeyLayout`'s pages
- fp8: e4m3 with a power of two as scale after a Hadamard rotation (`engine.attention.precision.IndexFormat`), in
  `engine.memory.layouts.IndexKeyLayout`'s pages

Numbers become e4m3 by integer arithmetic, since not every GPU has an instruction for it.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton.language as tl
from torch import Tensor

from engine.errors import EngineError
from engine.kernels.interface.fp8 import ACTIVATION_FLOOR
from engine.kernels.triton.kernel import UNFUSED, block, kernel, overlap, row_sums, turn
from engine.memory.blocks import BLOCK, E4M3
from engine.memory.layouts import Int8KeyLayout

KeyForm = Literal["plain", "int8", "fp8"]

_KEYS = 4  # a program
_QUERIES = 8
_PLAIN = tl.constexpr(0)
_INT8 = tl.constexpr(1)
_FP8 = tl.constexpr(2)
CODES: dict[KeyForm, int] = {"plain": 0, "int8": 1, "fp8": 2}


def store_keys(
    key: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    positions: Tensor,
    pages: Tensor,
    offsets: Tensor,
    plane: Tensor,
    form: KeyForm,
    *,
    interleaved: bool = False,
) -> None:
    """k = rotate((x - mean) / sqrt(var + eps) * weight + bias), stored in `form` at (pages[t], offsets[t]).

    Args:
        key: [T, d], the projected key x; a row's numbers contiguous
        weight: [d], of the layer norm
        bias: [d]
        eps: of the layer norm
        rotation: cos and sin [positions, n / 2] float32 of every position; the first n dims are rotated
        positions: [T] integers; nothing is written for a row below 0
        pages: [T] integers
        offsets: [T] integers
        plane: [pages, 64, d], or [pages, 64, d + 4] uint8 in int8 and fp8
        form: of the plane
        interleaved: dims 2i and 2i + 1 are a pair of the rotation, not i and i + n/2

    Raises:
        EngineError: vectors of d numbers have no such form.
    """
    rows, dim = key.shape
    check_form(dim, form)
    if not rows:
        return
    cos, sin = rotation
    width = block(dim)
    _store_keys[(-(-rows // _KEYS),)](
        key, weight, bias, cos, sin, positions, pages, offsets, plane, *scale_part(plane, form),
        rows, key.stride(0), plane.stride(0), plane.stride(1), eps, dim**-0.5, ACTIVATION_FLOOR,
        DIM=dim, DIM_BLOCK=width, LOG_DIM=width.bit_length() - 1, HALF=cos.shape[1], INTERLEAVED=interleaved, FORM=CODES[form], ROWS=_KEYS,
        num_warps=4, **overlap(), **UNFUSED,
    )  # fmt: skip


def queries(
    query: Tensor,
    head_weights: Tensor,
    scale: float,
    rotation: tuple[Tensor, Tensor],
    positions: Tensor,
    form: KeyForm,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """q = rotate(x) in `form`, and head weights times `scale` and the vector's own.

    Args:
        query: [T, H d], the projected queries x; a row's numbers contiguous
        head_weights: [T, H], the projected weights; likewise
        scale: all constant factors, H^-0.5 d^-0.5
        rotation: as in `store_keys`
        positions: [T] integers; nothing is written for a row below 0
        form: what the keys are in
        interleaved: as in `store_keys`

    Returns:
        [T, H, d] in the dtype of query, or int8, or float8_e4m3fn; [T, H] float32

    Raises:
        EngineError: vectors of d numbers have no such form.
    """
    rows, heads = head_weights.shape
    dim = query.shape[1] // heads
    check_form(dim, form)
    dtype = {"plain": query.dtype, "int8": torch.int8, "fp8": torch.uint8}[form]
    out = torch.empty(rows, heads, dim, dtype=dtype, device=query.device)
    weights = torch.empty(rows, heads, dtype=torch.float32, device=query.device)
    if rows:
        cos, sin = rotation
        width = block(dim)
        _queries[(-(-rows * heads // _QUERIES),)](
            query, head_weights, cos, sin, positions, out, weights,
            rows, query.stride(0), head_weights.stride(0), scale, dim**-0.5, ACTIVATION_FLOOR,
            HEADS=heads, DIM=dim, DIM_BLOCK=width, LOG_DIM=width.bit_length() - 1, HALF=cos.shape[1], INTERLEAVED=interleaved, FORM=CODES[form],
            ROWS=_QUERIES, num_warps=4, **overlap(), **UNFUSED,
        )  # fmt: skip
    return (out.view(E4M3) if form == "fp8" else out), weights


def check_form(dim: int, form: KeyForm) -> None:
    """Raise an `EngineError` if vectors of `dim` numbers have no such form."""
    if form == "fp8" and (dim > BLOCK or dim < 4 or dim & (dim - 1)):
        raise EngineError(
            f"index vectors of {dim} numbers cannot be in FP8; a power of two from 4 to {BLOCK} can"
        )
    if form == "int8" and not Int8KeyLayout.fits(dim):
        raise EngineError(
            f"index vectors of {dim} numbers cannot be in 8-bit integers; a multiple of 4 up to 512 can"
        )


def scale_part(plane: Tensor, form: KeyForm) -> tuple[Tensor, int]:
    """The plane as float32 numbers, where its scales are, and its page stride in those."""
    if form == "plain":
        return plane, 0
    numbers = plane.view(torch.float32)
    return numbers, numbers.stride(0)


@kernel
def _turned(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    position: tl.tensor,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
) -> tl.tensor:
    """[rows, dims] float32, rotated by the rows' positions [rows, 1]."""
    dim = tl.arange(0, DIM_BLOCK)[None, :] + tl.zeros([ROWS, 1], dtype=tl.int32)
    turns = dim < 2 * HALF
    if INTERLEAVED:
        partner = dim ^ 1
        pair = dim // 2
        first = (dim & 1) == 0
    else:
        first = dim < HALF
        partner = tl.where(first, dim + HALF, dim - HALF)
        pair = tl.where(first, dim, dim - HALF)
    partner = tl.where(turns, partner, dim)
    other = tl.gather(x, partner, 1)
    known = turns & (position >= 0)
    c = tl.load(cos + position * HALF + pair, mask=known, other=1.0)
    s = tl.load(sin + position * HALF + pair, mask=known, other=0.0)
    s = tl.where(first, -s, s)
    return tl.where(turns, x * c + other * s, x)


@kernel
def _hadamard(
    x: tl.tensor, scale: tl.tensor, DIM: tl.constexpr, LOG_DIM: tl.constexpr, ROWS: tl.constexpr
) -> tl.tensor:
    """Sylvester's matrix over the dims of [rows, DIM] float32: sums and differences of halves, LOG_DIM times."""
    dim = tl.arange(0, DIM)[None, :] + tl.zeros([ROWS, 1], dtype=tl.int32)
    for step in tl.static_range(LOG_DIM):
        half = 1 << step
        other = tl.gather(x, dim ^ half, 1)
        x = tl.where((dim & half) == 0, x + other, other - x)
    return x * scale


@kernel
def _int8(x: tl.tensor, largest: tl.tensor) -> tl.tuple:
    """(integers as float32, scale) of [rows, dims] float32 whose rows have these largest magnitudes [rows, 1]."""
    scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    by = tl.where(scale > 0, scale, 1.0)
    ratio = tl.div_rn(x, tl.broadcast_to(by, x.shape))
    magic = 12582912.0  # 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
    return (ratio + magic) - magic, scale


@kernel
def e4m3(x: tl.tensor, largest: tl.tensor, floor: tl.tensor) -> tl.tuple:
    """(bytes of e4m3, scale, a power of two) likewise."""
    scale = tl.div_rn(tl.maximum(largest, floor), tl.full(largest.shape, 448.0, tl.float32))
    bits = scale.to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFF) != 0, (bits & 0x7F800000) + 0x800000, bits)  # up to a power of two
    scale = bits.to(tl.float32, bitcast=True)
    # A quotient by a power of two is the product with its inverse, to the bit.
    ratio = x * ((254 << 23) - bits).to(tl.float32, bitcast=True)
    ratio = tl.minimum(tl.maximum(ratio, -448.0), 448.0)
    whole = ratio.to(tl.int32, bitcast=True)
    sign = (whole >> 24) & 0x80
    size = whole & 0x7FFFFFFF
    # From 2^-6 on the exponent is moved and 20 digits are rounded away; below, adding 2^14 rounds to steps of 2^-9.
    normal = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(size < 0x3C800000, small, normal) | sign).to(tl.uint8), scale


@kernel
def _store_keys(
    key: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    pages: tl.tensor,
    offsets: tl.tensor,
    plane: tl.tensor,
    scales: tl.tensor,
    scale_page_stride: tl.tensor,
    num_rows: tl.tensor,
    row_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    eps: tl.tensor,
    hadamard_scale: tl.tensor,
    floor: tl.tensor,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    LOG_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program some rows."""
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    store_some(
        key, weight, bias, cos, sin, positions, pages, offsets, plane, scales, scale_page_stride, num_rows, row_stride, page_stride, slot_stride, eps, hadamard_scale, floor, DIM, DIM_BLOCK, LOG_DIM, HALF, INTERLEAVED, FORM, ROWS, row,
    )  # fmt: skip


@kernel
def store_some(
    key: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    pages: tl.tensor,
    offsets: tl.tensor,
    plane: tl.tensor,
    scales: tl.tensor,
    scale_page_stride: tl.tensor,
    num_rows: tl.tensor,
    row_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    eps: tl.tensor,
    hadamard_scale: tl.tensor,
    floor: tl.tensor,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    LOG_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    row: tl.tensor,
) -> None:
    """The keys of rows [ROWS, 1]."""
    dim = tl.arange(0, DIM_BLOCK)[None, :]
    position = tl.load(positions + row, mask=row < num_rows, other=-1).to(tl.int64)
    there = position >= 0
    mask = there & (dim < DIM)
    dtype = key.dtype.element_ty
    x = tl.load(key + row * row_stride + dim, mask=mask, other=0.0).to(tl.float32)
    mean = row_sums(x) / DIM
    apart = tl.where(dim < DIM, x - mean, 0.0)
    root = tl.rsqrt(row_sums(apart * apart) / DIM + eps)
    gain = tl.load(weight + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    shift = tl.load(bias + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    x = (apart * root * gain + shift).to(dtype).to(tl.float32)
    x = _turned(x, cos, sin, position, HALF, INTERLEAVED, ROWS, DIM_BLOCK).to(dtype).to(tl.float32)
    page = tl.load(pages + row, mask=there, other=0).to(tl.int64)
    slot = tl.load(offsets + row, mask=there, other=0).to(tl.int64)
    if FORM == _PLAIN:
        at = page * page_stride + slot * slot_stride + dim
        tl.store(plane + at, x.to(plane.dtype.element_ty), mask=mask)
    elif FORM == _INT8:
        numbers, scale = _int8(x, tl.max(tl.abs(x), 1, keep_dims=True))
        at = page * page_stride + (((slot // 16) * (DIM // 4) + dim // 4) * 16 + slot % 16) * 4 + dim % 4
        tl.store(plane + at, (numbers + 128.0).to(tl.int32).to(tl.uint8), mask=mask)
        tl.store(scales + page * scale_page_stride + 16 * DIM + slot, scale, mask=there)
    else:
        x = _hadamard(x, hadamard_scale, DIM, LOG_DIM, ROWS).to(dtype).to(tl.float32)
        bytes_, scale = e4m3(x, tl.max(tl.abs(x), 1, keep_dims=True), floor)
        tl.store(plane + page * page_stride + slot * DIM + dim, bytes_, mask=mask)
        tl.store(scales + page * scale_page_stride + 16 * DIM + slot, scale, mask=there)


@kernel
def _queries(
    query: tl.tensor,
    head_weights: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,
    weights: tl.tensor,
    num_rows: tl.tensor,
    row_stride: tl.tensor,
    weight_stride: tl.tensor,
    weight_scale: tl.tensor,
    hadamard_scale: tl.tensor,
    floor: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    LOG_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program some vectors."""
    turn(EARLY)
    vector = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    query_some(
        query, head_weights, cos, sin, positions, out, weights, num_rows, row_stride, weight_stride, weight_scale, hadamard_scale, floor, HEADS, DIM, DIM_BLOCK, LOG_DIM, HALF, INTERLEAVED, FORM, ROWS, vector // HEADS, vector % HEADS,
    )  # fmt: skip


@kernel
def query_some(
    query: tl.tensor,
    head_weights: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,
    weights: tl.tensor,
    num_rows: tl.tensor,
    row_stride: tl.tensor,
    weight_stride: tl.tensor,
    weight_scale: tl.tensor,
    hadamard_scale: tl.tensor,
    floor: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    LOG_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    row: tl.tensor,
    head: tl.tensor,
) -> None:
    """The vectors of these rows and heads, [ROWS, 1]; a head beyond the last is none."""
    vector = row * HEADS + head
    dim = tl.arange(0, DIM_BLOCK)[None, :]
    position = tl.load(positions + row, mask=(row < num_rows) & (head < HEADS), other=-1).to(tl.int64)
    there = position >= 0
    mask = there & (dim < DIM)
    dtype = query.dtype.element_ty
    x = tl.load(query + row * row_stride + head * DIM + dim, mask=mask, other=0.0).to(tl.float32)
    x = _turned(x, cos, sin, position, HALF, INTERLEAVED, ROWS, DIM_BLOCK).to(dtype).to(tl.float32)
    weight = tl.load(head_weights + row * weight_stride + head, mask=there, other=0.0).to(tl.float32)
    weight = weight * weight_scale
    if FORM == _PLAIN:
        tl.store(out + vector * DIM + dim, x.to(dtype), mask=mask)
    elif FORM == _INT8:
        numbers, scale = _int8(x, tl.max(tl.abs(x), 1, keep_dims=True))
        tl.store(out + vector * DIM + dim, numbers.to(tl.int32).to(tl.int8), mask=mask)
        weight = weight * scale
    else:
        x = _hadamard(x, hadamard_scale, DIM, LOG_DIM, ROWS).to(dtype).to(tl.float32)
        bytes_, scale = e4m3(x, tl.max(tl.abs(x), 1, keep_dims=True), floor)
        tl.store(out + vector * DIM + dim, bytes_, mask=mask)
        weight = weight * scale
    tl.store(weights + vector, weight, mask=there)
