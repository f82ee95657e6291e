"""Products of few rows with a weight: y = x W^T, read once, row by row of W.

So few rows are a matter of reading W. It does not depend on the kernel before, so a program reads its part before it waits
for that (see `engine.kernels.triton.kernel.overlap`); a library's product begins to read when the kernel before has ended.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.kernel import block, kernel, overlap

MOST_ROWS = 4
"""Rows of x; each costs a sum over what was read once."""
MOST_INPUTS = 8192
_THREADS = 128
_NUMBERS = 64  # of W a thread


def fits(rows: int, inputs: int) -> bool:
    """Whether a product of so many rows of so many numbers is one for these kernels."""
    return 0 < rows <= MOST_ROWS and inputs <= MOST_INPUTS and inputs % 8 == 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, in float32, rounded once.

    Args:
        x: [T, in], a row's numbers contiguous, for which `fits`
        weight: [out, in] contiguous
        bias: [out]

    Returns:
        [T, out] in the dtype of x
    """
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, gated=False)
    return out


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(g) * u of g, u = x W^T + bias, rounded as `linear` and then `silu_times` round it.

    Args:
        x: [T, in] likewise
        weight: [2 F, in] contiguous, gates and then ups
        bias: [2 F]

    Returns:
        [T, F] in the dtype of x
    """
    out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, gated=True)
    return out


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, gated: bool) -> None:
    rows, inputs = x.shape
    outputs, width = out.shape[1], max(block(inputs), 64)
    each = max(1, _THREADS * _NUMBERS // (2 * width if gated else width))
    while each > 1 and -(-outputs // each) < 120:
        each //= 2  # a part for each multiprocessor
    _linear[(-(-outputs // each),)](
        x, weight, weight if bias is None else bias, out, x.stride(0),
        ROWS=rows, INPUTS=inputs, WIDTH=width, OUTPUTS=outputs, EACH=each, BIAS=bias is not None, GATED=gated,
        num_warps=_THREADS // 32, **overlap(),
    )  # fmt: skip


@kernel
def _sums(
    x: tl.tensor, tile: tl.tensor, bias: tl.tensor, out: tl.tensor, k: tl.tensor, INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr, BIAS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One row's numbers [N], rounded, as float32."""
    dtype = x.dtype.element_ty
    own = tl.load(x + k, mask=k < INPUTS, other=0.0).to(tl.float32)
    sums = tl.sum(tile.to(tl.float32) * own[None, :], 1)
    if BIAS:
        sums += tl.load(bias + out, mask=out < OUTPUTS, other=0.0).to(tl.float32)
    return sums.to(dtype).to(tl.float32)


@kernel
def _linear(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, y: tl.tensor, x_stride: tl.tensor,
    ROWS: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, EACH: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """A program some outputs."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    out = tl.program_id(0) * EACH + tl.arange(0, EACH)
    k = tl.arange(0, WIDTH)
    place = weight + out.to(tl.int64)[:, None] * INPUTS + k[None, :]
    there = (out < OUTPUTS)[:, None] & (k < INPUTS)[None, :]
    tile = tl.load(place, mask=there, other=0.0)
    second = tile
    if GATED:
        second = tl.load(place + OUTPUTS * INPUTS, mask=there, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    dtype = y.dtype.element_ty
    for row in tl.static_range(ROWS):
        result = _sums(x + row * x_stride, tile, bias, out, k, INPUTS, OUTPUTS, BIAS)
        if GATED:
            up = _sums(x + row * x_stride, second, bias + OUTPUTS, out, k, INPUTS, OUTPUTS, BIAS)
            result = (result / (1.0 + tl.exp(-result))).to(dtype).to(tl.float32) * up
        tl.store(y + row * OUTPUTS + out, result.to(dtype), mask=out < OUTPUTS)
