"""The lightning indexer: it makes the queries and keys that rate every earlier token for the current one.

It is the indexer of DeepSeek-V3.2-Exp (arXiv 2512.02556, section 2), in sizes that fit the host model: several query
heads scored with ReLU, one key that all heads share, LayerNorm on the key, rotary embedding on the first `rope_dim`
dims (half-split; interleaved in GLM-5), and head weights computed from the same hidden state. Queries come from the
host's normalised query latent if it has one (DeepSeek), else from the hidden state. The kernels compute the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.layers.linear import Held, linear, linear_float32
from engine.layers.norm import layer_norm
from engine.layers.rope import rotate

KEY_NORM_EPS = 1e-6


@dataclass(frozen=True)
class IndexerWeights:
    """One layer's indexer of H heads of d dims over a hidden size of E."""

    wq: Held  # [H * d, E], or [H * d, query latent]
    wk: Held  # [d, E]
    k_norm_weight: Tensor  # [d]
    k_norm_bias: Tensor  # [d]
    weights_proj: Held  # [H, E]


@dataclass(frozen=True)
class IndexQueries:
    """The queries and head weights that score a batch's rows against cached index keys."""

    query: Tensor  # [T, H, d]
    head_weights: Tensor  # [T, H] float32, scaled by H^-0.5 * d^-0.5


class LightningIndexer:
    """One layer's indexer, in the precision of its weights.

    Args:
        weights: the layer's
        num_heads: H
        interleaved: whether the rotated dims pair as 2i with 2i + 1, else as i with i + n/2
    """

    def __init__(self, weights: IndexerWeights, num_heads: int, *, interleaved: bool = False) -> None:
        self.weights = weights
        self.interleaved = interleaved
        self.num_heads = num_heads
        self.head_dim = weights.wk.shape[0]

    def keys(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Make the index keys for the cache: hidden [T, E] -> [T, d].

        Dense rows get a key too, because a sparse row may score their token later.
        """
        w = self.weights
        key = layer_norm(linear(hidden, w.wk), w.k_norm_weight, w.k_norm_bias, KEY_NORM_EPS)
        return rotate(key.unsqueeze(1), rotation, interleaved=self.interleaved).squeeze(1)

    def queries(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor], latent: Tensor | None = None
    ) -> IndexQueries:
        """Make the index queries and head weights of rows [T, E]. `latent` [T, r]: the host's query latent, if any."""
        w = self.weights
        query = linear(hidden if latent is None else latent, w.wq).view(-1, self.num_heads, self.head_dim)
        scale = self.num_heads**-0.5 * self.head_dim**-0.5
        head_weights = linear_float32(hidden, w.weights_proj) * scale
        return IndexQueries(
            query=rotate(query, rotation, interleaved=self.interleaved), head_weights=head_weights
        )
