"""What a step over rows reads, on the device, and how a batch becomes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.attention.batch import Batch
from engine.kernels.triton.expanded_plan import DenseChunk, ExpandedPlan, plan_expanded
from engine.kernels.triton.rows import Blocks, Rows, Span, blocks_of
from engine.plan.tiles import Segment

CONTEXT_STEP = 1024
"""Contexts are rounded up to multiples of it: kernels are compiled anew for numbers of another kind."""


ALIGNED = 16
"""Rows, pages and selections are laid out in multiples of so many."""


ALL_ALONE = 1 << 30
"""`Sharing.alone` where no rows share what they read, so that each has the bits of a decode."""


class Sharing(NamedTuple):
    """How rows of prompts share what they read, in the kernels of one family."""

    attended: int  # the most rows of a block of attention
    scored: int  # the most rows of a block of the scores
    alone: int = 1  # chunks of at most so many rows are computed row by row, as decodes are
    tokens: int = (
        0  # of context of dense rows of chunks, which are expanded, in a graph; 0: nothing is expanded
    )

    def is_chunk(self, segment: Segment) -> bool:
        """Whether rows of a request are computed in blocks."""
        return segment.num_rows > self.alone


@dataclass(frozen=True)
class Piece:
    """Rows that are scored together, so that their scores fit the budget."""

    first: int
    rows: Rows
    blocks: Blocks | None


@dataclass(frozen=True)
class RowInputs:
    """A step's rows on the device."""

    token_ids: Tensor  # [T] integers
    pages: Tensor  # [T] integers: where each row's cache entry goes
    offsets: Tensor  # [T] integers
    rows: Rows
    max_context: int  # no row's position reaches it
    top_k: int  # no row selects more; 0: no row has a selection
    blocks: Blocks | None  # of attention; None: every row is a decode
    pieces: tuple[Piece, ...]
    dense: ExpandedPlan | None = None  # of the dense rows of chunks, where the family expands their context
    flaws: Tensor | None = None  # [T] int32, to which those of selections are added; None: nobody looks


def spans_of(batch: Batch, sharing: Sharing) -> list[Span]:
    """The chunks of a batch whose rows are computed in blocks."""
    return [Span(s.first_row, s.num_rows, s.start) for s in batch.segments if sharing.is_chunk(s)]


def expanded_plan(batch: Batch, sharing: Sharing) -> ExpandedPlan | None:
    """How the dense rows of chunks are expanded, on the CPU; None: there are none, or the family expands nothing."""
    if not sharing.tokens:
        return None
    chunks = [
        DenseChunk(number, s.first_row, s.dense_rows, s.start)
        for number, s in enumerate(batch.segments)
        if sharing.is_chunk(s) and s.dense_rows
    ]
    return plan_expanded(chunks, sharing.attended) if chunks else None


def longest_context(batch: Batch) -> int:
    """One more than the last position of a batch."""
    return max(segment.start + segment.num_rows for segment in batch.segments)


def row_inputs(batch: Batch, device: torch.device, budget_bytes: int, sharing: Sharing) -> RowInputs:
    """A batch, whose tensors are on the CPU, as rows on the device, its prompts in blocks.

    Args:
        batch: of the step
        device: of the model
        budget_bytes: that the scores of rows may take together
        sharing: of the model's kernels
    """
    vectors = (
        batch.token_ids,
        batch.pages,
        batch.offsets,
        batch.request,
        batch.positions,
        batch.index_top_k,
    )
    # Lines of whole `ALIGNED` numbers: kernels are compiled anew for addresses of another kind, too.
    count = len(batch.token_ids)
    host = np.zeros((len(vectors), _aligned(count)), dtype=np.int32)
    for line, vector in zip(host, vectors, strict=True):
        line[:count] = vector.numpy()
    packed = torch.from_numpy(host).to(device)[:, :count]
    token_ids, pages, offsets, request, positions, index_top_k = packed.unbind()
    lines, width = batch.block_table.shape
    table = torch.zeros(lines, _aligned(width), dtype=torch.int32)
    table[:, :width] = batch.block_table
    rows = Rows(request, positions, index_top_k, table.to(device))
    context = -(-longest_context(batch) // CONTEXT_STEP) * CONTEXT_STEP
    spans, plan = spans_of(batch, sharing), expanded_plan(batch, sharing)
    top_k = max(
        (s.index_top_k or 0 for s in batch.segments if s.dense_rows < s.num_rows),
        default=0,
    )
    return RowInputs(
        token_ids=token_ids,
        pages=pages,
        offsets=offsets,
        rows=rows,
        max_context=context,
        top_k=_aligned(top_k),
        blocks=blocks_of(spans, len(rows), sharing.attended, device) if spans else None,
        pieces=_pieces(rows, spans, max(1, budget_bytes // (4 * context)), sharing.scored) if top_k else (),
        dense=None if plan is None else plan.to(device),
    )


def _aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED


def _pieces(rows: Rows, spans: Sequence[Span], most: int, size: int) -> tuple[Piece, ...]:
    """The rows, about at most so many at a time, their chunks in blocks of at most `size` rows."""
    pieces = []
    each = _aligned(-(-len(rows) // -(-len(rows) // most)))
    for first in range(0, len(rows), each):
        end = min(first + each, len(rows))
        own = Rows(
            rows.request[first:end], rows.positions[first:end], rows.index_top_k[first:end], rows.block_table
        )  # fmt: skip
        inside = []
        for row, count, position in spans:
            begin, stop = max(row, first), min(row + count, end)
            if begin < stop:
                inside.append(Span(begin - first, stop - begin, position + begin - row))
        blocks = blocks_of(inside, end - first, size, rows.request.device) if inside else None
        pieces.append(Piece(first, own, blocks))
    return tuple(pieces)
