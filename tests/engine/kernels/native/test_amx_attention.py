"""Dense attention with AMX: that in float64, and that without AMX but for the order of sums."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.native.kernels import NativeKernels

pytestmark = pytest.mark.skipif(not native.uses_amx(), reason="this processor has no AMX, or may not use it")

PAGES = 5


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    assert native.use_amx(True)
    yield
    native.use_amx(True)


class Case:
    """Rows of one request after `start` tokens, with pages in any order."""

    def __init__(self, heads: int, group: int, dim: int, rows: int, start: int) -> None:
        draw = torch.Generator().manual_seed(rows)
        self.query = torch.randn(1, rows, heads, group, dim, generator=draw).bfloat16()
        self.plane = torch.randn(PAGES, 64, heads, 2, dim, generator=draw).bfloat16()
        self.table = torch.randperm(PAGES, generator=draw)[None]
        self.positions = torch.arange(start, start + rows)[None]

    def attended(self) -> Tensor:
        return NativeKernels().attend_causal(self.query, self.plane, self.table, self.positions, 0.2)[0]

    def exact(self) -> Tensor:
        """[rows, heads, group, dim] in float64."""
        cache = self.plane[self.table[0]].flatten(0, 1).double()
        scores = torch.einsum("rhgd,chd->rhgc", self.query[0].double(), cache[:, :, 0]) * 0.2
        hidden = torch.arange(len(cache)) > self.positions[0][:, None]
        weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
        return torch.einsum("rhgc,chd->rhgd", weights, cache[:, :, 1])


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize(
    ("heads", "group", "dim"), [(3, 3, 64), (2, 6, 128), (1, 1, 32), (2, 5, 96), (1, 48, 256)]
)
@pytest.mark.parametrize(("rows", "start"), [(16, 0), (17, 60), (50, 100), (300, 0)])
def test_attention_is_that_in_float64(heads: int, group: int, dim: int, rows: int, start: int) -> None:
    case = Case(heads, group, dim, rows, start)
    found = case.attended()
    native.use_amx(False)
    without = case.attended()
    exact = case.exact()
    assert error(found, exact) < 4e-3  # weights and results are rounded to bfloat16
    assert error(found, exact) < 1.02 * error(without, exact)
    assert error(found, without) < 1.5e-3


def test_not_a_number_is_seen_by_the_rows_that_may_see_it() -> None:
    case = Case(2, 3, 64, 100, 100)
    case.plane[case.table[0, 150 // 64], 150 % 64] = torch.nan
    found = case.attended().isnan()
    assert found[50:].all()
    # A block of rows multiplies all tokens of a page, the hidden ones with weights of zero.
    native.use_amx(False)
    assert torch.equal(case.attended().isnan(), found)
