"""The operations over whole tiles with torch's own kernels, for any torch device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.interface.composed import Composed
from engine.kernels.torchops.fp8 import VectorisedFp8
from engine.kernels.torchops.int8 import VectorisedInt8
from engine.kernels.torchops.latent import VectorisedLatent

PRODUCTS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}
"""The most numbers of a (row, head, position) array of scores. On a CPU the array and its keys fit into the caches."""


class VectorisedKernels(VectorisedFp8, VectorisedInt8, VectorisedLatent, Composed):
    """The backend `torch`. The formulas are in `engine.kernels.interface`."""

    name = "torch"
    integer_keys = False
    fused = False

    def computed_by(self, operation: str, dtype: torch.dtype) -> str:
        return "torch"

    def streams_latents(self, latent: torch.dtype, index: torch.dtype) -> bool:
        return False

    def index_scores(
        self, query: Tensor, head_weights: Tensor, key_plane: Tensor, block_table: Tensor, positions: Tensor
    ) -> Tensor:
        """Compute in float32, because a rounded score would change the selection; see also `PRODUCTS_AT_ONCE`."""
        requests, rows, heads, dim = query.shape
        pages, size = block_table.shape[1], key_plane.shape[1]
        wide = query.reshape(requests, rows * heads, dim).float()
        scores = wide.new_empty(requests, rows, pages * size)
        at_once = max(1, PRODUCTS_AT_ONCE[query.device.type] // (requests * rows * heads * size))
        for first in range(0, pages, at_once):
            keys = _contexts(key_plane, block_table[:, first : first + at_once]).float()  # [R, c, d]
            per_head = torch.bmm(wide, keys.transpose(1, 2)).relu_()
            part = torch.matmul(
                head_weights.unsqueeze(2), per_head.view(requests, rows, heads, -1)
            )  # [R, Q, 1, H] @ [R, Q, H, c]
            scores[:, :, first * size : first * size + keys.shape[1]] = part.squeeze(2)
        return scores.masked_fill_(_future(positions, pages * size), -math.inf)

    def select(self, scores: Tensor, index_top_k: Tensor) -> Tensor:
        """Use `torch.topk`. Its order of equal scores is unspecified, so ties at the edge are corrected."""
        context = scores.shape[-1]
        width = min(int(index_top_k.max()), context)
        values, indices = scores.topk(width, dim=-1)
        ranks = torch.arange(width, device=scores.device)
        taken = ranks < index_top_k.unsqueeze(-1)
        edge = values.gather(-1, index_top_k.clamp(max=width).unsqueeze(-1) - 1)  # worst score of each set
        crossed = ((scores >= edge).sum(-1) > index_top_k) & (edge.squeeze(-1) > -math.inf)
        if bool(crossed.any()):
            indices[crossed] = _latest_first(scores[crossed], width)
        return indices.masked_fill_(~(taken & (values > -math.inf)), -1)

    def attend_selected(
        self, query: Tensor, kv_plane: Tensor, block_table: Tensor, selected: Tensor, scale: float
    ) -> Tensor:
        """Gather each row's own keys and values, then attend to them in one batch."""
        requests, rows, kv_heads, group, dim = query.shape
        page_size = kv_plane.shape[1]
        present = selected >= 0
        chosen = selected.clamp(min=0)
        pages = block_table.gather(1, (chosen // page_size).flatten(1)).view_as(chosen)
        kv = kv_plane[pages, chosen % page_size].flatten(0, 1)  # [RQ, K, Hkv, 2, D]
        # The query heads of a group read the same keys. So they are rows of one product, and no key is copied.
        out = F.scaled_dot_product_attention(
            query.reshape(requests * rows, kv_heads, group, dim),
            kv[:, :, :, 0].transpose(1, 2),
            kv[:, :, :, 1].transpose(1, 2),
            attn_mask=present.view(requests * rows, 1, 1, -1),
            scale=scale,
        )
        return out.reshape(requests, rows, kv_heads, group, dim)

    def attend_masked(
        self, query: Tensor, kv_plane: Tensor, block_table: Tensor, allowed: Tensor, scale: float
    ) -> Tensor:
        """Gather each request's pages once, then attend with all its rows under a mask."""
        requests, rows, kv_heads, group, dim = query.shape
        kv = _contexts(kv_plane, block_table)  # [R, C, Hkv, 2, D]
        folded = query.permute(0, 2, 3, 1, 4).reshape(requests, kv_heads, group * rows, dim)
        mask = allowed.unsqueeze(1).expand(-1, group, -1, -1).reshape(requests, 1, group * rows, -1)
        out = F.scaled_dot_product_attention(
            folded,
            kv[:, :, :, 0].transpose(1, 2),
            kv[:, :, :, 1].transpose(1, 2),
            attn_mask=mask,
            scale=scale,
        )
        return out.reshape(requests, kv_heads, group, rows, dim).permute(0, 3, 1, 2, 4)


def _contexts(plane: Tensor, block_table: Tensor) -> Tensor:
    """Copy each request's cached tokens in order: [num_pages, S, ...] and [R, P] -> [R, C, ...]."""
    return plane[block_table].flatten(1, 2)


def _future(positions: Tensor, context: int) -> Tensor:
    """Which context positions lie after the query's position: [R, Q] -> [R, Q, C] bool."""
    return torch.arange(context, device=positions.device) > positions.unsqueeze(-1)


def _latest_first(scores: Tensor, width: int) -> Tensor:
    """Return the `width` best positions of each row [N, C]. Of equal scores the later position comes first."""
    flipped = scores.flip(-1)
    order = flipped.argsort(dim=-1, descending=True, stable=True)[:, :width]
    return scores.shape[-1] - 1 - order
