"""What a kernel backend provides: each operation is a formula with shapes.

Letters: R requests of a tile, Q query rows of each, C context positions (a whole number of pages,
padded to the longest request of the tile), H index heads, d index head dim, G query heads a KV head,
K selected positions, P pages a request, S = 64 tokens a page.

A plane is a view `[num_pages, S, ...]` of the paged cache; request r's position c lies at
`plane[block_table[r, c // S], c % S]`. Block tables are padded with page 0: what lies there is finite
and masked.
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
        name: of the backend
        integer_keys: whether index keys in 8-bit integers are faster here than in the model's own numbers
        fused: whether `attend_sparse` and `attend_causal` work row by row, so that what a tile's rows need adds up to
            nothing
    """

    name: str
    integer_keys: bool
    fused: bool

    def described(self, dtype: torch.dtype) -> str:
        """Which operation is computed by what, for the engine's log.

        Args:
            dtype: of the model
        """
        ...

    def streams_latents(self, latent: torch.dtype, index: torch.dtype) -> bool:
        """Whether attention over latents and index scores, cached in these numbers, are computed a few tokens at a time.

        Then no array of (row, head, position) is ever whole, and no cached token is copied.
        """
        ...

    def index_scores(
        self, query: Tensor, head_weights: Tensor, key_plane: Tensor, block_table: Tensor, positions: Tensor
    ) -> Tensor:
        """Lightning indexer scores, eq. (1) of the DeepSeek-V3.2-Exp report (arXiv 2512.02556, section 2).

        I[r,q,c] = sum_h head_weights[r,q,h] * relu(query[r,q,h] . key[r,c]),  -inf where c > positions[r,q].

        Weights may be negative, so a score may be below 0: what must not be chosen is -inf, never 0.

        Args:
            query: [R, Q, H, d]
            head_weights: [R, Q, H] float32, constant factors folded in
            key_plane: [num_pages, S, d]
            block_table: [R, P] int64
            positions: [R, Q] int64, each query's own position

        Returns:
            [R, Q, C = P * S] float32
        """
        ...

    def select(self, scores: Tensor, index_top_k: Tensor) -> Tensor:
        """The `index_top_k[r, q]` best-scored positions of each row, eq. (2)'s selected set.

        Equal scores at the edge of the set: the later position wins, so that the set is a function of
        the row alone and never of what else is in the batch.

        Args:
            scores: [R, Q, C] float32, -inf where a position may not be chosen
            index_top_k: [R, Q] int64, >= 1

        Returns:
            [R, Q, K] int64 with K = min(max(index_top_k), C), in no particular order, -1 where a row has fewer.
        """
        ...

    def attend_selected(
        self, query: Tensor, kv_plane: Tensor, block_table: Tensor, selected: Tensor, scale: float
    ) -> Tensor:
        """Attention over only the selected positions, which are gathered from the cache.

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
        """Attention over the context positions that `allowed` permits; reads the whole context.

        With `allowed` causal this is dense attention; with it scattered from a selected set it equals
        `attend_selected`.

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
        """`attend_masked` with every position allowed up to the row's own: dense attention.

        Args:
            positions: [R, Q] int64
            (others as in `attend_masked`)
        """
        ...

    def attend_sparse(
        self, query: Tensor, index_query: Tensor, head_weights: Tensor, kv_plane: Tensor, key_plane: Tensor,
        block_table: Tensor, positions: Tensor, index_top_k: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        """Index scores (in the numbers that `key_plane` holds), `select`, `attend_selected`.

        Args:
            query: [R, Q, Hkv, G, D]
            index_query: [R, Q, H, d]
            (others as in the operations that it consists of)

        Returns:
            [R, Q, Hkv, G, D] in the query's dtype
        """
        ...
