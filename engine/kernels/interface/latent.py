"""The operations of multi-head latent attention (arXiv 2405.04434, section 2.1) over a paged cache.

Letters as in `engine.kernels.interface.attention`; also: H attention heads, r the latent's rank, n / p / v the plain,
rotated and value dims of a head. The cache holds of a token one vector c = [latent r | rotated shared key p].
A plane may store it in another layout: `unpack` turns gathered tokens [..., stored] into [..., r + p].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Unpack = Callable[[Tensor], Tensor]


def as_stored(tokens: Tensor) -> Tensor:
    """The layout of a plane that holds the numbers themselves."""
    return tokens


class LatentKernels(Protocol):
    """Attention over latents, absorbed (every head reads c itself) or expanded (keys and values of each head)."""

    def latent_selected(
        self,
        query: Tensor,
        plane: Tensor,
        block_table: Tensor,
        selected: Tensor,
        rank: int,
        scale: float,
        unpack: Unpack = as_stored,
    ) -> Tensor:
        """Absorbed attention over only the selected positions, which are gathered.

        u[r,q,h] = sum_s softmax_s(scale * query[r,q,h] . c[r,s]) c[r,s,:rank],  s in selected[r,q].

        Args:
            query: [R, Q, H, r + p], its plain part already times the head's key expansion
            plane: [num_pages, S, stored]
            block_table: [R, P] int64
            selected: [R, Q, K] int64, -1 for none; each row has at least one
            rank: r
            scale: softmax scale
            unpack: see this module

        Returns:
            [R, Q, H, r] in the query's dtype
        """
        ...

    def latent_masked(
        self,
        query: Tensor,
        plane: Tensor,
        block_table: Tensor,
        allowed: Tensor,
        rank: int,
        scale: float,
        unpack: Unpack = as_stored,
    ) -> Tensor:
        """The same over the positions that `allowed` [R, Q, C] bool permits; reads the whole context."""
        ...

    def latent_expanded(
        self,
        query: Tensor,
        plane: Tensor,
        block_table: Tensor,
        allowed: Tensor,
        expand: Tensor,
        rank: int,
        scale: float,
        unpack: Unpack = as_stored,
    ) -> Tensor:
        """Multi-head attention after making each head's keys and values of the context, once for all rows.

        [k | w][r,c,h] = expand[h] @ c[r,c,:rank];  s = scale * query[r,q,h] . [k | c[r,c,rank:]];
        out[r,q,h] = sum_c softmax_c(s) w[r,c,h] over the allowed positions.

        Args:
            query: [R, Q, H, n + p]
            expand: [H, n + v, r]
            (others as in `latent_masked`)

        Returns:
            [R, Q, H, v] in the query's dtype
        """
        ...
