"""Products of few rows with a weight: y = x W^T, read once.

So few rows are a matter of reading W. It does not depend on the kernel before, so a program reads its part before it waits
for that (see `engine.kernels.triton.kernel.overlap`); a library's product begins to read when the kernel before has ended.

A row must have the same bits in any company, and products of more rows are the library's. Its kernels sum in the matrix
unit, K in order; these do so too. Whether the bits are equal is for the device to say: `agrees` asks it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from engine.kernels.triton.kernel import block, kernel, overlap

MOST_ROWS = 4
"""Rows of x; 0 turns these kernels off."""
MOST_INPUTS = 2048
MOST_NUMBERS = 1 << 21
"""Of W. A larger one takes the library longer than launches do, and it reads faster: a step of one row of a model of 1.5B
parameters, whose products have up to 27M, took 2.5 ms with these kernels for 1.4 with an older form of them."""
OUTPUTS = (16, 64)
"""Of a program: the least that the matrix unit multiplies at once in one warp, and in four (Hopper's, as its libraries do)."""
_COLUMNS = tl.constexpr(16)  # what rows are padded to
_NUMBERS = 32768  # of W for four warps
_COMPANY = (8, 16, 64, 256, 2048)  # numbers of rows, for which the library has kernels of its own
_ASKED = 64  # rows


def fits(rows: int, weight: Tensor) -> bool:
    """Whether a product of so many rows with `weight` [out, in] is one for these kernels."""
    inputs = weight.shape[1]
    few = 0 < rows <= MOST_ROWS and weight.numel() <= MOST_NUMBERS
    return few and inputs <= MOST_INPUTS and inputs % 8 == 0


def holds(weight: Tensor, each: int, *, gated: bool = False) -> bool:
    """Whether the device has room for programs of `each` outputs; of float32 none of these kernels is used.

    Args:
        weight: [out, in] contiguous, on a GPU
        each: one of `OUTPUTS`
        gated: whether it is for `gated_linear`
    """
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    room: int = driver.active.utils.get_device_properties(weight.device.index or 0)["max_shared_mem"]
    return _shared_bytes(weight.shape[1], each, gated) <= room


def agrees(weight: Tensor, bias: Tensor | None, each: int) -> bool:
    """Whether `linear` has the bits that the library's product has in every company, in some rows of random numbers.

    Args:
        weight: [out, in] contiguous, on a GPU; it `fits` and `holds`
        bias: [out]
        each: one of `OUTPUTS`
    """
    inputs = weight.shape[1]
    generator = torch.Generator(weight.device).manual_seed(0)
    drawn = torch.randn(max(_COMPANY), inputs, generator=generator, device=weight.device)
    spread = torch.randn(drawn.shape, generator=generator, device=weight.device).mul(2).exp()
    spread[::2] = 1  # every second row has numbers of many sizes, as a model's may
    x = (drawn * spread).to(weight.dtype)
    ours = torch.cat([linear(part, weight, bias, each) for part in torch.split(x[:_ASKED], MOST_ROWS)])
    for rows in _COMPANY:
        theirs = F.linear(x[:rows], weight, bias)[:_ASKED]
        if not torch.equal(ours[: len(theirs)], theirs):
            return False
    return True


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, each: int = OUTPUTS[0]) -> Tensor:
    """x W^T + bias, in float32, rounded once.

    Args:
        x: [T, in], a row's numbers contiguous, for which `fits`
        weight: [out, in] contiguous
        bias: [out]
        each: outputs of a program, one of `OUTPUTS`

    Returns:
        [T, out] in the dtype of x
    """
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, each, gated=False)
    return out


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, each: int = OUTPUTS[0]) -> Tensor:
    """silu(g) * u of g, u = x W^T + bias, rounded as `linear` and then `silu_times` round it.

    Args:
        x: [T, in] likewise
        weight: [2 F, in] contiguous, gates and then ups
        bias: [2 F]
        each: likewise

    Returns:
        [T, F] in the dtype of x
    """
    out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, each, gated=True)
    return out


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, each: int, gated: bool) -> None:
    rows, inputs = x.shape
    outputs = out.shape[1]
    first, rest = _parts(inputs)
    numbers = each * (first + rest) * (2 if gated else 1)
    _linear[(-(-outputs // each),)](
        x, weight, weight if bias is None else bias, out, x.stride(0),
        ROWS=rows, INPUTS=inputs, FIRST=first, REST=rest, OUTPUTS=outputs, EACH=each, BIAS=bias is not None, GATED=gated,
        num_warps=4 if numbers <= _NUMBERS else 8, **overlap(),
    )  # fmt: skip


def _parts(inputs: int) -> tuple[int, int]:
    """The largest power of two in it, and what holds the rest."""
    first = max(block(inputs + 1) // 2, 16)
    return first, max(block(inputs - first), 16) if inputs > first else 0


def _shared_bytes(inputs: int, each: int, gated: bool) -> int:
    """What a program needs at once, of numbers of two bytes."""
    first, rest = _parts(inputs)
    lines = each * (2 if gated else 1)
    return 2 * (first * (lines + 16) + rest * lines)


@kernel
def _read(
    weight: tl.tensor, out: tl.tensor, k: tl.tensor, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr
) -> tl.tensor:
    """W [N, K] at these outputs and inputs."""
    place = weight + out.to(tl.int64)[:, None] * INPUTS + k[None, :]
    return tl.load(place, mask=(out < OUTPUTS)[:, None] & (k < INPUTS)[None, :], other=0.0)


@kernel
def _rounded(
    sums: tl.tensor, bias: tl.tensor, out: tl.tensor, OUTPUTS: tl.constexpr, BIAS: tl.constexpr
) -> tl.tensor:
    """[N, rows] with the bias, rounded to its dtype, as float32."""
    if BIAS:
        sums += tl.load(bias + out, mask=out < OUTPUTS, other=0.0).to(tl.float32)[:, None]
    return sums.to(bias.dtype.element_ty).to(tl.float32)


@kernel
def _linear(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, y: tl.tensor, x_stride: tl.tensor,
    ROWS: tl.constexpr, INPUTS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, OUTPUTS: tl.constexpr,
    EACH: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """A program some outputs."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    out = tl.program_id(0) * EACH + tl.arange(0, EACH)
    row = tl.arange(0, _COLUMNS)
    k = tl.arange(0, FIRST)
    tile = _read(weight, out, k, INPUTS, OUTPUTS)
    if GATED:
        second = _read(weight + OUTPUTS * INPUTS, out, k, INPUTS, OUTPUTS)
    if REST:
        more = FIRST + tl.arange(0, REST)
        tile_rest = _read(weight, out, more, INPUTS, OUTPUTS)
        if GATED:
            second_rest = _read(weight + OUTPUTS * INPUTS, out, more, INPUTS, OUTPUTS)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    own = tl.trans(tl.load(x + row[:, None] * x_stride + k[None, :], mask=(row < ROWS)[:, None] & (k < INPUTS)[None, :], other=0.0))  # fmt: skip
    sums = tl.dot(tile, own, input_precision="ieee")
    if GATED:
        ups = tl.dot(second, own, input_precision="ieee")
    if REST:
        own_rest = tl.trans(tl.load(x + row[:, None] * x_stride + more[None, :], mask=(row < ROWS)[:, None] & (more < INPUTS)[None, :], other=0.0))  # fmt: skip
        sums = tl.dot(tile_rest, own_rest, sums, input_precision="ieee")
        if GATED:
            ups = tl.dot(second_rest, own_rest, ups, input_precision="ieee")
    dtype = y.dtype.element_ty
    result = _rounded(sums, bias, out, OUTPUTS, BIAS)
    if GATED:
        up = _rounded(ups, bias + OUTPUTS, out, OUTPUTS, BIAS)
        result = (result / (1.0 + tl.exp(-result))).to(dtype).to(tl.float32) * up
    place = y + row[None, :] * OUTPUTS + out[:, None]
    tl.store(place, result.to(dtype), mask=(out < OUTPUTS)[:, None] & (row < ROWS)[None, :])
