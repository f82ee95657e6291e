"""A step plan as tensors: one flat batch of T rows, built once and read by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import PAGE_SIZE
from engine.plan.tiles import Form, Segment, Tile, TileCosts, cut
from engine.plan.types import StepPlan


@dataclass(frozen=True)
class TileTensors:
    """A tile on the device: R requests x Q rows, context of P pages."""

    form: Form
    rows: Tensor  # [R * Q] int64, into the batch
    shape: tuple[int, int]  # (R, Q)
    positions: Tensor  # [R, Q] int64
    block_table: Tensor  # [R, P] int64, padded with page 0
    index_top_k: Tensor  # [R, Q] int64
    expanded: bool = False  # see `Tile`


@dataclass(frozen=True)
class Batch:
    """T rows, token-major. Tiles are cut when they are first asked for: a kernel that takes rows needs none."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    pages: Tensor  # [T] int64: where each row's cache entry goes
    offsets: Tensor  # [T] int64
    segments: tuple[Segment, ...]  # the requests, in the order of their rows
    costs: TileCosts

    @cached_property
    def tiles(self) -> tuple[TileTensors, ...]:
        """The attention work."""
        device = self.token_ids.device
        return tuple(_tensors(tile, device) for tile in cut(self.segments, self.costs))

    @cached_property
    def selecting(self) -> Tensor | None:
        """[T, 1] bool: which rows read a selection; None: no row does."""
        flags = np.zeros((self.token_ids.shape[0], 1), dtype=np.bool_)
        for segment in self.segments:
            flags[segment.first_row + segment.dense_rows : segment.first_row + segment.num_rows] = True
        return torch.from_numpy(flags).to(self.token_ids.device) if flags.any() else None


def build_batch(plan: StepPlan, costs: TileCosts, device: torch.device) -> Batch:
    """Lay the requests of `plan` one after the other.

    Raises:
        IndexError: a request's page table does not cover its rows.
    """
    segments: list[Segment] = []
    first = 0
    for request in plan.requests:
        count = len(request.token_ids)
        segments.append(
            Segment(
                first_row=first,
                num_rows=count,
                start=request.start,
                page_ids=request.page_ids,
                index_top_k=request.index_top_k,
            )
        )
        first += count
    token_ids, positions, pages = (np.empty(first, dtype=np.int64) for _ in range(3))
    for request, segment in zip(plan.requests, segments, strict=True):
        rows = slice(segment.first_row, segment.first_row + segment.num_rows)
        token_ids[rows] = request.token_ids
        if segment.num_rows == 1:
            positions[rows] = segment.start
            pages[rows] = request.page_ids[segment.start // PAGE_SIZE]
        else:
            own = np.arange(segment.start, segment.start + segment.num_rows)
            positions[rows] = own
            pages[rows] = np.array(request.page_ids)[own // PAGE_SIZE]
    return Batch(
        token_ids=_to(token_ids, device),
        positions=_to(positions, device),
        pages=_to(pages, device),
        offsets=_to(positions % PAGE_SIZE, device),
        segments=tuple(segments),
        costs=costs,
    )


def _to(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    """A tensor of it; on the CPU over the same memory. Much cheaper than torch.tensor of a list."""
    return torch.from_numpy(numbers).to(device)


def _tensors(tile: Tile, device: torch.device) -> TileTensors:
    shape = (len(tile.rows), len(tile.rows[0]))
    return TileTensors(
        form=tile.form,
        rows=_to(np.array(tile.rows, dtype=np.int64).reshape(-1), device),
        shape=shape,
        positions=_to(np.array(tile.positions, dtype=np.int64), device),
        block_table=_to(_table(tile.page_ids, tile.context_pages), device),
        index_top_k=_to(np.array(tile.index_top_k, dtype=np.int64), device).unsqueeze(1).expand(shape),
        expanded=tile.expanded,
    )


def _table(page_ids: Sequence[Sequence[int]], width: int) -> NDArray[np.int64]:
    table = np.zeros((len(page_ids), width), dtype=np.int64)
    for row, ids in zip(table, page_ids, strict=True):
        row[: len(ids)] = ids
    return table
