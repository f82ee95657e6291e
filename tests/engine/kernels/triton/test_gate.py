"""The gate against torch's silu."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.kernels.triton.gate import silu_times


def plain(product: torch.Tensor) -> torch.Tensor:
    gate, up = product.chunk(2, dim=-1)
    return F.silu(gate) * up


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    tolerance = 2e-6 if ours.dtype is torch.float32 else 2.0**-7
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(("rows", "size"), [(1, 1536), (3, 8960), (2, 1), (5, 1025), (0, 8)])
def test_product(device: torch.device, dtype: torch.dtype, rows: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    product = (torch.randn(rows, 2 * size, generator=generator) * 4).to(device, dtype)
    close(silu_times(product), plain(product))


def test_far_out_and_rows_apart(device: torch.device) -> None:
    product = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, 2.0, 2.0, 2.0, 2.0, 2.0]] * 3, device=device)
    wide = torch.cat((product, torch.full((3, 7), torch.nan, device=device)), dim=1)
    assert silu_times(wide[:, :10]).tolist() == plain(product).tolist()


def test_a_row_has_the_same_bits_again_and_in_other_company(device: torch.device, dtype: torch.dtype) -> None:
    product = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    whole = silu_times(product)
    assert torch.equal(silu_times(product), whole)
    assert torch.equal(silu_times(product[4:5]), whole[4:5])
