"""Every backend against the definitions in `engine.kernels.reference`, op by op, shape by shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import BACKENDS, load_backend, native, vectorised
from engine.kernels.reference import ReferenceKernels

HERE = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "native" and native.missing() is not None, reason=str(native.missing())
        ),
    )
    for name in sorted(BACKENDS)
]
OTHERS = [one for one in HERE if one.values[0] != "reference"]
PAGE = 64


def make_cache(generator: torch.Generator, pages: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(pages, PAGE, *shape, generator=generator).to(dtype)


@st.composite
def tile_shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(requests, rows, pages a request, seed); one of the first two is 1, as in the engine."""
    one = draw(st.integers(1, 4))
    requests, rows = draw(st.sampled_from([(one, 1), (1, one)]))
    return requests, rows, draw(st.integers(1, 3)), draw(st.integers(0, 2**31))


class Case:
    """Random inputs of one tile."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        self.requests, self.rows, pages, seed = shape
        g = torch.Generator().manual_seed(seed)
        self.context = pages * PAGE
        order = torch.randperm(self.requests * pages + 2, generator=g)
        self.block_table = order[: self.requests * pages].view(self.requests, pages)
        self.positions = torch.randint(0, self.context, (self.requests, self.rows), generator=g)
        self.keys = make_cache(g, len(order), 16, dtype=dtype)
        self.kv = make_cache(g, len(order), 2, 2, 8, dtype=dtype)
        self.index_query = torch.randn(self.requests, self.rows, 3, 16, generator=g).to(dtype)
        self.head_weights = torch.randn(self.requests, self.rows, 3, generator=g)
        self.query = torch.randn(self.requests, self.rows, 2, 3, 8, generator=g).to(dtype)
        self.top_k = torch.randint(1, self.context + 9, (self.requests, self.rows), generator=g)
        scores = torch.randn(self.requests, self.rows, self.context, generator=g)
        # Coarse scores, so that many are equal and ties cross the edge of the set.
        future = torch.arange(self.context) > self.positions.unsqueeze(-1)
        self.scores = ((scores * 2).round() / 2).masked_fill(future, -math.inf)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=20, deadline=None)
@given(shape=tile_shapes())
def test_conformance(backend: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    case, kernels, reference = Case(shape, dtype), load_backend(backend), ReferenceKernels()
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}

    args = (case.index_query, case.head_weights, case.keys, case.block_table, case.positions)
    scores, expected = kernels.index_scores(*args), reference.index_scores(*args)
    assert torch.equal(scores == -math.inf, expected == -math.inf)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)  # float32 whatever the inputs

    selected, wanted = kernels.select(case.scores, case.top_k), reference.select(case.scores, case.top_k)
    assert torch.equal(selected.sort(-1).values, wanted.sort(-1).values)

    torch.testing.assert_close(
        kernels.attend_selected(case.query, case.kv, case.block_table, wanted, 0.3),
        reference.attend_selected(case.query, case.kv, case.block_table, wanted, 0.3),
        **close,
    )
    allowed = torch.rand(case.scores.shape, generator=torch.Generator().manual_seed(shape[3])) < 0.5
    allowed[..., 0] = True
    torch.testing.assert_close(
        kernels.attend_masked(case.query, case.kv, case.block_table, allowed, 0.3),
        reference.attend_masked(case.query, case.kv, case.block_table, allowed, 0.3),
        **close,
    )


def test_index_scores_do_not_depend_on_how_many_positions_are_taken_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = load_backend("torch")
    for shape in ((1, 3, 7, 5), (3, 1, 4, 6)):
        case = Case(shape, torch.bfloat16)
        args = (case.index_query, case.head_weights, case.keys, case.block_table, case.positions)
        whole = kernels.index_scores(*args)
        for pages in (1, 2, 3):
            limit = pages * PAGE * case.requests * case.rows * 3
            monkeypatch.setitem(vectorised.PRODUCTS_AT_ONCE, "cpu", limit)
            torch.testing.assert_close(kernels.index_scores(*args), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", HERE)
def test_masked_positions_are_never_selected_even_when_every_score_is_negative(backend: str) -> None:
    """0 would beat them all: the mask has to be -inf."""
    scores = torch.full((1, 1, 64), -5.0)
    scores[..., 10:] = -math.inf
    selected = load_backend(backend).select(scores, torch.tensor([[32]]))
    assert sorted(selected.flatten().tolist()) == [-1] * 22 + list(range(10))


@pytest.mark.parametrize("backend", HERE)
def test_a_tie_at_the_edge_does_not_depend_on_the_rest_of_the_batch(backend: str) -> None:
    kernels = load_backend(backend)
    row = torch.zeros(1, 1, 128)
    alone = set(kernels.select(row, torch.tensor([[5]])).flatten().tolist())
    both = kernels.select(row.expand(2, 1, 128).clone(), torch.tensor([[5], [100]]))
    assert alone == set(both[0].flatten().tolist()) - {-1} == {123, 124, 125, 126, 127}


@pytest.mark.parametrize("backend", HERE)
def test_negative_head_weights_lower_a_score(backend: str) -> None:
    query = torch.ones(1, 1, 1, 4)
    keys = torch.zeros(1, 64, 4)
    keys[0, 1] = 1.0
    scores = load_backend(backend).index_scores(
        query, torch.tensor([[[-2.0]]]), keys, torch.tensor([[0]]), torch.tensor([[2]])
    )
    assert scores[0, 0, :3].tolist() == [0.0, -8.0, 0.0]
    assert bool((scores[0, 0, 3:] == -math.inf).all())
