"""Multi-head latent attention (arXiv 2405.04434, section 2.1): its projections, and attention over tiles in two forms.

Absorbed: the query is multiplied with the key expansion and the output with the value expansion, so heads read the
latents. Expanded: keys and values of each head are made first. `engine.plan.tiles.LatentTileCosts` chooses per tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.gqa import selection_mask
from engine.attention.tiling import Tiling
from engine.config import PAGE_SIZE
from engine.errors import EngineError
from engine.kernels.interface.attention import Kernels
from engine.kernels.interface.latent import Unpack, as_stored
from engine.layers.linear import linear
from engine.layers.norm import rms_norm
from engine.layers.rope import rotate
from engine.memory.blocks import Matrix

LATENT_NORM_EPS = 1e-6
"""The epsilon of q_a_layernorm and kv_a_layernorm. The family's published code uses the norm's default for them,
whatever `rms_norm_eps` says (GLM-5's is 1e-5)."""


@dataclass(frozen=True)
class MLAWeights:
    """One layer's weights.

    E is the hidden size, H the heads of this rank, r_q and r the ranks of the query latent and the cached latent. A
    head has n plain, p rotated and v value dims.
    """

    q_a: Matrix | None  # [r_q, E]; None: queries come from the hidden state
    q_a_norm: Tensor | None  # [r_q]
    q_b: Matrix  # [H * (n + p), r_q or E]
    kv_a: Matrix  # [r + p, E]
    kv_a_norm: Tensor  # [r]
    kv_b: Tensor  # [H, n + v, r]: always plain, because the absorbed form multiplies head by head
    o: Matrix  # [E, H * v]


@dataclass(frozen=True)
class Projected:
    """The queries and cache entries of a batch's rows. Letters as in `MLAWeights`."""

    query: Tensor  # [T, H, n + p], rotated
    cached: Tensor  # [T, r + p]: normalised latent, rotated shared key
    query_latent: Tensor | None  # [T, r_q], normalised; the indexer makes its queries from it


class LatentAttention:
    """One layer's latent attention. Letters as in `MLAWeights`.

    Args:
        weights: the layer's
        nope: n
        scale: softmax scale
        interleaved: whether the rotated dims pair as 2i with 2i + 1
    """

    def __init__(self, weights: MLAWeights, *, nope: int, scale: float, interleaved: bool) -> None:
        self.weights = weights
        self.nope = nope
        self.rank = weights.kv_a_norm.shape[0]
        self.scale = scale
        self.interleaved = interleaved
        self.num_heads = weights.kv_b.shape[0]

    def project(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Projected:
        """Make the queries and cache entries of rows [T, E]."""
        w = self.weights
        latent = None
        if w.q_a is not None and w.q_a_norm is not None:
            latent = rms_norm(linear(hidden, w.q_a), w.q_a_norm, LATENT_NORM_EPS)
        query = linear(hidden if latent is None else latent, w.q_b).view(len(hidden), self.num_heads, -1)
        plain, turning = query[..., : self.nope], query[..., self.nope :]
        query = torch.cat((plain, rotate(turning, rotation, interleaved=self.interleaved)), dim=-1)
        kv = linear(hidden, w.kv_a)
        key = rotate(kv[:, self.rank :].unsqueeze(1), rotation, interleaved=self.interleaved).squeeze(1)
        cached = torch.cat((rms_norm(kv[:, : self.rank], w.kv_a_norm, LATENT_NORM_EPS), key), dim=-1)
        return Projected(query=query, cached=cached, query_latent=latent)

    def attend(
        self,
        query: Tensor,
        selections: Sequence[Tensor | None],
        plane: Tensor,
        tiling: Tiling,
        kernels: Kernels,
        unpack: Unpack = as_stored,
    ) -> Tensor:
        """Attend with every row over the cached tokens of its request, the row's own token included.

        Args:
            query: [T, H, n + p]
            selections: for each tile its selected positions [R, Q, K], or None if the tile is dense
            plane: [num_pages, 64, stored], with this step's rows already written
            tiling: the rows in tiles
            kernels: the backend
            unpack: turns tokens as the plane stores them into numbers

        Returns:
            [T, E]; if this rank has only some heads, their part of the sum

        Raises:
            EngineError: a sparse tile came without a selection.
        """
        w, values = self.weights, self.weights.kv_b.shape[1] - self.nope
        out = query.new_empty(len(query), self.num_heads, values)
        for tile, selected in zip(tiling.tiles, selections, strict=True):
            rows = query[tile.rows].view(*tile.shape, *query.shape[1:])
            common = (plane, tile.block_table)
            if tile.form == "gather" and selected is not None:
                made = kernels.latent_selected(
                    self._absorb(rows), *common, selected, self.rank, self.scale, unpack
                )
                result = self._values(made)
            else:
                context = tile.block_table.shape[1] * PAGE_SIZE
                if tile.form == "dense":
                    allowed = torch.arange(context, device=query.device) <= tile.positions.unsqueeze(-1)
                elif selected is not None:
                    allowed = selection_mask(selected, context)
                else:
                    raise EngineError("a sparse row was scheduled on a model that has no indexer")
                if tile.expanded:
                    result = kernels.latent_expanded(
                        rows, *common, allowed, w.kv_b, self.rank, self.scale, unpack
                    )
                else:
                    result = self._values(
                        kernels.latent_masked(
                            self._absorb(rows), *common, allowed, self.rank, self.scale, unpack
                        )
                    )
            out[tile.rows] = result.flatten(0, 1)
        return linear(out.flatten(1), w.o)

    def _absorb(self, query: Tensor) -> Tensor:
        """Multiply the plain part with each head's key expansion: [R, Q, H, n + p] -> [R, Q, H, r + p]."""
        keys = self.weights.kv_b[:, : self.nope]  # [H, n, r]
        plain = torch.einsum("rqhn,hnk->rqhk", query[..., : self.nope], keys)
        return torch.cat((plain, query[..., self.nope :]), dim=-1)

    def _values(self, made: Tensor) -> Tensor:
        """Multiply with each head's value expansion: [R, Q, H, r] -> [R, Q, H, v]."""
        return torch.einsum("rqhk,hvk->rqhv", made, self.weights.kv_b[:, self.nope :])
