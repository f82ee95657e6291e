"""The FP8 operations of a kernel backend, as DeepSeek-V3.2 computes its index scores and its cache.

Each is a formula; letters as in `engine.kernels.interface.attention`. e4m3(x) rounds to 3 bits after the point, to the
nearest number, ties to even. Numbers above 448, the largest, become 448.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from engine.memory.blocks import BlockWeight

ScaleFormat = Literal["float", "ue8m0"]
"""`float`: the scale is not rounded. `ue8m0`: it is rounded up to a power of two (an unsigned exponent of 8 bits)."""

ACTIVATION_FLOOR = 1e-4
"""The least `amax` of a row, which is for rows of zeros (DeepSeek-V3.2-Exp, inference/kernel.py)."""

CACHE_FLOOR = 448e-4
"""The least `amax` of latents in the KV cache, where the scale itself is at least 1e-4 (FlashMLA, tests/quant.py)."""


class Fp8Kernels(Protocol):
    """FP8 quantisation, rotation and products."""

    def quantise(
        self, x: Tensor, scale_format: ScaleFormat, floor: float = ACTIVATION_FLOOR, block: int = 128
    ) -> tuple[Tensor, Tensor]:
        """Quantise rows to FP8, with one scale for each `block` consecutive numbers of a row.

        amax = max(max_j |x_j|, floor); s = amax / 448, or with `ue8m0` 2^ceil(log2(amax / 448));
        x8_j = e4m3(clamp(x_j / s, -448, 448)), all in float32.

        Args:
            x: [..., n], finite
            scale_format: see `ScaleFormat`
            floor: the least `amax`
            block: consecutive numbers that share a scale

        Returns:
            [..., n] float8_e4m3fn, and scales [..., ceil(n / block)] float32
        """
        ...

    def hadamard(self, x: Tensor) -> Tensor:
        """Multiply with Sylvester's Hadamard matrix: y_i = n^-1/2 sum_j (-1)^popcount(i & j) x_j.

        The matrix is orthogonal, so index scores stay the same. It spreads the outliers of a vector over all its
        numbers, so that one scale for each vector is enough.

        Args:
            x: [..., n], n a power of two

        Returns:
            [..., n] in the dtype of x, summed in float32
        """
        ...

    def index_scores_fp8(
        self, query: Tensor, head_weights: Tensor, key_plane: Tensor, block_table: Tensor, positions: Tensor
    ) -> Tensor:
        """Compute lightning indexer scores from FP8 numbers.

        I[r,q,c] = s_k[r,c] * sum_h head_weights[r,q,h] * relu(query[r,q,h] . k8[r,c]),
        -inf where c > positions[r,q]. Here k8 are the keys' numbers and s_k their scales. Products of e4m3 numbers are
        exact, sums are in float32.

        Args:
            query: [R, Q, H, d] float8_e4m3fn
            head_weights: [R, Q, H] float32, multiplied with the queries' scales and all constant factors
            key_plane: [num_pages, S, d + 4] uint8, pages laid out as in `engine.memory.layouts.IndexKeyLayout`
            block_table: [R, P] int64
            positions: [R, Q] int64

        Returns:
            [R, Q, C = P * S] float32
        """
        ...

    def linear_fp8(self, x: Tensor, weight: BlockWeight, scale_format: ScaleFormat) -> Tensor:
        """Compute y = x W^T with x and W in FP8, and a float32 sum that is rescaled after each 128 numbers.

        x8, s = quantise(x); y_o = sum_b s_b * W.scales[o // 128, b] * sum_{j in block b} x8_j W8_{o,j}.
        The promotion to float32 after each block is DeepSeek-V3's (arXiv 2412.19437, section 3.3.2).

        Args:
            x: [..., in]
            weight: W, [out, in]
            scale_format: of the scales of x

        Returns:
            [..., out] in the dtype of x
        """
        ...
