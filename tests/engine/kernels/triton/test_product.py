"""Products of few rows against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.kernels.triton.gate import silu_times
from engine.kernels.triton.product import fits, gated_linear, linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 576, 200), (4, 96, 34), (2, 1536, 6), (3, 8, 2)])
def test_products(
    device: torch.device, dtype: torch.dtype, rows: int, inputs: int, outputs: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    made = [torch.randn(*s, generator=generator) for s in ((rows, inputs + 8), (outputs, inputs), (outputs,))]
    wide, weight, more = (one.to(device, dtype) for one in made)
    x, added = wide[:, :inputs], more if bias else None
    assert fits(rows, inputs)
    weight *= inputs**-0.5
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    wanted = F.linear(x, weight, added)
    torch.testing.assert_close(linear(x, weight, added), wanted, rtol=tolerance, atol=tolerance)
    gated = gated_linear(x, weight, added)
    torch.testing.assert_close(gated, silu_times(wanted), rtol=tolerance, atol=tolerance)
    assert torch.equal(gated, silu_times(linear(x, weight, added)))
    for row in range(rows):
        assert torch.equal(linear(x[row : row + 1], weight, added)[0], linear(x, weight, added)[row])


def test_what_fits() -> None:
    assert not fits(5, 64)
    assert not fits(0, 64)
    assert not fits(1, 60)
