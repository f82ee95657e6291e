"""Index scores of flat rows against their definition, row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from engine.errors import EngineError
from engine.kernels.triton.rows import Span, blocks_of
from engine.kernels.triton.scores import block_rows, index_scores
from tests.engine.kernels.triton.batches import EDGES, REFERENCE, Batch, Line, labelled

DIMS = [(8, 64), (3, 16), (5, 36), (2, 128)]
# FP8 products of a matrix unit are summed in fewer bits.
TOLERANCE = {"plain": 1e-4, "int8": 1e-4, "fp8": 1e-3}


def operands(
    batch: Batch, layout: str, heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """(the reference's operation, query, head weights, key plane), on the CPU; some weights are negative."""
    rows = len(batch.lines)
    query, weights = batch.random(rows, heads, dim, dtype=dtype), batch.random(rows, heads)
    keys = batch.plane(dim, dtype=dtype)
    if layout == "int8":
        query[0, 0] = 0  # a query that has no scale
        return REFERENCE.index_scores_int8, query, weights, batch.int8_plane(keys)
    if layout == "fp8":
        query8, scales = REFERENCE.quantise(query, "float")
        return REFERENCE.index_scores_fp8, query8, weights * scales[..., 0], batch.fp8_plane(keys)
    return REFERENCE.index_scores, query, weights, keys


def check(
    batch: Batch, scores: Tensor, operation: Any, query: Tensor, weights: Tensor, plane: Tensor, layout: str
) -> None:
    """Every sparse row is as defined, and -inf beyond its end."""
    tol = TOLERANCE[layout]
    for row, line in enumerate(batch.lines):
        if line.request < 0 or not line.top_k:
            continue
        wanted = operation(
            query[None, row : row + 1],
            weights[None, row : row + 1],
            plane,
            batch.table_of(row),
            batch.position_of(row),
        )[0, 0]
        got = scores[row].cpu()
        assert torch.equal(got == -math.inf, wanted == -math.inf), line
        torch.testing.assert_close(got, wanted, rtol=tol, atol=tol * 10, msg=labelled(line))


def score(batch: Batch, query: Tensor, weights: Tensor, plane: Tensor, **more: Any) -> Tensor:
    device = batch.device
    return index_scores(
        query.to(device),
        weights.to(device),
        plane.to(device),
        batch.rows,
        more.pop("context", batch.context),
        **more,
    )


@pytest.mark.parametrize("layout", TOLERANCE)
@pytest.mark.parametrize(("heads", "dim"), DIMS)
def test_edges(device: torch.device, dtypes: list[torch.dtype], layout: str, heads: int, dim: int) -> None:
    for dtype in dtypes:
        batch = Batch(EDGES, 3, device, spare=2)
        operation, query, weights, plane = operands(batch, layout, heads, dim, dtype)
        check(batch, score(batch, query, weights, plane), operation, query, weights, plane, layout)


@pytest.mark.parametrize("layout", TOLERANCE)
def test_a_prompt_in_blocks_beside_decodes(device: torch.device, layout: str) -> None:
    prompt = [Line(1, position, 0 if position < 70 else 70) for position in range(60, 101)]
    batch = Batch([Line(0, 130, 9), *prompt, Line(2, 64, 3)], 3, device)
    operation, query, weights, plane = operands(batch, layout, 8, 64)
    blocks = blocks_of([Span(1, len(prompt), 60)], len(batch.lines), block_rows(8), device)
    blocked = score(batch, query, weights, plane, blocks=blocks)
    check(batch, blocked, operation, query, weights, plane, layout)
    spans = [Span(1, 3, 60), Span(4, len(prompt) - 3, 63)]
    cut = blocks_of(spans, len(batch.lines), block_rows(8), device)
    sparse = batch.rows.index_top_k > 0
    assert torch.equal(score(batch, query, weights, plane, blocks=cut)[sparse], blocked[sparse])


@pytest.mark.parametrize("layout", TOLERANCE)
def test_the_same_bits_again_and_in_other_company(device: torch.device, layout: str) -> None:
    batch = Batch(EDGES, 3, device)
    _, query, weights, plane = operands(batch, layout, 8, 64)
    first = score(batch, query, weights, plane)
    sparse = batch.rows.index_top_k > 0
    sparse &= batch.rows.positions >= 0
    assert torch.equal(score(batch, query, weights, plane)[sparse], first[sparse])
    for row in (0, 6, 7):
        alone = Batch([batch.lines[row]], 3, device, spare=4)
        alone.rows.block_table[:, :3] = batch.block_table[batch.lines[row].request]
        alone.rows.request.zero_()
        own = score(alone, query[row : row + 1], weights[row : row + 1], plane, context=7 * 64)
        assert torch.equal(own[0, :192], first[row])


def test_without_filling_only_whole_pages_are_written(device: torch.device) -> None:
    batch = Batch([Line(0, 5, 2), Line(0, 70, 2)], 4, device)
    _, query, weights, plane = operands(batch, "plain", 2, 16)
    scores = score(batch, query, weights, plane, fill=False).cpu()
    wanted = score(batch, query, weights, plane).cpu()
    assert torch.equal(scores[0, :64], wanted[0, :64])
    assert torch.equal(scores[1, :128], wanted[1, :128])
    assert torch.isneginf(wanted[1, 71:]).all()


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    batch = Batch([Line(0, 5, 2)], 1, device)
    plane = batch.plane(16)
    with pytest.raises(EngineError, match="float16"):
        score(batch, batch.random(1, 2, 16, dtype=torch.float16), batch.random(1, 2), plane)
    with pytest.raises(EngineError, match="8-bit"):
        score(batch, batch.random(1, 2, 16), batch.random(1, 2), plane.to(torch.uint8))
