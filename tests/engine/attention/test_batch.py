"""The batch: its tensors hold the rows of the plan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.batch import build_batch
from engine.attention.tiling import Tiling
from engine.config import PAGE_SIZE
from engine.plan.sparsity import row_index_top_k
from engine.plan.tiles import TileCosts
from engine.plan.types import ScheduledRequest, StepPlan

COSTS = TileCosts(budget_bytes=1 << 20, index_row_bytes=32, attention_row_bytes=36, token_bytes=1536)
CPU = torch.device("cpu")


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    requests = []
    for number in range(draw(st.integers(1, 8))):
        count = draw(st.one_of(st.just(1), st.integers(1, 200)))
        start = draw(st.integers(0, 2000))
        pages = (start + count - 1) // PAGE_SIZE + 1
        requests.append(
            ScheduledRequest(
                request_id=str(number),
                token_ids=tuple(draw(st.integers(0, 9)) + 10 * i for i in range(count)),
                start=start,
                page_ids=tuple(range(number * 1000, number * 1000 + pages)),
                index_top_k=draw(st.one_of(st.none(), st.integers(1, 1500))),
                sample=None,
            )
        )
    return StepPlan(requests=tuple(requests))


@settings(max_examples=60)
@given(plan=plans())
def test_every_row_has_its_token_its_place_and_its_pages(plan: StepPlan) -> None:
    rows = [
        (request, token_id, request.start + i)
        for request in plan.requests
        for i, token_id in enumerate(request.token_ids)
    ]
    batch = build_batch(plan, CPU)
    assert batch.token_ids.tolist() == [token_id for _, token_id, _ in rows]
    assert batch.positions.tolist() == [position for _, _, position in rows]
    assert batch.pages.tolist() == [request.page_ids[p // PAGE_SIZE] for request, _, p in rows]
    assert batch.offsets.tolist() == [position % PAGE_SIZE for _, _, position in rows]
    assert [plan.requests[number] for number in batch.request.tolist()] == [request for request, _, _ in rows]
    assert batch.index_top_k.tolist() == [row_index_top_k(p + 1, r.index_top_k) for r, _, p in rows]
    for request, pages in zip(plan.requests, batch.block_table.tolist(), strict=True):
        assert tuple(pages[: len(request.page_ids)]) == request.page_ids
        assert set(pages[len(request.page_ids) :]) <= {0}
    sparse = [[chosen > 0] for chosen in batch.index_top_k.tolist()]
    selecting = None if batch.selecting is None else batch.selecting.tolist()
    assert selecting == (sparse if any(map(any, sparse)) else None)
    assert (batch.request.dtype, batch.index_top_k.dtype) == (torch.int32, torch.int64)
    assert all(tensor.is_contiguous() for tensor in (batch.request, batch.index_top_k, batch.block_table))


@settings(max_examples=60)
@given(plan=plans())
def test_tiles_have_every_row_once_with_its_place_and_its_pages(plan: StepPlan) -> None:
    rows = [(request, request.start + i) for request in plan.requests for i in range(len(request.token_ids))]
    tiling = Tiling(build_batch(plan, CPU), COSTS)
    assert tiling.selects == (tiling.batch.selecting is not None)
    seen = []
    for tile in tiling.tiles:
        assert tile.rows.shape == (tile.shape[0] * tile.shape[1],)
        assert tile.positions.shape == tile.index_top_k.shape == tile.shape
        for place, row in enumerate(tile.rows.tolist()):
            line, column = divmod(place, tile.shape[1])
            request, position = rows[row]
            seen.append(row)
            assert tile.positions[line, column] == position
            needed = position // PAGE_SIZE + 1
            assert tile.block_table[line, :needed].tolist() == list(request.page_ids[:needed])
            assert set(tile.block_table[line, len(request.page_ids) :].tolist()) <= {0}
            if tile.form != "dense":
                assert tile.index_top_k[line, column] == request.index_top_k
    assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize("count", [1, 3])
def test_pages_that_do_not_cover_the_rows_are_an_error(count: int) -> None:
    request = ScheduledRequest(
        request_id="r", token_ids=(1,) * count, start=64, page_ids=(0,), index_top_k=None, sample=None
    )
    with pytest.raises(IndexError):
        build_batch(StepPlan(requests=(request,)), CPU)
