"""The exact top-k against a sort, on rows of every kind."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from engine.kernels.triton import candidates, long_rows
from engine.kernels.triton import select as module
from engine.kernels.triton.select import select
from lab.doctor.rows import check_selection, kinds_of_scores, selecting_rows
from tests.engine.kernels.triton.conftest import CHIP

FORMS = ["whole", "among", "long", "stretches", "slow"]


def choose(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Let every batch be selected in one form, with samples and rooms as small as rows are here."""
    monkeypatch.setattr(module, "MANY_ROWS", 1 if form == "among" else 1 << 20)
    for name in ("WHOLE", "WHOLE_SELECTED", "WHOLE_CUT"):
        monkeypatch.setattr(module, name, 1 << 20 if form == "whole" else 0)
    monkeypatch.setattr(module, "LONG", 0 if form == "long" else 1 << 30)
    for name, size in {"SAMPLE": 64, "FEW_SAMPLE": 64, "LEAST_ROOM": 64, "STRETCH": 512, "WORDS": 16}.items():
        monkeypatch.setattr(long_rows, name, size)
    if form == "slow":
        monkeypatch.setattr(module, "MOST_SELECTED", 0)
    monkeypatch.setattr(candidates, "SAMPLE", 64)
    monkeypatch.setattr(candidates, "LEAST_ROOM", 64)
    if not CHIP:
        monkeypatch.setattr(candidates, "shape_of", lambda *_: candidates.Reading(1024, 4, 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("context", "stretch"),
    [(64, 8192), (192, 8192), (600, 256), (2100, 8192), *([(9999, 1024)] if CHIP else [])],
)
def test_kinds_of_rows(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, context: int, stretch: int, form: str
) -> None:
    """Also in several rounds: stretches are made short."""
    choose(monkeypatch, form)
    monkeypatch.setattr(module, "STRETCH", stretch)
    g = torch.Generator().manual_seed(context)
    scores = kinds_of_scores(context, g)
    last = torch.full((12,), context - 1)
    check_selection(scores, torch.randint(0, context, (12,), generator=g), torch.full((12,), 70), 70, device)
    width = min(context // 2, 100)
    check_selection(scores, last, torch.randint(1, width + 1, (12,), generator=g), width, device)


@pytest.mark.parametrize("second", [None, -9.0, 5.0])
@pytest.mark.parametrize("deviations", [-9.0, -1.0, 0.0, 99.0])
def test_a_sample_that_misleads(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, deviations: float, second: float | None
) -> None:
    """Too few candidates, or more than there is room for: another sample, if there is one, then the whole row."""
    choose(monkeypatch, "among" if second is None else "long")
    monkeypatch.setattr(candidates, "DEVIATIONS", deviations)
    monkeypatch.setattr(long_rows, "DEVIATIONS", deviations)
    monkeypatch.setattr(long_rows, "SECOND_DEVIATIONS", second)
    g = torch.Generator().manual_seed(7)
    scores = kinds_of_scores(900, g)[[0, 1, 3, 6, 7, 9]]
    check_selection(scores, torch.full((6,), 899), torch.full((6,), 60), 60, device)


@pytest.mark.parametrize("form", FORMS)
def test_edges(device: torch.device, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """One token, pages' ends, k above the context, dense rows, padding, widths that no page divides."""
    choose(monkeypatch, form)
    g = torch.Generator().manual_seed(0)
    positions = torch.tensor([0, 0, 62, 63, 64, 65, 127, 128, -1, 100, 5])
    top_k = torch.tensor([1, 9, 63, 64, 64, 3, 200, 77, 5, 0, 6])
    for width in (200, 333):
        check_selection(torch.randn(11, 192, generator=g), positions, top_k, width, device)


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_beyond_the_end_is_not_selected(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    choose(monkeypatch, form)
    scores = torch.zeros(3, 128)
    scores[:, 50:] = math.inf
    scores[1, 50:] = math.nan
    check_selection(scores, torch.tensor([49, 49, 10]), torch.tensor([7, 7, 20]), 20, device)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_in_any_company(device: torch.device, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    choose(monkeypatch, form)
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
        top_k = [8192, 1, 100, 8191, 8192, 8192, 8192, 64, 8192, 5000, 8192, 2049]
        check_selection(rows, ends, torch.tensor(top_k), 8192, device)


@pytest.mark.skipif(not CHIP, reason="long in the interpreter")
@pytest.mark.parametrize(("context", "top_k"), [(7168, 256), (30_720, 2048)])
def test_many_rows(device: torch.device, context: int, top_k: int) -> None:
    g = torch.Generator().manual_seed(3)
    rows = torch.cat([kinds_of_scores(context, g) for _ in range(50)])
    ends = torch.randint(0, context, (600,), generator=g)
    check_selection(rows, ends, torch.randint(1, top_k + 1, (600,), generator=g), top_k, device)
    check_selection(rows, torch.full((600,), context - 1), torch.full((600,), top_k), top_k, device)


def test_more_than_candidates_are_kept_for(device: torch.device) -> None:
    g = torch.Generator().manual_seed(4)
    context = 20_000 if CHIP else 9_000
    scores = kinds_of_scores(context, g)[[0, 1, 3, 5]]
    width = 9_500 if CHIP else 8_200
    ends = torch.tensor([context - 1, context - 1, width + 7, context - 1])
    check_selection(scores, ends, torch.tensor([width, width, width - 1, width]), width, device)


@pytest.mark.parametrize(("width", "context"), [(256, 7168), (256, 32768), (2048, 30720), (2048, 131072)])
def test_the_room_is_hardly_ever_too_small(width: int, context: int) -> None:
    """How many scores lie above the so-manieth best of a sample is about a gamma distribution."""
    sample, room = candidates.sample_of(width, context)
    rank = sample * width / context
    enough = (rank + candidates.DEVIATIONS * math.sqrt(rank) + 2) * 17 / 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = torch.distributions.Gamma(enough, 1.0).sample(torch.Size([20_000])) * context / sample
    assert float((found > room).float().mean()) < 1e-3
