"""Attention of flat rows against its definition, row by row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from engine.errors import EngineError
from engine.kernels.triton import attention
from engine.kernels.triton.attention import block_rows
from engine.kernels.triton.mask import reach
from engine.kernels.triton.rows import Span, blocks_of
from lab.doctor.rows import attend_rows, attention_operands, check_attention, mixed
from lab.doctor.tiles import TOLERANCE
from tests.engine.kernels.triton.batches import EDGES, Batch, Line
from tests.engine.kernels.triton.conftest import CHIP

DIMS = [(3, 3, 64), (2, 6, 128), (1, 8, 64), (2, 1, 24)]  # KV heads, query heads of each, numbers a head


def same(one: Tensor, other: Tensor) -> None:
    """Equal bits on a chip. The interpreter multiplies with NumPy, on some CPUs in an order that depends on the place."""
    if CHIP:
        assert torch.equal(one, other)
    else:
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dims", DIMS)
def test_edges(device: torch.device, dtypes: list[torch.dtype], dims: tuple[int, int, int]) -> None:
    for dtype in dtypes:
        batch = Batch(EDGES, 3, device, spare=2)
        given = attention_operands(batch, dims, dtype, 110)
        check_attention(batch, attend_rows(batch, *given), *given)
        check_attention(batch, attend_rows(batch, *given[:2], None), *given[:2], None)


@pytest.mark.parametrize("dims", [(1, 3, 64), (2, 1, 24)])
def test_a_prompt_in_blocks_beside_decodes(
    device: torch.device,
    dtypes: list[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
    dims: tuple[int, int, int],
) -> None:
    monkeypatch.setattr(attention, "BLOCK_SPLIT", 64)  # so that a block has several
    monkeypatch.setattr(attention, "PROMPT_SPARSE_SPLIT", 64)
    for dtype in dtypes:
        batch = Batch(mixed(118, 136, 132), 3, device)
        given = attention_operands(batch, dims, dtype, 132)
        blocks = blocks_of([Span(1, 18, 118)], len(batch.lines), block_rows(dims[1]), device)
        check_attention(batch, attend_rows(batch, *given, blocks), *given)
        check_attention(batch, attend_rows(batch, *given[:2], None, blocks), *given[:2], None)


def bits_of(batch: Batch, selected: Tensor) -> Tensor:
    """The rows' masks, made here; nothing of rows that have none."""
    bits = torch.zeros(len(batch.lines), batch.context, dtype=torch.int64)
    for row, line in enumerate(batch.lines):
        if line.top_k > 0 and line.position < reach(line.top_k):
            bits[row, selected[row][selected[row] >= 0].long()] = 1
    return (bits.view(len(batch.lines), -1, 32) << torch.arange(32)).sum(-1).int()


@pytest.mark.parametrize("dims", [(1, 3, 64), (2, 1, 24)])
def test_rows_of_prompts_through_a_mask(
    device: torch.device,
    dtypes: list[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
    dims: tuple[int, int, int],
) -> None:
    """Dense, masked and gathering rows side by side: of 14 selected, the last contexts are 10 times as long and longer."""
    monkeypatch.setattr(attention, "BLOCK_SPLIT", 64)
    prompt = [Line(1, position, 0 if position < 124 else 14) for position in range(118, 146)]
    for dtype in dtypes:
        batch = Batch([Line(0, 130, 9), *prompt, Line(2, 150, 0), Line(-1, -1, 0)], 3, device)
        query, plane, selected = attention_operands(batch, dims, dtype, 20)
        mask = bits_of(batch, selected)
        blocks = blocks_of([Span(1, 28, 118)], len(batch.lines), block_rows(dims[1]), device)
        masked = attend_rows(batch, query, plane, selected, blocks, mask=mask)
        check_attention(batch, masked, query, plane, selected)
        cut = blocks_of([Span(1, 3, 118), Span(4, 25, 121)], len(batch.lines), block_rows(dims[1]), device)
        same(attend_rows(batch, query, plane, selected, cut, mask=mask), masked)
        gathered = attend_rows(batch, query, plane, selected, blocks)
        assert torch.equal(masked[1:7], gathered[1:7])  # dense
        assert reach(14) == 140
        assert torch.equal(masked[-8:], gathered[-8:])  # beyond it
        assert not torch.equal(masked[7:23], gathered[7:23])


def test_long_rows(device: torch.device, dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than a merge holds, unless they double."""
    monkeypatch.setattr(attention, "ROW_SPLIT", 16)
    monkeypatch.setattr(attention, "SPARSE_SPLIT", 32)
    for dtype in dtypes:
        batch = Batch([Line(0, 1150, 700), Line(0, 1149, 0)], 18, device)
        given = attention_operands(batch, (1, 4, 64), dtype, 700)
        check_attention(batch, attend_rows(batch, *given), *given)


@pytest.mark.skipif(not CHIP, reason="long in the interpreter")
@pytest.mark.parametrize("dims", DIMS[:3])
def test_long_rows_as_they_are_split(device: torch.device, dims: tuple[int, int, int]) -> None:
    prompt = [Line(1, position, 0) for position in range(6000, 6500)]
    lines = [
        Line(0, 9000, 0),
        Line(0, 8500, 2048),
        *prompt,
        *(Line(1, p, 512) for p in range(6500, 6600)),
        Line(2, 4500, 3),
    ]
    batch = Batch(lines, 142, device)
    blocks = blocks_of([Span(2, 600, 6000)], len(lines), block_rows(dims[1]), device)
    for dtype in TOLERANCE:
        given = attention_operands(batch, dims, dtype, 2048)
        check_attention(batch, attend_rows(batch, *given, blocks), *given)
        check_attention(batch, attend_rows(batch, *given), *given)


def test_the_same_bits_again_and_in_other_company(device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Row by row: with other neighbours, wider tables and a longer longest context."""
    for dtype in dtypes:
        batch = Batch(EDGES, 3, device)
        query, plane, selected = attention_operands(batch, DIMS[0], dtype, 110)
        first = attend_rows(batch, query, plane, selected)
        assert torch.equal(attend_rows(batch, query, plane, selected), first)
        for row in (0, 4, 6):
            alone = Batch([batch.lines[row]], 3, device, spare=4)
            alone.rows.request.zero_()
            alone.rows.block_table[:1, :3] = batch.block_table[batch.lines[row].request]
            wide = torch.nn.functional.pad(selected[row : row + 1], (0, 290), value=-1)
            own = attend_rows(alone, query[row : row + 1], plane, wide, context=7 * 64)
            assert torch.equal(own[0], first[row])


@pytest.mark.parametrize("cuts", [(1,), (7, 29)])
def test_where_a_prompt_is_cut_changes_no_bit(
    device: torch.device, dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, cuts: Sequence[int]
) -> None:
    """Block by block: a chunk that ends elsewhere, or a hit in the prefix cache, gives the same rows."""
    monkeypatch.setattr(attention, "BLOCK_SPLIT", 64)
    for dtype in dtypes:
        batch = Batch([Line(0, position, 0) for position in range(100, 130)], 3, device)
        query, plane, _ = attention_operands(batch, (1, 3, 64), dtype, 1)
        size = block_rows(3)
        whole = attend_rows(batch, query, plane, None, blocks_of([Span(0, 30, 100)], 30, size, device))
        edges = [0, *cuts, 30]
        spans = [Span(a, b - a, 100 + a) for a, b in itertools.pairwise(edges)]
        cut = attend_rows(batch, query, plane, None, blocks_of(spans, 30, size, device))
        same(cut, whole)


def test_blocks() -> None:
    """Whole spans in order, apart at the alignment; the other rows one by one."""
    blocks = blocks_of([Span(1, 5, 2), Span(7, 3, 0)], 11, 2, torch.device("cpu"), align=4)
    assert blocks.table.tolist() == [[1, 2], [3, 2], [5, 1], [7, 2], [9, 1]]
    assert blocks.singles.tolist() == [0, 6, 10]
    blocks = blocks_of([Span(0, 5, 3)], 5, 4, torch.device("cpu"), align=4)
    assert blocks.table.tolist() == [[0, 1], [1, 4]]


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    batch = Batch([Line(0, 5, 0)], 1, device)
    query, plane = batch.random(1, 2, 3, 16), batch.plane(2, 2, 16)
    with pytest.raises(EngineError, match="bfloat16"):
        attend_rows(batch, query, plane.bfloat16(), None)
    with pytest.raises(EngineError, match="contiguous"):
        attend_rows(batch, query.transpose(1, 2).contiguous().transpose(1, 2), plane, None)
