"""Products with AMX: those of the exact weights in float64, far nearer than one bfloat16 for each number would be."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.native.packed import PackedWeight
from engine.memory.quantised import quantise_4bit, quantise_8bit
from tests.engine.kernels.native.test_packed import SUPER, weight_of

pytestmark = pytest.mark.skipif(not native.uses_amx(), reason="this processor has no AMX, or may not use it")

INTEGERS = ["q4", "q8", *SUPER]
# Ragged tiles, an odd number of them, more than are multiplied at once; one panel of inputs, several, and uneven ones.
SHAPES = [(40, 256), (7, 768), (304, 512), (64, 2304)]
ROWS = [16, 17, 31, 33, 64, 100, 512, 523]
PANELS = [(7, 800), (48, 96)]  # uneven panels, and one that is short, of kinds without super-blocks


class Rows(ctypes.Structure):
    """`struct dsa_rows` of matrix.h, as the steps of a model fill it: from float32."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("integers", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("integer_sums", ctypes.c_void_p),
        ("begins", ctypes.c_void_p),
        ("upper", ctypes.c_void_p),
        ("lower", ctypes.c_void_p),
    )


def from_float32(weight: PackedWeight, x: Tensor) -> Tensor:
    """Compute x weight^T as a step does, on this thread: [n, in] float32 -> [n, out] float32."""
    library = native.library()
    assert library is not None
    count, inputs = x.shape
    blocks, stride = -(-count // 16), -(-weight.outputs // 16) * 16
    values = torch.empty(count, inputs, dtype=torch.bfloat16)
    # What no row fills may be anything.
    upper, lower = torch.full((2, blocks * 16 * inputs), torch.nan, dtype=torch.bfloat16)
    rows = Rows(values.data_ptr(), count, inputs, upper=upper.data_ptr(), lower=lower.data_ptr())
    for r in range(count):
        library.dsa_set_row(ctypes.byref(rows), r, ctypes.c_void_p(x[r].data_ptr()))
    out = torch.empty(count, stride)
    library.dsa_product(
        ctypes.byref(weight.descriptor), ctypes.byref(rows), ctypes.c_void_p(out.data_ptr()),
        ctypes.c_size_t(stride), 0, stride // 16,
    )  # fmt: skip
    return out[:, : weight.outputs]


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    assert native.use_amx(True)
    yield
    native.use_amx(True)


def random_rows(count: int, inputs: int) -> Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(count))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def shapes_of(kind: str) -> list[tuple[int, int]]:
    return SHAPES if kind in SUPER else SHAPES + PANELS


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_of_bfloat16(kind: str, threads: int) -> None:
    """Against float64, and against the products without AMX, which round activations to 16 bits."""
    library = native.library()
    assert library is not None
    before = library.dsa_threads()
    native.set_threads(threads)
    try:
        for outputs, inputs in shapes_of(kind):
            weight, exact = weight_of(kind, outputs, inputs)
            for count in ROWS:
                x = random_rows(count, inputs).bfloat16()
                native.use_amx(False)
                without = weight.multiply(x, dtype=torch.float32)
                native.use_amx(True)
                found = weight.multiply(x, dtype=torch.float32)
                assert error(found, x.double() @ exact.T) < 1e-5, (outputs, inputs, count)
                assert 1e-8 < error(found, without) < 4e-5, (outputs, inputs, count)
                rounded = weight.multiply(x, dtype=torch.bfloat16)
                torch.testing.assert_close(rounded, found.bfloat16(), rtol=0, atol=0)
    finally:
        native.set_threads(before)


@pytest.mark.parametrize("kind", INTEGERS)
def test_rows_of_float32(kind: str) -> None:
    """As a step has them: a bfloat16 would be off by 2e-3."""
    for outputs, inputs in shapes_of(kind):
        weight, exact = weight_of(kind, outputs, inputs)
        for count in ROWS:
            x = random_rows(count, inputs)
            assert error(from_float32(weight, x), x.double() @ exact.T) < 1e-5, (outputs, inputs, count)
            assert error(x.bfloat16().double() @ exact.T, x.double() @ exact.T) > 1e-3


def test_weights_of_bfloat16() -> None:
    """They are exact, and rows are rounded to bfloat16 whatever they were, with AMX or without."""
    for outputs, inputs in SHAPES + PANELS:
        weight, exact = weight_of("bf16", outputs, inputs)
        for count in ROWS:
            x = random_rows(count, inputs)
            expected = x.bfloat16().double() @ exact.T
            assert error(from_float32(weight, x), expected) < 1e-6
            found = weight.multiply(x.bfloat16(), dtype=torch.float32)
            assert error(found, expected) < 1e-6
            native.use_amx(False)
            assert error(found, weight.multiply(x.bfloat16(), dtype=torch.float32)) < 1e-6
            native.use_amx(True)


def test_parts_of_several_kinds() -> None:
    """Parts with an odd number of tiles, so that a pair of tiles never has two kinds."""
    parts = (quantise_4bit(torch.randn(48, 512)), torch.randn(16, 512), quantise_8bit(torch.randn(23, 512)))
    weight = PackedWeight.of(parts)
    exact = weight.dequantise(torch.float32).double()
    x = random_rows(70, 512)
    expected = x.double() @ exact.T
    expected[:, 48:64] = x.bfloat16().double() @ exact[48:64].T
    assert error(from_float32(weight, x), expected) < 1e-5
    assert error(weight.multiply(x.bfloat16(), dtype=torch.float32), x.bfloat16().double() @ exact.T) < 1e-5


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", [*INTEGERS, "bf16"])
@pytest.mark.parametrize("at", [3, 20])
def test_not_a_number_stays_in_its_row(kind: str, fault: float, at: int) -> None:
    weight, _ = weight_of(kind, 40, 768)
    x = random_rows(50, 768).bfloat16()
    for product in (
        lambda x: weight.multiply(x, dtype=torch.float32),
        lambda x: from_float32(weight, x.float()),
    ):
        before = product(x)
        faulty = x.clone()
        faulty[21, at] = fault
        after = product(faulty)
        assert not after[21].isfinite().any()
        others = torch.arange(50) != 21
        assert before[others].isfinite().all()
        assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("kind", [*INTEGERS, "bf16"])
def test_a_row_does_not_depend_on_the_rows_beside_it(kind: str) -> None:
    """Wherever it is in a block, and whether the block is full, as long as the rows are many."""
    weight, _ = weight_of(kind, 40, 768)
    x = random_rows(100, 768)
    whole = from_float32(weight, x)
    for first, last in ((0, 16), (3, 20), (7, 64), (50, 100)):
        assert torch.equal(from_float32(weight, x[first:last].contiguous()), whole[first:last])


@pytest.mark.parametrize("kind", [*INTEGERS, "bf16"])
def test_rows_that_are_to_be_alike_do_not_use_it(kind: str) -> None:
    weight = weight_of(kind, 40, 768)[0].for_alike_rows()
    x = random_rows(70, 768).bfloat16()
    found = weight.multiply(x, dtype=torch.float32)
    native.use_amx(False)
    assert torch.equal(found, weight.multiply(x, dtype=torch.float32))


def test_the_switch() -> None:
    assert not native.use_amx(False)
    assert not native.uses_amx()
    assert native.use_amx(True)
    assert native.uses_amx()


def test_zeros_and_the_largest_numbers() -> None:
    weight, exact = weight_of("q4_k", 16, 256)
    assert (from_float32(weight, torch.zeros(20, 256)) == 0).all()
    for size in (1e30, 1e-20):
        x = random_rows(20, 256) * size
        assert error(from_float32(weight, x), x.double() @ exact.T) < 1e-5
