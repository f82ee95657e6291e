"""Products with a matrix for each head: queries absorbed into latents, and values expanded from them.

q'_h = q_h W^UK_h and o_h = W^UV_h u_h, as in DeepSeek-V2 (arXiv 2405.04434, section 2.1.2). Both matrices are parts of
kv_b [H, n + v, r]. A program takes a head, some of its outputs and some rows; the sums of a row have one order.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from engine.kernels.interface.fp8 import ACTIVATION_FLOOR, ScaleFormat
from engine.kernels.triton.kernel import block, kernel, overlap, turn
from engine.kernels.triton.quantise import SUMS, QuantisedRows, bytes_of, room, scale_of
from engine.memory.blocks import BLOCK

_MOST_ROWS = 64  # a program
_OUTPUTS = 128


def absorb(query: Tensor, keys: Tensor, out: Tensor) -> None:
    """out[t, h] = query[t, h] W^UK_h, summed in float32 (products of float32 numbers are IEEE's).

    Args:
        query: [T, H, n], a head's numbers contiguous; it may be a part of wider heads
        keys: [H, n, r], `kv_b[:, :n]`
        out: [T, H, r] of the same dtype, likewise; it may be a part of [T, H, r + p], whose rest keeps its numbers
    """
    _launch(query, keys.transpose(1, 2), out, None, power=False)


def expand_values(latents: Tensor, values: Tensor) -> Tensor:
    """o[t, h] = W^UV_h latents[t, h], likewise.

    Args:
        latents: [T, H, r], a head's numbers contiguous
        values: [H, v, r], `kv_b[:, n:]`

    Returns:
        [T, H, v] in the dtype of latents
    """
    out = latents.new_empty(*latents.shape[:2], values.shape[1])
    _launch(latents, values, out, None, power=False)
    return out


def expand_values_rows(latents: Tensor, values: Tensor, scale_format: ScaleFormat = "ue8m0") -> QuantisedRows:
    """`expand_values`, quantised for the product with o: one launch. A head has 128 values, as a scale's block has.

    Args:
        latents: as in `expand_values`
        values: [H, 128, r]
        scale_format: as in `engine.kernels.interface.fp8`

    Returns:
        [T, H * 128]
    """
    rows, heads = latents.shape[:2]
    assert values.shape[1] == BLOCK
    made = room(rows, heads * BLOCK, latents, latents.dtype)
    _launch(
        latents, values, made.values.view(torch.uint8).view(rows, heads, BLOCK), made, scale_format == "ue8m0"
    )
    return made


def _launch(x: Tensor, weight: Tensor, out: Tensor, made: QuantisedRows | None, power: bool) -> None:
    """`weight` is [H, out, in], with any strides of which one is 1."""
    rows, heads, inputs = x.shape
    if not rows:
        return
    outputs = weight.shape[1]
    row_block = min(max(16, block(rows)), _MOST_ROWS)
    exact = x.dtype == torch.float32
    _head_product[(heads, -(-outputs // _OUTPUTS), -(-rows // row_block))](
        x, weight, out, out if made is None else made.scales, out if made is None else made.turns,
        rows, *x.stride()[:2], weight.stride(0), *out.stride()[:2], ACTIVATION_FLOOR,
        ROW_STEP=weight.stride(1), COLUMN_STEP=weight.stride(2), INPUTS=inputs, OUTPUTS=outputs, ROW_BLOCK=row_block, OUT_BLOCK=_OUTPUTS,
        STEP=32 if exact else 64, MADE=made is not None, POWER=power, SUMS=SUMS, num_warps=4, num_stages=4, **overlap(),
    )  # fmt: skip


@kernel
def _head_product(
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    scales: tl.tensor,
    turns: tl.tensor,
    num_rows: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    weight_head: tl.tensor,
    y_row: tl.tensor,
    y_head: tl.tensor,
    floor: tl.tensor,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    MADE: tl.constexpr,
    POWER: tl.constexpr,
    SUMS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a head, some outputs and some rows."""
    turn(EARLY)
    head = tl.program_id(0)
    out = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    row = tl.program_id(2).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    inside = row < num_rows
    k = tl.arange(0, STEP)
    base = weight + head.to(tl.int64) * weight_head
    own_at = x + row[:, None] * x_row + head * x_head + k[None, :]
    sums = tl.zeros([OUT_BLOCK, ROW_BLOCK], dtype=tl.float32)
    for step in tl.range(0, INPUTS, STEP):
        at = step + k
        if COLUMN_STEP == 1:
            tile = tl.load(base + out[:, None] * ROW_STEP + at[None, :], mask=(out < OUTPUTS)[:, None] & (at < INPUTS)[None, :], other=0.0)  # fmt: skip
        else:
            tile = tl.trans(tl.load(base + out[None, :] * ROW_STEP + at[:, None] * COLUMN_STEP, mask=(out < OUTPUTS)[None, :] & (at < INPUTS)[:, None], other=0.0))  # fmt: skip
        own = tl.load(own_at + step, mask=inside[:, None] & (at < INPUTS)[None, :], other=0.0)
        sums = tl.dot(tile, tl.trans(own), sums, input_precision="ieee")
    place = y + row[None, :] * y_row + head * y_head + out[:, None]
    mask = inside[None, :] & (out < OUTPUTS)[:, None]
    if MADE:
        made = sums.to(x.dtype.element_ty).to(tl.float32)
        scale = scale_of(tl.max(tl.abs(made), 0, keep_dims=True), floor, POWER)
        tl.store(place, bytes_of(made, scale), mask=mask)
        tl.store(scales + head * num_rows + row[None, :], scale, mask=inside[None, :])
        if head + tl.program_id(1) + tl.program_id(2) == 0:
            tl.store(turns + tl.arange(0, SUMS), tl.zeros([SUMS], dtype=tl.int32))
    else:
        tl.store(place, sums.to(y.dtype.element_ty), mask=mask)
