"""Index scores of flat rows against their definition, row by row."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from engine.errors import EngineError
from engine.kernels.triton.rows import Span, blocks_of
from engine.kernels.triton.scores import block_rows
from lab.doctor.rows import SCORE_TOLERANCE, check_scores, score_operands, score_rows
from tests.engine.kernels.triton.batches import EDGES, Batch, Line
from tests.engine.kernels.triton.conftest import CHIP

DIMS = [(8, 64), (3, 16), (5, 36), (2, 128)]


@pytest.mark.parametrize("layout", SCORE_TOLERANCE)
@pytest.mark.parametrize(("heads", "dim"), DIMS)
def test_edges(device: torch.device, dtypes: list[torch.dtype], layout: str, heads: int, dim: int) -> None:
    for dtype in dtypes:
        batch = Batch(EDGES, 3, device, spare=2)
        operation, query, weights, plane = score_operands(batch, layout, heads, dim, dtype)
        check_scores(
            batch, score_rows(batch, query, weights, plane), operation, query, weights, plane, layout
        )


@pytest.mark.parametrize("layout", SCORE_TOLERANCE)
def test_a_prompt_in_blocks_beside_decodes(device: torch.device, layout: str) -> None:
    prompt = [Line(1, position, 0 if position < 70 else 70) for position in range(60, 101)]
    batch = Batch([Line(0, 130, 9), *prompt, Line(2, 64, 3)], 3, device)
    operation, query, weights, plane = score_operands(batch, layout, 8, 64)
    blocks = blocks_of([Span(1, len(prompt), 60)], len(batch.lines), block_rows(8), device)
    blocked = score_rows(batch, query, weights, plane, blocks=blocks)
    check_scores(batch, blocked, operation, query, weights, plane, layout)
    spans = [Span(1, 3, 60), Span(4, len(prompt) - 3, 63)]
    cut = blocks_of(spans, len(batch.lines), block_rows(8), device)
    sparse = batch.rows.index_top_k > 0
    again = score_rows(batch, query, weights, plane, blocks=cut)[sparse]
    if CHIP or layout == "int8":
        assert torch.equal(again, blocked[sparse])
    else:  # the interpreter multiplies with NumPy, on some CPUs in an order that depends on the column
        torch.testing.assert_close(again, blocked[sparse])


@pytest.mark.parametrize("layout", SCORE_TOLERANCE)
def test_the_same_bits_again_and_in_other_company(device: torch.device, layout: str) -> None:
    batch = Batch(EDGES, 3, device)
    _, query, weights, plane = score_operands(batch, layout, 8, 64)
    first = score_rows(batch, query, weights, plane)
    sparse = batch.rows.index_top_k > 0
    sparse &= batch.rows.positions >= 0
    assert torch.equal(score_rows(batch, query, weights, plane)[sparse], first[sparse])
    for row in (0, 6, 7):
        alone = Batch([batch.lines[row]], 3, device, spare=4)
        alone.rows.block_table[:, :3] = batch.block_table[batch.lines[row].request]
        alone.rows.request.zero_()
        own = score_rows(alone, query[row : row + 1], weights[row : row + 1], plane, context=7 * 64)
        assert torch.equal(own[0, :192], first[row])


def test_without_filling_only_whole_pages_are_written(device: torch.device) -> None:
    batch = Batch([Line(0, 5, 2), Line(0, 70, 2)], 4, device)
    _, query, weights, plane = score_operands(batch, "plain", 2, 16)
    scores = score_rows(batch, query, weights, plane, fill=False).cpu()
    wanted = score_rows(batch, query, weights, plane).cpu()
    assert torch.equal(scores[0, :64], wanted[0, :64])
    assert torch.equal(scores[1, :128], wanted[1, :128])
    assert torch.isneginf(wanted[1, 71:]).all()


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    batch = Batch([Line(0, 5, 2)], 1, device)
    plane = batch.plane(16)
    with pytest.raises(EngineError, match="float16"):
        score_rows(batch, batch.random(1, 2, 16, dtype=torch.float16), batch.random(1, 2), plane)
    with pytest.raises(EngineError, match="8-bit"):
        score_rows(batch, batch.random(1, 2, 16), batch.random(1, 2), plane.to(torch.uint8))
