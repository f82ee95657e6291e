"""What FP8 changes of the selection: the share of the top 2048 that it has in common with full precision.

Independent Gaussian queries and keys are the worst case: nothing but noise separates their scores (0.97 of 8192
positions, 0.96 of 32768). Real keys are correlated: neighbours are alike, and a few directions carry most of the
variance, for queries of all heads alike. Both are here.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.choice import load_backend
from engine.memory.layouts import IndexKeyLayout
from engine.memory.planes import PagedCache

TOP_K = 2048
KERNELS = load_backend("torch")


def overlap(query: Tensor, head_weights: Tensor, keys: Tensor) -> float:
    """Share in common of the top 2048 of full-precision and of rotated FP8 scores.

    Args:
        query: [N, H, d]
        head_weights: [N, H]
        keys: [C, d], C a multiple of 64
    """
    rows, context = query.shape[0], keys.shape[0]
    pages = torch.arange(context // 64).unsqueeze(0)
    last = torch.full((1, rows), context - 1)
    plain = KERNELS.index_scores(
        query.unsqueeze(0), head_weights.unsqueeze(0), keys.view(-1, 64, keys.shape[1]), pages, last
    )
    layout = IndexKeyLayout(keys.shape[1])
    plane = PagedCache(context // 64, [layout.spec("index_key")], 1, torch.device("cpu")).plane(
        0, "index_key"
    )
    k8, k_scales = KERNELS.quantise(KERNELS.hadamard(keys), "ue8m0")
    at = torch.arange(context)
    layout.write(plane, at // 64, at % 64, k8, k_scales.squeeze(-1))
    q8, q_scales = KERNELS.quantise(KERNELS.hadamard(query), "ue8m0")
    folded = head_weights * q_scales.squeeze(-1)
    low = KERNELS.index_scores_fp8(q8.unsqueeze(0), folded.unsqueeze(0), plane, pages, last)
    index_top_k = torch.full((1, rows), TOP_K)
    chosen = torch.zeros(rows, context, dtype=torch.bool)
    chosen.scatter_(1, KERNELS.select(plain, index_top_k)[0], True)
    return float(chosen.gather(1, KERNELS.select(low, index_top_k)[0]).float().mean())


def correlated(
    context: int, rank: int = 32, heads: int = 64, dim: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer-normed keys with a decaying spectrum, each correlated by 0.9 with its neighbour; 4 queries of related heads."""
    g = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, rank + 1).float() ** -0.7
    basis = torch.randn(rank, dim, generator=g)
    steps = torch.randn(context, rank, generator=g)
    for t in range(1, context):
        steps[t] = 0.9 * steps[t - 1] + (1 - 0.9**2) ** 0.5 * steps[t]
    keys = (steps * spectrum) @ basis + 0.3 * torch.randn(context, dim, generator=g)
    keys = torch.nn.functional.layer_norm(keys, (dim,))
    bases = basis + 0.5 * torch.randn(heads, rank, dim, generator=g)
    query = torch.einsum("nr,hrd->nhd", torch.randn(4, rank, generator=g) * spectrum, bases)
    query += 0.3 * torch.randn(4, heads, dim, generator=g)
    return query, torch.randn(4, heads, generator=g) + 1, keys


@pytest.mark.parametrize("context", [8192, pytest.param(32768, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rank", [32, 64])
def test_correlated_keys(context: int, rank: int) -> None:
    assert overlap(*correlated(context, rank)) > 0.98


@pytest.mark.parametrize(
    ("context", "least"), [(8192, 0.97), pytest.param(32768, 0.955, marks=pytest.mark.slow)]
)
def test_the_worst_case_is_below(context: int, least: float) -> None:
    g = torch.Generator().manual_seed(0)
    query, keys = torch.randn(4, 64, 128, generator=g), torch.randn(context, 128, generator=g)
    assert least < overlap(query, torch.randn(4, 64, generator=g).abs(), keys) < 0.98
