"""The operations of a kernel backend on index keys and queries in 8-bit integers, which a CPU multiplies fastest.

A vector x is kept as integers n and one scale s: s = max|x| / 127, n_j = round(x_j / s), ties to even, in float32 (n = 0
if s = 0). Scores are more exact than with e4m3, because an 8-bit integer has 7 bits after the sign.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Int8Kernels(Protocol):
    """Stores and scores index keys in 8-bit integers.

    Letters as in `engine.kernels.interface.attention`. A plane has the layout `engine.memory.layouts.Int8KeyLayout`.
    """

    def store_index_keys(self, plane: Tensor, pages: Tensor, offsets: Tensor, keys: Tensor) -> None:
        """Quantise keys and write them at (pages[t], offsets[t]).

        Args:
            plane: [num_pages, S, d + 4] uint8
            pages: [T] int64
            offsets: [T] int64
            keys: [T, d]
        """
        ...

    def index_scores_int8(
        self, query: Tensor, head_weights: Tensor, key_plane: Tensor, block_table: Tensor, positions: Tensor
    ) -> Tensor:
        """Compute `index_scores` from quantised queries (n, s)[r,q,h] and quantised keys (m, t)[r,c].

        I[r,q,c] = t[r,c] sum_h head_weights[r,q,h] s[r,q,h] relu(n[r,q,h] . m[r,c]),  -inf where c > positions[r,q].

        Args:
            query: [R, Q, H, d]; this operation quantises it
            key_plane: [num_pages, S, d + 4] uint8
            (others as in `index_scores`)

        Returns:
            [R, Q, C] float32
        """
        ...
