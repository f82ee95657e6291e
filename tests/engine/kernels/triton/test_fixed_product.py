"""Products whose rows have the same bits in any company, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.kernels.triton.fixed_product import ONE, ROW_BLOCKS, fixed_linear, row_blocks
from tests.engine.kernels.triton.conftest import CHIP


@pytest.mark.parametrize("blocks", [ONE, ROW_BLOCKS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 96, 70), (18, 40, 34), (130, 72, 130)])
def test_products(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    inputs: int,
    outputs: int,
    bias: bool,
    blocks: tuple[int, ...],
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    made = [torch.randn(*s, generator=generator) for s in ((rows, inputs + 8), (outputs, inputs), (outputs,))]
    wide, weight, more = (one.to(device, dtype) for one in made)
    x, added = wide[:, :inputs], more if bias else None
    weight *= inputs**-0.5
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    found = fixed_linear(x, weight, added, blocks=blocks)
    assert found.dtype is dtype
    torch.testing.assert_close(found, F.linear(x, weight, added), rtol=tolerance, atol=tolerance)
    logits = fixed_linear(x, weight, blocks=blocks, dtype=torch.float32)
    torch.testing.assert_close(logits, F.linear(x.float(), weight.float()), rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(not CHIP, reason="NumPy's products have other bits with other numbers of rows")
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 1544), (1536, 576), (8960, 1536), (100, 34)])
def test_a_row_has_the_same_bits_in_any_company(
    device: torch.device, dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    made = [torch.randn(*s, generator=generator) for s in ((2048, inputs), (outputs, inputs))]
    x, weight = (one.to(device, dtype) for one in made)
    weight *= inputs**-0.5
    blocks = row_blocks(weight)
    wanted = fixed_linear(x, weight, blocks=blocks)
    for rows in (1, 2, 8, 16, 17, 64, 65, 128, 300):
        for first in (0, 5, 1000):
            found = fixed_linear(x[first : first + rows], weight, blocks=blocks)
            assert torch.equal(found, wanted[first : first + rows])
    few, many = (fixed_linear(x, weight[: outputs // 2], blocks=blocks), wanted[:, : outputs // 2])
    assert torch.equal(few, many)
