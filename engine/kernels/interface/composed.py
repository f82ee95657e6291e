"""Operations that consist of other operations. Their definitions are here, and most backends use them unchanged."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.interface.attention import Kernels
from engine.kernels.interface.selection import watched
from engine.memory.blocks import E4M3


def index_scores_as_stored(
    kernels: Kernels,
    query: Tensor,
    head_weights: Tensor,
    key_plane: Tensor,
    block_table: Tensor,
    positions: Tensor,
) -> Tensor:
    """Compute index scores in the number format of the plane's keys: FP8, 8-bit integers, or plain numbers."""
    score = kernels.index_scores
    if query.dtype is E4M3:
        score = kernels.index_scores_fp8
    elif key_plane.dtype is torch.uint8:
        score = kernels.index_scores_int8
    return score(query, head_weights, key_plane, block_table, positions)


class Composed:
    """`attend_causal` and `attend_sparse` from a backend's other operations."""

    def attend_causal(
        self: Kernels, query: Tensor, kv_plane: Tensor, block_table: Tensor, positions: Tensor, scale: float
    ) -> Tensor:
        context = block_table.shape[1] * kv_plane.shape[1]
        allowed = torch.arange(context, device=query.device) <= positions.unsqueeze(-1)
        return self.attend_masked(query, kv_plane, block_table, allowed, scale)

    def attend_sparse(
        self: Kernels, query: Tensor, index_query: Tensor, head_weights: Tensor, kv_plane: Tensor, key_plane: Tensor,
        block_table: Tensor, positions: Tensor, index_top_k: Tensor, scale: float, flaws: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        scores = index_scores_as_stored(self, index_query, head_weights, key_plane, block_table, positions)
        selected = self.select(scores, index_top_k)
        if flaws is not None:
            selected, found = watched(selected, positions, index_top_k, scores.shape[-1])
            flaws |= found
        return self.attend_selected(query, kv_plane, block_table, selected, scale)
