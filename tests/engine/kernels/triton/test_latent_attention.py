"""Latent attention of flat rows against its definition, row by row."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from engine.errors import EngineError
from engine.kernels.reference.latent import ReferenceLatent
from engine.kernels.triton import latent_attention
from engine.kernels.triton.latent_attention import attend_latents, dense_splits, sparse_splits
from engine.kernels.triton.latent_kernels import items_kernel, locate_kernel
from engine.memory.layouts import LatentLayout
from lab.doctor.tiles import TOLERANCE, must_be_close, must_be_equal
from tests.engine.kernels.triton.batches import EDGES, PAGE, Batch, Line
from tests.engine.kernels.triton.batches import REFERENCE as QUANTISER

REFERENCE = ReferenceLatent()
SCALE = 0.2
DIMS = [(3, 32, 16), (17, 24, 8), (1, 200, 16)]  # heads, rank, rope
STORED = ["plain", "fp8"]


def latents(batch: Batch, stored: str, rank: int, rope: int, dtype: torch.dtype) -> Tensor:
    """A plane, its pages apart from one another. Tokens that no row may read are not numbers."""
    tokens = batch.random(batch.num_pages, PAGE, rank + rope)
    apart = torch.zeros(batch.num_pages, 3, PAGE, rank + rope, dtype=dtype)
    apart[:, 1] = tokens.to(dtype)
    if stored == "fp8":
        layout = LatentLayout(rank, rope)
        values, scales = QUANTISER.quantise(tokens[..., :rank].flatten(0, 1), "float")
        packed = layout.pack(values, scales, tokens[..., rank:].flatten(0, 1))
        apart = torch.zeros(batch.num_pages, 3, PAGE, layout.token_bytes, dtype=torch.uint8)
        apart[:, 1] = packed.view(batch.num_pages, PAGE, -1)
    ends = torch.zeros(len(batch.block_table), dtype=torch.long)
    for line in batch.lines:
        if line.request >= 0:
            ends[line.request] = max(int(ends[line.request]), line.position)
    written = torch.zeros(batch.num_pages, PAGE, dtype=torch.bool)
    for request, end in enumerate(ends.tolist()):
        for page in range(end // PAGE + 1):
            written[batch.block_table[request, page], : end + 1 - page * PAGE] = True
    apart[:, 1][~written] = 0xFF if stored == "fp8" else torch.nan
    return apart[:, 1]


def operands(
    batch: Batch, dims: tuple[int, int, int], stored: str, dtype: torch.dtype, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(query, plane, selected), on the CPU."""
    heads, rank, rope = dims
    query = batch.random(len(batch.lines), heads, rank + rope, dtype=dtype)
    selected = torch.full((len(batch.lines), width), -1, dtype=torch.int32)
    for row, line in enumerate(batch.lines):
        if line.request >= 0 and line.top_k:
            chosen = torch.randperm(line.position + 1, generator=batch.generator)[: line.top_k].sort().values
            selected[row, : len(chosen)] = chosen.int()
    return query, latents(batch, stored, rank, rope, dtype), selected


def attend(
    batch: Batch, query: Tensor, plane: Tensor, selected: Tensor | None, rank: int,
    singles: Tensor | None = None, context: int = 0,
) -> Tensor:  # fmt: skip
    to = batch.device
    chosen = None if selected is None else selected.to(to)
    one = None if singles is None else singles.to(to)
    return attend_latents(
        query.to(to), plane.to(to), batch.rows, chosen, rank, SCALE, context or batch.context, one
    )


def check(
    batch: Batch, out: Tensor, query: Tensor, plane: Tensor, selected: Tensor | None, rank: int
) -> None:
    """Each row is that of the definition; padding is 0."""
    tolerance = TOLERANCE[query.dtype]
    rope = query.shape[-1] - rank
    unpack = partial(LatentLayout(rank, rope).unpack, dtype=query.dtype)
    more = {"unpack": unpack} if plane.dtype == torch.uint8 else {}
    for row, line in enumerate(batch.lines):
        got, own = out[row].cpu(), query[None, row : row + 1]
        if line.request < 0:
            must_be_equal(f"{line}", got, torch.zeros_like(got))
            continue
        if line.top_k and selected is not None:
            chosen = selected[None, row : row + 1].long()
        else:
            chosen = torch.arange(line.position + 1)[None, None]
        wanted = REFERENCE.latent_selected(own, plane, batch.table_of(row), chosen, rank, SCALE, **more)
        must_be_close(f"{line}", got, wanted[0, 0], tolerance, tolerance)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dims", DIMS)
def test_edges(
    device: torch.device, dtypes: list[torch.dtype], stored: str, dims: tuple[int, int, int]
) -> None:
    for dtype in dtypes:
        batch = Batch(EDGES, 3, device, spare=2)
        given = operands(batch, dims, stored, dtype, 110)
        check(batch, attend(batch, *given, dims[1]), *given, dims[1])
        check(batch, attend(batch, *given[:2], None, dims[1]), *given[:2], None, dims[1])


@pytest.mark.parametrize("stored", STORED)
def test_rows_in_splits(
    device: torch.device, dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, stored: str
) -> None:
    """More dense splits than there may be, unless they double; sparse rows of one split to all of them."""
    monkeypatch.setattr(latent_attention, "DENSE_SPLIT", 64)
    monkeypatch.setattr(latent_attention, "MOST_DENSE_SPLITS", 4)
    for dtype in dtypes:
        lines = [
            Line(0, 575, 0),
            Line(0, 575, 300),
            Line(1, 300, 70),
            Line(1, 63, 0),
            Line(-1, -1, 0),
            Line(1, 64, 0),
        ]
        batch = Batch(lines, 9, device)
        given = operands(batch, (3, 32, 16), stored, dtype, 320)
        check(batch, attend(batch, *given, 32), *given, 32)
        check(batch, attend(batch, *given[:2], None, 32), *given[:2], None, 32)


def test_dense_rows_in_a_list(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those of the list, whatever else is dense; all sparse ones; more than one launch takes."""
    monkeypatch.setattr(latent_attention, "ROWS_AT_ONCE", 2)
    lines = [
        Line(0, 100, 0),
        Line(0, 101, 0),
        Line(0, 102, 9),
        Line(1, 80, 0),
        Line(-1, -1, 0),
        Line(1, 81, 0),
    ]
    batch = Batch(lines, 2, device)
    query, plane, selected = operands(batch, (3, 32, 16), "plain", torch.float32, 10)
    singles = torch.tensor([3, 2, 5], dtype=torch.int32)
    out = attend(batch, query, plane, selected, 32, singles)
    every = attend(batch, query, plane, selected, 32)
    assert torch.equal(out[2:], every[2:])
    check(batch, every, query, plane, selected, 32)
    dense = attend(batch, query, plane, None, 32, singles)
    assert torch.equal(dense[[3, 5]], every[[3, 5]])
    assert not dense[[0, 1, 4]].any()


def test_positions_left_out_in_between(device: torch.device) -> None:
    """-1 anywhere, not only at the end."""
    batch = Batch([Line(0, 100, 40)], 2, device)
    query, plane, selected = operands(batch, (3, 32, 16), "plain", torch.float32, 40)
    selected[0, ::3] = -1
    check(batch, attend(batch, query, plane, selected, 32), query, plane, selected, 32)


def test_the_same_bits_in_other_company(device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Other neighbours, another place, wider tables and a longer longest context: of as many rows."""
    for dtype in dtypes:
        batch = Batch(EDGES, 3, device)
        query, plane, selected = operands(batch, DIMS[0], "fp8", dtype, 110)
        first = attend(batch, query, plane, selected, 32)
        assert torch.equal(attend(batch, query, plane, selected, 32), first)
        order = torch.tensor([6, 6, 0, 3, 1, 4, 4, 6, 5, 7])
        other = Batch([EDGES[row] for row in order], 3, device, spare=4)
        other.rows.block_table[:, :3] = batch.block_table
        out = attend(other, query[order], plane, selected[order], 32, context=7 * 64)
        assert torch.equal(out, first[order.to(out.device)])


def test_how_rows_are_split() -> None:
    """Few rows fill the device by splits; many do without."""
    assert [sparse_splits(count, 2, 2048, 64) for count in (1, 2, 16, 33, 64, 512)] == [32, 32, 4, 2, 1, 1]
    assert sparse_splits(1, 2, 100, 64) == 2
    assert [dense_splits(count, 131072) for count in (1, 8, 16, 64, 1000)] == [64, 64, 32, 8, 1]
    assert [dense_splits(1, context) for context in (1, 512, 513, 2048)] == [1, 1, 2, 4]


def test_selected_positions_are_located(device: torch.device) -> None:
    """Page times 64 plus offset; the complement of the request's first token for none."""
    batch = Batch([Line(0, 200, 5), Line(1, 70, 2), Line(-1, -1, 0)], 4, device)
    table = batch.block_table.cpu()
    selected = torch.tensor([[0, 63, 64, 130, -1], [1, 70, -1, -1, -1], [-1] * 5], dtype=torch.int32)
    tokens = torch.zeros(3, 8, dtype=torch.int32, device=device)
    rows = batch.rows
    locate_kernel[(3, 2)](
        rows.block_table, rows.request, rows.positions, rows.index_top_k, selected.to(device), tokens,
        rows.block_table.stride(0), 5, 8, 5, SIZE=4, EVERY=False, EARLY=False,
    )  # fmt: skip
    for row, line in enumerate(batch.lines[:2]):
        wanted = [
            int(table[line.request, at // PAGE]) * PAGE + at % PAGE
            if at >= 0
            else -1 - int(table[line.request, 0]) * PAGE
            for at in selected[row].tolist()
        ]
        assert tokens[row, :5].tolist() == wanted
    assert not tokens[2].any()


def test_splits_of_dense_rows_are_listed(device: torch.device) -> None:
    """Row, part, begin and end; padding has an empty one, which writes its zeros."""
    batch = Batch([Line(0, 299, 0), Line(0, 200, 7), Line(1, 63, 0), Line(-1, -1, 0)], 5, device)
    rows, items = batch.rows, torch.zeros(17, 4, dtype=torch.int32, device=device)
    items_kernel[(1,)](
        rows.positions, rows.index_top_k, rows.positions, items, 4, 0, ROWS=4, MOST=4, BASE=64, LISTED=False,
        EVERY=False, EARLY=False,
    )  # fmt: skip
    assert int(items[0, 0]) == 5
    assert items[1:6].tolist() == [
        [0, 0, 0, 128],
        [0, 1, 128, 256],
        [0, 2, 256, 300],
        [2, -1, 0, 64],
        [3, -1, 0, 0],
    ]


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    batch = Batch([Line(0, 5, 0)], 1, device)
    query, plane, _ = operands(batch, (2, 32, 16), "plain", torch.float32, 1)
    with pytest.raises(EngineError, match="needs a cache"):
        attend(batch, query, plane[..., 1:], None, 32)
    with pytest.raises(EngineError, match="contiguous"):
        attend(batch, query.transpose(1, 2).contiguous().transpose(1, 2), plane, None, 32)
    with pytest.raises(EngineError, match="multiple of 4"):
        attend(batch, query, plane, None, 48)
    with pytest.raises(EngineError, match="positive"):
        attend_latents(query, plane, batch.rows, None, 32, 0.0, 64)
