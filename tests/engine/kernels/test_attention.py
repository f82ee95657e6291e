"""Every backend against the definitions in `engine.kernels.reference.attention`, op by op, shape by shape."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import native
from engine.kernels.choice import BACKENDS, load_backend
from engine.kernels.reference.attention import ReferenceKernels
from engine.kernels.torchops import attention as vectorised
from engine.memory.layouts import Int8KeyLayout

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


class Dims(NamedTuple):
    """Sizes of heads that are multiples of a processor's vectors, and sizes that are not."""

    index_heads: int
    index_dim: int
    kv_heads: int
    group: int
    dim: int


DIMS = [Dims(3, 16, 2, 3, 8), Dims(8, 64, 3, 3, 64), Dims(5, 36, 1, 7, 96), Dims(2, 128, 2, 1, 32)]


class Case:
    """Random inputs of one tile."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, dims: Dims = DIMS[0]) -> None:
        self.requests, self.rows, pages, seed = shape
        heads, index_dim, kv_heads, group, dim = dims
        g = torch.Generator().manual_seed(seed)
        self.context = pages * PAGE
        order = torch.randperm(self.requests * pages + 2, generator=g)
        self.block_table = order[: self.requests * pages].view(self.requests, pages)
        self.positions = torch.randint(0, self.context, (self.requests, self.rows), generator=g)
        self.keys = make_cache(g, len(order), index_dim, dtype=dtype)
        # A page's planes lie between those of other layers.
        planes = torch.zeros(len(order), 5, PAGE * (index_dim + 4), dtype=torch.uint8)
        self.keys8 = planes[:, 2].unflatten(1, (PAGE, index_dim + 4))
        self.kv = torch.randn(len(order), 3, PAGE, kv_heads, 2, dim, generator=g).to(dtype)[:, 1]
        self.index_query = torch.randn(self.requests, self.rows, heads, index_dim, generator=g).to(dtype)
        self.head_weights = torch.randn(self.requests, self.rows, heads, generator=g)
        self.query = torch.randn(self.requests, self.rows, kv_heads, group, dim, generator=g).to(dtype)
        self.index_top_k = torch.randint(1, self.context + 9, (self.requests, self.rows), generator=g)
        scores = torch.randn(self.requests, self.rows, self.context, generator=g)
        # Coarse scores, so that many are equal and ties cross the edge of the set.
        future = torch.arange(self.context) > self.positions.unsqueeze(-1)
        self.scores = ((scores * 2).round() / 2).masked_fill(future, -math.inf)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=10, deadline=None)
@given(shape=tile_shapes(), dims=st.sampled_from(DIMS))
def test_conformance(backend: str, dtype: torch.dtype, shape: tuple[int, int, int, int], dims: Dims) -> None:
    case, kernels, reference = Case(shape, dtype, dims), load_backend(backend), ReferenceKernels()
    tolerance = TOLERANCE[dtype]

    args = (case.index_query, case.head_weights, case.keys, case.block_table, case.positions)
    scores, expected = kernels.index_scores(*args), reference.index_scores(*args)
    assert torch.equal(scores == -math.inf, expected == -math.inf)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)  # float32 whatever the inputs

    every = torch.arange(len(case.kv)).repeat_interleave(PAGE), torch.arange(PAGE).repeat(len(case.kv))
    wanted_keys = case.keys8.clone()
    kernels.store_index_keys(case.keys8, *every, case.keys.flatten(0, 1))
    reference.store_index_keys(wanted_keys, *every, case.keys.flatten(0, 1))
    assert torch.equal(case.keys8, wanted_keys)  # bit by bit: pages outlive the backend that wrote them
    args = (case.index_query, case.head_weights, case.keys8, case.block_table, case.positions)
    scores, expected = kernels.index_scores_int8(*args), reference.index_scores_int8(*args)
    assert torch.equal(scores == -math.inf, expected == -math.inf)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)

    selected, wanted = (
        kernels.select(case.scores, case.index_top_k),
        reference.select(case.scores, case.index_top_k),
    )
    assert selected.shape == wanted.shape
    assert torch.equal(selected.sort(-1).values, wanted.sort(-1).values)

    attended = (case.query, case.kv, case.block_table)
    torch.testing.assert_close(
        kernels.attend_selected(*attended, wanted, 0.3),
        reference.attend_selected(*attended, wanted, 0.3),
        rtol=tolerance,
        atol=tolerance,
    )
    allowed = torch.rand(case.scores.shape, generator=torch.Generator().manual_seed(shape[3])) < 0.5
    allowed[..., 0] = True
    torch.testing.assert_close(
        kernels.attend_masked(*attended, allowed, 0.3),
        reference.attend_masked(*attended, allowed, 0.3),
        rtol=tolerance,
        atol=tolerance,
    )
    torch.testing.assert_close(
        kernels.attend_causal(*attended, case.positions, 0.3),
        reference.attend_causal(*attended, case.positions, 0.3),
        rtol=tolerance,
        atol=tolerance,
    )
    # Scores that differ by rounding may select differently at the edge: the row's own set is what counts.
    tops = case.index_top_k.where(case.index_top_k > case.positions, 1)
    for index_plane in (case.keys, case.keys8):
        torch.testing.assert_close(
            kernels.attend_sparse(
                case.query, case.index_query, case.head_weights, case.kv, index_plane, case.block_table,
                case.positions, tops, 0.3,
            ),
            reference.attend_sparse(
                case.query, case.index_query, case.head_weights, case.kv, index_plane, case.block_table,
                case.positions, tops, 0.3,
            ),
            rtol=tolerance, atol=tolerance,
        )  # fmt: skip


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("rows", [1, 37, 130])
@pytest.mark.parametrize("dims", DIMS[:3])
def test_a_chunk_of_a_long_prompt(backend: str, rows: int, dims: Dims) -> None:
    """Blocks of rows that end anywhere, over several pages: each row as if it were alone."""
    case, kernels, reference = (
        Case((1, rows, 5, rows), torch.bfloat16, dims),
        load_backend(backend),
        ReferenceKernels(),
    )
    case.positions = torch.arange(rows).unsqueeze(0) + 320 - rows
    every = torch.arange(len(case.kv)).repeat_interleave(PAGE), torch.arange(PAGE).repeat(len(case.kv))
    kernels.store_index_keys(case.keys8, *every, case.keys.flatten(0, 1))
    attended = (case.query, case.kv, case.block_table)
    torch.testing.assert_close(
        kernels.attend_causal(*attended, case.positions, 0.3),
        reference.attend_causal(*attended, case.positions, 0.3),
        rtol=2e-2, atol=2e-2,
    )  # fmt: skip
    index_top_k = torch.full_like(case.positions, 100)
    index = (case.index_query, case.head_weights)
    common = (case.block_table, case.positions)
    chosen = kernels.select(kernels.index_scores_int8(*index, case.keys8, *common), index_top_k)
    torch.testing.assert_close(
        kernels.attend_sparse(case.query, *index, case.kv, case.keys8, *common, index_top_k, 0.3),
        reference.attend_selected(*attended, chosen, 0.3),
        rtol=2e-2, atol=2e-2,
    )  # fmt: skip


@pytest.mark.parametrize("backend", OTHERS)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=90),
    st.sampled_from([1, 3, 40, 150]),
    st.integers(1, 5000),
)
def test_select_is_exact_whatever_the_scores(
    backend: str, numbers: list[float], repeats: int, index_top_k: int
) -> None:
    """Denormals, zeros of both signs, infinities; long rows, and rows of few different scores."""
    scores = torch.tensor(numbers).repeat(repeats).view(1, 1, -1)
    chosen = load_backend(backend).select(scores, torch.tensor([[index_top_k]]))[0, 0]
    kept = chosen[chosen >= 0]
    order = sorted(
        (c for c, x in enumerate(scores.flatten().tolist()) if x > -math.inf),
        key=lambda c: (-float(scores[0, 0, c]), -c),
    )
    assert sorted(kept.tolist()) == sorted(order[:index_top_k])


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("kind", ["normal", "rising", "falling", "heavy", "one in eight", "negative"])
def test_select_of_long_rows(backend: str, kind: str) -> None:
    """Rows whose sample says little or nothing about the other scores."""
    g = torch.Generator().manual_seed(3)
    scores = torch.randn(7000, generator=g)
    if kind == "rising":
        scores = scores.sort().values
    elif kind == "falling":
        scores = scores.sort(descending=True).values
    elif kind == "heavy":
        scores = (scores * 20).exp()
    elif kind == "one in eight":
        scores[torch.arange(7000) // 16 % 8 == 0] += 10
    elif kind == "negative":
        scores = -scores.abs() - 1
    for index_top_k in (1, 512, 2300):
        chosen = load_backend(backend).select(scores.view(1, 1, -1), torch.tensor([[index_top_k]]))
        assert sorted(chosen.flatten().tolist()) == sorted(scores.topk(index_top_k).indices.tolist())


@pytest.mark.parametrize("backend", HERE)
def test_integers_keep_what_they_can_of_a_key(backend: str) -> None:
    """The largest number is 127 steps; nothing is off by more than half a step; zeros stay zeros."""
    keys = torch.randn(70, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    keys[3] = 0
    layout, at = Int8KeyLayout(64), torch.arange(70)
    plane = torch.full((2, PAGE, layout.token_bytes), 7, dtype=torch.uint8)
    load_backend(backend).store_index_keys(plane, at // PAGE, at % PAGE, keys)
    numbers, scales = (part.flatten(0, 1)[:70] for part in layout.read(plane, torch.arange(2)))
    steps = keys.float().abs().amax(-1) / 127
    assert torch.equal(scales, steps)
    assert ((numbers * scales.unsqueeze(-1) - keys.float()).abs() <= 0.5001 * steps.unsqueeze(-1)).all()
    assert (numbers.abs().amax(-1)[keys.abs().amax(-1) > 0] == 127).all()


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
    """A masked score of 0 would be the largest, so it must be -inf."""
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
