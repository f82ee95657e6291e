"""The FP8 operations of a kernel backend, as DeepSeek-V3.2 computes its index scores and its cache.

Each is a formula; letters as in `engine.kernels.interface.attention`. e4m3 has 3 bits after the point: to the
nearest, ties to even, largest 448, and what is larger is clamped to it.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from engine.memory.blocks import BlockWeight

ScaleFormat = Literal["float", "ue8m0"]
"""A scale as it comes out, or rounded up to a power of two (an unsigned exponent of 8 bits)."""

ACTIVATION_FLOOR = 1e-4
"""A row of zeros is scaled as if its largest number were this (DeepSeek-V3.2-Exp, inference/kernel.py)."""

CACHE_FLOOR = 448e-4
"""The same for the latents in the KV cache: there the scale itself is at least 1e-4 (FlashMLA, tests/quant.py)."""


class Fp8Kernels(Protocol):
    """FP8 quantisation, rotation and products."""

    def quantise(
        self, x: Tensor, scale_format: ScaleFormat, floor: float = ACTIVATION_FLOOR, block: int = 128
    ) -> tuple[Tensor, Tensor]:
        """One scale for each `block` consecutive numbers of a row.

        amax = max(max_j |x_j|, floor); s = amax / 448, or 2^ceil(log2(amax / 448)) as ue8m0;
        x8_j = e4m3(clamp(x_j / s, -448, 448)), all in float32.

        Args:
            x: [..., n], finite

        Returns:
            [..., n] float8_e4m3fn, and scales [..., ceil(n / block)] float32
        """
        ...

    def hadamard(self, x: Tensor) -> Tensor:
        """y_i = n^-1/2 sum_j (-1)^popcount(i & j) x_j: Sylvester's Hadamard matrix, which is orthogonal.

        It leaves index scores as they are and spreads a vector's outliers over all its numbers, so that
        one scale a vector suffices.

        Args:
            x: [..., n], n a power of two

        Returns:
            [..., n] in the dtype of x, summed in float32
        """
        ...

    def index_scores_fp8(
        self, query: Tensor, head_weights: Tensor, key_plane: Tensor, block_table: Tensor, positions: Tensor
    ) -> Tensor:
        """Lightning indexer scores from FP8 numbers.

        I[r,q,c] = s_k[r,c] * sum_h head_weights[r,q,h] * relu(query[r,q,h] . k8[r,c]),
        -inf where c > positions[r,q]; products of e4m3 numbers are exact, sums are in float32.

        Args:
            query: [R, Q, H, d] float8_e4m3fn
            head_weights: [R, Q, H] float32, the queries' scales and all constant factors folded in
            key_plane: [num_pages, S, d + 4] uint8, pages laid out as in `engine.memory.layouts.IndexKeyLayout`
            block_table: [R, P] int64
            positions: [R, Q] int64

        Returns:
            [R, Q, C = P * S] float32
        """
        ...

    def linear_fp8(self, x: Tensor, weight: BlockWeight, scale_format: ScaleFormat) -> Tensor:
        """y = x W^T with both in FP8, and a float32 sum that is rescaled after each 128 numbers.

        x8, s = quantise(x); y_o = sum_b s_b * W.scales[o // 128, b] * sum_{j in block b} x8_j W8_{o,j}.
        The promotion to float32 after each block is DeepSeek-V3's (arXiv 2412.19437, section 3.3.2).

        Args:
            x: [..., in]
            weight: [out, in]

        Returns:
            [..., out] in the dtype of x
        """
        ...
