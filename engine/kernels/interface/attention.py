"""The operations of a kernel backend: each is a formula with shapes.

Letters: R requests of a tile, Q query rows of each, C context positions (whole pages, padded to the longest request of
the tile), H index heads, d index head dim, Hkv KV heads, G query heads for each KV head, D head dim, K selected
positions, P pages of a request, S = 64 tokens of a page.

A plane is a view `[num_pages, S, ...]` of the paged cache; request r's position c lies at
`plane[block_table[r, c // S], c % S]`. Block tables are padded with page 0: its numbers are finite, and masked.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.interface.fp8 import Fp8Kernels
from engine.kernels.interface.int8 import Int8Kernels
from engine.kernels.interface.latent import LatentKernels


class Kernels(Fp8Kernels, Int8Kernels, LatentKernels, Protocol):
    """The operations of sparse attention.

    Attributes:
        name: the backend's
        integer_keys: whether this backend is faster with index keys in 8-bit integers than in the model's dtype
        fused: whether `attend_sparse` and `attend_causal` work row by row, so that the rows of a tile need no arrays of
            their own
    """

    name: str
    integer_keys: bool
    fused: bool

    def computed_by(self, operation: str, dtype: torch.dtype) -> str:
        """Say, for the engine's log, which code computes an operation.

        Args:
            operation: its name in this interface, `index_scores` for example
            dtype: of its operands
        """
        ...

    def streams_latents(self, latent: torch.dtype, index: torch.dtype) -> bool:
        """Whether attention over latents and index scores are computed for a few tokens at a time.

        Then there is never a whole array of (row, head, position), and no cached token is copied.

        Args:
            latent: dtype of the cached latents
            index: dtype of the cached index keys
        """
        ...

    def index_scores(
        self, query: Tensor, head_weights: Tensor, key_plane: Tensor, block_table: Tensor, positions: Tensor
    ) -> Tensor:
        """Lightning indexer scores, eq. (1) of the DeepSeek-V3.2-Exp report (arXiv 2512.02556, section 2).

        I[r,q,c] = sum_h head_weights[r,q,h] * relu(query[r,q,h] . key[r,c]),  -inf where c > positions[r,q].

        Weights may be negative, so scores may be below 0: a position that must not be chosen gets -inf, never 0.

        Args:
            query: [R, Q, H, d]
            head_weights: [R, Q, H] float32, multiplied with all constant factors
            key_plane: [num_pages, S, d]
            block_table: [R, P] int64
            positions: [R, Q] int64, the position of each query row

        Returns:
            [R, Q, C = P * S] float32
        """
        ...

    def select(self, scores: Tensor, index_top_k: Tensor) -> Tensor:
        """Select the `index_top_k[r, q]` best-scored positions of each row, the set of eq. (2) of the same report.

        Of equal scores at the edge of the set the later position wins. So the set depends only on the row, never on
        the other rows of the batch.

        Args:
            scores: [R, Q, C] float32, -inf where a position may not be chosen
            index_top_k: [R, Q] int64, >= 1

        Returns:
            [R, Q, K] int64 with K = min(max(index_top_k), C), in no particular order, padded with -1
        """
        ...

    def attend_selected(
        self, query: Tensor, kv_plane: Tensor, block_table: Tensor, selected: Tensor, scale: float
    ) -> Tensor:
        """Attend over the selected positions, which are gathered from the cache.

        out[r,q,h,g] = sum_s softmax_s(scale * query[r,q,h,g] . k[r,s,h]) v[r,s,h],  s in selected[r,q].

        Args:
            query: [R, Q, Hkv, G, D]
            kv_plane: [num_pages, S, Hkv, 2, D], keys at index 0 and values at 1
            block_table: [R, P] int64
            selected: [R, Q, K] int64, -1 for none; each row has at least one

        Returns:
            [R, Q, Hkv, G, D] in the query's dtype
        """
        ...

    def attend_masked(
        self, query: Tensor, kv_plane: Tensor, block_table: Tensor, allowed: Tensor, scale: float
    ) -> Tensor:
        """Attend over the context positions where `allowed` is True. It reads the whole context.

        If `allowed` is causal, this is dense attention. If `allowed` is True at the positions of a selected set, the
        result is that of `attend_selected`.

        Args:
            allowed: [R, Q, C] bool, at least one True a row
            (others as in `attend_selected`)

        Returns:
            [R, Q, Hkv, G, D] in the query's dtype
        """
        ...

    def attend_causal(
        self, query: Tensor, kv_plane: Tensor, block_table: Tensor, positions: Tensor, scale: float
    ) -> Tensor:
        """Dense attention: `attend_masked` where a row may read all positions up to its own.

        Args:
            positions: [R, Q] int64
            (others as in `attend_masked`)

        Returns:
            [R, Q, Hkv, G, D] in the query's dtype
        """
        ...

    def attend_sparse(
        self, query: Tensor, index_query: Tensor, head_weights: Tensor, kv_plane: Tensor, key_plane: Tensor,
        block_table: Tensor, positions: Tensor, index_top_k: Tensor, scale: float, flaws: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute index scores (in the number format of `key_plane`), then `select`, then `attend_selected`.

        Args:
            query: [R, Q, Hkv, G, D]
            index_query: [R, Q, H, d]
            flaws: [R, Q] int32, to which the flaws of selections are added (`engine.kernels.interface.selection`);
                None: nobody looks
            (others as in these operations)

        Returns:
            [R, Q, Hkv, G, D] in the query's dtype
        """
        ...
