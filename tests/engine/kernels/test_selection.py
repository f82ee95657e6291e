"""Flaws of selections are found, each by its name, and no row reads beyond its own context."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.interface.selection import EMPTY, OUTSIDE, REPEATED, SHORT, watched


@pytest.mark.parametrize(
    ("selected", "flaws", "read"),
    [
        ([4, 0, 9], 0, [4, 0, 9]),
        ([-1, -1, -1], EMPTY, [9, -1, -1]),
        ([4, -1, 9], SHORT, [4, -1, 9]),
        ([4, 10, 9], SHORT | OUTSIDE, [4, -1, 9]),  # after its own position
        ([4, 1000, 9], SHORT | OUTSIDE, [4, -1, 9]),  # beyond every page
        ([4, -7, 9], SHORT | OUTSIDE, [4, -1, 9]),
        ([70, 70, 70], EMPTY | OUTSIDE, [9, -1, -1]),
        ([4, 4, 9], SHORT | REPEATED, [4, 4, 9]),
    ],
)
def test_a_row_with_a_flaw(selected: list[int], flaws: int, read: list[int]) -> None:
    good = [0, 1, 2]
    rows = torch.tensor([[good, selected]])
    mended, found = watched(rows, torch.tensor([[5, 9]]), torch.tensor([[3, 3]]), 64)
    assert found.tolist() == [[0, flaws]]
    assert mended.tolist() == [[good, read]]


def test_a_short_context_is_read_whole() -> None:
    selected = torch.tensor([[[0, 1, -1], [2, 1, -1]]])
    _, found = watched(selected, torch.tensor([[1, 2]]), torch.tensor([[3, 3]]), 64)
    assert found.tolist() == [[0, SHORT]]


def test_a_window_ends_what_may_be_read() -> None:
    allowed = torch.zeros(1, 1, 64, dtype=torch.bool)
    allowed[..., 6:10] = True
    for selected, flaws in (([6, 9], 0), ([5, 9], SHORT | OUTSIDE)):
        _, found = watched(torch.tensor([[selected]]), torch.tensor([[9]]), torch.tensor([[2]]), 64, allowed)
        assert found.item() == flaws
