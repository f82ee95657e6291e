"""The mixture of experts against its formula, token by token and expert by expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.layers.moe import MoEConfig, route, run_experts

CONFIG = MoEConfig(
    num_experts=16, num_shared_experts=1, experts_per_token=3, num_groups=4, groups_per_token=2,
    normalise=True, scaling=2.5, intermediate_size=6,
)  # fmt: skip


def plain_route(x: Tensor, gate: Tensor, bias: Tensor, c: MoEConfig) -> dict[int, float]:
    """One token's experts and weights, as arXiv 2412.19437 tells it."""
    scores = [1 / (1 + float(torch.exp(-(x @ row)))) for row in gate]
    biased = [score + float(b) for score, b in zip(scores, bias, strict=True)]
    size = c.num_experts // c.num_groups
    groups = range(c.num_groups)
    worth = {g: sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in groups}
    kept = sorted(groups, key=lambda g: -worth[g])[: c.groups_per_token]
    eligible = [e for g in kept for e in range(g * size, (g + 1) * size)]
    chosen = sorted(eligible, key=lambda e: -biased[e])[: c.experts_per_token]
    total = sum(scores[e] for e in chosen) if c.normalise else 1.0
    return {e: scores[e] / total * c.scaling for e in chosen}


def plain_experts(x: Tensor, chosen: dict[int, float], gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for expert, weight in chosen.items():
        gate, up = (gate_up[expert] @ x).chunk(2)
        out += weight * (down[expert] @ (gate * torch.sigmoid(gate) * up))
    return out


@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("normalise", [True, False])
def test_route_and_experts_equal_the_formula(tokens: int, normalise: bool) -> None:
    config = MoEConfig(**{**CONFIG.__dict__, "normalise": normalise})
    g = torch.Generator().manual_seed(tokens)
    x, gate = torch.randn(tokens, 8, generator=g), torch.randn(16, 8, generator=g)
    bias = torch.randn(16, generator=g)
    gate_up, down = torch.randn(16, 12, 8, generator=g), torch.randn(16, 8, 6, generator=g)
    experts, weights = route(x, gate, bias, config)
    out = run_experts(x, experts, weights, gate_up, down)
    for t in range(tokens):
        wanted = plain_route(x[t].double(), gate.double(), bias.double(), config)
        assert set(experts[t].tolist()) == set(wanted)
        for expert, weight in zip(experts[t].tolist(), weights[t].tolist(), strict=True):
            assert weight == pytest.approx(wanted[expert], rel=1e-5)
        expected = plain_experts(x[t].double(), wanted, gate_up.double(), down.double())
        torch.testing.assert_close(out[t].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    x, gate = torch.ones(1, 8), torch.zeros(16, 8)
    bias = torch.zeros(16)
    bias[[0, 1, 2]] = 5.0
    experts, weights = route(x, gate, bias, CONFIG)
    assert set(experts[0].tolist()) == {0, 1, 2}
    torch.testing.assert_close(weights, torch.full((1, 3), 2.5 / 3))


def test_the_parts_of_a_split_set_of_experts_add_up() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(9, 8, generator=g)
    gate_up, down = torch.randn(16, 12, 8, generator=g), torch.randn(16, 8, 6, generator=g)
    experts, weights = route(x, torch.randn(16, 8, generator=g), torch.randn(16, generator=g), CONFIG)
    whole = run_experts(x, experts, weights, gate_up, down)
    parts = [run_experts(x, experts, weights, gate_up[i : i + 4], down[i : i + 4], i) for i in (0, 4, 8, 12)]
    torch.testing.assert_close(sum(parts), whole)


def test_only_experts_that_were_chosen_are_visited() -> None:
    """An expert of NaNs that nobody chose does not show."""
    g = torch.Generator().manual_seed(4)
    gate_up, down = torch.randn(16, 12, 8, generator=g), torch.randn(16, 8, 6, generator=g)
    gate_up[5:] = torch.nan
    out = run_experts(torch.randn(2, 8), torch.tensor([[0, 4], [1, 0]]), torch.ones(2, 2), gate_up, down)
    assert bool(out.isfinite().all())
