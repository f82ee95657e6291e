"""Conformance of a backend that computes tiles: cases, and the check of every operation against its definition.

The definitions are `engine.kernels.reference`. The tests draw many cases; `dsa doctor` takes `CASES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from engine.kernels.interface.attention import Kernels
from engine.kernels.interface.fp8 import ScaleFormat
from engine.kernels.reference.attention import ReferenceKernels
from engine.memory.layouts import IndexKeyLayout, Int8KeyLayout
from engine.plan.sparsity import dense_mask

PAGE = 64
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far attention may be from its definition, absolute and relative, by the dtype of its operands."""
SCALE = 0.3


class ConformanceError(Exception):
    """An operation's result is not that of its definition; the message names the operation and the difference."""


class HeadDims(NamedTuple):
    """Numbers and sizes of the heads of a model and of its indexer."""

    index_heads: int
    index_dim: int
    kv_heads: int
    group: int
    dim: int


DIMS = [
    HeadDims(3, 16, 2, 3, 8),
    HeadDims(8, 64, 3, 3, 64),
    HeadDims(5, 36, 1, 7, 96),
    HeadDims(2, 128, 2, 1, 32),
]
"""Sizes that are multiples of a processor's vectors, and sizes that are not."""


class TileShape(NamedTuple):
    """A tile; `requests` or `rows` is 1, as in the engine."""

    requests: int
    rows: int
    pages: int  # of each request
    seed: int


CASES = [
    (TileShape(1, 5, 3, 0), DIMS[0]),
    (TileShape(4, 1, 2, 1), DIMS[1]),
    (TileShape(1, 37, 2, 2), DIMS[2]),
    (TileShape(3, 1, 1, 3), DIMS[3]),
]
"""What `dsa doctor` checks: prompt chunks and decodes, every size of heads, one to three pages."""


def random_plane(generator: torch.Generator, pages: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """[pages, 64, *shape] of normally distributed numbers."""
    return torch.randn(pages, PAGE, *shape, generator=generator).to(dtype)


class TileCase:
    """Random inputs of one tile, on the CPU."""

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, dims: HeadDims = DIMS[0]
    ) -> None:
        self.requests, self.rows, pages, self.seed = shape
        self.dtype = dtype
        heads, index_dim, kv_heads, group, dim = dims
        g = torch.Generator().manual_seed(self.seed)
        self.context = pages * PAGE
        order = torch.randperm(self.requests * pages + 2, generator=g)
        self.block_table = order[: self.requests * pages].view(self.requests, pages)
        self.positions = torch.randint(0, self.context, (self.requests, self.rows), generator=g)
        self.keys = random_plane(g, len(order), index_dim, dtype=dtype)
        # A page's planes lie between those of other layers.
        planes = torch.zeros(len(order), 5, PAGE * (index_dim + 4), dtype=torch.uint8)
        self.keys8 = planes[:, 2].view(len(order), PAGE, index_dim + 4)
        self.kv = torch.randn(len(order), 3, PAGE, kv_heads, 2, dim, generator=g).to(dtype)[:, 1]
        self.index_query = torch.randn(self.requests, self.rows, heads, index_dim, generator=g).to(dtype)
        self.head_weights = torch.randn(self.requests, self.rows, heads, generator=g)
        self.query = torch.randn(self.requests, self.rows, kv_heads, group, dim, generator=g).to(dtype)
        self.index_top_k = torch.randint(1, self.context + 9, (self.requests, self.rows), generator=g)
        scores = torch.randn(self.requests, self.rows, self.context, generator=g)
        # Coarse scores, so that many are equal and ties cross the edge of the set.
        future = torch.arange(self.context) > self.positions.unsqueeze(-1)
        self.scores = ((scores * 2).round() / 2).masked_fill(future, -math.inf)

    def allowed(self) -> Tensor:
        """[R, Q, C] bool: half of the positions, and always the first."""
        allowed = torch.rand(self.scores.shape, generator=torch.Generator().manual_seed(self.seed)) < 0.5
        allowed[..., 0] = True
        return allowed

    def everywhere(self) -> tuple[Tensor, Tensor]:
        """Page and offset of every token of the planes."""
        count = len(self.kv)
        return torch.arange(count).repeat_interleave(PAGE), torch.arange(PAGE).repeat(count)


HEADS, RANK, NOPE, ROPE, VALUE = 3, 16, 8, 4, 6
"""Sizes of `LatentCase`."""


class LatentCase:
    """Random latents and queries for the tile of a `TileCase`, scaled so that a softmax is not one-hot."""

    def __init__(self, case: TileCase, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(int(case.block_table.sum()))
        shape = (case.requests, case.rows, HEADS)
        self.plane = random_plane(g, int(case.block_table.max()) + 1, RANK + ROPE, dtype=dtype)
        self.query = (torch.randn(*shape, NOPE + ROPE, generator=g) / 2).to(dtype)
        self.absorbed = (torch.randn(*shape, RANK + ROPE, generator=g) / 2).to(dtype)
        self.expand = (torch.randn(HEADS, NOPE + VALUE, RANK, generator=g) / 4).to(dtype)


def must_be_close(operation: str, got: Tensor, wanted: Tensor, rtol: float, atol: float) -> None:
    """Compare on the CPU.

    Raises:
        ConformanceError: shapes, dtypes or numbers differ.
    """
    try:
        torch.testing.assert_close(got.cpu(), wanted.cpu(), rtol=rtol, atol=atol)
    except AssertionError as difference:
        lines = [line for line in str(difference).splitlines() if line.strip()]
        raise ConformanceError(f"{operation}: {'; '.join(lines)}") from None


def must_be_equal(operation: str, got: Tensor, wanted: Tensor) -> None:
    """Compare bit by bit; raises `ConformanceError`."""
    must_be_close(operation, got, wanted, 0, 0)


def check_tile(kernels: Kernels, case: TileCase, device: torch.device = CPU) -> None:
    """Compare every operation of grouped-query attention with its definition.

    Args:
        kernels: the backend
        case: on the CPU, where the definitions compute
        device: where the backend computes

    Raises:
        ConformanceError: an operation's result differs.
    """
    reference, tolerance = ReferenceKernels(), TOLERANCE[case.dtype]

    def compare(
        operation: str, arguments: tuple[Any, ...], rtol: float = tolerance, atol: float = tolerance
    ) -> None:
        got = getattr(kernels, operation)(*(_to(one, device) for one in arguments))
        must_be_close(operation, got, getattr(reference, operation)(*arguments), rtol, atol)

    index, at = (case.index_query, case.head_weights), (case.block_table, case.positions)
    compare("index_scores", (*index, case.keys, *at), 1e-4, 1e-3)  # float32 whatever the inputs
    _check_keys(kernels, case, device)
    compare("index_scores_int8", (*index, case.keys8, *at), 1e-4, 1e-3)
    chosen = kernels.select(case.scores.to(device), case.index_top_k.to(device))
    wanted = reference.select(case.scores, case.index_top_k)
    must_be_equal("select", chosen.sort(-1).values, wanted.sort(-1).values)
    attended = (case.query, case.kv, case.block_table)
    compare("attend_selected", (*attended, wanted, SCALE))
    compare("attend_masked", (*attended, case.allowed(), SCALE))
    compare("attend_causal", (*attended, case.positions, SCALE))
    # Scores that differ by rounding may select differently at the edge: the row's own set is what counts.
    whole = dense_mask(case.positions + 1 - case.index_top_k, 0)
    tops = case.index_top_k.where(whole, 1)
    for plane in (case.keys, case.keys8):
        compare("attend_sparse", (case.query, *index, case.kv, plane, *at, tops, SCALE))


def _check_keys(kernels: Kernels, case: TileCase, device: torch.device) -> None:
    """Store index keys as integers. `case.keys8` has afterwards those of the definition."""
    at, keys = case.everywhere(), case.keys.flatten(0, 1)
    ours = case.keys8.clone().to(device)
    kernels.store_index_keys(ours, at[0].to(device), at[1].to(device), keys.to(device))
    ReferenceKernels().store_index_keys(case.keys8, *at, keys)
    if device.type == "cpu":
        must_be_equal("store_index_keys", ours, case.keys8)  # pages outlive the backend that wrote them
        return
    # A GPU divides by a constant as it multiplies: a scale's last digit, and so a number between two integers.
    layout, pages = Int8KeyLayout(case.keys.shape[-1]), torch.arange(len(ours))
    (numbers, scales), (own, wanted) = layout.read(ours.cpu(), pages), layout.read(case.keys8, pages)
    must_be_close("store_index_keys", numbers, own, 0, 1)
    must_be_close("store_index_keys", scales, wanted, 1e-6, 0)


def check_latents(kernels: Kernels, case: TileCase, device: torch.device = CPU) -> None:
    """Compare every operation of latent attention with its definition. Arguments and errors as in `check_tile`."""
    reference, latents = ReferenceKernels(), LatentCase(case, case.dtype)
    tolerance = TOLERANCE[case.dtype] * 2
    selected = reference.select(case.scores, case.index_top_k)

    def compare(operation: str, *arguments: Any) -> None:
        got = getattr(kernels, operation)(*(_to(one, device) for one in arguments))
        must_be_close(operation, got, getattr(reference, operation)(*arguments), tolerance, tolerance)

    # Planes of another layout are unpacked after the gather; here each number is stored halved.
    stored = latents.plane / 2
    for plane, extra in ((latents.plane, ()), (stored, (lambda tokens: tokens * 2,))):
        at = (plane, case.block_table)
        compare("latent_selected", latents.absorbed, *at, selected, RANK, SCALE, *extra)
        compare("latent_masked", latents.absorbed, *at, case.allowed(), RANK, SCALE, *extra)
        compare("latent_expanded", latents.query, *at, case.allowed(), latents.expand, RANK, SCALE, *extra)


def check_fp8(kernels: Kernels, case: TileCase, device: torch.device = CPU) -> None:
    """Compare quantisation and index scores in FP8 with their definitions. Arguments and errors as in `check_tile`."""
    reference, dim = ReferenceKernels(), case.keys.shape[-1]
    layout = IndexKeyLayout(dim)
    for scale_format in get_args(ScaleFormat):
        (got, scales), (wanted, own) = (
            one.quantise(case.keys.to(where), scale_format)
            for one, where in ((kernels, device), (reference, CPU))
        )
        must_be_close("quantise", scales, own, 0 if device.type == "cpu" else 1e-6, 0)
        # e4m3 has 3 bits after the point: a number between two may go either way on a GPU (see `_check_keys`).
        step = 0.0 if device.type == "cpu" else 2.0**-3
        must_be_close("quantise", got.float(), wanted.float(), step, step * 2.0**-6)
    values, scales = reference.quantise(case.keys.flatten(0, 1), "ue8m0")
    plane = torch.zeros(len(case.keys), PAGE, layout.token_bytes, dtype=torch.uint8)
    layout.write(plane, *case.everywhere(), values, scales[:, 0])
    query, query_scales = reference.quantise(case.index_query, "ue8m0")
    arguments = (
        query, case.head_weights * query_scales[..., 0], plane, case.block_table, case.positions
    )  # fmt: skip
    got = kernels.index_scores_fp8(*(one.to(device) for one in arguments))
    must_be_close("index_scores_fp8", got, reference.index_scores_fp8(*arguments), 1e-4, 1e-3)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def known_masked(kernels: Kernels, device: torch.device = CPU) -> None:
    """A masked position is not selected where every score is negative: its score is -inf, not 0."""
    scores = torch.full((1, 1, 64), -5.0, device=device)
    scores[..., 10:] = -math.inf
    selected = kernels.select(scores, torch.tensor([[32]], device=device))
    _must_say("select", sorted(selected.flatten().tolist()), [-1] * 22 + list(range(10)))


def known_tie(kernels: Kernels, device: torch.device = CPU) -> None:
    """A tie at the edge of a set goes to the later position, whatever the rest of the batch is."""
    row = torch.zeros(1, 1, 128, device=device)
    alone = set(kernels.select(row, torch.tensor([[5]], device=device)).flatten().tolist())
    both = kernels.select(row.expand(2, 1, 128).clone(), torch.tensor([[5], [100]], device=device))
    _must_say("select", alone, {123, 124, 125, 126, 127})
    _must_say("select", set(both[0].flatten().tolist()) - {-1}, alone)


def known_negative(kernels: Kernels, device: torch.device = CPU) -> None:
    """A negative head weight lowers a score."""
    query, keys = torch.ones(1, 1, 1, 4), torch.zeros(1, 64, 4)
    keys[0, 1] = 1.0
    arguments = (query, torch.tensor([[[-2.0]]]), keys, torch.tensor([[0]]), torch.tensor([[2]]))
    scores = kernels.index_scores(*(one.to(device) for one in arguments))[0, 0].tolist()
    _must_say("index_scores", scores, [0.0, -8.0, 0.0] + [-math.inf] * 61)


KNOWN: tuple[Callable[[Kernels, torch.device], None], ...] = (known_masked, known_tie, known_negative)
"""Answers that are known without a reference, so the reference is checked, too."""


def _must_say(operation: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise ConformanceError(f"{operation}: {got} should be {wanted}")
