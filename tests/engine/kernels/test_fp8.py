"""FP8 operations: every backend against the formulas in float64, with the bounds written down, and one another.

u = 2^-24 is float32's unit roundoff. e4m3 rounds a number in [2^-6, 448] within 2^-4 of itself, a smaller one
within 2^-10.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import EngineError
from engine.kernels.choice import load_backend
from engine.kernels.interface.fp8 import ACTIVATION_FLOOR, CACHE_FLOOR
from engine.memory.blocks import E4M3, BlockWeight, dequantise_rows, product
from engine.memory.layouts import IndexKeyLayout, LatentLayout
from engine.memory.planes import PagedCache, PlaneSpec
from tests.engine.kernels.test_attention import HERE

U = 2.0**-24
FORMATS = ("float", "ue8m0")
CPU = torch.device("cpu")


def gaussians(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, as activations are."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randn(*shape[:-1], 1, generator=g).mul(3).exp()
    return (torch.randn(*shape, generator=g) * sizes).to(dtype)


# ---- quantisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("width", [128, 512, 200, 16])
def test_quantise(backend: str, scale_format: str, dtype: torch.dtype, width: int) -> None:
    x = gaussians(0, 6, width, dtype=dtype)
    x[0] = 0
    x[1, 0] = 448 * 2.0**-3  # its scale is a power of two already
    values, scales = load_backend(backend).quantise(x, scale_format)  # type: ignore[arg-type]
    assert (values.dtype, values.shape, scales.dtype) == (E4M3, x.shape, torch.float32)
    assert scales.shape == (6, -(-width // 128))
    for b, part in enumerate(x.double().split(128, dim=-1)):
        exact = part.abs().amax(-1).clamp(min=ACTIVATION_FLOOR) / 448
        if scale_format == "ue8m0":
            assert torch.equal(scales[:, b].double(), torch.exp2(exact.log2().ceil()))
        else:
            assert ((scales[:, b].double() - exact).abs() <= U * exact).all()
        s = scales[:, b : b + 1].double()
        found = values[:, b * 128 : (b + 1) * 128].double()
        # within e4m3's rounding of the scaled number, which float32's division has moved by u
        assert ((found - part / s).abs() <= (2.0**-4 + U) * (part / s).abs().clamp(min=2.0**-6)).all()
        assert (found.abs() <= 448).all()
        if scale_format == "float":
            assert (found[2:].abs().amax(-1) == 448).all()  # the whole range is used
        else:
            assert (found[2:].abs().amax(-1) > 448 / 2 - 16).all()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=40),
    st.sampled_from(FORMATS),
    st.sampled_from([ACTIVATION_FLOOR, CACHE_FLOOR]),
    st.sampled_from([4, 128]),
)
def test_backends_quantise_to_the_same_bits(
    numbers: list[float], scale_format: str, floor: float, block: int
) -> None:
    x = torch.tensor([numbers])
    (values, scales), (wanted, wanted_scales) = (
        load_backend(name).quantise(x, scale_format, floor, block)  # type: ignore[arg-type]
        for name in ("torch", "reference")
    )
    assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scales, wanted_scales)


# ---- rotation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("size", [1, 2, 64, 128])
def test_hadamard(backend: str, size: int) -> None:
    """Sylvester's doubling, H_2n = [[H, H], [H, -H]]; n sums of n numbers, so n u of their absolute sum."""
    kernels = load_backend(backend)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = gaussians(1, 3, 5, size)
    exact = x.double() @ matrix.T * size**-0.5
    bound = (size + 2) * U * x.double().abs().sum(-1, keepdim=True) * size**-0.5
    assert ((kernels.hadamard(x).double() - exact).abs() <= bound).all()
    half = x.bfloat16()
    exact = half.double() @ matrix.T * size**-0.5
    error = (kernels.hadamard(half).double() - exact).abs()
    assert (error <= 2.0**-8 * exact.abs() + bound * 1.01).all()
    assert kernels.hadamard(half).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", HERE)
def test_hadamard_keeps_scores_and_is_its_own_inverse(backend: str) -> None:
    kernels = load_backend(backend)
    q, k = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(kernels.hadamard(q) @ kernels.hadamard(k).T, q @ k.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kernels.hadamard(kernels.hadamard(q)), q)


# ---- index scores -------------------------------------------------------------------------------


class Scoring:
    """Quantised index queries and keys of R requests in a paged cache, beside other planes."""

    def __init__(
        self, seed: int, requests: int, rows: int, pages: int, heads: int = 5, dim: int = 128
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.kernels = load_backend("torch")
        layout = IndexKeyLayout(dim)
        cache = PagedCache(
            requests * pages + 2, [PlaneSpec("kv", (7,), torch.uint8), layout.spec("index_key")], 2, CPU
        )
        self.plane = cache.plane(1, "index_key")
        self.block_table = torch.randperm(cache.num_pages, generator=g)[: requests * pages].view(
            requests, pages
        )
        self.positions = torch.randint(0, pages * 64, (requests, rows), generator=g)
        self.keys = torch.randn(requests, pages * 64, dim, generator=g)
        self.k8, k_scales = self.kernels.quantise(self.keys, "ue8m0")
        self.k_scales = k_scales.squeeze(-1)
        for r in range(requests):
            at = torch.arange(pages * 64)
            layout.write(self.plane, self.block_table[r][at // 64], at % 64, self.k8[r], self.k_scales[r])
        query = torch.randn(requests, rows, heads, dim, generator=g)
        self.q8, q_scales = self.kernels.quantise(query, "ue8m0")
        self.head_weights = torch.randn(requests, rows, heads, generator=g) * q_scales.squeeze(-1)


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(1, 3, 2), (3, 1, 1), (1, 1, 3)]))
def test_index_scores(backend: str, seed: int, shape: tuple[int, int, int]) -> None:
    """Sums of d products, then of H terms, in float32: off by less than (d + H + 3) u of all absolute terms."""
    case = Scoring(seed, *shape)
    scores = load_backend(backend).index_scores_fp8(
        case.q8, case.head_weights, case.plane, case.block_table, case.positions
    )
    q, k = case.q8.double(), case.k8.double()
    w, s = case.head_weights.double(), case.k_scales.double().unsqueeze(1)
    exact = torch.einsum("rqh,rqhc->rqc", w, torch.relu(torch.einsum("rqhd,rcd->rqhc", q, k))) * s
    terms = torch.einsum("rqh,rqhc->rqc", w.abs(), torch.einsum("rqhd,rcd->rqhc", q.abs(), k.abs())) * s
    future = torch.arange(k.shape[1]) > case.positions.unsqueeze(-1)
    assert (scores[future] == -math.inf).all()
    bound = (q.shape[-1] + q.shape[-2] + 3) * U * terms
    assert ((scores.double() - exact).abs() <= bound)[~future].all()


# ---- products with FP8 weights ------------------------------------------------------------------


def block_weight(seed: int, rows: int, columns: int, powers: bool) -> BlockWeight:
    g = torch.Generator().manual_seed(seed)
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=g) * 0.01 + 1e-3
    if powers:
        scales = torch.exp2(scales.log2().ceil())
    return BlockWeight((torch.randn(rows, columns, generator=g) * 100).clamp(-448, 448).to(E4M3), scales)


def exact_weight(weight: BlockWeight) -> Tensor:
    """In float64, block by block."""
    out = weight.values.double()
    for i in range(weight.scales.shape[0]):
        for j in range(weight.scales.shape[1]):
            out[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= weight.scales[i, j].double()
    return out


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("shape", [(128, 128), (576, 384), (130, 257), (5, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_dequantised_to_the_nearest_number(
    shape: tuple[int, int], dtype: torch.dtype, powers: bool
) -> None:
    """No neighbour of the result is nearer to the exact product; with power-of-two scales it *is* the product."""
    weight = block_weight(3, *shape, powers)
    exact, found = exact_weight(weight), weight.dequantise(dtype)
    assert found.dtype == dtype
    error = (found.double() - exact).abs()
    up = torch.nextafter(found, torch.full_like(found, math.inf)).double()
    down = torch.nextafter(found, torch.full_like(found, -math.inf)).double()
    assert (error <= (up - exact).abs()).all()
    assert (error <= (down - exact).abs()).all()
    if powers:
        assert error.max() == 0


def test_a_product_beside_the_middle_of_two_bfloat16_numbers_is_not_rounded_twice() -> None:
    """Scales that bring each e4m3 mantissa next to each middle; float32 lands on it, and bfloat16 then errs."""
    mantissas = torch.arange(8, 16) / 8
    middles = 1 + (2 * torch.arange(128) + 1) * 2.0**-8
    scales = (middles.double() / mantissas.double().unsqueeze(1)).float()
    scales = torch.stack((scales, scales.nextafter(scales * 0), scales.nextafter(scales * 2)))
    values = mantissas.view(1, 8, 1).expand_as(scales)
    exact = values.double() * scales.double()

    def errs(found: Tensor) -> Tensor:
        bits = found.view(torch.int16)
        neighbours = torch.stack(((bits - 1).view(torch.bfloat16), (bits + 1).view(torch.bfloat16)))
        return ((found.double() - exact).abs() > (neighbours.double() - exact).abs().amin(0)).sum()

    assert errs((values * scales).bfloat16()) > 0
    assert errs(product(values.to(E4M3), scales, torch.bfloat16)) == 0


def test_several_weights_of_one_shape() -> None:
    ones = [block_weight(seed, 130, 200, False) for seed in range(3)]
    several = BlockWeight(
        torch.stack([one.values for one in ones]), torch.stack([one.scales for one in ones])
    )
    assert several.shape == (3, 130, 200)
    assert several.num_bytes == 3 * (130 * 200 + 4 * 2 * 2)
    for i, one in enumerate(ones):
        assert torch.equal(several.dequantise(torch.bfloat16)[i], one.dequantise(torch.bfloat16))
        assert torch.equal(several[i].dequantise(torch.float32), one.dequantise(torch.float32))
    picked = several[torch.tensor([2, 0])].dequantise(torch.float32)
    assert torch.equal(picked[0], ones[2].dequantise(torch.float32))


def test_scales_must_fit() -> None:
    with pytest.raises(EngineError, match=r"shape \[130, 200\] has scales of shape \[1, 2\].* \[2, 2\]"):
        BlockWeight(torch.zeros(130, 200).to(E4M3), torch.ones(1, 2))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(192, 256), (576, 200)])
def test_linear(backend: str, scale_format: str, rows: int, columns: int) -> None:
    """Against the product of the dequantised operands: in + 2 roundings of float32 of all absolute terms."""
    kernels, weight = load_backend(backend), block_weight(5, rows, columns, False)
    x = gaussians(6, 4, columns)
    values, scales = kernels.quantise(x, scale_format)  # type: ignore[arg-type]
    x64 = values.double() * scales.double().repeat_interleave(128, -1)[:, :columns]
    w64 = exact_weight(weight)
    found = kernels.linear_fp8(x, weight, scale_format).double()  # type: ignore[arg-type]
    bound = (columns + 4) * U * (x64.abs() @ w64.abs().T)
    assert ((found - x64 @ w64.T).abs() <= bound).all()
    assert kernels.linear_fp8(x.bfloat16(), weight, scale_format).dtype == torch.bfloat16  # type: ignore[arg-type]


# ---- layouts ------------------------------------------------------------------------------------


def test_the_published_sizes() -> None:
    assert LatentLayout(512, 64).token_bytes == 656
    assert IndexKeyLayout(128).token_bytes == 132
    assert IndexKeyLayout(128).spec("index_key").page_bytes == 64 * 132
    with pytest.raises(EngineError, match="index key of 256 numbers"):
        IndexKeyLayout(256)


def test_a_latent_byte_by_byte() -> None:
    """[512 e4m3][4 float32][64 bfloat16], little-endian as FlashMLA reads it."""
    x = gaussians(7, 3, 512)
    rope = gaussians(8, 3, 64, dtype=torch.bfloat16)
    values, scales = load_backend("torch").quantise(x, "ue8m0", CACHE_FLOOR)
    packed = LatentLayout(512, 64).pack(values, scales, rope)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, 656))
    for t in range(3):
        raw = bytes(packed[t].tolist())
        assert raw[:512] == bytes(values[t].view(torch.uint8).tolist())
        assert raw[512:528] == scales[t].numpy().tobytes()
        assert raw[528:] == rope[t].view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (32, 8), (200, 6), (33, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_latent_comes_back_as_it_was_quantised(rank: int, rope: int, dtype: torch.dtype) -> None:
    layout = LatentLayout(rank, rope)
    x, k_rope = gaussians(9, 5, rank), gaussians(10, 5, rope, dtype=torch.bfloat16)
    values, scales = load_backend("torch").quantise(x, "ue8m0", CACHE_FLOOR)
    cache = PagedCache(3, [PlaneSpec("odd", (1,), torch.uint8), layout.spec("latent")], 2, CPU)
    pages, offsets = torch.tensor([2, 0, 0, 1, 2]), torch.tensor([63, 0, 1, 5, 0])
    cache.write(1, "latent", pages, offsets, layout.pack(values, scales, k_rope))
    found = layout.unpack(cache.plane(1, "latent")[pages, offsets], dtype)
    assert torch.equal(found[:, :rank], dequantise_rows(values, scales, dtype))
    assert torch.equal(found[:, rank:], k_rope.to(dtype))
    assert int(cache.plane(0, "latent").sum()) == 0


def test_index_keys_byte_by_byte() -> None:
    """A page is 64 x 128 bytes of e4m3, then 64 float32 scales."""
    layout, kernels = IndexKeyLayout(128), load_backend("torch")
    cache = PagedCache(2, [layout.spec("index_key")], 1, CPU)
    plane = cache.plane(0, "index_key")
    values, scales = kernels.quantise(gaussians(11, 3, 128), "ue8m0")
    pages, offsets = torch.tensor([1, 1, 0]), torch.tensor([0, 63, 7])
    layout.write(plane, pages, offsets, values, scales.squeeze(-1))
    for t, (page, offset) in enumerate(zip(pages.tolist(), offsets.tolist(), strict=True)):
        raw = bytes(plane[page].flatten().tolist())
        assert len(raw) == 64 * 132
        assert raw[offset * 128 : (offset + 1) * 128] == bytes(values[t].view(torch.uint8).tolist())
        at = 64 * 128 + 4 * offset
        assert raw[at : at + 4] == scales[t].numpy().tobytes()
    keys, key_scales = layout.read(plane, torch.tensor([[1], [0]]))
    assert keys.shape == (2, 1, 64, 128)
    assert torch.equal(keys[0, 0, 63].float(), values[1].float())
    assert float(key_scales[1, 0, 7]) == float(scales[2])
    assert int((plane != 0).sum()) <= 3 * 132
