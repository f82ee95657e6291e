"""Index keys and queries in 8-bit integers: what a CPU multiplies fastest.

A vector x is kept as integers n and one scale s: s = max|x| / 127, n_j = round(x_j / s), ties to even, in float32 (n = 0
where s = 0). Scores are what e4m3 would make of them, more exactly: an integer of 8 bits has 7 after the sign.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Int8Kernels(Protocol):
    """Letters as in `engine.kernels.interface.attention`; a plane is as `engine.memory.layouts.Int8KeyLayout` says."""

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
        """`index_scores` of the numbers that quantised queries (n, s)[r,q,h] and keys (m, t)[r,c] stand for.

        I[r,q,c] = t[r,c] sum_h head_weights[r,q,h] s[r,q,h] relu(n[r,q,h] . m[r,c]),  -inf where c > positions[r,q].

        Args:
            query: [R, Q, H, d], quantised here
            key_plane: [num_pages, S, d + 4] uint8
            (others as in `index_scores`)

        Returns:
            [R, Q, C] float32
        """
        ...
