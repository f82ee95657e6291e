"""The definition of each operation of latent attention, row by row in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.interface.latent import Unpack, as_stored


class ReferenceLatent:
    """The operations of latent attention, in float32. The formulas are in `engine.kernels.interface.latent`."""

    def latent_selected(
        self, query: Tensor, plane: Tensor, block_table: Tensor, selected: Tensor, rank: int, scale: float,
        unpack: Unpack = as_stored,
    ) -> Tensor:  # fmt: skip
        """Softmax over the selected positions of one row at a time."""
        out = query.new_empty(*query.shape[:-1], rank)
        for r in range(query.shape[0]):
            context = unpack(plane[block_table[r]].flatten(0, 1)).float()  # [C, r + p]
            for q in range(query.shape[1]):
                chosen = context[selected[r, q][selected[r, q] >= 0]]
                weights = (query[r, q].float() @ chosen.T * scale).softmax(-1)
                out[r, q] = (weights @ chosen[:, :rank]).to(query.dtype)
        return out

    def latent_masked(
        self, query: Tensor, plane: Tensor, block_table: Tensor, allowed: Tensor, rank: int, scale: float,
        unpack: Unpack = as_stored,
    ) -> Tensor:  # fmt: skip
        """Softmax over the allowed positions of one row at a time."""
        out = query.new_empty(*query.shape[:-1], rank)
        for r in range(query.shape[0]):
            context = unpack(plane[block_table[r]].flatten(0, 1)).float()
            for q in range(query.shape[1]):
                chosen = context[allowed[r, q]]
                weights = (query[r, q].float() @ chosen.T * scale).softmax(-1)
                out[r, q] = (weights @ chosen[:, :rank]).to(query.dtype)
        return out

    def latent_expanded(
        self, query: Tensor, plane: Tensor, block_table: Tensor, allowed: Tensor, expand: Tensor, rank: int,
        scale: float, unpack: Unpack = as_stored,
    ) -> Tensor:  # fmt: skip
        """Make the keys and values of one head at a time, then attend."""
        rows, heads = query.shape[1], query.shape[2]
        plain = query.shape[-1] - (unpack(plane[:1]).shape[-1] - rank)
        out = query.new_empty(*query.shape[:-1], expand.shape[1] - plain)
        for r in range(query.shape[0]):
            context = unpack(plane[block_table[r]].flatten(0, 1)).float()
            for h in range(heads):
                made = context[:, :rank] @ expand[h].float().T  # [C, n + v]
                keys = torch.cat((made[:, :plain], context[:, rank:]), dim=-1)
                for q in range(rows):
                    mask = allowed[r, q]
                    weights = (keys[mask] @ query[r, q, h].float() * scale).softmax(-1)
                    out[r, q, h] = (weights @ made[mask, plain:]).to(query.dtype)
        return out
