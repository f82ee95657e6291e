"""Products of routed experts over flat rows, without a wait for the host: `engine.layers.moe.run_experts`.

More than 400 lines, because four launches share how choices are sorted and cut.

A choice is a pair of a row and an expert. Choices are sorted by expert and cut into tiles of one expert each. A program
takes a tile and 128 outputs, so that only experts which are chosen are read, and once if a tile holds their rows. The first
launch sorts; the second multiplies with gate and up, with their silu, and in FP8 quantises what it made (128 outputs are the
block of a scale); the third multiplies with down; the last adds a row's experts in the order in which they were chosen.

All shapes depend on numbers of rows and experts alone, so a CUDA graph can hold all of it. Tiles that a batch does not fill
end at once. No sum depends on the order in which programs end. A row's result depends on its company in one thing: experts
with many rows each are `wide_experts`' in FP8, whose last bits may differ. It has more than 400 lines, as experts in FP8 and
plain ones share the sorting and the sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from engine.errors import EngineError
from engine.kernels.interface.fp8 import ACTIVATION_FLOOR, ScaleFormat
from engine.kernels.triton.fp8_product import OUTPUTS, block_sums, linear_fp8
from engine.kernels.triton.gate import gated
from engine.kernels.triton.kernel import block, kernel, overlap, turn
from engine.kernels.triton.quantise import QuantisedRows, bytes_of, quantise_rows, scale_of, silu_times_rows
from engine.kernels.triton.wide_experts import WideTile, serves, wide_products
from engine.memory.blocks import BLOCK, E4M3, BlockWeight, Matrix, num_blocks

WIDE_ROWS = 64
"""Choices an expert, on the average, from which on tiles are wide."""
_CHOICES = 2048  # counted at once
_SUMMED = 1024  # numbers of a row a program of the last launch


class ExpertTile(NamedTuple):
    """How products of experts are divided.

    Attributes:
        rows: a tile
        up_stages: steps on their way, with gate and up
        up_warps: a program of these
        down_stages: steps on their way, with down
        down_warps: a program of these
    """

    rows: int
    up_stages: int = 3
    up_warps: int = 4
    down_stages: int = 5
    down_warps: int = 4


def tile_of(rows: int, choices: int, experts: int, *, quantised: bool) -> ExpertTile:
    """What suits this many rows, their choices and the experts that are here."""
    mean = -(-choices // experts)
    size = max(16, min(128, block(2 * mean), block(rows)))
    if not quantised:
        return ExpertTile(min(size, 64), 3, 4, 3, 4)
    if size == 128:
        return ExpertTile(size, 3, 8, 4, 8)
    return ExpertTile(size, 3, 8, 4, 4) if size == 64 else ExpertTile(size)


def run_experts(
    x: Tensor | QuantisedRows,
    experts: Tensor,
    weights: Tensor,
    gate_up: Matrix,
    down: Matrix,
    first: int = 0,
    shared: tuple[Matrix, Matrix] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    scale_format: ScaleFormat = "ue8m0",
    tile: ExpertTile | WideTile | None = None,
) -> Tensor:
    """Compute y[t] = sum_j weights[t,j] * E_{experts[t,j]}(x[t]) + S(x[t]) with E(x) = down (silu(gate x) * up x).

    Each E(x) is rounded to the dtype of x, as a plain layer's; the sum is float32. In FP8, x and silu(gate x) * up x are
    rounded to FP8, too (arXiv 2412.19437, section 3.3.2).

    Args:
        x: [T, E], a row's numbers contiguous; quantised or not if the experts are in FP8
        experts: [T, k] integers, contiguous. -1: none, and a row whose first is -1 has no shared expert either
        weights: [T, k] float32, contiguous
        gate_up: [X', 2F, E] contiguous, gate rows first; in FP8 F is a multiple of 128
        down: [X', E, F] contiguous
        first: the weights are those of experts `first` to `first + X' - 1`; the sum leaves out other experts
        shared: gate_up [2F, E] and down [E, F] of an expert S of the same kind that every row has, or None
        dtype: of the result
        scale_format: of scales that are made here
        tile: how to divide it; None: by `tile_of`, or by `WideTile` from `WIDE_ROWS` choices an expert on

    Returns:
        [T, E] in `dtype`

    Raises:
        EngineError: the weights are not as above.
    """
    rows, chosen = experts.shape
    held, twice, inputs = gate_up.shape
    inner = twice // 2
    quantised = isinstance(gate_up, BlockWeight)
    _check(gate_up, down, shared, inner)
    like = x if isinstance(x, Tensor) else x.values
    out = torch.empty(rows, inputs, dtype=dtype, device=like.device)
    if not rows:
        return out
    model_dtype = x.dtype
    if isinstance(x, Tensor) and quantised:
        x = quantise_rows(x, scale_format)
    kinds = held + (shared is not None)
    choices = rows * (chosen + (shared is not None))
    made = torch.empty(choices, inputs, dtype=model_dtype, device=like.device)
    if isinstance(gate_up, BlockWeight) and isinstance(down, BlockWeight) and tile is None:
        tile = WideTile() if choices >= WIDE_ROWS * kinds and serves(gate_up, down) else None
    if isinstance(tile, WideTile):
        assert isinstance(x, QuantisedRows)
        assert isinstance(gate_up, BlockWeight)
        assert isinstance(down, BlockWeight)
        routed = rows * chosen
        order, *cut = _sort(experts, held, first, False, tile.rows)
        wide_products(x, gate_up, down, order, cut, chosen, made[:routed], scale_format, tile)
        if shared is not None:  # all rows have it: a product of its own
            other_up, other_down = shared
            assert isinstance(other_up, BlockWeight)
            assert isinstance(other_down, BlockWeight)
            inner_rows = silu_times_rows(linear_fp8(x, other_up), scale_format)
            linear_fp8(inner_rows, other_down, out=made[routed:])
        _add(made, experts, weights, out, first, held, shared is not None)
        return out
    size, up_stages, up_warps, down_stages, down_warps = tile or tile_of(
        rows, choices, kinds, quantised=quantised
    )
    tiles = _sort(experts, held, first, shared is not None, size)
    most = len(tiles.expert)
    common = {"CHOSEN": chosen, "SHARED": shared is not None, "HELD": held, "TILE": size}
    up_grid, down_grid = (most, -(-inner // OUTPUTS)), (most, -(-inputs // OUTPUTS))
    if isinstance(x, QuantisedRows):
        assert isinstance(gate_up, BlockWeight)
        assert isinstance(down, BlockWeight)
        other_up, other_down = shared or (gate_up, down)
        assert isinstance(other_up, BlockWeight)
        assert isinstance(other_down, BlockWeight)
        hidden = torch.empty(choices, inner, dtype=E4M3, device=like.device)
        hidden_scales = torch.empty(num_blocks(inner), choices, dtype=torch.float32, device=like.device)
        _up_fp8[up_grid](
            x.values, x.scales, gate_up.values, gate_up.scales, other_up.values, other_up.scales, hidden.view(torch.uint8), hidden_scales,
            *tiles, made, rows, choices, ACTIVATION_FLOOR,
            INPUTS=inputs, INNER=inner, POWER=scale_format == "ue8m0", **common, OUT_BLOCK=OUTPUTS, STAGES=up_stages,
            num_warps=up_warps, num_stages=up_stages, **overlap(),
        )  # fmt: skip
        _down_fp8[down_grid](
            hidden, hidden_scales, down.values, down.scales, other_down.values, other_down.scales, made, *tiles, choices,
            INPUTS=inner, OUTPUTS=inputs, HELD=held, TILE=size, OUT_BLOCK=OUTPUTS, STAGES=down_stages,
            num_warps=down_warps, num_stages=down_stages, **overlap(),
        )  # fmt: skip
    else:
        assert isinstance(gate_up, Tensor)
        assert isinstance(down, Tensor)
        other_up, other_down = shared or (gate_up, down)
        step = 64 if x.dtype == torch.bfloat16 else 32
        hidden = torch.empty(choices, inner, dtype=x.dtype, device=x.device)
        _up[up_grid](
            x, gate_up, other_up, hidden, *tiles, rows, choices, x.stride(0),
            INPUTS=inputs, INNER=inner, **common, OUT_BLOCK=OUTPUTS, STEP=step, STAGES=up_stages,
            num_warps=up_warps, num_stages=up_stages, **overlap(),
        )  # fmt: skip
        _down[down_grid](
            hidden, down, other_down, made, *tiles, choices,
            INPUTS=inner, OUTPUTS=inputs, HELD=held, TILE=size, OUT_BLOCK=OUTPUTS, STEP=step, STAGES=down_stages,
            num_warps=down_warps, num_stages=down_stages, **overlap(),
        )  # fmt: skip
    _add(made, experts, weights, out, first, held, shared is not None)
    return out


def _add(
    made: Tensor, experts: Tensor, weights: Tensor, out: Tensor, first: int, held: int, shared: bool
) -> None:
    """Sum what a row's experts made."""
    rows, chosen = experts.shape
    size = out.shape[1]
    _sum[(rows, -(-size // _SUMMED))](
        made, experts, weights, out, rows, first,
        HELD=held, CHOSEN=chosen, SHARED=shared, SIZE=size, PART=min(_SUMMED, block(size)), num_warps=4, **overlap(),
    )  # fmt: skip


def _check(gate_up: Matrix, down: Matrix, shared: tuple[Matrix, Matrix] | None, inner: int) -> None:
    """Raise an `EngineError` if these weights are not of one kind."""
    quantised = isinstance(gate_up, BlockWeight)
    if quantised and inner % BLOCK:
        raise EngineError(
            f"experts of {inner} numbers cannot be computed in FP8, as a block of {BLOCK} would hold gate and up; "
            "load them in the model's dtype"
        )
    if isinstance(down, BlockWeight) != quantised:
        raise EngineError("gate_up and down must both be in FP8 blocks, or both plain")
    if shared is not None and (
        any(isinstance(weight, BlockWeight) != quantised for weight in shared)
        or shared[0].shape != gate_up.shape[1:]
        or shared[1].shape != down.shape[1:]
    ):
        raise EngineError(
            "the shared expert must have the routed experts' sizes and be in FP8 where they are"
        )


class _Tiles(NamedTuple):
    """Sorted choices. Choice t k + j is row t's j-th; after these, choice T k + t is row t's shared expert."""

    order: Tensor  # [choices] int32: choices by expert
    expert: Tensor  # [most tiles] int32: its expert, counted from `first`; the shared one is the last; -1: no tile
    start: Tensor  # [most tiles] int32: its first place in `order`
    stop: Tensor  # [most tiles] int32: the end of its expert's places


def _sort(experts: Tensor, held: int, first: int, shared: bool, size: int) -> _Tiles:
    """Sort choices by expert, and cut them into tiles of `size`."""
    rows, chosen = experts.shape
    choices, kinds = rows * (chosen + shared), held + shared
    most = min(kinds, choices) + max(choices - kinds, 0) // size
    sizes = (choices, most, most, most)
    # Each begins at a multiple of 16 bytes: kernels are compiled anew for other addresses.
    rooms = [-(-size // 4) * 4 for size in sizes]
    made = torch.empty(sum(rooms), dtype=torch.int32, device=experts.device)
    tiles = _Tiles(*(part[:size] for part, size in zip(torch.split(made, rooms), sizes, strict=True)))
    part = min(_CHOICES, max(block(choices), 32))
    _sort_choices[(kinds,)](
        experts, *tiles, rows, choices, most, first,
        HELD=held, CHOSEN=chosen, KINDS=kinds, KIND_BLOCK=block(kinds + 1), TILE=size, PART=part, num_warps=4 if part <= 1024 else 8, **overlap(),
    )  # fmt: skip
    return tiles


@kernel
def _kinds_of(
    experts: tl.tensor, choice: tl.tensor, rows: tl.tensor, choices: tl.tensor, first: tl.tensor,
    HELD: tl.constexpr, CHOSEN: tl.constexpr, KINDS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The experts of these choices, counted from `first`, the shared one as HELD; KINDS where there is none."""
    routed = rows * CHOSEN
    own = tl.load(experts + choice, mask=choice < routed, other=-1).to(tl.int32)
    local = tl.where((own >= first) & (own < first + HELD), own - first, KINDS)
    row = choice - routed
    there = (choice >= routed) & (choice < choices)
    lead = tl.load(experts + row * CHOSEN, mask=there, other=-1).to(tl.int32)
    return tl.where(there & (lead >= 0), HELD, local)


@kernel
def _sort_choices(
    experts: tl.tensor,
    order: tl.tensor,
    tile_expert: tl.tensor,
    tile_start: tl.tensor,
    tile_stop: tl.tensor,
    num_rows: tl.tensor,
    choices: tl.tensor,
    most: tl.tensor,
    first: tl.tensor,
    HELD: tl.constexpr,
    CHOSEN: tl.constexpr,
    KINDS: tl.constexpr,
    KIND_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program an expert: it counts all choices, and writes where its own are."""
    turn(EARLY)
    mine = tl.program_id(0)
    kind = tl.arange(0, KIND_BLOCK)
    place = tl.arange(0, PART)
    counts = tl.zeros([KIND_BLOCK], dtype=tl.int32)
    for at in tl.range(0, choices, PART):
        kinds = _kinds_of(experts, at + place, num_rows, choices, first, HELD, CHOSEN, KINDS)
        counts += tl.histogram(kinds, KIND_BLOCK)
    counts = tl.where(kind < KINDS, counts, 0)
    tiles = (counts + TILE - 1) // TILE
    start = tl.sum(tl.where(kind < mine, counts, 0), 0)
    count = tl.sum(tl.where(kind == mine, counts, 0), 0)
    tile = tl.sum(tl.where(kind < mine, tiles, 0), 0)
    own_tiles = (count + TILE - 1) // TILE
    for at in tl.range(0, own_tiles):
        tl.store(tile_expert + tile + at, mine)
        tl.store(tile_start + tile + at, start + at * TILE)
        tl.store(tile_stop + tile + at, start + count)
    if mine == KINDS - 1:
        for at in tl.range(tile + own_tiles, most, PART):
            tl.store(tile_expert + at + place, tl.full([PART], -1, tl.int32), mask=at + place < most)
    if count > 0:
        for at in tl.range(0, choices, PART):
            hit = _kinds_of(experts, at + place, num_rows, choices, first, HELD, CHOSEN, KINDS) == mine
            rank = tl.cumsum(hit.to(tl.int32), 0)
            tl.store(order + start + rank - 1, at + place, mask=hit)
            start += tl.sum(hit.to(tl.int32), 0)


@kernel
def _rows_of(
    order: tl.tensor, start: tl.tensor, stop: tl.tensor, num_rows: tl.tensor, CHOSEN: tl.constexpr, TILE: tl.constexpr
) -> tl.tuple:  # fmt: skip
    """(places, whether they are of the tile, their rows) of a tile."""
    place = start + tl.arange(0, TILE)
    inside = place < stop
    choice = tl.load(order + place, mask=inside, other=0)
    routed = num_rows * CHOSEN
    return place, inside, tl.where(choice < routed, choice // CHOSEN, choice - routed)


@kernel
def _up_fp8(
    x: tl.tensor,
    x_scales: tl.tensor,
    weight: tl.tensor,
    w_scales: tl.tensor,
    shared: tl.tensor,
    shared_scales: tl.tensor,
    hidden: tl.tensor,
    hidden_scales: tl.tensor,
    order: tl.tensor,
    tile_expert: tl.tensor,
    tile_start: tl.tensor,
    tile_stop: tl.tensor,
    like: tl.tensor,
    num_rows: tl.tensor,
    choices: tl.tensor,
    floor: tl.tensor,
    INPUTS: tl.constexpr,
    INNER: tl.constexpr,
    POWER: tl.constexpr,
    CHOSEN: tl.constexpr,
    SHARED: tl.constexpr,
    HELD: tl.constexpr,
    TILE: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a tile, 128 gates and their ups."""
    turn(EARLY)
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert >= 0:
        start = tl.load(tile_start + tl.program_id(0))
        stop = tl.load(tile_stop + tl.program_id(0))
        place, inside, row = _rows_of(order, start, stop, num_rows, CHOSEN, TILE)
        part = tl.program_id(1)
        STEPS: tl.constexpr = (INPUTS + 127) // 128
        BLOCKS: tl.constexpr = INNER // 128
        base = weight
        scales = w_scales
        number = expert
        if SHARED:
            if expert == HELD:
                base = shared
                scales = shared_scales
                number = 0
        base += number.to(tl.int64) * (2 * INNER * INPUTS) + part * (OUT_BLOCK * INPUTS)
        scales += number * (2 * BLOCKS * STEPS) + part * STEPS
        second = base + INNER * INPUTS
        second_scales = scales + BLOCKS * STEPS
        out = tl.arange(0, OUT_BLOCK)
        k = tl.arange(0, 128)
        own_at = x + row[:, None] * INPUTS + k[None, :]
        tile_at = out[:, None] * INPUTS + k[None, :]
        gates = tl.zeros([OUT_BLOCK, TILE], dtype=tl.float32)
        ups = tl.zeros([OUT_BLOCK, TILE], dtype=tl.float32)
        scale_at = x_scales + row
        gate_factor = tl.load(scales)
        up_factor = tl.load(second_scales)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            if INPUTS % 128 == 0:
                gate = tl.load(base + step * 128 + tile_at)
                up = tl.load(second + step * 128 + tile_at)
                own = tl.load(own_at + step * 128, mask=inside[:, None], other=0.0)
            else:
                there = (step * 128 + k < INPUTS)[None, :]
                gate = tl.load(base + step * 128 + tile_at, mask=there, other=0.0)
                up = tl.load(second + step * 128 + tile_at, mask=there, other=0.0)
                own = tl.load(own_at + step * 128, mask=inside[:, None] & there, other=0.0)
            scale = tl.load(scale_at + step * num_rows, mask=inside, other=0.0)
            after = tl.minimum(step + 1, STEPS - 1)  # a step ahead by hand: it is one number
            next_gate = tl.load(scales + after)
            next_up = tl.load(second_scales + after)
            own = tl.trans(own)
            gates += tl.dot(gate, own, out_dtype=tl.float32) * (scale * gate_factor)[None, :]
            ups += tl.dot(up, own, out_dtype=tl.float32) * (scale * up_factor)[None, :]
            gate_factor = next_gate
            up_factor = next_up
        made = gated(gates, ups, like.dtype.element_ty).to(tl.float32)
        own_scale = scale_of(tl.max(tl.abs(made), 0, keep_dims=True), floor, POWER)
        at = place[None, :].to(tl.int64) * INNER + part * OUT_BLOCK + out[:, None]
        tl.store(hidden + at, bytes_of(made, own_scale), mask=inside[None, :])
        tl.store(hidden_scales + part * choices + place[None, :], own_scale, mask=inside[None, :])


@kernel
def _down_fp8(
    hidden: tl.tensor,
    hidden_scales: tl.tensor,
    weight: tl.tensor,
    w_scales: tl.tensor,
    shared: tl.tensor,
    shared_scales: tl.tensor,
    made: tl.tensor,
    order: tl.tensor,
    tile_expert: tl.tensor,
    tile_start: tl.tensor,
    tile_stop: tl.tensor,
    choices: tl.tensor,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HELD: tl.constexpr,
    TILE: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a tile and 128 outputs."""
    turn(EARLY)
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert >= 0:
        place = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, TILE)
        inside = place < tl.load(tile_stop + tl.program_id(0))
        part = tl.program_id(1)
        STEPS: tl.constexpr = (INPUTS + 127) // 128
        BLOCKS: tl.constexpr = (OUTPUTS + 127) // 128
        WHOLE: tl.constexpr = (OUTPUTS % OUT_BLOCK == 0) and (INPUTS % 128 == 0)
        base = weight
        scales = w_scales
        number = expert
        if expert == HELD:
            base = shared
            scales = shared_scales
            number = 0
        base += number.to(tl.int64) * (OUTPUTS * INPUTS) + part * (OUT_BLOCK * INPUTS)
        scales += number * (BLOCKS * STEPS) + part * STEPS
        sums = block_sums(
            hidden, hidden_scales, choices, place.to(tl.int64), inside, base, scales,
            OUTPUTS - part * OUT_BLOCK, 0, STEPS, INPUTS, WHOLE, TILE, OUT_BLOCK, STAGES,
        )  # fmt: skip
        choice = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        out = part * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
        at = choice[None, :] * OUTPUTS + out[:, None]
        tl.store(made + at, sums.to(made.dtype.element_ty), mask=inside[None, :] & (out < OUTPUTS)[:, None])


@kernel
def _up(
    x: tl.tensor,
    weight: tl.tensor,
    shared: tl.tensor,
    hidden: tl.tensor,
    order: tl.tensor,
    tile_expert: tl.tensor,
    tile_start: tl.tensor,
    tile_stop: tl.tensor,
    num_rows: tl.tensor,
    choices: tl.tensor,
    stride: tl.tensor,
    INPUTS: tl.constexpr,
    INNER: tl.constexpr,
    CHOSEN: tl.constexpr,
    SHARED: tl.constexpr,
    HELD: tl.constexpr,
    TILE: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a tile, 128 gates and their ups, of plain numbers."""
    turn(EARLY)
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert >= 0:
        start = tl.load(tile_start + tl.program_id(0))
        stop = tl.load(tile_stop + tl.program_id(0))
        place, inside, row = _rows_of(order, start, stop, num_rows, CHOSEN, TILE)
        base = weight
        number = expert
        if SHARED:
            if expert == HELD:
                base = shared
                number = 0
        out = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
        there = (out < INNER)[:, None]
        base += number.to(tl.int64) * (2 * INNER * INPUTS)
        k = tl.arange(0, STEP)
        own_at = x + row.to(tl.int64)[:, None] * stride + k[None, :]
        tile_at = base + out[:, None] * INPUTS + k[None, :]
        gates = tl.zeros([OUT_BLOCK, TILE], dtype=tl.float32)
        ups = tl.zeros([OUT_BLOCK, TILE], dtype=tl.float32)
        for step in tl.range(0, INPUTS, STEP, num_stages=STAGES):
            here = (step + k < INPUTS)[None, :]
            gate = tl.load(tile_at + step, mask=there & here, other=0.0)
            up = tl.load(tile_at + INNER * INPUTS + step, mask=there & here, other=0.0)
            own = tl.trans(tl.load(own_at + step, mask=inside[:, None] & here, other=0.0))
            gates = tl.dot(gate, own, gates, input_precision="ieee")
            ups = tl.dot(up, own, ups, input_precision="ieee")
        made = gated(gates, ups, hidden.dtype.element_ty)
        at = place[None, :].to(tl.int64) * INNER + out[:, None]
        tl.store(hidden + at, made, mask=inside[None, :] & there)


@kernel
def _down(
    hidden: tl.tensor,
    weight: tl.tensor,
    shared: tl.tensor,
    made: tl.tensor,
    order: tl.tensor,
    tile_expert: tl.tensor,
    tile_start: tl.tensor,
    tile_stop: tl.tensor,
    choices: tl.tensor,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HELD: tl.constexpr,
    TILE: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a tile and 128 outputs, of plain numbers."""
    turn(EARLY)
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert >= 0:
        place = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, TILE)
        inside = place < tl.load(tile_stop + tl.program_id(0))
        base = weight
        number = expert
        if expert == HELD:
            base = shared
            number = 0
        out = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
        there = (out < OUTPUTS)[:, None]
        k = tl.arange(0, STEP)
        own_at = hidden + place.to(tl.int64)[:, None] * INPUTS + k[None, :]
        tile_at = base + number.to(tl.int64) * (OUTPUTS * INPUTS) + out[:, None] * INPUTS + k[None, :]
        sums = tl.zeros([OUT_BLOCK, TILE], dtype=tl.float32)
        for step in tl.range(0, INPUTS, STEP, num_stages=STAGES):
            here = (step + k < INPUTS)[None, :]
            tile = tl.load(tile_at + step, mask=there & here, other=0.0)
            own = tl.trans(tl.load(own_at + step, mask=inside[:, None] & here, other=0.0))
            sums = tl.dot(tile, own, sums, input_precision="ieee")
        choice = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        at = choice[None, :] * OUTPUTS + out[:, None]
        tl.store(made + at, sums.to(made.dtype.element_ty), mask=inside[None, :] & there)


@kernel
def _sum(
    made: tl.tensor,
    experts: tl.tensor,
    weights: tl.tensor,
    y: tl.tensor,
    num_rows: tl.tensor,
    first: tl.tensor,
    HELD: tl.constexpr,
    CHOSEN: tl.constexpr,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a part of a row."""
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PART + tl.arange(0, PART)
    inside = at < SIZE
    total = tl.zeros([PART], dtype=tl.float32)
    for j in tl.static_range(CHOSEN):
        choice = row * CHOSEN + j
        expert = tl.load(experts + choice).to(tl.int32)
        here = (expert >= first) & (expert < first + HELD)
        own = tl.load(made + choice * SIZE + at, mask=inside & here, other=0.0).to(tl.float32)
        share = tl.load(weights + choice)
        total += tl.where(here, own * share, 0.0)
    if SHARED:
        there = tl.load(experts + row * CHOSEN) >= 0
        choice = num_rows.to(tl.int64) * CHOSEN + row
        total += tl.load(made + choice * SIZE + at, mask=inside & there, other=0.0).to(tl.float32)
    tl.store(y + row * SIZE + at, total.to(y.dtype.element_ty), mask=inside)
