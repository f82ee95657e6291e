"""Products of few rows against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.kernels.triton.gate import silu_times
from engine.kernels.triton.product import OUTPUTS, agrees, fits, gated_linear, holds, linear
from tests.engine.kernels.triton.conftest import CHIP


@pytest.mark.parametrize("each", OUTPUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 576, 200), (4, 96, 34), (2, 1536, 6), (3, 8, 2)])
def test_products(
    device: torch.device, dtype: torch.dtype, rows: int, inputs: int, outputs: int, bias: bool, each: int
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    made = [torch.randn(*s, generator=generator) for s in ((rows, inputs + 8), (outputs, inputs), (outputs,))]
    wide, weight, more = (one.to(device, dtype) for one in made)
    x, added = wide[:, :inputs], more if bias else None
    assert fits(rows, weight)
    if CHIP and not holds(weight, each):
        pytest.skip("the engine does not use it: the numbers are float32, or a program has no room for them")
    weight *= inputs**-0.5
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    wanted = F.linear(x, weight, added)
    torch.testing.assert_close(linear(x, weight, added, each), wanted, rtol=tolerance, atol=tolerance)
    together = linear(x, weight, added, each)
    for row in range(rows):
        assert torch.equal(linear(x[row : row + 1], weight, added, each)[0], together[row])
    if CHIP and not holds(weight, each, gated=True):
        return
    gated = gated_linear(x, weight, added, each)
    torch.testing.assert_close(gated, silu_times(wanted), rtol=tolerance, atol=tolerance)
    if CHIP:
        assert torch.equal(gated, silu_times(together))
    else:  # NumPy's exponential has other last bits where numbers lie apart
        torch.testing.assert_close(gated, silu_times(together), rtol=1e-6, atol=1e-6)


def test_what_fits() -> None:
    assert fits(4, torch.empty(1 << 15, 64))
    assert not fits(5, torch.empty(8, 64))
    assert not fits(0, torch.empty(8, 64))
    assert not fits(1, torch.empty(8, 60))
    assert not fits(1, torch.empty(8, 4096))
    assert not fits(1, torch.empty((1 << 15) + 1, 64))


def test_float32_is_the_librarys() -> None:
    assert not holds(torch.ones(8, 64), OUTPUTS[0])


@pytest.mark.skipif(not CHIP, reason="the library's products are a GPU's")
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 1544), (576, 576), (1536, 576), (1536, 256)])
def test_bits_are_the_librarys(device: torch.device, inputs: int, outputs: int) -> None:
    """What agrees in rows of one kind has the library's bits in others, too: larger, smaller, with zeros."""
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(outputs, inputs, generator=generator).to(device, torch.bfloat16)
    forms = [each for each in OUTPUTS if holds(weight, each) and agrees(weight, None, each)]
    if not forms:
        pytest.skip("this device's library sums in another order, and is used for few rows, too")
    x = torch.randn(256, inputs, generator=generator) * torch.exp(
        3 * torch.randn(256, inputs, generator=generator)
    )
    x = x.where(torch.rand(256, inputs, generator=generator) < 0.7, 0.0).to(device, torch.bfloat16)
    for each in forms:
        for rows in (1, 2, 4):
            ours = torch.cat([linear(part, weight, None, each) for part in torch.split(x, rows)])
            assert torch.equal(ours, F.linear(x, weight))
