"""Products with weights in FP8 blocks against the definition."""

from __future__ import annotations

import pytest
import torch

from engine.errors import EngineError
from engine.kernels.torchops.fp8 import VectorisedFp8
from engine.kernels.triton.fp8_product import (
    ProductTile,
    _library_has_blocks,
    library_serves,
    linear_fp8,
    stack_rows,
    tile_of,
)
from engine.kernels.triton.quantise import SUMS, quantise_rows
from engine.memory.blocks import BlockWeight
from tests.engine.kernels.triton.kit import random_blocks


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Sums in another order, and on a GPU the matrix unit's own sums of 128 products: it cuts each addend off 13 bits after the
    point of the largest, so that a sum of as many can be wrong by 2^-11 of it, as 9e-4 of 4.0 was seen to be.
    """
    tolerance = 2.0**-11 if ours.is_cuda else 1e-6
    if ours.dtype is torch.bfloat16:
        tolerance = 2.0**-7
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 128, 128), (3, 200, 300), (20, 256, 1024), (70, 130, 256)]
)
def test_product(
    device: torch.device, dtype: torch.dtype, rows: int, outputs: int, inputs: int, splits: int
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(rows, inputs, generator=generator).to(device, dtype)
    weight = random_blocks(generator, outputs, inputs, device=device)
    wanted = VectorisedFp8().linear_fp8(x, weight, "ue8m0")
    close(linear_fp8(x, weight), wanted)
    ready = quantise_rows(x)
    for _ in range(2):  # the first leaves `turns` as it was
        made = linear_fp8(ready, weight, tile=ProductTile(16, 3, 4, splits))
        close(made, wanted)
        assert not ready.turns.any()
    for row in (0, rows - 1):
        assert torch.equal(
            linear_fp8(x[row : row + 1], weight, tile=ProductTile(16, 3, 4, splits))[0], made[row]
        )


@pytest.mark.parametrize("rows", [63, 64, 70, 128])
def test_many_rows(device: torch.device, rows: int) -> None:
    """The library's product where there is one, whose rows come by fours; in a graph, too."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 512, generator=generator).to(device, dtype)
    weight = random_blocks(generator, 208, 512, device=device)
    assert library_serves(rows, weight, dtype) == (rows >= 64 and _library_has_blocks())
    assert not library_serves(rows, random_blocks(generator, 208, 640, device=device), dtype)
    wanted = VectorisedFp8().linear_fp8(x, weight, "ue8m0")
    out = torch.empty_like(wanted)
    made = linear_fp8(x, weight, out=out)
    assert made is out
    close(made, wanted)
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            linear_fp8(x, weight, out=out)
        out.zero_()
        graph.replay()
        close(out, wanted)


def test_float_scales(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 256, generator=generator).to(device, dtype)
    weight = random_blocks(generator, 128, 256, device=device)
    close(linear_fp8(x, weight, "float"), VectorisedFp8().linear_fp8(x, weight, "float"))
    assert not torch.equal(linear_fp8(x, weight, "float"), linear_fp8(x, weight))


def test_no_rows(device: torch.device) -> None:
    weight = random_blocks(torch.Generator().manual_seed(0), 256, 128, device=device)
    assert linear_fp8(torch.empty(0, 128, device=device), weight).shape == (0, 256)


def test_parts_depend_on_the_weight_alone() -> None:
    assert len({tile_of(rows, 2112, 7168).splits for rows in range(1, 65)}) == 1
    assert tile_of(1, 128, 128).splits == 1
    assert tile_of(64, 2112, 7168).splits * 17 <= SUMS


def test_stack(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (random_blocks(generator, rows, 256, device=device) for rows in (256, 72))
    x = torch.randn(2, 256, generator=generator).to(device)
    both = linear_fp8(x, stack_rows([first, second]))
    assert torch.equal(both, torch.cat((linear_fp8(x, first), linear_fp8(x, second)), dim=1))
    with pytest.raises(EngineError, match="put it last"):
        stack_rows([second, first])
    narrow = random_blocks(generator, 128, 128, device=device)
    with pytest.raises(EngineError, match="same number of columns"):
        stack_rows([first, narrow])


def test_stack_of_many(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [random_blocks(generator, 3, 128, 256, device=device) for _ in range(2)]
    whole = stack_rows(parts)
    assert isinstance(whole, BlockWeight)
    assert whole.shape == (3, 256, 256)
    assert torch.equal(whole[1].dequantise(torch.float32)[128:], parts[1][1].dequantise(torch.float32))
