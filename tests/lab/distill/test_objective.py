"""Targets, loss and selection of the indexer's training against definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.reference.attention import ReferenceKernels
from lab.distill.objective import attention_target, captured_mass, divergence, index_logits, top_mask

shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 5),
        "total": st.integers(1, 12),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 3),
        "dim": st.sampled_from([2, 4, 8]),
        "seed": st.integers(0, 1 << 20),
        "spread": st.sampled_from([0.1, 1.0, 8.0]),
    }
)


def draw(shape: dict[str, int], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys, and a causal mask; each row's mask ends at another position."""
    n, total = shape["rows"], shape["total"]
    query = torch.randn(n, shape["kv_heads"], shape["group"], shape["dim"], generator=generator)
    keys = torch.randn(total, shape["kv_heads"], shape["dim"], generator=generator)
    rows = torch.randint(total, (n, 1), generator=generator)
    return query * shape["spread"], keys, torch.arange(total) <= rows


def plain_target(query: Tensor, keys: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Equation (3)'s p: probabilities summed over the heads, divided by their sum."""
    n, kv_heads, group, _ = query.shape
    target = torch.zeros(n, keys.shape[0], dtype=torch.float64)
    for row in range(n):
        for head in range(kv_heads * group):
            dots = keys[:, head // group].double() @ query[row, head // group, head % group].double() * scale
            weights = dots.sub(dots[allowed[row]].max()).exp() * allowed[row]
            target[row] += weights / weights.sum()
        target[row] /= target[row].sum()
    return target


def plain_divergence(target: list[float], scores: list[float], support: list[bool]) -> float:
    """KL(p || softmax(scores)), both over the support alone."""
    inside = [s for s, is_in in enumerate(support) if is_in]
    mass = sum(target[s] for s in inside)
    top = max(scores[s] for s in inside)
    total = top + math.log(sum(math.exp(scores[s] - top) for s in inside))
    return sum(
        target[s] / mass * (math.log(target[s] / mass) - (scores[s] - total)) for s in inside if target[s] > 0
    )


@settings(max_examples=60, deadline=None)
@given(shape=shapes)
def test_the_target_is_the_heads_attention_summed_and_normalised(shape: dict[str, int]) -> None:
    query, keys, allowed = draw(shape, torch.Generator().manual_seed(shape["seed"]))
    target = attention_target(query, keys, allowed, 0.3)
    torch.testing.assert_close(target.double(), plain_target(query, keys, allowed, 0.3), atol=2e-6, rtol=2e-5)
    assert bool((target[~allowed] == 0).all())
    torch.testing.assert_close(target.sum(-1), torch.ones(shape["rows"]))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, sparse=st.booleans(), top_k=st.integers(1, 6))
def test_the_loss_is_the_divergence_over_its_support(shape: dict[str, int], sparse: bool, top_k: int) -> None:
    """Dense stage: all causal positions. Sparse stage: the selected ones, the target renormalised there."""
    generator = torch.Generator().manual_seed(shape["seed"])
    query, keys, allowed = draw(shape, generator)
    target = attention_target(query, keys, allowed, 0.3)
    scores = torch.randn(target.shape, generator=generator) * shape["spread"]
    support = top_mask(scores, allowed, top_k) if sparse else allowed
    loss = divergence(target, scores, support)
    for row, value in enumerate(loss.tolist()):
        expected = plain_divergence(
            target[row].double().tolist(), scores[row].double().tolist(), support[row].tolist()
        )
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert value > -1e-5


def test_the_losss_gradient_is_softmax_minus_target_on_the_support_and_0_beside_it() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 8, generator=generator)
    target[:, 2] = 0.0  # a position of the support that attention gives nothing
    support = torch.ones(3, 8, dtype=torch.bool)
    support[:, 5:] = False
    scores = torch.randn(3, 8, generator=generator, requires_grad=True)
    divergence(target, scores, support).sum().backward()
    inside = target[:, :5] / target[:, :5].sum(-1, keepdim=True)
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad[:, :5], scores.detach()[:, :5].softmax(-1) - inside)
    assert scores.grad[:, 5:].abs().max() == 0


def test_a_target_carries_no_gradient() -> None:
    query, keys = torch.randn(2, 1, 2, 4, requires_grad=True), torch.randn(6, 1, 4, requires_grad=True)
    target = attention_target(query, keys, torch.ones(2, 6, dtype=torch.bool), 0.5)
    assert not target.requires_grad


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.0, 0.5, 2.0]), min_size=9, max_size=9), min_size=1, max_size=4),
    rows=st.lists(st.integers(0, 8), min_size=4, max_size=4),
    top_k=st.integers(1, 12),
)  # fmt: skip
def test_what_is_selected_in_training_is_what_is_selected_in_serving(
    values: list[list[float]], rows: list[int], top_k: int
) -> None:
    """This includes ties, which are common after a ReLU."""
    scores = torch.tensor(values)
    positions = torch.tensor(rows[: len(values)])
    allowed = torch.arange(9) <= positions.unsqueeze(-1)
    served = ReferenceKernels().select(
        scores.masked_fill(~allowed, -math.inf).unsqueeze(0), torch.full((1, len(values)), top_k)
    )[0]
    mask = top_mask(scores, allowed, top_k)
    for row in range(len(values)):
        assert mask[row].nonzero().flatten().tolist() == sorted(s for s in served[row].tolist() if s >= 0)


def test_captured_mass_is_the_targets_part_in_the_selection() -> None:
    target = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    assert captured_mass(target, torch.tensor([[True, False, True, True]])).tolist() == [0.75]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 4), heads=st.integers(1, 4), total=st.integers(1, 9), seed=st.integers(0, 1 << 20))
def test_index_logits_are_equation_1(n: int, heads: int, total: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(n, heads, 4, generator=generator)
    weights = torch.randn(n, heads, generator=generator)
    keys = torch.randn(total, 4, generator=generator)
    expected = torch.zeros(n, total, dtype=torch.float64)
    for head in range(heads):
        dots = query[:, head].double() @ keys.double().T
        expected += weights[:, head, None].double() * dots.clamp(min=0)
    torch.testing.assert_close(index_logits(query, weights, keys).double(), expected, atol=1e-5, rtol=1e-5)
