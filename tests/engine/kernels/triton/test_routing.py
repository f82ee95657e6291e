"""The gate against the plain layer."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.triton.routing import route
from engine.layers import moe
from engine.layers.moe import MoEConfig
from tests.engine.kernels.triton.conftest import CHIP


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "experts", "groups", "chosen_groups", "chosen"),
    [(5, 96, 8, 4, 2, 3), (17, 300, 16, 1, 1, 8), (3, 64, 24, 3, 2, 4), (1, 600, 64, 8, 4, 8)],
)
def test_choice(
    device: torch.device, rows: int, inputs: int, experts: int, groups: int, chosen_groups: int, chosen: int, normalise: bool
) -> None:  # fmt: skip
    config = MoEConfig(experts, 1, chosen, groups, chosen_groups, normalise, 2.5, 32)
    generator = torch.Generator().manual_seed(inputs)
    x, gate, bias = (
        torch.randn(s, generator=generator).to(device)
        for s in ((rows, inputs), (experts, inputs), (experts,))
    )
    operands = (gate * inputs**-0.5, bias * 0.1, config)
    numbers, weights = route(x, *operands)
    wanted, wanted_weights = moe.route(x, *operands)
    assert torch.equal(numbers.long(), wanted)
    torch.testing.assert_close(weights, wanted_weights, rtol=2e-6, atol=2e-6)
    again = route(x[-1:], *operands)
    assert torch.equal(again[0], numbers[-1:])
    if CHIP:  # the interpreter's library sums other numbers of rows in another order
        assert torch.equal(again[1], weights[-1:])
    torch.testing.assert_close(again[1], weights[-1:], rtol=2e-6, atol=2e-6)


def test_equal_scores_go_to_the_lower_number(device: torch.device) -> None:
    config = MoEConfig(16, 1, 4, 4, 2, True, 1.0, 32)
    x, bias = torch.zeros(1, 64, device=device), torch.zeros(16, device=device)
    numbers, weights = route(x, torch.ones(16, 64, device=device), bias, config)
    assert numbers.tolist() == [[0, 1, 2, 3]]
    torch.testing.assert_close(weights, torch.full_like(weights, 0.25))
    bias[9] = bias[14] = 1.0
    numbers, _ = route(x, torch.ones(16, 64, device=device), bias, config)
    assert numbers.tolist() == [[9, 14, 8, 10]]


def test_rows_of_padding(device: torch.device, dtype: torch.dtype) -> None:
    config = MoEConfig(8, 1, 2, 1, 1, True, 1.0, 32)
    generator = torch.Generator().manual_seed(0)
    x, gate = (
        torch.randn(3, 64, generator=generator).to(device, dtype),
        torch.randn(8, 64, generator=generator).to(device),
    )
    bias = torch.zeros(8, device=device)
    positions = torch.tensor([7, -1, 0], dtype=torch.int32, device=device)
    numbers, weights = route(x, gate, bias, config, positions)
    plain, plain_weights = route(x, gate, bias, config)
    assert numbers[1].tolist() == [-1, -1]
    assert not weights[1].any()
    assert torch.equal(numbers[::2], plain[::2])
    assert torch.equal(weights[::2], plain_weights[::2])
    assert route(x[:0], gate, bias, config)[0].shape == (0, 2)
