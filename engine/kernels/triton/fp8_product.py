"""Products with weights in FP8 blocks: y = x W^T, with x in FP8, too (`linear_fp8` of `engine.kernels.interface.fp8`).

The matrix unit sums 128 products; these sums are scaled and added in float32 (arXiv 2412.19437, section 3.3.2). A weight's
128 outputs are the matrix unit's lines and rows of x its columns, so that a few rows waste little. A product with few
outputs is cut along its inputs, by the weight's shape alone: the program that ends last adds the parts in their order.

From `LIBRARY_ROWS` rows on the library multiplies where it can (`library_serves`): it is 1.4 to 3 times as fast there. Its
sums have another order, so the last bits of a row may differ between a step of few rows and one of many; among steps of few
rows they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from engine.errors import EngineError
from engine.kernels.interface.fp8 import ScaleFormat
from engine.kernels.triton.kernel import block, kernel, overlap
from engine.kernels.triton.quantise import SUMS, QuantisedRows, quantise_rows
from engine.memory.blocks import BLOCK, BlockWeight, num_blocks

OUTPUTS = 128
"""Of a program: those that share a scale."""
MOST_CUT_ROWS = 64
"""Rows of x up to which the inputs are cut."""
LIBRARY_ROWS = 64
"""Rows of x from which on the library multiplies; the one place that says so."""
AHEAD = 4
"""Steps of W that a program asks for before it waits for the kernel before: W does not depend on that."""


class ProductTile(NamedTuple):
    """How a product is divided.

    Attributes:
        rows: of x a program
        stages: steps of 128 inputs whose numbers are on their way
        warps: a program
        splits: parts of the inputs
    """

    rows: int
    stages: int
    warps: int
    splits: int = 1


def tile_of(rows: int, outputs: int, inputs: int) -> ProductTile:
    """What suits a product of so many rows with a weight [outputs, inputs]."""
    if rows > MOST_CUT_ROWS:
        return ProductTile(
            128 if rows * outputs >= 128 * 128 * 200 else 64, 4, 8 if rows * outputs >= 128 * 128 * 200 else 4
        )
    tiles, steps = num_blocks(outputs), num_blocks(inputs)
    splits = min(max(1, 480 // tiles), max(1, steps // 4))
    return ProductTile(max(16, block(rows)), 5, 4, splits)


def library_serves(rows: int, weight: BlockWeight, dtype: torch.dtype) -> bool:
    """Whether the library's product is used for so many rows: `torch._scaled_mm` with scales of 1 x 128 and 128 x 128.

    cuBLAS has it for Hopper since CUDA 12.9. It wants whole blocks of inputs, four of them to a line of scales, and outputs
    by sixteens (cuBLAS, "1D and 2D block scaling for FP8 data types"); with other sizes its numbers are wrong, without an error.
    Among numbers of rows from `LIBRARY_ROWS` on, a row had the same bits on an H200.
    """
    outputs, inputs = weight.shape
    whole = inputs % (4 * BLOCK) == 0 and outputs % 16 == 0
    return rows >= LIBRARY_ROWS and whole and dtype == torch.bfloat16 and _library_has_blocks()


@cache
def _library_has_blocks() -> bool:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    return torch.cuda.get_device_capability()[0] == 9 and version >= (12, 9)


def linear_fp8(
    x: Tensor | QuantisedRows,
    weight: BlockWeight,
    scale_format: ScaleFormat = "ue8m0",
    tile: ProductTile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute y = x W^T, by FP8 products of 128 numbers each, summed in float32.

    Args:
        x: [T, in], a row's numbers contiguous, or quantised already
        weight: W, [out, in], contiguous
        scale_format: of the scales of x, if it is not quantised yet
        tile: how to divide it; None: by the library where it serves, else by `tile_of`
        out: what is returned, [T, out] contiguous; None: new memory

    Returns:
        [T, out] in the dtype of x, or of the numbers that were quantised
    """
    if isinstance(x, Tensor):
        x = quantise_rows(x, scale_format)
    rows, (outputs, inputs) = len(x), weight.shape
    if out is None:
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.values.device)
    if not rows:
        return out
    if tile is None and library_serves(rows, weight, x.dtype):
        return _librarys(x, weight, out)
    row_block, stages, num_warps, splits = tile or tile_of(rows, outputs, inputs)
    steps, tiles, lines = num_blocks(inputs), num_blocks(outputs), -(-rows // row_block)
    each = -(-steps // splits)
    splits = -(-steps // each) if tiles * lines <= SUMS else 1
    parts = (
        torch.empty(splits, rows, outputs, dtype=torch.float32, device=out.device) if splits > 1 else x.scales
    )
    _linear_fp8[(lines, tiles, splits)](
        x.values, x.scales, weight.values, weight.scales, out, parts, x.turns, rows,
        INPUTS=inputs, OUTPUTS=outputs, STEPS=steps, EACH=each if splits > 1 else steps, SPLITS=splits,
        ROW_BLOCK=row_block, OUT_BLOCK=OUTPUTS, STAGES=stages, AHEAD=min(AHEAD, each) if rows <= MOST_CUT_ROWS else 0, num_warps=num_warps, num_stages=stages, **overlap(),
    )  # fmt: skip
    return out


def _librarys(x: QuantisedRows, weight: BlockWeight, out: Tensor) -> Tensor:
    """`torch._scaled_mm`, which wants rows by fours: others are filled up with zeros."""
    missing = -len(x) % 4
    values, scales, made = x.values, x.scales, out
    if missing:
        values = F.pad(values.view(torch.uint8), (0, 0, 0, missing)).view(values.dtype)
        scales, made = F.pad(scales, (0, missing)), F.pad(out, (0, 0, 0, missing))
    torch._scaled_mm(values, weight.values.T, scales.T, weight.scales.T, out_dtype=x.dtype, out=made)
    return out.copy_(made[: len(x)]) if missing else out


def stack_rows(weights: Sequence[BlockWeight]) -> BlockWeight:
    """One weight of several that multiply the same x: their outputs one after the other.

    The blocks stay what they are, so every weight but the last must be whole blocks: put q_a's 1,536 rows before kv_a's
    576.

    Raises:
        EngineError: a weight that is not the last cuts a block, or they multiply different sizes.
    """
    for weight in weights[:-1]:
        if weight.shape[-2] % BLOCK:
            raise EngineError(
                f"a weight of {weight.shape[-2]} rows cannot stand before another, as its blocks of {BLOCK} "
                "are not whole; put it last"
            )
    if len({weight.shape[-1] for weight in weights}) > 1:
        raise EngineError("weights for products with the same x must have the same number of columns")
    values = torch.cat([weight.values.view(torch.uint8) for weight in weights], dim=-2)
    return BlockWeight(
        values.view(weights[0].values.dtype), torch.cat([weight.scales for weight in weights], dim=-2)
    )


@kernel
def _fetch(
    weight: tl.tensor,
    first: tl.tensor,
    room: tl.tensor,
    INPUTS: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    """Ask for the 128 bytes of each output in COUNT steps from `first` on, into the L2 cache."""
    out = tl.arange(0, OUT_BLOCK)
    at = weight + tl.where(out < room, out, 0) * INPUTS
    for step in tl.static_range(COUNT):
        k = tl.minimum((first + step) * 128, INPUTS - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(at + k).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@kernel
def block_sums(
    x: tl.tensor,
    x_scales: tl.tensor,
    scale_stride: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    weight: tl.tensor,
    w_scales: tl.tensor,
    room: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    INPUTS: tl.constexpr,
    WHOLE: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """Sums [OUT_BLOCK, ROW_BLOCK] float32 over steps `first` to `last - 1` of 128 inputs.

    Args:
        x: [.., INPUTS] e4m3
        x_scales: [steps, ..] float32, steps `scale_stride` apart
        row: [ROW_BLOCK], rows of x
        inside: [ROW_BLOCK], whether there is such a row
        weight: e4m3 at the first of the outputs, [OUT_BLOCK, INPUTS]
        w_scales: at the scales of these outputs' blocks
        room: how many of the outputs there are
        WHOLE: whether all outputs and inputs are there
    """
    out = tl.arange(0, OUT_BLOCK)
    k = tl.arange(0, 128)
    own_at = x + row[:, None] * INPUTS + k[None, :]
    tile_at = weight + out[:, None] * INPUTS + k[None, :]
    sums = tl.zeros([OUT_BLOCK, ROW_BLOCK], dtype=tl.float32)
    scale_at = x_scales + row
    factor = tl.load(w_scales + first)
    for step in tl.range(first, last, num_stages=STAGES):
        if WHOLE:
            tile = tl.load(tile_at + step * 128)
            own = tl.load(own_at + step * 128, mask=inside[:, None], other=0.0)
        else:
            there = (step * 128 + k < INPUTS)[None, :]
            tile = tl.load(tile_at + step * 128, mask=(out < room)[:, None] & there, other=0.0)
            own = tl.load(own_at + step * 128, mask=inside[:, None] & there, other=0.0)
        scale = tl.load(scale_at + step * scale_stride, mask=inside, other=0.0)
        next_factor = tl.load(
            w_scales + tl.minimum(step + 1, last - 1)
        )  # a step ahead by hand: it is one number
        part = tl.dot(tile, tl.trans(own), out_dtype=tl.float32)
        sums += part * (scale * factor)[None, :]
        factor = next_factor
    return sums


@kernel
def _linear_fp8(
    x: tl.tensor,
    x_scales: tl.tensor,
    weight: tl.tensor,
    w_scales: tl.tensor,
    y: tl.tensor,
    parts: tl.tensor,
    turns: tl.tensor,
    num_rows: tl.tensor,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEPS: tl.constexpr,
    EACH: tl.constexpr,
    SPLITS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program some rows, 128 outputs and a part of the inputs."""
    block_row = tl.program_id(0)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD:
            _fetch(weight + tile.to(tl.int64) * (OUT_BLOCK * INPUTS), split * EACH, OUTPUTS - tile * OUT_BLOCK, INPUTS, OUT_BLOCK, AHEAD)  # fmt: skip
        tl.extra.cuda.gdc_wait()
    row = block_row.to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    inside = row < num_rows
    out = tile * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    WHOLE: tl.constexpr = (OUTPUTS % OUT_BLOCK == 0) and (INPUTS % 128 == 0)
    sums = block_sums(
        x, x_scales, num_rows, row, inside, weight + tile.to(tl.int64) * (OUT_BLOCK * INPUTS), w_scales + tile * STEPS,
        OUTPUTS - tile * OUT_BLOCK, split * EACH, tl.minimum(split * EACH + EACH, STEPS), INPUTS, WHOLE, ROW_BLOCK, OUT_BLOCK, STAGES,
    )  # fmt: skip
    mask = inside[None, :] & (out < OUTPUTS)[:, None]
    place = row[None, :] * OUTPUTS + out[:, None]
    if SPLITS == 1:
        tl.store(y + place, sums.to(y.dtype.element_ty), mask=mask)
    else:
        size = num_rows.to(tl.int64) * OUTPUTS
        tl.store(parts + split * size + place, sums, mask=mask)
        tl.debug_barrier()
        count = turns + tile * tl.num_programs(0) + block_row
        if tl.atomic_add(count, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.load(parts + place, mask=mask, other=0.0, cache_modifier=".cg")
            for other in tl.range(1, SPLITS, loop_unroll_factor=4 if ROW_BLOCK <= 16 else 1):
                total += tl.load(parts + other * size + place, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)
            tl.store(count, 0)
