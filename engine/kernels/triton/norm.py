"""Residual add and RMS norm in one pass: `x + update`, and `engine.layers.norm.rms_norm` of it."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.kernel import block, kernel, overlap, turn, warps


def add_rms_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + update;  n = s / sqrt(mean(s^2) + eps) * weight over the last dim (Zhang and Sennrich, arXiv 1910.07467).

    In float32, rounded where torch's operations round: s, s over its root mean square, and n.

    Args:
        x: [T, E], the residual stream, rows contiguous; of the weight's dtype, or float32 beside it
        update: [T, E] likewise, or None: s is x; its rows may be further apart
        weight: [E]
        eps: of the norm

    Returns:
        s [T, E] in the dtype of x (x itself without an update), n [T, E] in the dtype of weight
    """
    rows, size = x.shape
    total = x if update is None else torch.empty_like(x)
    normed = torch.empty(rows, size, dtype=weight.dtype, device=x.device)
    if rows:
        width = block(size)
        _add_rms_norm[(rows,)](
            x, x if update is None else update, weight, total, normed,
            0 if update is None else update.stride(0), eps,
            SIZE=size, BLOCK=width, UPDATE=update is not None, num_warps=warps(width), **overlap(),
        )  # fmt: skip
    return total, normed


@kernel
def _add_rms_norm(
    x: tl.tensor,
    update: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    update_stride: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    UPDATE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a row."""
    turn(EARLY)
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    own = tl.load(x + first + at, mask=inside, other=0.0)
    gain = tl.load(weight + at, mask=inside, other=0.0)
    if UPDATE:
        row = tl.program_id(0).to(tl.int64)
        change = tl.load(update + row * update_stride + at, mask=inside, other=0.0)
        own = (own.to(tl.float32) + change.to(tl.float32)).to(own.dtype)
        tl.store(total + first + at, own, mask=inside)
    wide = own.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    rounded = scaled.to(gain.dtype).to(tl.float32)
    tl.store(normed + first + at, (rounded * gain.to(tl.float32)).to(gain.dtype), mask=inside)
