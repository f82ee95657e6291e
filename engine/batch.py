"""A step plan as tensors: one flat batch of T rows, built once and read by every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.tiles import Form, Segment, Tile, TileCosts, cut
from engine.config import PAGE_SIZE
from engine.plan import StepPlan


@dataclass(frozen=True)
class TileTensors:
    """A tile on the device: R requests x Q rows, context of P pages."""

    form: Form
    rows: Tensor  # [R * Q] int64, into the batch
    shape: tuple[int, int]  # (R, Q)
    positions: Tensor  # [R, Q] int64
    block_table: Tensor  # [R, P] int64, padded with page 0
    top_k: Tensor  # [R, Q] int64
    expanded: bool = False  # see `Tile`


@dataclass(frozen=True)
class Batch:
    """T rows, token-major."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    pages: Tensor  # [T] int64: where each row's cache entry goes
    offsets: Tensor  # [T] int64
    tiles: tuple[TileTensors, ...]


def build_batch(plan: StepPlan, costs: TileCosts, device: torch.device) -> Batch:
    """Lay the requests of `plan` one after the other.

    Raises:
        IndexError: a request's page table does not cover its rows.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    pages: list[int] = []
    segments: list[Segment] = []
    for request in plan.requests:
        count = len(request.token_ids)
        segments.append(
            Segment(
                first_row=len(token_ids),
                num_rows=count,
                start=request.start,
                page_ids=request.page_ids,
                top_k=request.top_k,
            )
        )
        token_ids.extend(request.token_ids)
        for position in range(request.start, request.start + count):
            positions.append(position)
            pages.append(request.page_ids[position // PAGE_SIZE])
    position_tensor = torch.tensor(positions, device=device)
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=position_tensor,
        pages=torch.tensor(pages, device=device),
        offsets=position_tensor % PAGE_SIZE,
        tiles=tuple(_tensors(tile, device) for tile in cut(segments, costs)),
    )


def _tensors(tile: Tile, device: torch.device) -> TileTensors:
    width = tile.context_pages
    shape = (len(tile.rows), len(tile.rows[0]))
    return TileTensors(
        form=tile.form,
        rows=torch.tensor(tile.rows, device=device).flatten(),
        shape=shape,
        positions=torch.tensor(tile.positions, device=device),
        block_table=torch.tensor(
            [[*ids, *([0] * (width - len(ids)))] for ids in tile.page_ids], device=device
        ),
        top_k=torch.tensor(tile.top_k, device=device).unsqueeze(1).expand(shape),
        expanded=tile.expanded,
    )
