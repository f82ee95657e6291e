"""A step's rows in a buffer of one shape, filled anew for each step: what a captured graph reads.

Rows beyond a step's own are padding. Blocks beyond its own have no rows, and singles beyond its own are a row of padding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.batch import Batch
from engine.config import PAGE_SIZE
from engine.kernels.triton.expanded_plan import ExpandedPlan
from engine.kernels.triton.rows import Blocks, Rows, cut
from engine.models.rows.inputs import Piece, RowInputs, Sharing, spans_of

MOST_SPANS = 64
"""Chunks of prompts in a step with prompts."""
_COLUMNS = 6
"""Numbers of a row before its pages."""


class Padded(NamedTuple):
    """One shape: `rows` rows of contexts up to `context`, selections up to `top_k` wide (0: none), prompts or decodes."""

    rows: int
    context: int
    top_k: int
    prompts: bool
    singles: int  # the most decodes beside prompts
    sharing: Sharing
    expanded: bool = (
        False  # whether dense rows of chunks may be there, where the family expands their context
    )

    @property
    def size(self) -> int:
        """Numbers in the buffer."""
        return sum(count for _, count in self._sections())

    def _sections(self) -> list[tuple[str, int]]:
        """What lies in the buffer, and how many numbers of each."""
        found = [("vectors", self.rows * _COLUMNS), ("pages", self._lines * self._pages)]
        if self.prompts:
            found += [
                ("blocks", 2 * self._blocks(self.sharing.attended)),
                ("singles", self.singles),
            ]
            if self.top_k:
                found += [("scored", 2 * self._blocks(self.sharing.scored))]
        return found

    @property
    def _pages(self) -> int:
        return self.context // PAGE_SIZE

    @property
    def _lines(self) -> int:
        """Requests."""
        return MOST_SPANS + self.singles if self.prompts else self.rows

    def _blocks(self, size: int) -> int:
        """The most that chunks can be cut into: each has a last one, and one before a boundary of splits."""
        return self.rows // size + 2 * MOST_SPANS

    def holds(self, batch: Batch) -> bool:
        """Whether a batch, whose rows and contexts fit, has no more of anything else."""
        chunks = sum(self.sharing.is_chunk(segment) for segment in batch.segments)
        if not self.prompts:
            return chunks == 0
        singles = sum(s.num_rows for s in batch.segments if not self.sharing.is_chunk(s))
        # The last row is padding, to which singles that are not there point.
        return chunks <= MOST_SPANS and singles <= self.singles and len(batch.token_ids) < self.rows

    def inputs(self, buffer: Tensor) -> RowInputs:
        """Views of a buffer [size] int32, as the step reads it."""
        part, start = {}, 0
        for name, count in self._sections():
            part[name] = buffer[start : start + count]
            start += count
        vectors = part["vectors"].view(_COLUMNS, self.rows)
        token_ids, page, offset, request, positions, index_top_k = vectors.unbind()
        rows = Rows(request, positions, index_top_k, part["pages"].view(self._lines, self._pages))
        blocks = scored = None
        if self.prompts:
            blocks = Blocks(part["blocks"].view(-1, 2), part["singles"], self.sharing.attended)
        if self.prompts and self.top_k:
            scored = Blocks(part["scored"].view(-1, 2), part["singles"], self.sharing.scored)
        return RowInputs(
            token_ids=token_ids,
            pages=page,
            offsets=offset,
            rows=rows,
            max_context=self.context,
            top_k=self.top_k,
            blocks=blocks,
            pieces=(Piece(0, rows, scored),) if self.top_k else (),
            dense=self._dense(buffer.device) if self.expanded else None,
        )

    def _dense(self, device: torch.device) -> ExpandedPlan:
        """An empty plan, with room for as many blocks as the rows can be cut into."""
        return ExpandedPlan.empty(
            self._blocks(self.sharing.attended), self.sharing.tokens, self.sharing.attended, device
        )

    def fill(self, host: NDArray[np.int32], batch: Batch | None) -> None:
        """Lay a batch out in a buffer on the host; without one all is padding."""
        part, start = {}, 0
        for name, count in self._sections():
            part[name] = host[start : start + count]
            start += count
        vectors = part["vectors"].reshape(_COLUMNS, self.rows)
        count = 0 if batch is None else len(batch.token_ids)
        vectors[:, count:] = 0
        vectors[4, count:] = -1  # positions
        for name in ("blocks", "scored"):
            if name in part:
                part[name][:] = 0
        if self.prompts:
            part["singles"][:] = self.rows - 1
        if batch is None:
            part["pages"][:] = 0
            return
        sources = (
            batch.token_ids, batch.pages, batch.offsets, batch.request, batch.positions, batch.index_top_k,
        )  # fmt: skip
        for vector, source in zip(vectors, sources, strict=True):
            vector[:count] = source.numpy()
        lines, width = batch.block_table.shape
        part["pages"].reshape(self._lines, self._pages)[:lines, :width] = batch.block_table.numpy()
        if not self.prompts:
            return
        spans = spans_of(batch, self.sharing)
        alone = [
            row
            for s in batch.segments
            if not self.sharing.is_chunk(s)
            for row in range(s.first_row, s.first_row + s.num_rows)
        ]
        part["singles"][: len(alone)] = alone
        tables = [("blocks", self.sharing.attended)]
        if self.top_k:
            tables.append(("scored", self.sharing.scored))
        for name, size in tables:
            table = np.array(cut(spans, size), dtype=np.int32).reshape(-1)
            part[name][: len(table)] = table
