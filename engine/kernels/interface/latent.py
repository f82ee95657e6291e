"""The operations of multi-head latent attention (arXiv 2405.04434, section 2.1) over a paged cache.

Letters as in `engine.kernels.interface.attention`, and also: H attention heads, r the latent's rank, n / p / v the
plain, rotated and value dims of a head. The cache has one vector of each token, c = [latent r | rotated shared key p].
A plane may store c in another layout: `unpack` turns gathered tokens [..., stored] into [..., r + p].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Unpack = Callable[[Tensor], Tensor]


def as_stored(tokens: Tensor) -> Tensor:
    """Return the tokens unchanged: the `unpack` of a plane that stores c itself."""
    return tokens


class LatentKernels(Protocol):
    """Attention over latents: absorbed (all heads read c) or expanded (each head's keys and values are made first)."""

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
        """Absorbed attention over the selected positions, which are gathered.

        u[r,q,h] = sum_s softmax_s(scale * query[r,q,h] . c[r,s]) c[r,s,:rank],  s in selected[r,q].

        Args:
            query: [R, Q, H, r + p], its plain part already multiplied with the head's key expansion
            plane: [num_pages, S, stored]
            block_table: [R, P] int64
            selected: [R, Q, K] int64, -1 for none; each row has at least one
            rank: r
            scale: softmax scale
            unpack: see the module's docstring

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
        """Absorbed attention over the positions where `allowed` [R, Q, C] bool is True. It reads the whole context.

        Arguments, result and formula are otherwise those of `latent_selected`.
        """
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
        """Expanded attention: make each head's keys and values of the context once for all rows, then attend.

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
