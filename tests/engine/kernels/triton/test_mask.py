"""Bits of selections against the selected positions themselves."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from engine.kernels.triton import select as module
from engine.kernels.triton.mask import masks, reach
from engine.kernels.triton.select import select
from lab.doctor.rows import kinds_of_scores, selecting_rows
from tests.engine.kernels.triton.test_select import choose


@pytest.mark.parametrize("form", ["whole", "among", "long", "slow"])
def test_bits_say_what_is_selected(device: torch.device, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Ties, too; one row is dense, one padding, one has a context too long for a mask."""
    choose(monkeypatch, form)
    g = torch.Generator().manual_seed(5)
    context, top_k = 768, 60
    scores = kinds_of_scores(context, g).to(device)
    positions = torch.randint(top_k, reach(top_k), (12,), generator=g)
    chosen = torch.full((12,), top_k)
    chosen[4], positions[6], positions[5] = 0, -1, reach(top_k)
    rows = selecting_rows(positions, chosen, device)
    cuts = torch.full((12, 2), 12345, dtype=torch.int32, device=device)
    selected = select(scores, rows, top_k, cuts)
    bits = masks(scores, rows, cuts, top_k)
    assert bits.shape == (12, context // 32)
    for row in range(12):
        if row in (4, 5, 6):
            continue
        said = (bits[row, :, None] >> torch.arange(32, device=device)) & 1
        at = said.flatten()[: int(positions[row]) + 1].nonzero().flatten().int()
        assert torch.equal(at, selected[row][selected[row] >= 0])


def test_long_rows_are_cut_with_candidates(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(module, "WHOLE", 0)
    monkeypatch.setattr(module, "WHOLE_CUT", 0)
    scores = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)).to(device)
    rows = selecting_rows(torch.tensor([255]), torch.tensor([40]), device)
    cuts = torch.zeros(1, 2, dtype=torch.int32, device=device)
    selected = select(scores, rows, 40, cuts)
    said = (masks(scores, rows, cuts, 40)[0, :, None] >> torch.arange(32, device=device)) & 1
    assert torch.equal(said.flatten().nonzero().flatten().int(), selected[0])
