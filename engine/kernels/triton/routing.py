"""DeepSeek's gate (`engine.layers.moe.route`): which experts a row goes to, in two launches.

The first multiplies, cut along the inputs in a way that depends on nothing but their number; the second adds the parts in
their order and chooses. Of equal scores the one with the lower number wins.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.kernel import block, kernel, overlap, turn

_INPUTS = 256  # of a part
_EXPERTS = 64  # a program
_STEP = 64


class Gate(Protocol):
    """What the choice depends on; `engine.layers.moe.MoEConfig` says what each is."""

    @property
    def num_experts(self) -> int: ...
    @property
    def experts_per_token(self) -> int: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def groups_per_token(self) -> int: ...
    @property
    def normalise(self) -> bool: ...
    @property
    def scaling(self) -> float: ...


def route(
    x: Tensor, gate: Tensor, bias: Tensor, config: Gate, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose each row's experts and their weights, by the formulas of `engine.layers.moe.route`.

    Products are IEEE's if x is float32. If it is bfloat16, the gate is taken as two numbers of 11 bits, which the matrix
    unit multiplies exactly.

    Args:
        x: [T, E] float32 or bfloat16, a row's numbers contiguous
        gate: [X, E] float32, contiguous
        bias: [X] float32
        config: sizes, and how to choose
        positions: [T] integers; a row below 0 has the experts -1 with weights 0. None: there is none

    Returns:
        experts [T, k] int32, the best first; weights [T, k] float32
    """
    rows, inputs = x.shape
    c, k = config, config.experts_per_token
    experts = torch.empty(rows, k, dtype=torch.int32, device=x.device)
    weights = torch.empty(rows, k, dtype=torch.float32, device=x.device)
    if not rows:
        return experts, weights
    splits = -(-inputs // _INPUTS)
    parts = torch.empty(splits, rows, c.num_experts, dtype=torch.float32, device=x.device)
    row_block = min(max(16, block(rows)), 64)
    _gate_parts[(-(-rows // row_block), -(-c.num_experts // _EXPERTS), splits)](
        x, gate, parts, rows, x.stride(0),
        INPUTS=inputs, EXPERTS=c.num_experts, EXACT=x.dtype == torch.float32, ROW_BLOCK=row_block, EXPERT_BLOCK=_EXPERTS, PART=_INPUTS, STEP=_STEP,
        num_warps=4, num_stages=3, **overlap(),
    )  # fmt: skip
    size = c.num_experts // c.num_groups
    _choose[(rows,)](
        parts, bias, parts if positions is None else positions, experts, weights, rows, c.scaling,
        SPLITS=splits, EXPERTS=c.num_experts, GROUPS=c.num_groups, SIZE=size, CHOSEN_GROUPS=c.groups_per_token, CHOSEN=k,
        GROUP_BLOCK=block(c.num_groups), SIZE_BLOCK=block(size), CHOSEN_BLOCK=block(k),
        NORMALISE=c.normalise, PADDED=positions is not None, num_warps=1 if c.num_experts <= 256 else 4, **overlap(),
    )  # fmt: skip
    return experts, weights


@kernel
def _gate_parts(
    x: tl.tensor,
    gate: tl.tensor,
    parts: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    INPUTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXACT: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program some rows, some experts and a part of the inputs."""
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    expert = tl.program_id(1) * EXPERT_BLOCK + tl.arange(0, EXPERT_BLOCK)
    first = tl.program_id(2) * PART
    sums = tl.zeros([EXPERT_BLOCK, ROW_BLOCK], dtype=tl.float32)
    for step in tl.range(0, PART, STEP):
        k = first + step + tl.arange(0, STEP)
        there = (k < INPUTS)[None, :]
        own = tl.load(
            x + row[:, None] * stride + k[None, :], mask=(row < num_rows)[:, None] & there, other=0.0
        )
        rule = tl.load(gate + expert[:, None] * INPUTS + k[None, :], mask=(expert < EXPERTS)[:, None] & there, other=0.0)  # fmt: skip
        wide = tl.trans(own.to(tl.float32))
        if EXACT:
            sums = tl.dot(rule, wide, sums, input_precision="ieee")
        else:
            sums = tl.dot(rule, wide, sums, input_precision="tf32x3")
    place = (tl.program_id(2).to(tl.int64) * num_rows + row)[None, :] * EXPERTS + expert[:, None]
    tl.store(parts + place, sums, mask=(row < num_rows)[None, :] & (expert < EXPERTS)[:, None])


@kernel
def _choose(
    parts: tl.tensor,
    bias: tl.tensor,
    positions: tl.tensor,
    experts: tl.tensor,
    weights: tl.tensor,
    num_rows: tl.tensor,
    scaling: tl.tensor,
    SPLITS: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    CHOSEN_GROUPS: tl.constexpr,
    CHOSEN: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    CHOSEN_BLOCK: tl.constexpr,
    NORMALISE: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a row. Scores lie as [groups, experts of a group]."""
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUP_BLOCK)
    member = tl.arange(0, SIZE_BLOCK)
    expert = group[:, None] * SIZE + member[None, :]
    there = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    logits = tl.zeros([GROUP_BLOCK, SIZE_BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        at = (row + split * num_rows.to(tl.int64)) * EXPERTS
        logits += tl.load(parts + at + expert, mask=there, other=0.0)
    scores = 1.0 / (1.0 + tl.exp(-logits))
    worth = scores + tl.load(bias + expert, mask=there, other=0.0)
    worth = tl.where(there, worth, float("-inf"))
    if CHOSEN_GROUPS < GROUPS:
        best = tl.max(worth, 1)
        place = tl.min(tl.where(worth == best[:, None], member[None, :], SIZE_BLOCK), 1)
        second = tl.max(tl.where(member[None, :] == place[:, None], float("-inf"), worth), 1)
        total = tl.reshape(best + second, (GROUP_BLOCK, 1))
        other = tl.trans(total)
        number = group[:, None]
        before = (other > total) | ((other == total) & (group[None, :] < number))
        rank = tl.sum(before.to(tl.int32), 1)
        worth = tl.where((rank < CHOSEN_GROUPS)[:, None], worth, float("-inf"))
    chosen = tl.arange(0, CHOSEN_BLOCK)
    numbers = tl.zeros([CHOSEN_BLOCK], dtype=tl.int32)
    shares = tl.zeros([CHOSEN_BLOCK], dtype=tl.float32)
    left = tl.reshape(worth, (GROUP_BLOCK * SIZE_BLOCK,))
    flat = tl.reshape(expert, (GROUP_BLOCK * SIZE_BLOCK,))
    scores = tl.reshape(scores, (GROUP_BLOCK * SIZE_BLOCK,))
    for j in tl.static_range(CHOSEN):
        most = tl.max(left, 0)
        number = tl.min(tl.where(left == most, flat, 2147483647), 0)
        hit = flat == number
        share = tl.sum(tl.where(hit, scores, 0.0), 0)
        numbers = tl.where(chosen == j, number, numbers)
        shares = tl.where(chosen == j, share, shares)
        left = tl.where(hit, float("-inf"), left)
    if NORMALISE:
        shares = shares / (tl.sum(shares, 0) + 1e-20)
    shares = shares * scaling
    if PADDED:
        if tl.load(positions + row) < 0:
            numbers = tl.full([CHOSEN_BLOCK], -1, tl.int32)
            shares = tl.zeros([CHOSEN_BLOCK], dtype=tl.float32)
    tl.store(experts + row * CHOSEN + chosen, numbers, mask=chosen < CHOSEN)
    tl.store(weights + row * CHOSEN + chosen, shares, mask=chosen < CHOSEN)
