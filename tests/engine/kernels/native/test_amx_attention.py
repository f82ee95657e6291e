"""Attention of blocks of rows, over a whole context or over chosen tokens: that in float64, with AMX, and that without AMX but for
the order of sums."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.native.kernels import NativeKernels

with_amx = pytest.mark.skipif(not native.uses_amx(), reason="this processor has no AMX, or may not use it")

PAGES = 5


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    native.use_amx(True)
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
@with_amx
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


@with_amx
def test_not_a_number_is_seen_by_the_rows_that_may_see_it() -> None:
    case = Case(2, 3, 64, 100, 100)
    case.plane[case.table[0, 150 // 64], 150 % 64] = torch.nan
    found = case.attended().isnan()
    assert found[50:].all()
    # A block of rows multiplies all tokens of a page, the hidden ones with weights of zero.
    native.use_amx(False)
    assert torch.equal(case.attended().isnan(), found)


class _Block(ctypes.Structure):
    """`struct dsa_block` of dense.h."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("row_size", ctypes.c_int64),
        ("plane", ctypes.c_void_p),
        ("page_stride", ctypes.c_int64),
        ("block_table", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("rows", "head", "Hkv", "G", "D")),
        ("scale", ctypes.c_float),
    )


class Chosen(Case):
    """Rows of which each sees some of `count` chosen positions."""

    def __init__(self, heads: int, group: int, dim: int, rows: int, count: int) -> None:
        super().__init__(heads, group, dim, rows, 0)
        draw = torch.Generator().manual_seed(count)
        self.chosen = torch.randperm(64 * PAGES, generator=draw)[:count].sort().values
        self.seen = torch.rand(rows, count, generator=draw) < 0.6
        self.seen[:, 0] |= ~self.seen.any(1)

    def attended(self) -> Tensor:
        """[rows, heads, group, dim], by dsa_chosen_block."""
        rows, heads, group, dim = self.query.shape[1:]
        words = -(-len(self.chosen) // 64) + 1  # one more than it needs
        bits = [
            [sum(int(x) << i for i, x in enumerate(row[64 * word : 64 * word + 64])) for word in range(words)]
            for row in self.seen.tolist()
        ]
        visible = (ctypes.c_uint64 * (rows * words))(*[word for row in bits for word in row])
        chosen = self.chosen.int().contiguous()
        out = torch.empty(rows, heads, group, dim, dtype=torch.bfloat16)
        library = native.library()
        assert library is not None
        for head in range(heads):
            offset = 2 * head * group * dim
            block = _Block(
                self.query.data_ptr() + offset, out.data_ptr() + offset, heads * group * dim, self.plane.data_ptr(),
                2 * 64 * heads * 2 * dim, self.table.data_ptr(), rows, head, heads, group, dim, 0.2,
            )  # fmt: skip
            library.dsa_chosen_block(
                ctypes.byref(block),
                ctypes.c_void_p(chosen.data_ptr()),
                len(chosen),
                visible,
                ctypes.c_int64(words),
            )
        return out

    def exact(self) -> Tensor:
        cache = self.plane[self.table[0]].flatten(0, 1)[self.chosen].double()
        scores = torch.einsum("rhgd,chd->rhgc", self.query[0].double(), cache[:, :, 0]) * 0.2
        weights = scores.masked_fill(~self.seen[:, None, None], -torch.inf).softmax(-1)
        return torch.einsum("rhgc,chd->rhgd", weights, cache[:, :, 1])


@pytest.mark.parametrize(
    ("heads", "group", "dim"), [(3, 3, 64), (2, 6, 128), (1, 1, 32), (2, 5, 96), (1, 16, 256)]
)
@pytest.mark.parametrize(("rows", "count"), [(16, 1), (16, 64), (7, 100), (16, 300)])
def test_attention_over_chosen_tokens_is_that_in_float64(
    heads: int, group: int, dim: int, rows: int, count: int
) -> None:
    case = Chosen(heads, group, dim, rows, count)
    found, exact = case.attended(), case.exact()
    assert error(found, exact) < 4e-3
    native.use_amx(False)
    without = case.attended()
    assert error(found, exact) <= 1.02 * error(without, exact)
    assert error(found, without) < 1.5e-3
    case.seen = ~case.seen
    case.seen[:, 0] |= ~case.seen.any(1)
    assert count == 1 or error(found, case.exact()) > 0.1
