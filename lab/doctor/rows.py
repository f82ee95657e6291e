"""Conformance of Triton's kernels over flat rows: cases, and the check of attention, index scores and selection.

Triton must be installed. Each row is compared with its definition in `engine.kernels.reference`, alone. The tests run
more cases than `dsa doctor`, which takes `CHECKS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.kernels.reference.attention import ReferenceKernels
from engine.kernels.triton.attention import attend, block_rows
from engine.kernels.triton.rows import Blocks, Rows, Span, blocks_of
from engine.kernels.triton.scores import index_scores
from engine.kernels.triton.select import select
from engine.memory.layouts import IndexKeyLayout
from engine.plan.sparsity import row_index_top_k
from lab.doctor.tiles import PAGE, TOLERANCE, must_be_close, must_be_equal

REFERENCE = ReferenceKernels()
SCALE = 0.2
SCORE_TOLERANCE = {"plain": 1e-4, "int8": 1e-4, "fp8": 1e-3}
"""How far index scores may be from their definition. FP8 products of a matrix unit are summed in fewer bits."""


class RowLine(NamedTuple):
    """One row; request -1 is padding."""

    request: int
    position: int
    top_k: int


EDGES = [
    RowLine(0, 0, 1), RowLine(0, 62, 0), RowLine(0, 63, 5), RowLine(1, 64, 64), RowLine(1, 127, 0), RowLine(-1, -1, 0),
    RowLine(2, 128, 100), RowLine(2, 190, 7), RowLine(-1, -1, 9), RowLine(1, 65, 0),
]  # fmt: skip
"""One token, both sides of the ends of pages, k above the context, dense, sparse and padding side by side."""


def mixed(first: int, last: int, top_k: int) -> list[RowLine]:
    """A prompt's chunk, dense up to position top_k, between decodes of other requests."""
    prompt = [RowLine(1, position, row_index_top_k(position + 1, top_k)) for position in range(first, last)]
    return [RowLine(0, 130, 9), *prompt, RowLine(2, 150, 0), RowLine(-1, -1, 0)]


class RowBatch:
    """Rows over requests with page tables of their own, pages in random order."""

    def __init__(
        self, lines: Sequence[RowLine], pages: int, device: torch.device, seed: int = 0, spare: int = 0
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.lines, self.pages, self.device = list(lines), pages, device
        self.context = pages * PAGE
        requests = max(line.request for line in lines) + 1
        self.num_pages = requests * pages + 2
        order = torch.randperm(self.num_pages, generator=self.generator)
        self.block_table = order[: requests * pages].view(requests, pages).int()
        # Wider, as a batch with a longer request has it.
        table = torch.nn.functional.pad(self.block_table, (0, spare))
        self.rows = Rows(
            torch.tensor([max(line.request, 0) for line in lines], dtype=torch.int32).to(device),
            torch.tensor([line.position for line in lines], dtype=torch.int32).to(device),
            torch.tensor([line.top_k for line in lines], dtype=torch.int32).to(device),
            table.to(device),
        )

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers of a normal distribution, on the CPU."""
        return torch.randn(*shape, generator=self.generator).to(dtype)

    def plane(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[num_pages, 64, *shape], its pages apart from one another as those of an engine's cache may be."""
        apart = self.random(self.num_pages, 3, PAGE, *shape, dtype=dtype)
        return apart[:, 1]

    def int8_plane(self, keys: Tensor) -> Tensor:
        """Keys [num_pages, 64, d] as 8-bit integers."""
        apart = torch.zeros(self.num_pages, 2, PAGE, keys.shape[-1] + 4, dtype=torch.uint8)
        plane = apart[:, 1]
        REFERENCE.store_index_keys(plane, *self._everywhere(), keys.flatten(0, 1))
        return plane

    def fp8_plane(self, keys: Tensor) -> Tensor:
        """Keys [num_pages, 64, d] in FP8."""
        plane = torch.zeros(self.num_pages, PAGE, keys.shape[-1] + 4, dtype=torch.uint8)
        values, scales = REFERENCE.quantise(keys.flatten(0, 1), "float")
        IndexKeyLayout(keys.shape[-1]).write(plane, *self._everywhere(), values, scales[:, 0])
        return plane

    def table_of(self, row: int) -> Tensor:
        """[1, P] int64, as the reference takes it."""
        return self.block_table[self.lines[row].request][None].long()

    def position_of(self, row: int) -> Tensor:
        """[1, 1] int64."""
        return torch.tensor([[self.lines[row].position]])

    def _everywhere(self) -> tuple[Tensor, Tensor]:
        return torch.arange(self.num_pages).repeat_interleave(PAGE), torch.arange(PAGE).repeat(self.num_pages)


def attention_operands(
    batch: RowBatch, dims: tuple[int, int, int], dtype: torch.dtype, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(query, plane, selected), on the CPU. `dims` are KV heads, query heads of each, numbers a head."""
    kv_heads, group, dim = dims
    query = batch.random(len(batch.lines), kv_heads, group, dim, dtype=dtype)
    plane = batch.plane(kv_heads, 2, dim, dtype=dtype)
    selected = torch.full((len(batch.lines), width), -1, dtype=torch.int32)
    for row, line in enumerate(batch.lines):
        if line.request >= 0 and line.top_k:
            chosen = torch.randperm(line.position + 1, generator=batch.generator)[: line.top_k].sort().values
            selected[row, : len(chosen)] = chosen.int()
    return query, plane, selected


def attend_rows(
    batch: RowBatch,
    query: Tensor,
    plane: Tensor,
    selected: Tensor | None,
    blocks: Blocks | None = None,
    context: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Run the kernel on the batch's device; the other tensors are on the CPU."""
    to = batch.device
    return attend(
        query.to(to), plane.to(to), batch.rows, None if selected is None else selected.to(to), SCALE,
        context or batch.context, blocks, None if mask is None else mask.to(to),
    )  # fmt: skip


def check_attention(
    batch: RowBatch, out: Tensor, query: Tensor, plane: Tensor, selected: Tensor | None
) -> None:
    """Compare each row of `out` with its definition; padding is 0. Raises `ConformanceError`."""
    tolerance = TOLERANCE[query.dtype]
    for row, line in enumerate(batch.lines):
        got, own = out[row].cpu(), query[None, row : row + 1]
        if line.request < 0:
            must_be_equal(f"attend, {line}", got, torch.zeros_like(got))
            continue
        if line.top_k and selected is not None:
            chosen = selected[None, row : row + 1].long()
            wanted = REFERENCE.attend_selected(own, plane, batch.table_of(row), chosen, SCALE)
        else:
            wanted = REFERENCE.attend_causal(own, plane, batch.table_of(row), batch.position_of(row), SCALE)
        must_be_close(f"attend, {line}", got, wanted[0, 0], tolerance, tolerance)


def score_operands(
    batch: RowBatch, layout: str, heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """(the reference's operation, query, head weights, key plane), on the CPU; some weights are negative."""
    rows = len(batch.lines)
    query, weights = batch.random(rows, heads, dim, dtype=dtype), batch.random(rows, heads)
    keys = batch.plane(dim, dtype=dtype)
    if layout == "int8":
        query[0, 0] = 0  # a query that has no scale
        return REFERENCE.index_scores_int8, query, weights, batch.int8_plane(keys)
    if layout == "fp8":
        query8, scales = REFERENCE.quantise(query, "float")
        return REFERENCE.index_scores_fp8, query8, weights * scales[..., 0], batch.fp8_plane(keys)
    return REFERENCE.index_scores, query, weights, keys


def score_rows(batch: RowBatch, query: Tensor, weights: Tensor, plane: Tensor, **more: Any) -> Tensor:
    """Run the kernel on the batch's device; the other tensors are on the CPU."""
    device, context = batch.device, more.pop("context", batch.context)
    return index_scores(query.to(device), weights.to(device), plane.to(device), batch.rows, context, **more)


def check_scores(
    batch: RowBatch,
    scores: Tensor,
    operation: Any,
    query: Tensor,
    weights: Tensor,
    plane: Tensor,
    layout: str,
) -> None:
    """Compare every sparse row of `scores` with its definition: -inf beyond its end. Raises `ConformanceError`."""
    tolerance = SCORE_TOLERANCE[layout]
    for row, line in enumerate(batch.lines):
        if line.request < 0 or not line.top_k:
            continue
        wanted = operation(
            query[None, row : row + 1],
            weights[None, row : row + 1],
            plane,
            batch.table_of(row),
            batch.position_of(row),
        )[0, 0]
        must_be_close(f"index_scores ({layout}), {line}", scores[row], wanted, tolerance, tolerance * 10)


def selecting_rows(positions: Tensor, top_k: Tensor, device: torch.device) -> Rows:
    """Rows that have scores already, and no cache."""
    none = torch.zeros(len(positions), dtype=torch.int32, device=device)
    return Rows(none, positions.int().to(device), top_k.int().to(device), none[:1, None])


def sorted_selection(scores: Tensor, position: int, top_k: int, width: int) -> Tensor:
    """By a stable sort of one row: turned round, of equal scores the later position comes first."""
    row = scores[: position + 1].double() + 0.0
    order = len(row) - 1 - row.flip(0).sort(descending=True, stable=True).indices
    best = order[row[order] > -math.inf][:top_k].sort().values.int()
    return torch.cat((best, torch.full((width - len(best),), -1, dtype=torch.int32, device=best.device)))


def check_selection(
    scores: Tensor, positions: Tensor, top_k: Tensor, width: int, device: torch.device
) -> None:
    """Select from rows of scores [N, C], and compare with a sort. Raises `ConformanceError`."""
    scores = scores.to(device)
    got = select(scores, selecting_rows(positions, top_k, device), width)
    for row in range(len(scores)):
        expected = sorted_selection(scores[row], int(positions[row]), int(top_k[row]), width)
        must_be_equal(f"select, row {row} of {len(scores)} x {scores.shape[1]}", got[row], expected)


def kinds_of_scores(context: int, g: torch.Generator) -> Tensor:
    """[12, context]: rows that a threshold is hard to find in."""
    noise = torch.randn(12, context, generator=g)
    ramp = torch.arange(context).float()
    noise[1] = 1.5
    noise[2] = torch.where(noise[2] > 0, 0.0, -0.0)
    noise[3] = (noise[3] * 2).round()
    noise[4] = -noise[4].abs() - 1e-3
    noise[5] = noise[5].masked_fill(noise[5] < 0.5, -math.inf)
    noise[6] = -math.inf
    noise[7], noise[8] = ramp, -ramp
    noise[9] = noise[9].sign() * torch.exp(noise[9] * 20)
    noise[10] = torch.where(torch.rand(context, generator=g) < 0.02, noise[10] * 1e6, noise[10] * 1e-42)
    noise[11] = noise[11].cumsum(0)
    return noise


def _attention(device: torch.device, dtype: torch.dtype) -> None:
    """Dense and sparse rows, decodes and a prompt's chunk, for the heads of the default model."""
    dims = (3, 3, 64)
    batch = RowBatch(EDGES, 3, device, spare=2)
    given = attention_operands(batch, dims, dtype, 110)
    check_attention(batch, attend_rows(batch, *given), *given)
    check_attention(batch, attend_rows(batch, *given[:2], None), *given[:2], None)
    batch = RowBatch(mixed(118, 136, 132), 3, device)
    given = attention_operands(batch, dims, dtype, 132)
    blocks = blocks_of([Span(1, 18, 118)], len(batch.lines), block_rows(dims[1]), device)
    check_attention(batch, attend_rows(batch, *given, blocks), *given)


def _scores(layout: str) -> Callable[[torch.device, torch.dtype], None]:
    def check(device: torch.device, dtype: torch.dtype) -> None:
        batch = RowBatch(EDGES, 3, device, spare=2)
        operation, query, weights, plane = score_operands(batch, layout, 8, 64, dtype)
        check_scores(
            batch, score_rows(batch, query, weights, plane), operation, query, weights, plane, layout
        )

    return check


def _selection(device: torch.device, dtype: torch.dtype) -> None:
    """Rows of every kind, and the edges: one token, ends of pages, k above the context, dense rows, padding."""
    g = torch.Generator().manual_seed(0)
    check_selection(
        kinds_of_scores(600, g),
        torch.full((12,), 599),
        torch.randint(1, 101, (12,), generator=g),
        100,
        device,
    )
    positions = torch.tensor([0, 0, 62, 63, 64, 65, 127, 128, -1, 100, 5])
    top_k = torch.tensor([1, 9, 63, 64, 64, 3, 200, 77, 5, 0, 6])
    check_selection(torch.randn(11, 192, generator=g), positions, top_k, 200, device)


CHECKS: dict[str, Callable[[torch.device, torch.dtype], None]] = {
    "attention": _attention,
    "index scores (bf16)": _scores("plain"),
    "index scores (int8)": _scores("int8"),
    "index scores (fp8)": _scores("fp8"),
    "selection": _selection,
}
"""What `dsa doctor` checks: called with the device and the model's dtype, each raises `ConformanceError`."""
