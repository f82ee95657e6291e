"""Grouped-query attention over the tiles of a batch, dense or over selected tokens.

`tiling` cuts the rows into tiles, the kernels do the arithmetic, and the model makes the projections.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.attention.indexer import IndexQueries
from engine.attention.tiling import TileTensors, Tiling
from engine.config import PAGE_SIZE
from engine.errors import EngineError
from engine.kernels.interface.attention import Kernels
from engine.kernels.interface.composed import index_scores_as_stored
from engine.kernels.interface.selection import watched
from engine.memory.blocks import E4M3
from engine.plan.sparsity import is_dense


def attend(
    query: Tensor,
    index: IndexQueries | None,
    kv_plane: Tensor,
    index_plane: Tensor | None,
    tiling: Tiling,
    kernels: Kernels,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attend with every row over the cached tokens of its request, the row's own token included.

    Args:
        query: [T, Hkv, G, D]
        index: the layer's index queries; None if the model has no indexer
        kv_plane: [num_pages, 64, Hkv, 2, D], with this step's rows already written
        index_plane: [num_pages, 64, d], with this step's rows already written; None if the model has no indexer
        tiling: the rows in tiles
        kernels: the backend
        scale: softmax scale
        window: how many positions a row sees, up to and including its own; None: all of them

    Returns:
        [T, Hkv, G, D]

    Raises:
        EngineError: a sparse tile reached a model without an indexer.
    """
    out = torch.empty_like(query)
    for tile in tiling.tiles:
        rows = query[tile.rows].view(*tile.shape, *query.shape[1:])
        if window is not None:
            result = _attend_window(rows, index, kv_plane, index_plane, tile, kernels, scale, window)
        elif tile.form == "dense":
            result = kernels.attend_causal(rows, kv_plane, tile.block_table, tile.positions, scale)
        else:
            if index is None or index_plane is None:
                raise EngineError("a sparse row was scheduled on a model that has no indexer")
            if tile.form == "gather":
                flaws = torch.zeros(tile.shape, dtype=torch.int32, device=query.device)
                result = kernels.attend_sparse(
                    rows,
                    *_of(index, tile),
                    kv_plane,
                    index_plane,
                    tile.block_table,
                    tile.positions,
                    tile.index_top_k,
                    scale,
                    flaws,
                )
                tile.flaws[tile.rows] |= flaws.flatten()
            else:
                selected = select(index, index_plane, tile, kernels)
                allowed = selection_mask(selected, tile.block_table.shape[1] * PAGE_SIZE)
                result = kernels.attend_masked(rows, kv_plane, tile.block_table, allowed, scale)
        out[tile.rows] = result.flatten(0, 1)
    return out


def _attend_window(
    rows: Tensor,
    index: IndexQueries | None,
    kv_plane: Tensor,
    index_plane: Tensor | None,
    tile: TileTensors,
    kernels: Kernels,
    scale: float,
    window: int,
) -> Tensor:
    """Attend with a tile's rows [R, Q, Hkv, G, D] over their windows, or over the best tokens of each window."""
    own = tile.positions.unsqueeze(-1)
    at = torch.arange(tile.block_table.shape[1] * PAGE_SIZE, device=rows.device)
    allowed = (at <= own) & (at > own - window)
    if tile.form != "dense" and not is_dense(window, int(tile.index_top_k.min())):
        if index is None or index_plane is None:
            raise EngineError("a sparse row was scheduled on a model that has no indexer")
        selected = select(index, index_plane, tile, kernels, allowed)
        if tile.form == "gather":
            return kernels.attend_selected(rows, kv_plane, tile.block_table, selected, scale)
        allowed = selection_mask(selected, len(at))
    return kernels.attend_masked(rows, kv_plane, tile.block_table, allowed, scale)


def select(
    index: IndexQueries,
    index_plane: Tensor,
    tile: TileTensors,
    kernels: Kernels,
    allowed: Tensor | None = None,
) -> Tensor:
    """Select positions for a tile's rows: [R, Q, K], -1 for none. `allowed` [R, Q, C] bool: which may be selected."""
    query, head_weights = _of(index, tile)
    scores = index_scores_as_stored(
        kernels, query, head_weights, index_plane, tile.block_table, tile.positions
    )
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    selected = kernels.select(scores, tile.index_top_k)
    selected, flaws = watched(selected, tile.positions, tile.index_top_k, scores.shape[-1], allowed)
    tile.flaws[tile.rows] |= flaws.flatten()
    return selected


def _of(index: IndexQueries, tile: TileTensors) -> tuple[Tensor, Tensor]:
    """The tile's index queries [R, Q, H, d] and head weights [R, Q, H]."""
    if index.query.dtype is E4M3:  # gather bytes, because not every device gathers FP8
        query = index.query.view(torch.uint8)[tile.rows].view(E4M3)
    else:
        query = index.query[tile.rows]
    return query.view(*tile.shape, *query.shape[1:]), index.head_weights[tile.rows].view(*tile.shape, -1)


def selection_mask(selected: Tensor, context: int) -> Tensor:
    """Make a mask of selected positions: [R, Q, K], -1 for none -> [R, Q, context] bool, True at the positions."""
    # The -1s go into one extra column, which is cut off.
    mask = torch.zeros(*selected.shape[:2], context + 1, dtype=torch.bool, device=selected.device)
    mask.scatter_(-1, selected.where(selected >= 0, context), True)
    return mask[..., :context]
