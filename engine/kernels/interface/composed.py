"""Operations that are other operations, one after the other: their definition, and all that most backends need."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.interface.attention import Kernels
from engine.memory.blocks import E4M3


def index_scores_as_stored(
    kernels: Kernels,
    query: Tensor,
    head_weights: Tensor,
    key_plane: Tensor,
    block_table: Tensor,
    positions: Tensor,
) -> Tensor:
    """Index scores in the numbers that the plane holds its keys in: FP8, 8-bit integers, or plain ones."""
    score = kernels.index_scores
    if query.dtype is E4M3:
        score = kernels.index_scores_fp8
    elif key_plane.dtype is torch.uint8:
        score = kernels.index_scores_int8
    return score(query, head_weights, key_plane, block_table, positions)


class Composed:
    """See `engine.kernels.interface.attention.Kernels`."""

    def attend_causal(
        self: Kernels, query: Tensor, kv_plane: Tensor, block_table: Tensor, positions: Tensor, scale: float
    ) -> Tensor:
        """`attend_masked` with a causal mask."""
        context = block_table.shape[1] * kv_plane.shape[1]
        allowed = torch.arange(context, device=query.device) <= positions.unsqueeze(-1)
        return self.attend_masked(query, kv_plane, block_table, allowed, scale)

    def attend_sparse(
        self: Kernels, query: Tensor, index_query: Tensor, head_weights: Tensor, kv_plane: Tensor, key_plane: Tensor,
        block_table: Tensor, positions: Tensor, index_top_k: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        """Scores, `select`, `attend_selected`."""
        scores = index_scores_as_stored(self, index_query, head_weights, key_plane, block_table, positions)
        return self.attend_selected(query, kv_plane, block_table, self.select(scores, index_top_k), scale)
