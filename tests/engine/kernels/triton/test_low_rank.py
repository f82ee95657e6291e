"""The adapter against `LowRank`."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.triton.low_rank import Correction, add_low_rank
from lab.doctor.pointwise import correction, low_rank_operands


@pytest.mark.parametrize(
    ("rows", "inputs", "rank", "outputs"),
    [
        (1, 576, 32, 960),
        (17, 576, 32, 576),
        (33, 100, 5, 70),
        (16, 1536, 64, 300),
        (3, 7, 1, 1),
        (2, 64, 160, 130),
    ],
)
def test_flagged_rows_are_corrected(
    device: torch.device, dtype: torch.dtype, rows: int, inputs: int, rank: int, outputs: int
) -> None:
    y, x, fix = low_rank_operands(device, dtype, rows, inputs, rank, outputs)
    flags = torch.arange(rows, device=device) % 3 != 1
    before = y.clone()
    add_low_rank(y, correction(x, fix, flags))
    tolerance = 2e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(y, before + fix(x, flags.unsqueeze(1)), rtol=tolerance, atol=tolerance)
    assert torch.equal(y[~flags], before[~flags])


def test_rows_without_the_flag_are_not_even_read(device: torch.device) -> None:
    y, x, fix = low_rank_operands(device, torch.float32, 20, 50, 4, 30)
    x[5], y[5] = torch.nan, torch.nan
    before = y.clone()
    add_low_rank(y, correction(x, fix, torch.zeros(20, dtype=torch.int32, device=device)))
    assert torch.equal(y.view(torch.int32), before.view(torch.int32))
    flags = torch.ones(20, dtype=torch.int32, device=device)
    flags[5] = 0
    add_low_rank(y, correction(x, fix, flags))
    assert torch.isfinite(y).all(-1).tolist() == (flags != 0).tolist()


def test_numbers_beside_the_rows_stay(device: torch.device) -> None:
    y, x, fix = low_rank_operands(device, torch.float32, 3, 48, 8, 40)
    wide = torch.cat((y, torch.full((3, 9), 7.0, device=device)), dim=1)
    add_low_rank(wide[:, :40], correction(x, fix, torch.ones(3, dtype=torch.bool, device=device)))
    torch.testing.assert_close(
        wide[:, :40], y + fix(x, torch.ones(3, 1, device=device)), rtol=1e-5, atol=1e-5
    )
    assert (wide[:, 40:] == 7).all()


def test_a_row_has_the_same_bits_again_and_in_other_company(device: torch.device, dtype: torch.dtype) -> None:
    y, x, fix = low_rank_operands(device, dtype, 40, 576, 32, 200)
    flags = torch.ones(40, dtype=torch.bool, device=device)
    whole, again, alone = y.clone(), y.clone(), y[21:22].clone()
    given = correction(x, fix, flags)
    add_low_rank(whole, given)
    add_low_rank(again, given)
    add_low_rank(alone, Correction(given.short[21:22], fix.b, flags[:1]))
    assert torch.equal(again, whole)
    assert torch.equal(alone, whole[21:22])
