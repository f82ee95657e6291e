"""A batch's rows in tiles, as tensors, for backends whose operations take R requests x Q rows at once.

`engine.plan.tiles` decides how rows are cut. Kernels that take single rows need no tiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.batch import Batch, to_device
from engine.plan.tiles import Form, Tile, TileCosts, cut


@dataclass(frozen=True)
class TileTensors:
    """A tile on the device: R requests x Q rows, context of P pages."""

    form: Form
    rows: Tensor  # [R * Q] int64: indices into the batch
    shape: tuple[int, int]  # (R, Q)
    positions: Tensor  # [R, Q] int64
    block_table: Tensor  # [R, P] int64, padded with page 0
    index_top_k: Tensor  # [R, Q] int64
    flaws: Tensor  # [T] int32: the batch's
    expanded: bool = False  # see `engine.plan.tiles.Tile`


@dataclass(frozen=True)
class Tiling:
    """How one step's rows are cut. A model makes one in its forward, and every layer reads it."""

    batch: Batch
    costs: TileCosts

    @cached_property
    def tiles(self) -> tuple[TileTensors, ...]:
        """The tiles; they are cut at the first access."""
        return tuple(_tensors(tile, self.batch.flaws) for tile in cut(self.batch.segments, self.costs))

    @property
    def selects(self) -> bool:
        """Whether any tile is sparse."""
        return any(tile.form != "dense" for tile in self.tiles)


def _tensors(tile: Tile, flaws: Tensor) -> TileTensors:
    device = flaws.device
    shape = (len(tile.rows), len(tile.rows[0]))
    return TileTensors(
        form=tile.form,
        rows=to_device(np.array(tile.rows, dtype=np.int64).reshape(-1), device),
        shape=shape,
        positions=to_device(np.array(tile.positions, dtype=np.int64), device),
        block_table=to_device(_table(tile.page_ids, tile.context_pages), device),
        index_top_k=to_device(np.array(tile.index_top_k, dtype=np.int64), device).unsqueeze(1).expand(shape),
        flaws=flaws,
        expanded=tile.expanded,
    )


def _table(page_ids: Sequence[Sequence[int]], width: int) -> NDArray[np.int64]:
    table = np.zeros((len(page_ids), width), dtype=np.int64)
    for row, ids in zip(table, page_ids, strict=True):
        row[: len(ids)] = ids
    return table
