"""The lightning indexer: a small scorer that rates every earlier token for the current one.

As DeepSeek-V3.2-Exp's (arXiv 2512.02556, section 2), sized for its host: several ReLU-scored query
heads, one key shared by them all, LayerNorm on the key, rotary embedding on the first `rope_dim` dims
(half-split; interleaved in GLM-5), and per-head weights computed from the same hidden state. Queries come
from the host's normalised query latent where it has one (DeepSeek), else from the hidden state.
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
    """What scores a batch's rows against cached index keys."""

    query: Tensor  # [T, H, d]
    head_weights: Tensor  # [T, H] float32, scaled by H^-0.5 * d^-0.5


class LightningIndexer:
    """One layer's indexer, in the precision of its weights.

    Args:
        weights: of the layer
        num_heads: H
        interleaved: how the rotated dims pair
    """

    def __init__(self, weights: IndexerWeights, num_heads: int, *, interleaved: bool = False) -> None:
        self.weights = weights
        self.interleaved = interleaved
        self.num_heads = num_heads
        self.head_dim = weights.wk.shape[0]

    def keys(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Index keys to be cached: hidden [T, E] -> [T, d], whatever the row's index_top_k.

        A token that was computed densely may be scored by a sparse row later.
        """
        w = self.weights
        key = layer_norm(linear(hidden, w.wk), w.k_norm_weight, w.k_norm_bias, KEY_NORM_EPS)
        return rotate(key.unsqueeze(1), rotation, interleaved=self.interleaved).squeeze(1)

    def queries(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor], latent: Tensor | None = None
    ) -> IndexQueries:
        """Index queries and head weights of rows [T, E]; `latent` [T, r] is the host's query latent, if any."""
        w = self.weights
        query = linear(hidden if latent is None else latent, w.wq).view(-1, self.num_heads, self.head_dim)
        scale = self.num_heads**-0.5 * self.head_dim**-0.5
        head_weights = linear_float32(hidden, w.weights_proj) * scale
        return IndexQueries(
            query=rotate(query, rotation, interleaved=self.interleaved), head_weights=head_weights
        )
