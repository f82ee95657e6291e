"""Activations in FP8: e4m3 numbers with a scale for each 128 of a row, alone or in the launch that makes the numbers.

The formulas are those of `quantise` in `engine.kernels.interface.fp8`; every number and scale is the reference's. Numbers
become e4m3 by integer arithmetic, since not every GPU has an instruction for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from engine.kernels.interface.fp8 import ACTIVATION_FLOOR, ScaleFormat
from engine.kernels.triton.kernel import block, kernel, overlap, turn, warps
from engine.memory.blocks import BLOCK, E4M3, num_blocks

SUMS = 1024
"""Sums in parts that one row block of a product can have: see `QuantisedRows.turns`."""

_PART = 1024  # numbers of a row a program


@dataclass(frozen=True)
class QuantisedRows:
    """Rows in FP8, as products read them. Made by this module's functions only, for use on one stream.

    Attributes:
        values: [T, n] e4m3, contiguous
        scales: [ceil(n / 128), T] float32: the scales of a block of columns lie together
        turns: [SUMS] int32 zeros, in which programs that share a sum count themselves; they leave zeros
        dtype: of the numbers that were quantised, which is that of a product
    """

    values: Tensor
    scales: Tensor
    turns: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        """T."""
        return len(self.values)


def room(rows: int, size: int, like: Tensor, dtype: torch.dtype) -> QuantisedRows:
    """Memory for so many rows, for a kernel that fills all of it, `turns` with zeros."""
    return QuantisedRows(
        torch.empty(rows, size, dtype=E4M3, device=like.device),
        torch.empty(num_blocks(size), rows, dtype=torch.float32, device=like.device),
        torch.empty(SUMS, dtype=torch.int32, device=like.device),
        dtype,
    )


def quantise_rows(x: Tensor, scale_format: ScaleFormat = "ue8m0") -> QuantisedRows:
    """Quantise rows.

    Args:
        x: [T, n] float32 or bfloat16, a row's numbers contiguous
        scale_format: as in `engine.kernels.interface.fp8`
    """
    rows, size = x.shape
    made = room(rows, size, x, x.dtype)
    if rows:
        _quantise_rows[(rows, -(-size // _PART))](
            x, made.values.view(torch.uint8), made.scales, made.turns, rows, x.stride(0), ACTIVATION_FLOOR,
            SIZE=size, PART=min(_PART, max(block(size), BLOCK)), POWER=scale_format == "ue8m0", SUMS=SUMS, num_warps=4, **overlap(),
        )  # fmt: skip
    return made


def add_rms_norm_rows(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    eps: float,
    scale_format: ScaleFormat = "ue8m0",
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, QuantisedRows]:
    """`engine.kernels.triton.norm.add_rms_norm`, and its normed rows quantised: one launch.

    Args:
        x: [T, n], a row's numbers contiguous
        update: [T, n] of the same dtype, likewise, or None
        weight: [n]
        eps: of the norm
        scale_format: as in `quantise_rows`
        keep: whether the normed rows are wanted as plain numbers, too

    Returns:
        x + update [T, n] (x itself without an update), the normed rows [T, n] in the dtype of weight or None, and quantised
    """
    rows, size = x.shape
    total = x if update is None else torch.empty(rows, size, dtype=x.dtype, device=x.device)
    normed = torch.empty(rows, size, dtype=weight.dtype, device=x.device) if keep else None
    made = room(rows, size, x, weight.dtype)
    if rows:
        width = max(block(size), BLOCK)
        _norm_rows[(rows,)](
            x, x if update is None else update, weight, total, x if normed is None else normed,
            made.values.view(torch.uint8), made.scales, made.turns, rows, x.stride(0), 0 if update is None else update.stride(0), eps, ACTIVATION_FLOOR,
            SIZE=size, WIDTH=width, UPDATE=update is not None, KEEP=keep, POWER=scale_format == "ue8m0", SUMS=SUMS, num_warps=warps(width), **overlap(),
        )  # fmt: skip
    return total, normed, made


def silu_times_rows(product: Tensor, scale_format: ScaleFormat = "ue8m0") -> QuantisedRows:
    """`engine.kernels.triton.gate.silu_times`, quantised: one launch.

    Args:
        product: [T, 2 F], a row's gates and then its ups
        scale_format: as in `quantise_rows`

    Returns:
        [T, F]
    """
    rows, size = product.shape[0], product.shape[1] // 2
    made = room(rows, size, product, product.dtype)
    if rows:
        _silu_rows[(rows, -(-size // _PART))](
            product, made.values.view(torch.uint8), made.scales, made.turns, rows, product.stride(0), ACTIVATION_FLOOR,
            SIZE=size, PART=min(_PART, max(block(size), BLOCK)), POWER=scale_format == "ue8m0", SUMS=SUMS, num_warps=4, **overlap(),
        )  # fmt: skip
    return made


@kernel
def scale_of(largest: tl.tensor, floor: tl.tensor, POWER: tl.constexpr) -> tl.tensor:
    """The scale of numbers with these largest magnitudes, float32; POWER: rounded up to a power of two."""
    scale = tl.div_rn(tl.maximum(largest, floor), tl.full(largest.shape, 448.0, tl.float32))
    if POWER:
        bits = scale.to(tl.int32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFF) != 0, (bits & 0x7F800000) + 0x800000, bits)
        scale = bits.to(tl.float32, bitcast=True)
    return scale


@kernel
def bytes_of(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """The bytes of e4m3(clamp(x / scale, -448, 448)), uint8; `scale` float32 of the shape of x, or 1 where x has more."""
    ratio = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    ratio = tl.minimum(tl.maximum(ratio, -448.0), 448.0)
    whole = ratio.to(tl.int32, bitcast=True)
    sign = (whole >> 24) & 0x80
    size = whole & 0x7FFFFFFF
    # From 2^-6 on the exponent is moved and 20 digits are rounded away; below, adding 2^14 rounds to steps of 2^-9.
    normal = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(size < 0x3C800000, small, normal) | sign).to(tl.uint8)


@kernel
def _store(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    num_rows: tl.tensor,
    floor: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    POWER: tl.constexpr,
) -> None:
    """Numbers x [WIDTH] float32 of a row, from column `first` on; 0 where there is none."""
    x = tl.reshape(x, (WIDTH // 128, 128))
    scale = scale_of(tl.max(tl.abs(x), 1, keep_dims=True), floor, POWER)
    at = first + tl.arange(0, WIDTH // 128)[:, None] * 128
    column = at + tl.arange(0, 128)[None, :]
    tl.store(values + row * SIZE + column, bytes_of(x, scale), mask=column < SIZE)
    tl.store(scales + (at // 128) * num_rows + row, scale, mask=at < SIZE)


@kernel
def _clear(turns: tl.tensor, SUMS: tl.constexpr) -> None:
    """Zeros, by the first program."""
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(turns + tl.arange(0, SUMS), tl.zeros([SUMS], dtype=tl.int32))


@kernel
def _quantise_rows(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    turns: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    floor: tl.tensor,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
    POWER: tl.constexpr,
    SUMS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a part of a row."""
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * PART
    at = first + tl.arange(0, PART)
    own = tl.load(x + row * stride + at, mask=at < SIZE, other=0.0).to(tl.float32)
    _store(own, values, scales, row, first, num_rows, floor, SIZE, PART, POWER)
    _clear(turns, SUMS)


@kernel
def _norm_rows(
    x: tl.tensor,
    update: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    turns: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    update_stride: tl.tensor,
    eps: tl.tensor,
    floor: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    UPDATE: tl.constexpr,
    KEEP: tl.constexpr,
    POWER: tl.constexpr,
    SUMS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a row."""
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < SIZE
    own = tl.load(x + row * stride + at, mask=inside, other=0.0)
    gain = tl.load(weight + at, mask=inside, other=0.0)
    if UPDATE:
        change = tl.load(update + row * update_stride + at, mask=inside, other=0.0)
        own = (own.to(tl.float32) + change.to(tl.float32)).to(own.dtype)
        tl.store(total + row * SIZE + at, own, mask=inside)
    wide = own.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    rounded = scaled.to(gain.dtype).to(tl.float32)
    result = (rounded * gain.to(tl.float32)).to(gain.dtype)
    if KEEP:
        tl.store(normed + row * SIZE + at, result, mask=inside)
    _store(result.to(tl.float32), values, scales, row, 0, num_rows, floor, SIZE, WIDTH, POWER)
    _clear(turns, SUMS)


@kernel
def _silu_rows(
    product: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    turns: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    floor: tl.tensor,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
    POWER: tl.constexpr,
    SUMS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a part of a row."""
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * PART
    at = first + tl.arange(0, PART)
    gate = tl.load(product + row * stride + at, mask=at < SIZE, other=0.0)
    up = tl.load(product + row * stride + SIZE + at, mask=at < SIZE, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    result = (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    _store(result.to(tl.float32), values, scales, row, first, num_rows, floor, SIZE, PART, POWER)
    _clear(turns, SUMS)
