"""The gate of a gated feed-forward layer (Shazeer, arXiv 2002.05202): silu(gate) * up."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.kernel import kernel, overlap, turn

_BLOCK = 1024


def silu_times(product: Tensor) -> Tensor:
    """g / (1 + e^-g) * u, in float32, rounded where torch's operations round: the silu, and the result.

    Args:
        product: [T, 2 F], a row's gates g and then its ups u; rows may be further apart

    Returns:
        [T, F] in the dtype of product
    """
    rows, size = product.shape[0], product.shape[1] // 2
    out = torch.empty(rows, size, dtype=product.dtype, device=product.device)
    if rows:
        grid = (rows, -(-size // _BLOCK))
        _silu_times[grid](product, out, product.stride(0), SIZE=size, BLOCK=_BLOCK, num_warps=4, **overlap())
    return out


@kernel
def gated(gate: tl.tensor, up: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """silu(gate) * up, both given in any precision, rounded to DTYPE where torch's operations round."""
    gate = gate.to(DTYPE).to(tl.float32)
    up = up.to(DTYPE).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    return (silu * up).to(DTYPE)


@kernel
def _silu_times(
    product: tl.tensor,
    out: tl.tensor,
    stride: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program a block of a row."""
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    gate = tl.load(product + row * stride + at, mask=inside, other=0.0)
    up = tl.load(product + row * stride + SIZE + at, mask=inside, other=0.0)
    tl.store(out + row * SIZE + at, gated(gate, up, out.dtype.element_ty), mask=inside)
