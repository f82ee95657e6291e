"""Conformance of Triton's pointwise kernels and of sampling: operands, and each kernel against plain torch.

Triton must be installed. The tests run more cases than `dsa doctor`, which takes `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.precision import IndexFormat
from engine.kernels.reference.attention import ReferenceKernels
from engine.kernels.triton.gate import silu_times
from engine.kernels.triton.index_key import KeyForm, queries, store_keys
from engine.kernels.triton.low_rank import Correction, add_low_rank
from engine.kernels.triton.norm import add_rms_norm
from engine.kernels.triton.rotation import rotate_and_store
from engine.kernels.triton.sampling import DrawRows, Draws, draw, remember
from engine.layers.low_rank import LowRank
from engine.layers.norm import layer_norm, rms_norm
from engine.layers.rope import RotaryTable, rotate
from engine.memory.layouts import IndexKeyLayout, Int8KeyLayout
from engine.memory.planes import PagedCache, PlaneSpec
from engine.plan.types import SampleSpec
from engine.protocol import SamplingParams
from engine.step.device_sampler import needs_of, rows_of
from engine.step.masking import TokenMasks
from engine.step.sampler import sample
from lab.doctor.tiles import ConformanceError, must_be_close, must_be_equal

EPS = 1e-6
PAGES = [3, 1, 0, 2]
"""The order of the pages of a cache in these cases."""


def norm_operands(
    device: torch.device, dtype: torch.dtype, rows: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, update, weight) of so many rows of `size` numbers."""
    generator = torch.Generator().manual_seed(rows + size)
    x, update, weight = (
        torch.randn(*shape, generator=generator) for shape in ((rows, size), (rows, size), (size,))
    )
    return x.to(device, dtype), update.to(device, dtype), weight.to(device, dtype)


def low_rank_operands(
    device: torch.device, dtype: torch.dtype, rows: int, inputs: int, rank: int, outputs: int
) -> tuple[Tensor, Tensor, LowRank]:
    """(y, x, the adapter)."""
    generator = torch.Generator().manual_seed(rows * inputs + rank)
    y, x, a, b = (
        torch.randn(*shape, generator=generator).to(device, dtype)
        for shape in ((rows, outputs), (rows, inputs), (rank, inputs), (outputs, rank))
    )
    return y, x, LowRank(a * inputs**-0.5, b)


def correction(x: Tensor, fix: LowRank, flags: Tensor) -> Correction:
    """With the short product as it stands beside other numbers."""
    beside = F.pad(x @ fix.a.T, (3, 2), value=torch.nan)
    return Correction(beside[:, 3:-2], fix.b, flags)


class RotationCase(NamedTuple):
    """One layer's shapes, and what it has."""

    heads: int
    kv_heads: int
    dim: int
    rotated: int
    bias: bool = False
    norms: bool = False


ROTATIONS = [
    RotationCase(9, 3, 64, 64),
    RotationCase(12, 2, 128, 128, bias=True),
    RotationCase(8, 2, 128, 128, norms=True),
    RotationCase(4, 4, 80, 32, bias=True, norms=True),
    RotationCase(5, 1, 6, 6),
]


class RotationOperands(NamedTuple):
    """What a call takes."""

    product: Tensor
    positions: Tensor
    pages: Tensor
    offsets: Tensor
    table: RotaryTable
    bias: Tensor | None
    norms: tuple[Tensor, Tensor] | None


def rotation_operands(case: RotationCase, device: torch.device, dtype: torch.dtype) -> RotationOperands:
    """Rows on both sides of a page's edge."""
    generator = torch.Generator().manual_seed(case.dim)
    slots = [0, 63, 64, 128, 127, 255, 200]
    width = (case.heads + 2 * case.kv_heads) * case.dim

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return RotationOperands(
        product=made(len(slots), width),
        positions=torch.tensor([0, 63, 64, 128, 127, 255, 299], device=device),
        pages=torch.tensor([PAGES[slot // 64] for slot in slots], device=device),
        offsets=torch.tensor([slot % 64 for slot in slots], device=device),
        table=RotaryTable(case.rotated, 1e4, 300, device=device),
        bias=made(width) if case.bias else None,
        norms=(made(case.dim), made(case.dim)) if case.norms else None,
    )


def rotation_plane(case: RotationCase, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A poisoned plane, of a cache that has another before it."""
    shape = (case.kv_heads, 2, case.dim)
    cache = PagedCache(
        len(PAGES), [PlaneSpec("other", (3,), dtype), PlaneSpec("kv", shape, dtype)], 1, device
    )
    plane = cache.plane(0, "kv")
    plane.fill_(torch.nan)
    return plane


def rotated(case: RotationCase, p: RotationOperands) -> tuple[Tensor, Tensor]:
    """Queries [T, Hkv, G, D] and what the plane holds of each row [T, Hkv, 2, D]."""
    product = p.product if p.bias is None else p.product + p.bias
    heads = product.view(len(product), -1, case.dim)
    query, key, value = torch.split(heads, [case.heads, case.kv_heads, case.kv_heads], dim=1)
    if p.norms is not None:
        query, key = rms_norm(query, p.norms[0], EPS), rms_norm(key, p.norms[1], EPS)
    rotation = p.table.at(p.positions)
    query, key = rotate(query, rotation), rotate(key, rotation)
    return query.reshape(len(product), case.kv_heads, -1, case.dim), torch.stack((key, value), dim=2)


def run_rotation(p: RotationOperands, plane: Tensor, rows: slice = slice(None)) -> Tensor:
    """Run the kernel; return the queries."""
    return rotate_and_store(
        p.product[rows], p.positions[rows], p.pages[rows], p.offsets[rows], p.table.all(), plane,
        bias=p.bias, head_norms=p.norms, eps=EPS,
    )  # fmt: skip


KEY_SLOTS = [0, 63, 64, 79, 128, 127, 255, 17, 200]


class KeyCase(NamedTuple):
    """The indexer's shapes."""

    form: KeyForm
    heads: int
    dim: int
    rope: int
    interleaved: bool = False


KEYS = [
    KeyCase("plain", 4, 64, 32),
    KeyCase("plain", 3, 48, 48, interleaved=True),
    KeyCase("int8", 4, 64, 32),
    KeyCase("int8", 2, 100, 20, interleaved=True),
    KeyCase("fp8", 4, 128, 64),
    KeyCase("fp8", 64, 128, 64, interleaved=True),
    KeyCase("fp8", 5, 16, 16),
]


class KeyOperands(NamedTuple):
    """What the calls take."""

    key: Tensor
    query: Tensor
    head_weights: Tensor
    weight: Tensor
    bias: Tensor
    table: RotaryTable
    positions: Tensor
    pages: Tensor
    offsets: Tensor


def key_operands(case: KeyCase, device: torch.device, dtype: torch.dtype) -> KeyOperands:
    """Rows on both sides of pages' edges, one of them of zeros."""
    generator = torch.Generator().manual_seed(case.dim + case.heads)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    key, query = made(len(KEY_SLOTS), case.dim), made(len(KEY_SLOTS), case.heads * case.dim)
    key[3], query[3] = 0.0, 0.0  # scales of nothing
    return KeyOperands(
        key=key,
        query=query,
        head_weights=made(len(KEY_SLOTS), case.heads).float(),
        weight=made(case.dim),
        bias=made(case.dim) * 0.1,
        table=RotaryTable(case.rope, 1e4, 300, device=device),
        positions=torch.tensor(KEY_SLOTS, device=device),
        pages=torch.tensor([PAGES[slot // 64] for slot in KEY_SLOTS], device=device),
        offsets=torch.tensor([slot % 64 for slot in KEY_SLOTS], device=device),
    )


def key_plane(case: KeyCase, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A poisoned plane."""
    if case.form == "plain":
        spec = PlaneSpec("index_key", (case.dim,), dtype)
    else:
        spec = PlaneSpec("index_key", (case.dim + 4,), torch.uint8)
    plane = PagedCache(4, [spec], 1, device).plane(0, "index_key")
    return plane.fill_(77 if plane.dtype is torch.uint8 else torch.nan)


def store_case(case: KeyCase, p: KeyOperands, plane: Tensor, rows: slice = slice(None)) -> None:
    """Run the kernel."""
    store_keys(
        p.key[rows], p.weight, p.bias, EPS, p.table.all(), p.positions[rows], p.pages[rows], p.offsets[rows],
        plane, case.form, interleaved=case.interleaved,
    )  # fmt: skip


def store_plainly(case: KeyCase, p: KeyOperands, plane: Tensor, rows: Tensor | slice = slice(None)) -> None:
    """Do what the kernel does in plain torch."""
    key = layer_norm(p.key, p.weight, p.bias, EPS)
    rotation = p.table.at(p.positions.clamp(min=0))
    key = rotate(key.unsqueeze(1), rotation, interleaved=case.interleaved).squeeze(1)[rows]
    kernels = ReferenceKernels()
    if case.form == "int8":
        kernels.store_index_keys(plane, p.pages[rows], p.offsets[rows], key)
    else:
        IndexFormat(case.dim, "fp8" if case.form == "fp8" else key.dtype).write(
            plane, p.pages[rows], p.offsets[rows], key, kernels
        )


def key_values(case: KeyCase, plane: Tensor) -> Tensor:
    """What a plane stands for: [pages, 64, d] float32."""
    pages = torch.arange(len(plane), device=plane.device)
    if case.form == "int8":
        numbers, scales = Int8KeyLayout(case.dim).read(plane, pages)
    elif case.form == "fp8":
        numbers, scales = IndexKeyLayout(case.dim).read(plane, pages)
    else:
        return plane.float()
    return numbers.float() * scales.unsqueeze(-1)


def sample_spec(
    history: tuple[int, ...] = (), prompt_len: int = 0, output_index: int = 0, **params: object
) -> SampleSpec:
    """A request's wish; `params` are fields of `SamplingParams`."""
    return SampleSpec(
        params=SamplingParams(**{"max_tokens": 1, "seed": 0, **params}),  # type: ignore[arg-type]
        output_index=output_index,
        prompt_len=prompt_len,
        history=history,
    )


def draw_rows(
    specs: list[SampleSpec], vocab: int, device: torch.device, masks: TokenMasks | None = None
) -> DrawRows:
    """The specs on the device, each with its history."""
    history = torch.full((len(specs), vocab), -7, dtype=torch.int32, device=device)
    for slot, one in enumerate(specs):
        remember(history, slot, one.history[: one.prompt_len], one.history[one.prompt_len :])
    return rows_of(specs, range(len(specs)), history, device, masks)


def draw_on(
    logits: Tensor, specs: list[SampleSpec], device: torch.device, masks: TokenMasks | None = None
) -> Draws:
    """Run the kernels."""
    rows = draw_rows(specs, logits.shape[1], device, masks)
    return draw(logits.to(device), rows, needs_of(specs, masked=masks is not None))


def check_draws(
    logits: Tensor, specs: list[SampleSpec], device: torch.device, masks: TokenMasks | None = None
) -> None:
    """Draw on the device; tokens are to be the CPU's, and log-probabilities those in float64. Raises `ConformanceError`.

    The CPU's own log-probabilities are float32 sums over the vocabulary, which differ by 1.4e-5 between processors.
    """
    ours = draw_on(logits, specs, device, masks)
    exact = logits.double().log_softmax(-1)
    for row, theirs in enumerate(sample(logits.float(), specs, masks)):
        token = int(ours.tokens[row]) if bool(ours.finite[row]) else None
        if token != theirs.token_id:
            raise ConformanceError(
                f"draw: token {token} should be {theirs.token_id}, row {row}, {specs[row]}"
            )
        if theirs.logprob is None:
            continue
        own = theirs.logprob
        count = len(own.top)
        assert ours.logprobs is not None
        assert ours.ranks is not None
        assert ours.top_ids is not None
        assert ours.top_logprobs is not None
        told = (int(ours.ranks[row]), ours.top_ids[row, :count].tolist())
        if told != (wanted := (own.rank, [other for other, _ in own.top])):
            raise ConformanceError(f"draw: rank and best tokens {told} should be {wanted}, row {row}")
        values = torch.cat((ours.logprobs[row].view(1), ours.top_logprobs[row, :count])).double()
        known = exact[row, [theirs.token_id, *(other for other, _ in own.top)]]
        must_be_close("log-probabilities", values, known, 0, 1e-5)


def _norm(device: torch.device, dtype: torch.dtype) -> None:
    for rows, size in ((1, 576), (3, 1536)):
        x, update, weight = norm_operands(device, dtype, rows, size)
        total, normed = add_rms_norm(x, update, weight, EPS)
        must_be_equal("add_rms_norm", total, x + update)
        _near("add_rms_norm", normed, rms_norm(x + update, weight, EPS), 2e-6, 2.0**-7)


def _gate(device: torch.device, dtype: torch.dtype) -> None:
    product = (torch.randn(3, 2 * 1536, generator=torch.Generator().manual_seed(0)) * 4).to(device, dtype)
    gate, up = product.chunk(2, dim=-1)
    _near("silu_times", silu_times(product), F.silu(gate) * up, 2e-6, 2.0**-7)


def _low_rank(device: torch.device, dtype: torch.dtype) -> None:
    y, x, fix = low_rank_operands(device, dtype, 17, 576, 32, 576)
    flags = torch.arange(17, device=device) % 3 != 1
    before = y.clone()
    add_low_rank(y, correction(x, fix, flags))
    _near("add_low_rank", y, before + fix(x, flags.unsqueeze(1)), 2e-5, 3e-2)
    must_be_equal("add_low_rank", y[~flags], before[~flags])


def _rotation(device: torch.device, dtype: torch.dtype) -> None:
    for case in ROTATIONS[:2]:
        p, plane = rotation_operands(case, device, dtype), rotation_plane(case, device, dtype)
        query = run_rotation(p, plane)
        expected, stored = rotated(case, p)
        _near("rotate_and_store", query, expected, 4e-6, 2.0**-6)
        _near("rotate_and_store", plane[p.pages, p.offsets], stored, 4e-6, 2.0**-6)


def _index_keys(device: torch.device, dtype: torch.dtype) -> None:
    """Keys in each form, as far as rounding allows: a number between two steps may go either way."""
    for case in (KEYS[0], KEYS[2], KEYS[4]):
        p = key_operands(case, device, dtype)
        ours, theirs = key_plane(case, device, dtype), key_plane(case, device, dtype)
        store_case(case, p, ours)
        store_plainly(case, p, theirs)
        at = p.pages, p.offsets
        step = {"plain": 0.0, "int8": 1 / 120, "fp8": 1 / 15}[case.form]
        exact = 5e-6 if dtype is torch.float32 else 2.0**-6
        must_be_close(
            f"store_keys ({case.form})", key_values(case, ours)[at], key_values(case, theirs)[at],
            exact + step, exact + step * 0.3,
        )  # fmt: skip


def _index_queries(device: torch.device, dtype: torch.dtype) -> None:
    case = KEYS[0]
    p = key_operands(case, device, dtype)
    ours, weights = queries(p.query, p.head_weights, 0.1, p.table.all(), p.positions, "plain")
    turned = rotate(p.query.view(-1, case.heads, case.dim), p.table.at(p.positions))
    _near("queries", ours, turned, 1e-5, 2.0**-5)
    _near("queries", weights, p.head_weights * 0.1, 1e-6, 1e-6)


def _sampling(device: torch.device, dtype: torch.dtype) -> None:
    """Each way to sample, all in one batch and of one vocabulary."""
    del dtype  # logits are in float32
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0}, {}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.05}, {"logprobs": 3},
    ]  # fmt: skip
    logits = torch.randn(len(ways), 1000, generator=torch.Generator().manual_seed(1)) * 4
    check_draws(logits, [sample_spec(seed=i, **way) for i, way in enumerate(ways)], device)


def _near(operation: str, got: Tensor, wanted: Tensor, float32: float, narrower: float) -> None:
    """To the last digits of float32, or to a step of a narrower dtype."""
    tolerance = float32 if got.dtype is torch.float32 else narrower
    must_be_close(operation, got, wanted, tolerance, tolerance)


CHECKS: dict[str, Callable[[torch.device, torch.dtype], None]] = {
    "norms": _norm,
    "gate": _gate,
    "adapter": _low_rank,
    "rotation and cache": _rotation,
    "index keys": _index_keys,
    "index queries": _index_queries,
    "sampling": _sampling,
}
"""What `dsa doctor` checks: called with the device and the model's dtype, each raises `ConformanceError`."""
