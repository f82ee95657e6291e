"""The rows of latent attention against norms, `rotate`, `LatentFormat` and `IndexFormat`, step by step in torch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from engine.attention.indexer import IndexQueries
from engine.attention.precision import IndexFormat, LatentFormat
from engine.errors import EngineError
from engine.kernels.reference.attention import ReferenceKernels
from engine.kernels.triton.index_key import KeyForm, queries, store_keys
from engine.kernels.triton.latent_rows import IndexKeyPart, IndexQueryPart, rotate_queries, store_tokens
from engine.layers.norm import layer_norm, rms_norm
from engine.layers.rope import RotaryTable, rotate
from engine.memory.layouts import IndexKeyLayout, LatentLayout
from engine.memory.planes import PagedCache

EPS = 1e-6
SLOTS = [0, 63, 64, 130, 127, 255, 200]
PAGES = [3, 1, 0, 2]


class Case(NamedTuple):
    """A layer's sizes and forms."""

    rank: int
    rope: int
    heads: int
    nope: int
    latent: int | None = None
    fp8: bool = False
    interleaved: bool = True
    index_form: KeyForm | None = None
    index_heads: int = 4
    index_dim: int = 16
    index_interleaved: bool = False


CASES = [
    Case(512, 64, 5, 16, latent=1536, fp8=True, index_form="fp8", index_heads=20, index_dim=128),
    Case(32, 8, 40, 16, latent=40, index_form="plain"),
    Case(200, 8, 3, 12, latent=136, fp8=True, interleaved=False, index_form="fp8", index_interleaved=True),
    Case(30, 6, 4, 16, fp8=True),
    Case(33, 64, 2, 1),
]
V32 = CASES[0]


class Operands(NamedTuple):
    """One product of the hidden state, one of the query's latent, and where rows lie."""

    kv: Tensor
    latent: Tensor
    key: Tensor
    query: Tensor
    index_query: Tensor
    head_weights: Tensor
    norm: Tensor
    latent_norm: Tensor
    key_norm: Tensor
    key_bias: Tensor
    rotary: RotaryTable
    index_rotary: RotaryTable
    positions: Tensor
    pages: Tensor
    offsets: Tensor


def operands(case: Case, device: torch.device, dtype: torch.dtype) -> Operands:
    generator = torch.Generator().manual_seed(case.rank)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    rows, latent = len(SLOTS), case.latent or 0
    hidden = made(rows, case.rank + case.rope + latent + case.index_dim)
    kv, q_latent, key = hidden.split([case.rank + case.rope, latent, case.index_dim], dim=1)
    kv[2] *= 1e-5  # below what the floor of scales distinguishes
    wide = case.heads * (case.nope + case.rope)
    second = made(rows, wide + case.index_heads * case.index_dim)
    query, index_query = second.split([wide, case.index_heads * case.index_dim], dim=1)
    return Operands(
        kv, q_latent, key, query.view(rows, case.heads, -1), index_query,
        made(rows, case.index_heads).float(), made(case.rank), made(latent), made(case.index_dim),
        made(case.index_dim) * 0.1, RotaryTable(case.rope, 1e4, 300, device=device),
        RotaryTable(case.index_dim // 2, 1e4, 300, device=device), torch.tensor(SLOTS, device=device).int(),
        torch.tensor([PAGES[slot // 64] for slot in SLOTS], device=device),
        torch.tensor([slot % 64 for slot in SLOTS], device=device),
    )  # fmt: skip


def formats(case: Case, dtype: torch.dtype) -> tuple[LatentFormat, IndexFormat]:
    return (
        LatentFormat(LatentLayout(case.rank, case.rope), "fp8" if case.fp8 else dtype, dtype),
        IndexFormat(case.index_dim, "fp8" if case.index_form == "fp8" else dtype),
    )


def planes(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Poisoned, of one cache."""
    latent, index = formats(case, dtype)
    cache = PagedCache(len(PAGES), [latent.spec, index.spec(frozenset({0}))], 1, device)
    both = cache.plane(0, "latent"), cache.plane(0, "index_key")
    for plane in both:
        plane.fill_(77 if plane.dtype is torch.uint8 else torch.nan)
    return both


def key_part(case: Case, p: Operands, plane: Tensor, rows: slice = slice(None)) -> IndexKeyPart | None:
    if case.index_form is None:
        return None
    return IndexKeyPart(
        p.key[rows],
        p.key_norm,
        p.key_bias,
        EPS,
        p.index_rotary.all(),
        plane,
        case.index_form,
        case.index_interleaved,
    )


def store(
    case: Case, p: Operands, plane: Tensor, index_plane: Tensor, rows: slice = slice(None)
) -> Tensor | None:
    """Run the kernel."""
    latent = None if case.latent is None else (p.latent[rows], p.latent_norm, EPS)
    return store_tokens(
        p.kv[rows], p.norm, EPS, p.rotary.all(), p.positions[rows], p.pages[rows], p.offsets[rows], plane,
        interleaved=case.interleaved, query_latent=latent, index=key_part(case, p, index_plane, rows),
    )  # fmt: skip


def store_plainly(case: Case, p: Operands, plane: Tensor, index_plane: Tensor, kept: Tensor) -> None:
    latent, index = formats(case, p.kv.dtype)
    kernels = ReferenceKernels()
    turns = p.rotary.at(p.positions[kept])
    kv = p.kv[kept]
    key = rotate(kv[:, case.rank :].unsqueeze(1), turns, interleaved=case.interleaved).squeeze(1)
    cached = torch.cat((rms_norm(kv[:, : case.rank], p.norm, EPS), key), dim=-1)
    at = p.pages[kept], p.offsets[kept]
    plane[at] = latent.pack(cached, kernels)
    if case.index_form is not None:
        keys = layer_norm(p.key[kept], p.key_norm, p.key_bias, EPS)
        turns = p.index_rotary.at(p.positions[kept])
        keys = rotate(keys.unsqueeze(1), turns, interleaved=case.index_interleaved).squeeze(1)
        index.write(index_plane, *at, keys, kernels)


def numbers(case: Case, plane: Tensor, index_plane: Tensor) -> tuple[Tensor, Tensor]:
    """What the planes hold, [pages, 64, numbers] float32 each."""
    latent, _ = formats(case, torch.float32)
    keys = index_plane.float()
    if case.index_form == "fp8":
        values, scales = IndexKeyLayout(case.index_dim).read(
            index_plane, torch.arange(len(PAGES)).to(plane.device)
        )
        keys = values.float() * scales.unsqueeze(-1)
    return latent.unpack(plane).float(), keys


def same(ours: Tensor, theirs: Tensor, dtype: torch.dtype, fp8: bool) -> None:
    """Equal, but for the last digits before rounding: few numbers may fall on the other side of a step."""
    exact = 5e-6 if dtype is torch.float32 else 2.0**-6
    step = 1 / 15 if fp8 else 0.0
    torch.testing.assert_close(ours, theirs, rtol=exact + step, atol=exact + step * 0.3, equal_nan=True)
    if dtype is torch.float32:
        assert (ours - theirs).abs().nan_to_num().gt(1e-5).float().mean() < 0.01


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("padded", [[], [1, 4, 6]], ids=["all", "padding"])
def test_tokens(case: Case, padded: list[int], device: torch.device, dtype: torch.dtype) -> None:
    p = operands(case, device, dtype)
    p.positions[padded] = -1
    p.pages[padded] = -(10**9)  # far outside
    kept = p.positions >= 0
    ours, theirs = planes(case, device, dtype), planes(case, device, dtype)
    normed = store(case, p, *ours)
    store_plainly(case, p, *theirs, kept)
    at = p.pages[kept], p.offsets[kept]
    mine, plain = numbers(case, *ours), numbers(case, *theirs)
    same(mine[0][at], plain[0][at], dtype, case.fp8)
    if case.index_form is not None:
        same(mine[1][at], plain[1][at], dtype, case.index_form == "fp8")
    elsewhere = torch.ones(len(PAGES), 64, dtype=torch.bool, device=device)
    elsewhere[at] = False
    poison = planes(case, device, dtype)
    assert torch.equal(
        ours[0][elsewhere].float().nan_to_num(nan=77.0), poison[0][elsewhere].float().nan_to_num(nan=77.0)
    )
    rest, poison_rest = (
        mine[1][elsewhere].nan_to_num(nan=7.0),
        numbers(case, *poison)[1][elsewhere].nan_to_num(nan=7.0),
    )
    assert torch.equal(rest, poison_rest)
    if case.latent is None:
        assert normed is None
    else:
        assert normed is not None
        same(normed, rms_norm(p.latent, p.latent_norm, EPS), dtype, False)


def test_scales_and_keys_are_those_of_the_plain_path_to_the_byte(device: torch.device) -> None:
    """In float32 only e4m3 numbers at the edge of a step may differ; powers of two and rotated keys do not."""
    p = operands(V32, device, torch.float32)
    ours, theirs = planes(V32, device, torch.float32), planes(V32, device, torch.float32)
    store(V32, p, *ours)
    store_plainly(V32, p, *theirs, p.positions >= 0)
    at = p.pages, p.offsets
    assert torch.equal(ours[0][at][:, 512:], theirs[0][at][:, 512:])
    assert (ours[0][at] != theirs[0][at]).float().mean() < 0.002


@pytest.mark.parametrize("case", CASES, ids=str)
def test_queries(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    p = operands(case, device, dtype)
    p.positions[3] = -1
    before, kept = p.query.clone(), p.positions >= 0
    absorbed = torch.full((len(SLOTS), case.heads, case.rank + case.rope), 7.0, dtype=dtype, device=device)
    scale = case.index_heads**-0.5 * case.index_dim**-0.5
    part = None
    if case.index_form is not None:
        part = IndexQueryPart(
            p.index_query,
            p.head_weights,
            scale,
            p.index_rotary.all(),
            case.index_form,
            case.index_interleaved,
        )
    made = rotate_queries(
        p.query,
        p.positions,
        p.rotary.all(),
        interleaved=case.interleaved,
        turned=absorbed[..., case.rank :],
        index=part,
    )
    turned = rotate(
        before[kept][..., case.nope :], p.rotary.at(p.positions[kept]), interleaved=case.interleaved
    )
    assert torch.equal(p.query[..., : case.nope], before[..., : case.nope])
    assert torch.equal(p.query[3], before[3])
    assert absorbed[3].eq(7.0).all()
    assert absorbed[..., : case.rank].eq(7.0).all()
    exact = 1e-6 if dtype is torch.float32 else 2.0**-7
    torch.testing.assert_close(p.query[kept][..., case.nope :], turned, rtol=exact, atol=exact)
    assert torch.equal(absorbed[kept][..., case.rank :], p.query[kept][..., case.nope :])
    if case.index_form is None:
        assert made is None
        return
    assert made is not None
    index_query, weights = made
    heads = p.index_query[kept].view(-1, case.index_heads, case.index_dim)
    heads = rotate(heads, p.index_rotary.at(p.positions[kept]), interleaved=case.index_interleaved)
    plain = formats(case, dtype)[1].queries(
        IndexQueries(heads, p.head_weights[kept] * scale), ReferenceKernels()
    )
    torch.testing.assert_close(
        weights[kept], plain.head_weights, rtol=1e-6 if dtype is torch.float32 else 2e-2, atol=1e-9
    )
    same(index_query[kept].float(), plain.query.float(), dtype, case.index_form == "fp8")


def test_the_joint_launches_have_the_bits_of_the_single_ones(
    device: torch.device, dtype: torch.dtype
) -> None:
    p = operands(V32, device, dtype)
    ours, theirs = planes(V32, device, dtype), planes(V32, device, dtype)
    store(V32, p, *ours)
    store_keys(
        p.key,
        p.key_norm,
        p.key_bias,
        EPS,
        p.index_rotary.all(),
        p.positions,
        p.pages,
        p.offsets,
        theirs[1],
        "fp8",
    )
    assert torch.equal(ours[1], theirs[1])
    part = IndexQueryPart(p.index_query, p.head_weights, 0.1, p.index_rotary.all(), "fp8")
    made = rotate_queries(p.query.clone(), p.positions, p.rotary.all(), interleaved=True, index=part)
    alone, weights = queries(p.index_query, p.head_weights, 0.1, p.index_rotary.all(), p.positions, "fp8")
    assert made is not None
    assert torch.equal(made[0].view(torch.uint8), alone.view(torch.uint8))
    assert torch.equal(made[1], weights)


def test_a_row_has_the_same_bits_again_and_in_other_company(device: torch.device, dtype: torch.dtype) -> None:
    p = operands(V32, device, dtype)
    both = [planes(V32, device, dtype) for _ in range(2)]
    whole = store(V32, p, *both[0])
    for row in (5, 0, 3, 2, 1, 6, 4):
        alone = store(V32, p, *both[1], slice(row, row + 1))
        assert alone is not None
        assert whole is not None
        assert torch.equal(alone, whole[row : row + 1])
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)


def test_no_row(device: torch.device) -> None:
    p = operands(V32, device, torch.float32)
    ours = planes(V32, device, torch.float32)
    normed = store(V32, p, *ours, slice(0, 0))
    assert normed is not None
    assert normed.shape == (0, 1536)
    assert rotate_queries(p.query[:0], p.positions[:0], p.rotary.all(), interleaved=True) is None


def test_a_plane_of_other_tokens_is_refused(device: torch.device) -> None:
    p = operands(V32, device, torch.float32)
    wrong = torch.zeros(4, 64, 640, dtype=torch.uint8, device=device)
    with pytest.raises(EngineError, match="are not for latents of 512 \\+ 64"):
        store(V32, p, wrong, wrong)
    with pytest.raises(EngineError, match="64 rotated dims"):
        rotate_queries(p.query, p.positions, p.rotary.all(), interleaved=True, turned=p.query)
