"""Residual add and norm against `rms_norm`."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.triton.norm import add_rms_norm
from engine.layers.norm import rms_norm
from lab.doctor.pointwise import norm_operands

EPS = 1e-5


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To the last digits of float32, or to one step of bfloat16."""
    tolerance = 2e-6 if ours.dtype is torch.float32 else 2.0**-7
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize(
    ("rows", "size"), [(1, 576), (3, 1536), (2, 2048), (2, 4096), (2, 7168), (5, 1), (4, 77), (1, 64)]
)
def test_sum_and_norm(device: torch.device, dtype: torch.dtype, rows: int, size: int) -> None:
    x, update, weight = norm_operands(device, dtype, rows, size)
    before = x.clone()
    total, normed = add_rms_norm(x, update, weight, EPS)
    assert torch.equal(total, x + update)
    close(normed, rms_norm(x + update, weight, EPS))
    assert torch.equal(x, before)


def test_without_an_update_the_stream_is_as_it_was(device: torch.device, dtype: torch.dtype) -> None:
    x, _, weight = norm_operands(device, dtype, 3, 200)
    total, normed = add_rms_norm(x, None, weight, EPS)
    assert total is x
    close(normed, rms_norm(x, weight, EPS))


def test_a_wide_stream_beside_narrow_weights(device: torch.device) -> None:
    x, update, weight = norm_operands(device, torch.float32, 3, 96)
    update, weight = update.half(), weight.half()
    total, normed = add_rms_norm(x, update, weight, EPS)
    assert torch.equal(total, x + update)
    assert normed.dtype is torch.float16
    torch.testing.assert_close(normed.float(), rms_norm(total, weight.float(), EPS), rtol=2.0**-9, atol=1e-4)


def test_rows_of_zeros_and_no_rows(device: torch.device) -> None:
    weight = torch.ones(8, device=device)
    assert add_rms_norm(torch.zeros(2, 8, device=device), None, weight, EPS)[1].tolist() == [[0.0] * 8] * 2
    assert add_rms_norm(torch.zeros(0, 8, device=device), None, weight, EPS)[1].shape == (0, 8)


def test_a_row_has_the_same_bits_again_and_in_other_company(device: torch.device, dtype: torch.dtype) -> None:
    x, update, weight = norm_operands(device, dtype, 7, 576)
    total, normed = add_rms_norm(x, update, weight, EPS)
    for rows in (slice(0, 7), slice(3, 4), slice(2, 6)):
        again = add_rms_norm(x[rows], update[rows], weight, EPS)
        assert torch.equal(again[0], total[rows])
        assert torch.equal(again[1], normed[rows])


@pytest.mark.parametrize("size", [576, 77])
def test_the_rows_of_an_update_may_lie_apart(device: torch.device, dtype: torch.dtype, size: int) -> None:
    x, update, weight = norm_operands(device, dtype, 5, size)
    both = torch.nn.functional.pad(update, (0, 16), value=torch.nan)
    for ours, theirs in zip(
        add_rms_norm(x, both[:, :size], weight, EPS), add_rms_norm(x, update, weight, EPS), strict=True
    ):
        assert torch.equal(ours, theirs)
