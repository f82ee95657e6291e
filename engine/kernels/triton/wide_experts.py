"""Products of experts that have many rows each, in FP8: tiles of 128 rows, for devices that copy tiles by themselves.

Rows are gathered in the order of their experts first, so that a tile of rows is a box of memory, as a tile of a weight is.
The device's copy engine (TMA) then moves both without a thread's help. Rows are the matrix unit's lines here, so that a
thread has few of their scales. Two tiles of a weight are multiplied with one of rows at a time: gate and up, or neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.interface.fp8 import ACTIVATION_FLOOR, ScaleFormat
from engine.kernels.triton.gate import gated
from engine.kernels.triton.kernel import kernel, overlap, turn
from engine.kernels.triton.quantise import QuantisedRows, bytes_of, scale_of
from engine.memory.blocks import BLOCK, E4M3, BlockWeight, num_blocks

OUTPUTS = 128
"""Of a weight's tile: those that share a scale."""
_GATHERED = 16  # rows a program of the first launch
_PART = 1024  # their numbers


class WideTile(NamedTuple):
    """How the products are divided.

    Attributes:
        rows: a tile
        up_stages: steps of 128 inputs on their way, with gate and up
        down_stages: the same with down
        warps: a program
    """

    rows: int = 128
    up_stages: int = 3
    down_stages: int = 3
    warps: int = 8


def serves(gate_up: BlockWeight, down: BlockWeight) -> bool:
    """Whether the device copies tiles, and these weights' lines begin where it needs them to."""
    return _copies_tiles() and gate_up.shape[2] % 16 == 0 and down.shape[2] % BLOCK == 0


@cache
def _copies_tiles() -> bool:
    if triton.knobs.runtime.interpret:
        return True
    return (
        torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (9, 0)
    )


def wide_products(
    x: QuantisedRows,
    gate_up: BlockWeight,
    down: BlockWeight,
    order: Tensor,
    tiles: Sequence[Tensor],
    chosen: int,
    made: Tensor,
    scale_format: ScaleFormat,
    tile: WideTile,
) -> None:
    """Compute down (silu(gate x) * up x) of each choice.

    Args:
        x: [T, E]
        gate_up: [X, 2F, E] contiguous, gate rows first, F a multiple of 128
        down: [X, E, F] contiguous
        order: [C] int32, choices by expert
        tiles: expert, first place in `order` and the end of its expert's places of each tile of `tile.rows`, int32
        chosen: choices a row
        made: [C, E], which choice c is written to
        scale_format: of the inner numbers
        tile: how to divide it
    """
    inputs, inner, choices, most = gate_up.shape[2], down.shape[2], len(order), len(tiles[0])
    steps, device = num_blocks(inputs), made.device
    rows = torch.empty(choices, inputs, dtype=E4M3, device=device)
    scales = torch.empty(steps, choices, dtype=torch.float32, device=device)
    hidden = torch.empty(choices, inner, dtype=E4M3, device=device)
    hidden_scales = torch.empty(num_blocks(inner), choices, dtype=torch.float32, device=device)
    _gather_rows[(-(-choices // _GATHERED), -(-inputs // _PART))](
        x.values.view(torch.uint8), x.scales, rows.view(torch.uint8), scales, order, len(x), choices,
        INPUTS=inputs, STEPS=steps, CHOSEN=chosen, ROWS=_GATHERED, PART=_PART, num_warps=4, **overlap(),
    )  # fmt: skip
    _wide_up[(inner // OUTPUTS, most)](
        _boxes(rows, tile.rows), scales, _boxes(gate_up.values, OUTPUTS), gate_up.scales, hidden.view(torch.uint8), hidden_scales,
        *tiles, made, choices, ACTIVATION_FLOOR,
        INPUTS=inputs, INNER=inner, POWER=scale_format == "ue8m0", TILE=tile.rows, STAGES=tile.up_stages,
        num_warps=tile.warps, num_stages=tile.up_stages, **overlap(),
    )  # fmt: skip
    _wide_down[(-(-inputs // (2 * OUTPUTS)), most)](
        _boxes(hidden, tile.rows), hidden_scales, _boxes(down.values, OUTPUTS), down.scales, made, order, *tiles, choices,
        INPUTS=inner, OUTPUTS=inputs, TILE=tile.rows, STAGES=tile.down_stages,
        num_warps=tile.warps, num_stages=tile.down_stages, **overlap(),
    )  # fmt: skip


def _boxes(values: Tensor, lines: int) -> TensorDescriptor:
    """A matrix, or several one under the other, to be copied in boxes of so many lines and 128 columns."""
    whole = values.view(-1, values.shape[-1])
    return TensorDescriptor(whole, list(whole.shape), list(whole.stride()), [lines, BLOCK])


@kernel
def _gather_rows(
    values: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    row_scales: tl.tensor,
    order: tl.tensor,
    num_rows: tl.tensor,
    choices: tl.tensor,
    INPUTS: tl.constexpr,
    STEPS: tl.constexpr,
    CHOSEN: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a part of some rows, of places in `order`; what no expert has is left as it was."""
    turn(EARLY)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < choices
    choice = tl.load(order + place, mask=inside, other=-1)
    inside = inside & (choice >= 0) & (choice < num_rows * CHOSEN)
    row = (choice // CHOSEN).to(tl.int64)
    column = tl.program_id(1) * PART + tl.arange(0, PART)
    mask = inside[:, None] & (column < INPUTS)[None, :]
    numbers = tl.load(values + row[:, None] * INPUTS + column[None, :], mask=mask, other=0)
    tl.store(rows + place.to(tl.int64)[:, None] * INPUTS + column[None, :], numbers, mask=mask)
    step = tl.program_id(1) * (PART // 128) + tl.arange(0, PART // 128)
    mask = inside[None, :] & (step < STEPS)[:, None]
    own = tl.load(scales + step.to(tl.int64)[:, None] * num_rows + row[None, :], mask=mask, other=0.0)
    tl.store(row_scales + step.to(tl.int64)[:, None] * choices + place[None, :], own, mask=mask)


@kernel
def _two_sums(
    x: tl.tensor_descriptor,
    x_scales: tl.tensor,
    choices: tl.tensor,
    start: tl.tensor,
    inside: tl.tensor,
    weight: tl.tensor_descriptor,
    first: tl.tensor,
    second: tl.tensor,
    first_scales: tl.tensor,
    second_scales: tl.tensor,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tuple:
    """Sums [TILE, 128] float32 of rows from `start` on with a weight's lines from `first` on, and from `second` on."""
    one = tl.zeros([TILE, 128], dtype=tl.float32)
    two = tl.zeros([TILE, 128], dtype=tl.float32)
    scale_at = x_scales + start + tl.arange(0, TILE)
    scale = tl.load(scale_at, mask=inside, other=0.0)
    first_factor = tl.load(first_scales)
    second_factor = tl.load(second_scales)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        own = x.load([start, step * 128])
        tile = weight.load([first, step * 128])
        other = weight.load([second, step * 128])
        after = tl.minimum(step + 1, STEPS - 1)  # scales come a step ahead by hand: they are few
        next_scale = tl.load(scale_at + after * choices, mask=inside, other=0.0)
        next_first = tl.load(first_scales + after)
        next_second = tl.load(second_scales + after)
        one += tl.dot(own, tl.trans(tile), out_dtype=tl.float32) * (scale * first_factor)[:, None]
        two += tl.dot(own, tl.trans(other), out_dtype=tl.float32) * (scale * second_factor)[:, None]
        scale = next_scale
        first_factor = next_first
        second_factor = next_second
    return one, two


@kernel
def _wide_up(
    x: tl.tensor_descriptor,
    x_scales: tl.tensor,
    weight: tl.tensor_descriptor,
    w_scales: tl.tensor,
    hidden: tl.tensor,
    hidden_scales: tl.tensor,
    tile_expert: tl.tensor,
    tile_start: tl.tensor,
    tile_stop: tl.tensor,
    like: tl.tensor,
    choices: tl.tensor,
    floor: tl.tensor,
    INPUTS: tl.constexpr,
    INNER: tl.constexpr,
    POWER: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a tile, 128 gates and their ups."""
    turn(EARLY)
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert >= 0:
        start = tl.load(tile_start + tl.program_id(1))
        place = start + tl.arange(0, TILE)
        inside = place < tl.load(tile_stop + tl.program_id(1))
        part = tl.program_id(0)
        STEPS: tl.constexpr = (INPUTS + 127) // 128
        BLOCKS: tl.constexpr = INNER // 128
        line = expert * (2 * INNER) + part * 128
        scales = w_scales + (expert * (2 * BLOCKS) + part) * STEPS
        gates, ups = _two_sums(
            x, x_scales, choices, start, inside, weight, line, line + INNER, scales, scales + BLOCKS * STEPS, STEPS, TILE, STAGES,
        )  # fmt: skip
        made = gated(gates, ups, like.dtype.element_ty).to(tl.float32)
        own_scale = scale_of(tl.max(tl.abs(made), 1, keep_dims=True), floor, POWER)
        at = place[:, None].to(tl.int64) * INNER + part * 128 + tl.arange(0, 128)[None, :]
        tl.store(hidden + at, bytes_of(made, own_scale), mask=inside[:, None])
        tl.store(hidden_scales + part * choices + place[:, None], own_scale, mask=inside[:, None])


@kernel
def _wide_down(
    hidden: tl.tensor_descriptor,
    hidden_scales: tl.tensor,
    weight: tl.tensor_descriptor,
    w_scales: tl.tensor,
    made: tl.tensor,
    order: tl.tensor,
    tile_expert: tl.tensor,
    tile_start: tl.tensor,
    tile_stop: tl.tensor,
    choices: tl.tensor,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a tile and 256 outputs."""
    turn(EARLY)
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert >= 0:
        start = tl.load(tile_start + tl.program_id(1))
        place = start + tl.arange(0, TILE)
        inside = place < tl.load(tile_stop + tl.program_id(1))
        part = tl.program_id(0)
        STEPS: tl.constexpr = (INPUTS + 127) // 128
        BLOCKS: tl.constexpr = (OUTPUTS + 127) // 128
        line = expert * OUTPUTS + part * 256
        block_first = part * 2
        block_second = tl.minimum(block_first + 1, BLOCKS - 1)
        scales = w_scales + expert * (BLOCKS * STEPS)
        one, two = _two_sums(
            hidden, hidden_scales, choices, start, inside, weight, line, line + 128, scales + block_first * STEPS, scales + block_second * STEPS,
            STEPS, TILE, STAGES,
        )  # fmt: skip
        choice = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        out = part * 256 + tl.arange(0, 128)[None, :]
        at = made + choice[:, None] * OUTPUTS + out
        tl.store(at, one.to(made.dtype.element_ty), mask=inside[:, None] & (out < OUTPUTS))
        tl.store(at + 128, two.to(made.dtype.element_ty), mask=inside[:, None] & (out + 128 < OUTPUTS))
