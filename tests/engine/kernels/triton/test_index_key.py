"""Index keys and queries against layer norm, `rotate`, `IndexFormat` and the integer reference."""

from __future__ import annotations

import pytest
import torch

from engine.attention.indexer import IndexQueries
from engine.attention.precision import IndexFormat
from engine.errors import EngineError
from engine.kernels.reference.attention import ReferenceKernels
from engine.kernels.triton.index_key import queries
from engine.layers.rope import RotaryTable, rotate
from lab.doctor.pointwise import KEYS, KeyCase, key_operands, key_plane, key_values, store_case, store_plainly


def same(case: KeyCase, ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal, but for the last digits before rounding: few numbers may fall on the other side of a step."""
    step = {"plain": 0.0, "int8": 1 / 120, "fp8": 1 / 15}[case.form]
    exact = 5e-6 if dtype is torch.float32 else 2.0**-6
    torch.testing.assert_close(ours, theirs, rtol=exact + step, atol=exact + step * 0.3, equal_nan=True)
    if dtype is torch.float32:
        assert (ours - theirs).abs().nan_to_num().gt(1e-5).float().mean() < 0.01


@pytest.mark.parametrize("case", KEYS, ids=str)
def test_keys(case: KeyCase, device: torch.device, dtype: torch.dtype) -> None:
    p = key_operands(case, device, dtype)
    ours, theirs = key_plane(case, device, dtype), key_plane(case, device, dtype)
    store_case(case, p, ours)
    store_plainly(case, p, theirs)
    at = p.pages, p.offsets
    same(case, key_values(case, ours)[at], key_values(case, theirs)[at], dtype)
    kept = torch.ones(4, 64, dtype=torch.bool, device=device)  # what nobody wrote is as it was
    kept[at] = False
    poison = key_values(case, ours)[kept].nan_to_num(nan=77.0)
    assert torch.equal(poison, key_values(case, key_plane(case, device, dtype))[kept].nan_to_num(nan=77.0))


@pytest.mark.parametrize("case", KEYS, ids=str)
def test_queries(case: KeyCase, device: torch.device, dtype: torch.dtype) -> None:
    p = key_operands(case, device, dtype)
    scale = case.heads**-0.5 * case.dim**-0.5
    ours, weights = queries(
        p.query, p.head_weights, scale, p.table.all(), p.positions, case.form, interleaved=case.interleaved
    )
    turned = rotate(
        p.query.view(-1, case.heads, case.dim), p.table.at(p.positions), interleaved=case.interleaved
    )
    expected = IndexQueries(query=turned, head_weights=p.head_weights * scale)
    kernels = ReferenceKernels()
    if case.form == "int8":
        scales = turned.float().abs().amax(-1) / 127
        numbers = (turned.float() / scales.where(scales > 0, 1.0).unsqueeze(-1)).round()
        expected = IndexQueries(query=numbers, head_weights=expected.head_weights * scales)
        assert ours.dtype is torch.int8
    elif case.form == "fp8":
        expected = IndexFormat(case.dim, "fp8").queries(expected, kernels)
        assert ours.dtype is torch.float8_e4m3fn
    torch.testing.assert_close(
        weights, expected.head_weights, rtol=1e-6 if dtype is torch.float32 else 2e-2, atol=1e-9
    )
    numbers, theirs = ours.float(), expected.query.float()
    exact = 5e-6 if dtype is torch.float32 else 2.0**-6
    torch.testing.assert_close(
        numbers,
        theirs,
        rtol=exact if case.form != "fp8" else 0.15,
        atol=1.01 if case.form == "int8" else 2 * exact,
    )
    assert (numbers - theirs).abs().gt(1e-5).float().mean() < (0.005 if dtype is torch.float32 else 0.05)


def test_every_number_becomes_the_e4m3_that_torch_makes_of_it(device: torch.device) -> None:
    """All steps of e4m3, the middles between them, and their neighbours in float32."""
    steps = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (steps[1:] + steps[:-1]) / 2
    near = torch.cat(
        (steps, middles, middles * (1 + 2.0**-23), middles * (1 - 2.0**-23), steps * (1 + 2.0**-23))
    )
    numbers = torch.cat((near, -near)).clamp(-448, 448)
    numbers = torch.cat((numbers, torch.zeros(-len(numbers) % 3))).view(-1, 3)
    # A fourth number of 448 makes the scale 1; the transform is undone beforehand, exactly: sums of 4 halves.
    vectors = torch.cat((numbers, torch.full((len(numbers), 1), 448.0)), dim=1).double()
    signs = torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(4)] for i in range(4)], dtype=torch.float64
    )
    before = (vectors @ signs / 2).float()
    exact = ((before.double() @ signs / 2) == vectors).all(1) & (before.double() == vectors @ signs / 2).all(
        1
    )
    kernels = ReferenceKernels()
    turned = kernels.hadamard(before)
    expected, _ = kernels.quantise(turned, "ue8m0")
    table = RotaryTable(2, 1e4, 1, device=device)
    ours, _ = queries(
        before.to(device), torch.ones(len(before), 1, device=device), 1.0, table.all(),
        torch.zeros(len(before), dtype=torch.int64, device=device), "fp8",
    )  # fmt: skip
    assert exact.float().mean() > 0.3
    assert torch.equal(ours.view(torch.uint8).cpu().squeeze(1)[exact], expected.view(torch.uint8)[exact])


@pytest.mark.parametrize("case", [KEYS[0], KEYS[2], KEYS[4]], ids=str)
def test_padding_rows_write_nothing(case: KeyCase, device: torch.device) -> None:
    p = key_operands(case, device, torch.float32)
    p.positions[[1, 4, 8]] = -1
    p.pages[[1, 4, 8]] = -(10**9)
    ours, theirs = (key_plane(case, device, torch.float32) for _ in range(2))
    store_case(case, p, ours)
    kept = p.positions >= 0
    store_plainly(case, p, theirs, kept)
    same(case, key_values(case, ours), key_values(case, theirs), torch.float32)
    query, weights = queries(p.query, p.head_weights, 1.0, p.table.all(), p.positions, case.form)
    assert weights[kept].isfinite().all()
    assert query.float()[kept].isfinite().all()


@pytest.mark.parametrize("case", [KEYS[1], KEYS[3], KEYS[5]], ids=str)
def test_a_row_has_the_same_bits_again_and_in_other_company(
    case: KeyCase, device: torch.device, dtype: torch.dtype
) -> None:
    p = key_operands(case, device, dtype)
    planes = [key_plane(case, device, dtype) for _ in range(3)]
    store_case(case, p, planes[0])
    store_case(case, p, planes[1])
    for row in (5, 0, 7, 8, 3, 2, 1, 6, 4):
        store_case(case, p, planes[2], slice(row, row + 1))
    assert torch.equal(planes[1].view(torch.uint8), planes[0].view(torch.uint8))
    assert torch.equal(planes[2].view(torch.uint8), planes[0].view(torch.uint8))
    whole, weights = queries(p.query, p.head_weights, 1.0, p.table.all(), p.positions, case.form)
    alone, own = queries(p.query[5:6], p.head_weights[5:6], 1.0, p.table.all(), p.positions[5:6], case.form)
    assert torch.equal(alone.view(torch.uint8), whole[5:6].view(torch.uint8))
    assert torch.equal(own, weights[5:6])


def test_one_row_no_row_and_rows_apart(device: torch.device) -> None:
    case = KEYS[2]
    p = key_operands(case, device, torch.float32)
    planes = [key_plane(case, device, torch.float32) for _ in range(2)]
    wide = torch.cat((p.query, p.key, p.head_weights), dim=1)  # as one product of all three
    inner = case.heads * case.dim
    apart = p._replace(key=wide[:, inner : inner + case.dim])
    store_case(case, p, planes[0])
    store_case(case, apart, planes[1])
    store_case(case, p, planes[1], slice(0, 0))
    assert torch.equal(planes[0], planes[1])
    ours = queries(wide[:, :inner], wide[:, inner + case.dim :], 1.0, p.table.all(), p.positions, "int8")
    theirs = queries(p.query, p.head_weights, 1.0, p.table.all(), p.positions, "int8")
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_sizes_without_such_a_form_are_refused(device: torch.device) -> None:
    for case in (KeyCase("fp8", 1, 96, 32), KeyCase("fp8", 1, 256, 32), KeyCase("int8", 1, 30, 10)):
        p = key_operands(case._replace(form="plain"), device, torch.float32)
        with pytest.raises(EngineError, match=f"vectors of {case.dim} numbers"):
            store_case(case, p, torch.zeros(4, 64, case.dim + 4, dtype=torch.uint8))
