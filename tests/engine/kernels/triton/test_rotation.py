"""Rotation and cache write against `rotate`, `rms_norm` and a plain write."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from engine.kernels.triton.rotation import rotate_and_store
from engine.layers.norm import rms_norm
from engine.layers.rope import RotaryTable, rotate
from engine.memory.planes import PagedCache, PlaneSpec

PAGES = 4
EPS = 1e-6


class Case(NamedTuple):
    """One layer's shapes, and what it has."""

    heads: int
    kv_heads: int
    dim: int
    rotated: int
    bias: bool = False
    norms: bool = False


CASES = [
    Case(9, 3, 64, 64),
    Case(12, 2, 128, 128, bias=True),
    Case(8, 2, 128, 128, norms=True),
    Case(4, 4, 80, 32, bias=True, norms=True),
    Case(5, 1, 6, 6),
]


class Parts(NamedTuple):
    """What a call takes."""

    product: torch.Tensor
    positions: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor
    table: RotaryTable
    bias: torch.Tensor | None
    norms: tuple[torch.Tensor, torch.Tensor] | None


def parts(case: Case, device: torch.device, dtype: torch.dtype) -> Parts:
    generator = torch.Generator().manual_seed(case.dim)
    slots = [0, 63, 64, 128, 127, 255, 200]  # both sides of a page's edge
    order = [3, 1, 0, 2]
    width = (case.heads + 2 * case.kv_heads) * case.dim

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return Parts(
        product=made(len(slots), width),
        positions=torch.tensor([0, 63, 64, 128, 127, 255, 299], device=device),
        pages=torch.tensor([order[slot // 64] for slot in slots], device=device),
        offsets=torch.tensor([slot % 64 for slot in slots], device=device),
        table=RotaryTable(case.rotated, 1e4, 300, device=device),
        bias=made(width) if case.bias else None,
        norms=(made(case.dim), made(case.dim)) if case.norms else None,
    )


def plane_of(case: Case, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A poisoned plane, of a cache that has another before it."""
    shape = (case.kv_heads, 2, case.dim)
    cache = PagedCache(PAGES, [PlaneSpec("other", (3,), dtype), PlaneSpec("kv", shape, dtype)], 1, device)
    plane = cache.plane(0, "kv")
    plane.fill_(torch.nan)
    return plane


def plain(case: Case, p: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [T, Hkv, G, D] and what the plane holds of each row [T, Hkv, 2, D]."""
    product = p.product if p.bias is None else p.product + p.bias
    heads = product.view(len(product), -1, case.dim)
    query, key, value = heads.split([case.heads, case.kv_heads, case.kv_heads], dim=1)
    if p.norms is not None:
        query, key = rms_norm(query, p.norms[0], EPS), rms_norm(key, p.norms[1], EPS)
    rotation = p.table.at(p.positions)
    query, key = rotate(query, rotation), rotate(key, rotation)
    return query.reshape(len(product), case.kv_heads, -1, case.dim), torch.stack((key, value), dim=2)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    tolerance = 4e-6 if ours.dtype is torch.float32 else 2.0**-6
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def run(p: Parts, plane: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    return rotate_and_store(
        p.product[rows], p.positions[rows], p.pages[rows], p.offsets[rows], p.table.all(), plane,
        bias=p.bias, head_norms=p.norms, eps=EPS,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_queries_and_cache(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    p = parts(case, device, dtype)
    plane = plane_of(case, device, dtype)
    query = run(p, plane)
    expected, stored = plain(case, p)
    close(query, expected)
    close(plane[p.pages, p.offsets], stored)
    plane[p.pages, p.offsets] = torch.nan
    assert plane.isnan().all()  # nothing else was written


def test_values_are_stored_as_they_are(device: torch.device, dtype: torch.dtype) -> None:
    case = CASES[0]
    p = parts(case, device, dtype)
    plane = plane_of(case, device, dtype)
    run(p, plane)
    assert torch.equal(plane[p.pages, p.offsets][:, :, 1], plain(case, p)[1][:, :, 1])


def test_padding_rows_write_nothing(device: torch.device) -> None:
    case = CASES[0]
    p = parts(case, device, torch.float32)
    expected, stored = plain(case, p)
    padded = torch.tensor([1, 4, 5], device=device)
    p.positions[padded] = -1
    p.pages[padded] = -(10**9)  # far outside
    plane = plane_of(case, device, torch.float32)
    query = run(p, plane)
    kept = p.positions >= 0
    close(query[kept], expected[kept])
    close(plane[p.pages[kept], p.offsets[kept]], stored[kept])
    plane[p.pages[kept], p.offsets[kept]] = torch.nan
    assert plane.isnan().all()


def test_one_row_no_row_and_other_integers(device: torch.device) -> None:
    case = CASES[1]
    p = parts(case, device, torch.float32)
    plane = plane_of(case, device, torch.float32)
    whole = run(p, plane)
    assert torch.equal(run(p, plane, slice(2, 3)), whole[2:3])
    assert run(p, plane, slice(0, 0)).shape == (0, 2, 6, 128)
    narrow = p._replace(positions=p.positions.int(), pages=p.pages.int(), offsets=p.offsets.int())
    other = plane_of(case, device, torch.float32)
    assert torch.equal(run(narrow, other), whole)
    assert torch.equal(other.nan_to_num(), plane.nan_to_num())


@pytest.mark.parametrize("case", CASES[2:4], ids=str)
def test_a_row_has_the_same_bits_again_and_in_other_company(
    case: Case, device: torch.device, dtype: torch.dtype
) -> None:
    p = parts(case, device, dtype)
    planes = [plane_of(case, device, dtype) for _ in range(3)]
    whole, again, alone = run(p, planes[0]), run(p, planes[1]), run(p, planes[2], slice(4, 6))
    assert torch.equal(again, whole)
    assert torch.equal(planes[1].nan_to_num(), planes[0].nan_to_num())
    assert torch.equal(alone, whole[4:6])
    at = p.pages[4:6], p.offsets[4:6]
    assert torch.equal(planes[2][at], planes[0][at])
