"""Rows in FP8 against the definition, number by number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.interface.fp8 import ScaleFormat
from engine.kernels.torchops.fp8 import VectorisedFp8
from engine.kernels.triton.gate import silu_times
from engine.kernels.triton.norm import add_rms_norm
from engine.kernels.triton.quantise import QuantisedRows, add_rms_norm_rows, quantise_rows, silu_times_rows


def same(made: QuantisedRows, plain: Tensor, scale_format: ScaleFormat) -> None:
    values, scales = VectorisedFp8().quantise(plain, scale_format)
    assert torch.equal(made.values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(made.scales.T, scales)
    assert not made.turns.any()
    assert made.dtype == plain.dtype


@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
@pytest.mark.parametrize(("rows", "size"), [(1, 128), (5, 300), (2, 2049), (3, 24)])
def test_quantise(
    device: torch.device, dtype: torch.dtype, rows: int, size: int, scale_format: ScaleFormat
) -> None:
    """Numbers of many sizes, among them those that e4m3 has no normal form for, ties, and rows of zeros."""
    generator = torch.Generator().manual_seed(size)
    x = (
        torch.randn(rows, size, generator=generator)
        * torch.randn(rows, size, generator=generator).mul(3).exp()
    )
    x[-1] = torch.arange(size) % 64 / 16
    wide = torch.cat((x, torch.full((rows, 8), torch.nan)), dim=1).to(device, dtype)
    same(quantise_rows(wide[:, :size], scale_format), wide[:, :size], scale_format)
    same(quantise_rows(torch.zeros_like(wide)), torch.zeros_like(wide), "ue8m0")


def test_no_rows(device: torch.device) -> None:
    assert len(quantise_rows(torch.empty(0, 128, device=device))) == 0


@pytest.mark.parametrize("update", [False, True])
def test_norm(device: torch.device, dtype: torch.dtype, update: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, change, weight = (
        torch.randn(*s, generator=generator).to(device, dtype) for s in ((3, 300), (3, 300), (300,))
    )
    total, normed, made = add_rms_norm_rows(x, change if update else None, weight, 1e-6, keep=True)
    wanted_total, wanted = add_rms_norm(x, change if update else None, weight, 1e-6)
    assert torch.equal(total, wanted_total)
    assert normed is not None
    tolerance = 1e-6 if dtype is torch.float32 else 2.0**-7
    torch.testing.assert_close(normed, wanted, rtol=tolerance, atol=tolerance)
    same(made, normed, "ue8m0")
    again, nothing, alone = add_rms_norm_rows(x, change if update else None, weight, 1e-6)
    assert nothing is None
    assert torch.equal(again, total)
    assert torch.equal(alone.values.view(torch.uint8), made.values.view(torch.uint8))


def test_norm_of_a_part_of_wider_rows(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(4, 200, generator=generator).to(device, dtype)
    weight = torch.ones(128, dtype=dtype, device=device)
    _, normed, _ = add_rms_norm_rows(wide[:, :128], None, weight, 1e-6, keep=True)
    _, wanted, _ = add_rms_norm_rows(wide[:, :128].contiguous(), None, weight, 1e-6, keep=True)
    assert normed is not None
    assert wanted is not None
    assert torch.equal(normed, wanted)


def test_silu(device: torch.device, dtype: torch.dtype) -> None:
    product = torch.randn(3, 2 * 1100, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    same(silu_times_rows(product, "float"), silu_times(product), "float")
