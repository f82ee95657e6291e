"""The exact top-k against a sort, on rows of every kind."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from engine.errors import EngineError
from engine.kernels.triton import select as module
from engine.kernels.triton.select import select
from lab.doctor.rows import check_selection, kinds_of_scores, selecting_rows
from tests.engine.kernels.triton.conftest import CHIP


@pytest.mark.parametrize(
    ("context", "stretch"),
    [(64, 8192), (192, 8192), (600, 256), (5000, 8192), *([(9999, 1024)] if CHIP else [])],
)
def test_kinds_of_rows(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, context: int, stretch: int
) -> None:
    """Also in several rounds: stretches are made short."""
    monkeypatch.setattr(module, "STRETCH", stretch)
    g = torch.Generator().manual_seed(context)
    scores = kinds_of_scores(context, g)
    last = torch.full((12,), context - 1)
    check_selection(scores, torch.randint(0, context, (12,), generator=g), torch.full((12,), 70), 70, device)
    width = min(context // 2, 100)
    check_selection(scores, last, torch.randint(1, width + 1, (12,), generator=g), width, device)


def test_edges(device: torch.device) -> None:
    """One token, pages' ends, k above the context, dense rows, padding, widths that no page divides."""
    g = torch.Generator().manual_seed(0)
    positions = torch.tensor([0, 0, 62, 63, 64, 65, 127, 128, -1, 100, 5])
    top_k = torch.tensor([1, 9, 63, 64, 64, 3, 200, 77, 5, 0, 6])
    for width in (200, 333):
        check_selection(torch.randn(11, 192, generator=g), positions, top_k, width, device)


def test_what_lies_beyond_the_end_is_not_selected(device: torch.device) -> None:
    scores = torch.zeros(3, 128)
    scores[:, 50:] = math.inf
    scores[1, 50:] = math.nan
    check_selection(scores, torch.tensor([49, 49, 10]), torch.tensor([7, 7, 20]), 20, device)


def test_the_same_in_any_company(device: torch.device) -> None:
    g = torch.Generator().manual_seed(1)
    scores = kinds_of_scores(700, g).to(device)
    positions, top_k = torch.randint(300, 700, (12,), generator=g), torch.randint(1, 90, (12,), generator=g)
    together = select(scores, selecting_rows(positions, top_k, device), 90)
    assert torch.equal(select(scores, selecting_rows(positions, top_k, device), 90), together)
    for row in range(12):
        wide = torch.nn.functional.pad(scores[row : row + 1], (0, 68), value=9.0)
        alone = select(
            wide, selecting_rows(positions[row : row + 1], top_k[row : row + 1], device), int(top_k[row])
        )
        assert torch.equal(alone[0], together[row, : alone.shape[1]])


@pytest.mark.parametrize("context", [20_000, 131_072, *([1_048_576] if CHIP else [])])
def test_long_rows(device: torch.device, context: int) -> None:
    g = torch.Generator().manual_seed(2)
    rows = kinds_of_scores(context, g) if CHIP else kinds_of_scores(context, g)[[0, 1, 3]]
    count = len(rows)
    ends = torch.full((count,), context - 1)
    ends[-1] = context - 3
    check_selection(rows, ends, torch.full((count,), 2048), 2048, device)
    if CHIP:
        check_selection(
            rows,
            ends,
            torch.tensor([8192, 1, 100, 8191, 8192, 8192, 8192, 64, 8192, 5000, 8192, 2049]),
            8192,
            device,
        )


def test_more_than_can_be_selected(device: torch.device) -> None:
    with pytest.raises(EngineError, match="8192"):
        check_selection(torch.zeros(1, 64), torch.tensor([3]), torch.tensor([9000]), 9000, device)
