"""Every backend against the definitions in `engine.kernels.reference.attention`, op by op, shape by shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import native
from engine.kernels.choice import BACKENDS, load_backend
from engine.kernels.interface.attention import Kernels
from engine.kernels.reference.attention import ReferenceKernels
from engine.kernels.torchops import attention as vectorised
from engine.memory.layouts import Int8KeyLayout
from lab.doctor.tiles import (
    CASES,
    CPU,
    DIMS,
    KNOWN,
    PAGE,
    TOLERANCE,
    ConformanceError,
    HeadDims,
    TileCase,
    TileShape,
    check_tile,
)

HERE = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "native" and native.missing() is not None, reason=str(native.missing())
        ),
    )
    for name in sorted(BACKENDS)
]
OPERATIONS = (
    "index_scores store_index_keys index_scores_int8 select attend_selected attend_masked attend_causal attend_sparse"
).split()
OTHERS = [one for one in HERE if one.values[0] != "reference"]


@st.composite
def tile_shapes(draw: st.DrawFn) -> TileShape:
    """One of requests and rows is 1, as in the engine."""
    one = draw(st.integers(1, 4))
    requests, rows = draw(st.sampled_from([(one, 1), (1, one)]))
    return TileShape(requests, rows, draw(st.integers(1, 3)), draw(st.integers(0, 2**31)))


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=10, deadline=None)
@given(shape=tile_shapes(), dims=st.sampled_from(DIMS))
def test_conformance(backend: str, dtype: torch.dtype, shape: TileShape, dims: HeadDims) -> None:
    check_tile(load_backend(backend), TileCase(shape, dtype, dims))


@pytest.mark.parametrize("backend", OTHERS)
def test_the_check_sees_a_wrong_number(backend: str) -> None:
    """One number of one operation, far less than a page's worth."""

    class Off:
        def __init__(self, operation: str) -> None:
            self.operation, self.kernels = operation, load_backend(backend)

        def __getattr__(self, name: str) -> object:
            found = getattr(self.kernels, name)
            if name != self.operation:
                return found

            def changed(*arguments: torch.Tensor) -> torch.Tensor | None:
                out: torch.Tensor | None = found(*arguments)
                (arguments[0] if out is None else out)[
                    (0,) * (arguments[0] if out is None else out).dim()
                ] += 1
                return out

            return changed

    for operation in OPERATIONS:
        with pytest.raises(ConformanceError, match=f"^{operation}: "):
            check_tile(cast(Kernels, Off(operation)), TileCase(CASES[0][0], torch.float32, CASES[0][1]))
    check_tile(cast(Kernels, Off("nothing")), TileCase(CASES[0][0], torch.float32, CASES[0][1]))


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("rows", [1, 37, 130])
@pytest.mark.parametrize("dims", DIMS[:3])
def test_a_chunk_of_a_long_prompt(backend: str, rows: int, dims: HeadDims) -> None:
    """Blocks of rows that end anywhere, over several pages: each row as if it were alone."""
    case, kernels, reference = (
        TileCase((1, rows, 5, rows), torch.bfloat16, dims),
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
        case = TileCase(shape, torch.bfloat16)
        args = (case.index_query, case.head_weights, case.keys, case.block_table, case.positions)
        whole = kernels.index_scores(*args)
        for pages in (1, 2, 3):
            limit = pages * PAGE * case.requests * case.rows * 3
            monkeypatch.setitem(vectorised.PRODUCTS_AT_ONCE, "cpu", limit)
            torch.testing.assert_close(kernels.index_scores(*args), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("known", KNOWN, ids=lambda one: one.__name__)
def test_known_answers(backend: str, known: Callable[[Kernels, torch.device], None]) -> None:
    """Masked positions, ties at the edge, negative head weights."""
    known(load_backend(backend), CPU)
