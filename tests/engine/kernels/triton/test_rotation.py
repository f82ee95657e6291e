"""Rotation and cache write against `rotate`, `rms_norm` and a plain write."""

from __future__ import annotations

import pytest
import torch

from lab.doctor.pointwise import (
    ROTATIONS,
    RotationCase,
    rotated,
    rotation_operands,
    rotation_plane,
    run_rotation,
)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    tolerance = 4e-6 if ours.dtype is torch.float32 else 2.0**-6
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ROTATIONS, ids=str)
def test_queries_and_cache(case: RotationCase, device: torch.device, dtype: torch.dtype) -> None:
    p = rotation_operands(case, device, dtype)
    plane = rotation_plane(case, device, dtype)
    query = run_rotation(p, plane)
    expected, stored = rotated(case, p)
    close(query, expected)
    close(plane[p.pages, p.offsets], stored)
    plane[p.pages, p.offsets] = torch.nan
    assert plane.isnan().all()  # nothing else was written


def test_values_are_stored_as_they_are(device: torch.device, dtype: torch.dtype) -> None:
    case = ROTATIONS[0]
    p = rotation_operands(case, device, dtype)
    plane = rotation_plane(case, device, dtype)
    run_rotation(p, plane)
    assert torch.equal(plane[p.pages, p.offsets][:, :, 1], rotated(case, p)[1][:, :, 1])


def test_padding_rows_write_nothing(device: torch.device) -> None:
    case = ROTATIONS[0]
    p = rotation_operands(case, device, torch.float32)
    expected, stored = rotated(case, p)
    padded = torch.tensor([1, 4, 5], device=device)
    p.positions[padded] = -1
    p.pages[padded] = -(10**9)  # far outside
    plane = rotation_plane(case, device, torch.float32)
    query = run_rotation(p, plane)
    kept = p.positions >= 0
    close(query[kept], expected[kept])
    close(plane[p.pages[kept], p.offsets[kept]], stored[kept])
    plane[p.pages[kept], p.offsets[kept]] = torch.nan
    assert plane.isnan().all()


def test_one_row_no_row_and_other_integers(device: torch.device) -> None:
    case = ROTATIONS[1]
    p = rotation_operands(case, device, torch.float32)
    plane = rotation_plane(case, device, torch.float32)
    whole = run_rotation(p, plane)
    assert torch.equal(run_rotation(p, plane, slice(2, 3)), whole[2:3])
    assert run_rotation(p, plane, slice(0, 0)).shape == (0, 2, 6, 128)
    narrow = p._replace(positions=p.positions.int(), pages=p.pages.int(), offsets=p.offsets.int())
    other = rotation_plane(case, device, torch.float32)
    assert torch.equal(run_rotation(narrow, other), whole)
    assert torch.equal(other.nan_to_num(), plane.nan_to_num())


@pytest.mark.parametrize("case", ROTATIONS[2:4], ids=str)
def test_a_row_has_the_same_bits_again_and_in_other_company(
    case: RotationCase, device: torch.device, dtype: torch.dtype
) -> None:
    p = rotation_operands(case, device, dtype)
    planes = [rotation_plane(case, device, dtype) for _ in range(3)]
    whole, again, alone = (
        run_rotation(p, planes[0]),
        run_rotation(p, planes[1]),
        run_rotation(p, planes[2], slice(4, 6)),
    )
    assert torch.equal(again, whole)
    assert torch.equal(planes[1].nan_to_num(), planes[0].nan_to_num())
    assert torch.equal(alone, whole[4:6])
    at = p.pages[4:6], p.offsets[4:6]
    assert torch.equal(planes[2][at], planes[0][at])
