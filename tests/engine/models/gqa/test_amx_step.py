"""Whole steps with AMX: hidden states are as near to float32 over the same weights as those of steps without it."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import pytest

from engine.kernels import native
from tests.engine.kit import tiny_checkpoint
from tests.engine.models.gqa.test_gguf import convert
from tests.engine.models.gqa.test_native import Form, Forms, Rows, error

pytestmark = pytest.mark.skipif(not native.uses_amx(), reason="this processor has no AMX, or may not use it")

# Whole blocks of rows and the rest; the last part of a step too short for AMX; requests side by side.
CASES: list[list[Rows]] = [
    [(0, 0, 64, None)],
    [(0, 300, 100, None)],
    [(0, 0, 259, None)],
    [(0, 100, 20, None), (1, 599, 1, None), (2, 37, 270, None), (3, 10, 3, None)],
]


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    library = native.library()
    assert library is not None
    threads = library.dsa_threads()
    assert native.use_amx(True)
    yield
    native.use_amx(True)
    native.set_threads(threads)


@pytest.fixture(scope="module", params=["Q4_1", "Q8_0", "BF16"])
def forms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Form, Form]:
    """A model over the weights of a GGUF file: in float32, and as the kernels compute it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_checkpoint(
        folder, hidden_size=96, intermediate_size=160, num_attention_heads=6, num_key_value_heads=2, head_dim=32,
        initializer_range=0.1,
    )  # fmt: skip
    path = convert(model, folder / "model.gguf", kind=gguf.GGMLQuantizationType[request.param])
    return Form(path, "float32"), Form(path, "bfloat16", fast=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_as_near_to_float32_as_without_amx(
    forms: tuple[Form, Form], threads: int, case: list[Rows]
) -> None:
    exact, form = forms
    assert "with AMX" in form.built.kernels
    native.set_threads(threads)
    expected, found = exact.hidden(case), form.hidden(case)
    native.use_amx(False)
    without = form.hidden(case)
    # Both round queries, keys and values to bfloat16.
    assert error(found, expected) < 1.1 * error(without, expected)
    assert 0 < error(found, without) < 0.01


# Blocks of rows that unite what they select: contexts longer than it by little or much, beside dense rows and decodes. Of 16
# tokens each, rows have too few in common to unite.
SPARSE: list[list[Rows]] = [
    [(0, 300, 100, 100)],
    [(0, 0, 259, 64)],
    [(0, 500, 99, 130), (1, 599, 1, 64), (2, 37, 270, 150), (3, 580, 20, 300)],
    [(0, 350, 200, 16)],
]


@pytest.fixture(
    scope="module", params=[{}, {"kind": "mistral", "sliding_window": 150}], ids=["all", "windows"]
)
def sparse(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    """A model with an indexer whose keys are integers."""
    return Forms(tmp_path_factory.mktemp("sparse"), "int8", **request.param)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", SPARSE)
def test_sparse_rows_are_as_near_to_float32_as_without_amx(
    sparse: Forms, threads: int, case: list[Rows]
) -> None:
    native.set_threads(threads)
    expected, found = sparse.exact.hidden(case), sparse.native.hidden(case)
    native.use_amx(False)
    without = sparse.native.hidden(case)
    # Rounding may change which of two nearly equal tokens is selected: so both are held against float32.
    assert error(found, expected) < 1.1 * error(without, expected)
    assert error(found, without) > 0
    native.use_amx(True)
    fewer = [(number, start, rows, k and k // 2) for number, start, rows, k in case]
    assert error(sparse.native.hidden(fewer), expected) > 1.2 * error(found, expected)
