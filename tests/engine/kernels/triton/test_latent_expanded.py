"""Expanded attention of prompts against the plain definition, and its plans."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from engine.attention.precision import LatentFormat
from engine.errors import EngineError
from engine.kernels.reference.attention import ReferenceKernels
from engine.kernels.triton.expanded_plan import DenseChunk, ExpandedPlan, plan_expanded
from engine.kernels.triton.latent_expanded import attend_expanded, block_rows, workspace_bytes
from engine.kernels.triton.rows import Rows
from engine.memory.layouts import LatentLayout

CPU = torch.device("cpu")


class Case(NamedTuple):
    """A layer's sizes."""

    heads: int
    nope: int
    rope: int
    value: int
    rank: int
    fp8: bool


CASES = [
    Case(2, 16, 8, 12, 32, False),
    Case(3, 32, 16, 32, 200, True),
    Case(1, 128, 64, 128, 512, True),
]
SMALL = CASES[0]
CHUNKS = [
    DenseChunk(0, 1, 40, 0),
    DenseChunk(1, 41, 3, 197),
    DenseChunk(2, 46, 20, 120),
]
LONGEST = 200
ROWS = 68  # the first and the last are padding; 44 and 45 are decodes


class Batch(NamedTuple):
    """Operands of a call."""

    query: Tensor
    plane: Tensor
    rows: Rows
    expand: Tensor
    format: LatentFormat


def batch(case: Case, device: torch.device, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(case.rank)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    layout = LatentFormat(LatentLayout(case.rank, case.rope), "fp8" if case.fp8 else dtype, dtype)
    positions = torch.full((ROWS,), -1, dtype=torch.int32)
    request = torch.zeros(ROWS, dtype=torch.int32)
    for chunk in CHUNKS:
        at = slice(chunk.first_row, chunk.first_row + chunk.rows)
        positions[at] = torch.arange(chunk.first_position, chunk.first_position + chunk.rows).int()
        request[at] = chunk.request
    positions[44:46] = torch.tensor([99, 150])
    pages = -(-LONGEST // 64)
    table = torch.randperm(3 * pages, generator=generator).int().view(3, pages)
    cached = made(3 * pages * 64, case.rank + case.rope).to(dtype)
    stored = layout.pack(cached, ReferenceKernels()).view(3 * pages, 64, -1)
    return Batch(
        made(ROWS, case.heads, case.nope + case.rope).to(device, dtype),
        stored.to(device),
        Rows(request.to(device), positions.to(device), torch.zeros(ROWS, dtype=torch.int32, device=device), table.to(device)),
        (made(case.heads, case.nope + case.value, case.rank) * case.rank**-0.5).to(device, dtype),
        layout,
    )  # fmt: skip


def attend(case: Case, b: Batch, plan: ExpandedPlan) -> Tensor:
    out = torch.full((ROWS, case.heads, case.value), 7.0, dtype=b.query.dtype, device=b.query.device)
    attend_expanded(b.query, b.plane, b.rows, plan.to(b.query.device), b.expand, case.rank, 0.3, out)
    return out


def expected(case: Case, b: Batch) -> Tensor:
    """Row by row, in float32."""
    out = torch.full((ROWS, case.heads, case.value), 7.0, device=b.query.device)
    context = torch.arange(b.rows.block_table.shape[1] * 64, device=b.query.device)
    for chunk in CHUNKS:
        at = slice(chunk.first_row, chunk.first_row + chunk.rows)
        out[at] = ReferenceKernels().latent_expanded(
            b.query[at].float().unsqueeze(0), b.plane, b.rows.block_table[chunk.request].long().unsqueeze(0),
            (context <= b.rows.positions[at].unsqueeze(1)).unsqueeze(0), b.expand.float(), case.rank, 0.3, b.format.unpack,
        )[0]  # fmt: skip
    return out


def close(ours: Tensor, theirs: Tensor) -> None:
    tolerance = 2e-5 if ours.dtype is torch.float32 else 2e-2
    torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_rows_of_prompts(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    b = batch(case, device, dtype)
    close(attend(case, b, plan_expanded(CHUNKS, 16)), expected(case, b))


def test_a_row_has_the_same_bits_in_any_rounds_and_company(device: torch.device, dtype: torch.dtype) -> None:
    b = batch(SMALL, device, dtype)
    whole = attend(SMALL, b, plan_expanded(CHUNKS, 16))
    plan = plan_expanded(CHUNKS, 16, 128)
    assert plan.rounds == 5
    assert torch.equal(attend(SMALL, b, plan), whole)
    # NumPy's products depend on where in a block a row is; a GPU's do not.
    first, count = (50, 7) if device.type == "cuda" else (62, 4)
    one = attend(SMALL, b, plan_expanded([DenseChunk(2, first, count, 74 + first)], 16, 256))
    assert torch.equal(one[first : first + count], whole[first : first + count])
    assert one[:first].eq(7.0).all()
    assert one[first + count :].eq(7.0).all()


def test_sparse_rows_and_padding_are_left(device: torch.device) -> None:
    b = batch(SMALL, device, torch.float32)
    whole = attend(SMALL, b, plan_expanded(CHUNKS, 16))
    b.rows.index_top_k[50:] = 8
    b.rows.positions[3] = -1
    b.rows.positions[17:33] = -1
    for tokens in (128, 8192):
        ours = attend(SMALL, b, plan_expanded(CHUNKS, 16, tokens))
        left = (b.rows.index_top_k > 0) | (b.rows.positions < 0)
        left[44:46] = True
        assert ours[left].eq(7.0).all()
        assert torch.equal(ours[~left], whole[~left])


def test_a_static_plan_is_filled_again(device: torch.device) -> None:
    b = batch(SMALL, device, torch.float32)
    static = ExpandedPlan.empty(9, 900, 16, device)
    assert static.tokens == 1024
    assert attend(SMALL, b, static).eq(7.0).all()
    whole = attend(SMALL, b, plan_expanded(CHUNKS, 16))
    plan = plan_expanded(CHUNKS, 16)
    assert static.holds(plan)
    static.fill(plan)
    assert torch.equal(attend(SMALL, b, static), whole)
    static.fill(plan_expanded(CHUNKS[2:], 16))
    ours = attend(SMALL, b, static)
    assert ours[:46].eq(7.0).all()
    assert torch.equal(ours[46:66], whole[46:66])
    long = plan_expanded([DenseChunk(0, 0, 2, 5000)], 16)
    assert not static.holds(long)
    with pytest.raises(EngineError, match="5120 tokens"):
        static.fill(long)


def test_rounds_hold_every_block_over_all_of_its_context_once() -> None:
    chunks = [DenseChunk(4, 10, 300, 70_000), DenseChunk(1, 310, 1, 0), DenseChunk(2, 311, 130, 0)]
    plan = plan_expanded(chunks, 128, 1000)
    assert plan.tokens == 1024
    seen = {row: 0 for c in chunks for row in range(c.first_row, c.first_row + c.rows)}
    for pages, blocks in zip(plan.pages.tolist(), plan.blocks.tolist(), strict=True):
        for first, count, base, begin, end in blocks:
            if not count:
                continue
            chunk = next(c for c in chunks if c.first_row <= first < c.first_row + c.rows)
            assert base % 128 == begin % 128 == 0
            for position in range(begin, end):
                place = base + position - begin
                assert pages[place // 64] == [chunk.request, position // 64]
                assert place % 64 == position % 64
            for row in range(first, first + count):
                assert seen[row] == begin
                seen[row] = end
    for chunk in chunks:
        for row in range(chunk.first_row, chunk.first_row + chunk.rows):
            own = chunk.first_position + row - chunk.first_row
            assert own < seen[row] <= own + 128


def test_no_chunk_is_no_work(device: torch.device) -> None:
    b = batch(SMALL, device, torch.float32)
    plan = plan_expanded([])
    assert plan.rounds == 0
    assert attend(SMALL, b, plan).eq(7.0).all()
    assert block_rows(torch.bfloat16) == 128
    assert (
        workspace_bytes(8192, 512, 128, 128, 128, 512, 64, 2) == 8192 * (65536 + 1152) + 512 * 128 * 130 * 4
    )


def test_tensors_of_different_layers_are_refused(device: torch.device) -> None:
    b = batch(SMALL, device, torch.float32)
    plan = plan_expanded(CHUNKS, 16)
    with pytest.raises(EngineError, match="not of one layer"):
        attend(SMALL._replace(value=16), b, plan)
    with pytest.raises(EngineError, match="contiguous"):
        attend(SMALL, b._replace(query=b.query.transpose(0, 1).contiguous().transpose(0, 1)), plan)
