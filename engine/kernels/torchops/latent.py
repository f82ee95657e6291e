"""The operations of latent attention over whole tiles with torch's own kernels, for any torch device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.interface.latent import Unpack, as_stored


class VectorisedLatent:
    """The operations of latent attention. The formulas are in `engine.kernels.interface.latent`.

    All heads read the same vectors, so the heads are rows of one product.
    """

    def latent_selected(
        self, query: Tensor, plane: Tensor, block_table: Tensor, selected: Tensor, rank: int, scale: float,
        unpack: Unpack = as_stored,
    ) -> Tensor:  # fmt: skip
        """Gather each row's own tokens, then attend to them with all heads at once."""
        requests, rows, heads, dim = query.shape
        size = plane.shape[1]
        chosen = selected.clamp(min=0)
        pages = block_table.gather(1, (chosen // size).flatten(1)).view_as(chosen)
        tokens = unpack(plane[pages, chosen % size]).to(query.dtype).flatten(0, 1).unsqueeze(1)
        out = F.scaled_dot_product_attention(
            query.reshape(requests * rows, 1, heads, dim),
            tokens,  # [RQ, 1, K, r + p]
            tokens[..., :rank],
            attn_mask=(selected >= 0).view(requests * rows, 1, 1, -1),
            scale=scale,
        )
        return out.view(requests, rows, heads, rank)

    def latent_masked(
        self, query: Tensor, plane: Tensor, block_table: Tensor, allowed: Tensor, rank: int, scale: float,
        unpack: Unpack = as_stored,
    ) -> Tensor:  # fmt: skip
        """Gather each request's pages once, then attend to them with all rows and heads at once."""
        requests, rows, heads, dim = query.shape
        tokens = unpack(plane[block_table].flatten(1, 2)).to(query.dtype).unsqueeze(1)  # [R, 1, C, r + p]
        mask = allowed.unsqueeze(2).expand(-1, -1, heads, -1).reshape(requests, 1, rows * heads, -1)
        out = F.scaled_dot_product_attention(
            query.reshape(requests, 1, rows * heads, dim),
            tokens,
            tokens[..., :rank],
            attn_mask=mask,
            scale=scale,
        )
        return out.view(requests, rows, heads, rank)

    def latent_expanded(
        self, query: Tensor, plane: Tensor, block_table: Tensor, allowed: Tensor, expand: Tensor, rank: int,
        scale: float, unpack: Unpack = as_stored,
    ) -> Tensor:  # fmt: skip
        """Expand the context, then compute ordinary multi-head attention."""
        tokens = unpack(plane[block_table].flatten(1, 2)).to(query.dtype)  # [R, C, r + p]
        heads, made_dim, _ = expand.shape
        shared = tokens[..., rank:]
        plain = query.shape[-1] - shared.shape[-1]
        made = F.linear(tokens[..., :rank], expand.reshape(heads * made_dim, rank))
        made = made.view(*tokens.shape[:2], heads, made_dim).transpose(1, 2)  # [R, H, C, n + v]
        keys = torch.cat((made[..., :plain], shared.unsqueeze(1).expand(-1, heads, -1, -1)), dim=-1)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys, made[..., plain:], attn_mask=allowed.unsqueeze(1), scale=scale
        )
        return out.transpose(1, 2)
