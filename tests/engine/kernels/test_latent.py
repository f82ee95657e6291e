"""Every backend's latent attention against the definition, and the forms against one another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from engine.attention.gqa import selection_mask
from engine.kernels.choice import load_backend
from engine.kernels.reference.attention import ReferenceKernels
from tests.engine.kernels.test_attention import HERE, OTHERS, TOLERANCE, Case, make_cache, tile_shapes

HEADS, RANK, NOPE, ROPE, VALUE = 3, 16, 8, 4, 6


class Latents:
    """Random latents and queries for the tile of a `Case`, scaled so that a softmax is not one-hot."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(int(case.block_table.sum()))
        shape = (case.requests, case.rows, HEADS)
        self.plane = make_cache(g, int(case.block_table.max()) + 1, RANK + ROPE, dtype=dtype)
        self.query = (torch.randn(*shape, NOPE + ROPE, generator=g) / 2).to(dtype)
        self.absorbed = (torch.randn(*shape, RANK + ROPE, generator=g) / 2).to(dtype)
        self.expand = (torch.randn(HEADS, NOPE + VALUE, RANK, generator=g) / 4).to(dtype)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=15, deadline=None)
@given(shape=tile_shapes())
def test_conformance(backend: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    case, kernels, reference = Case(shape, dtype), load_backend(backend), ReferenceKernels()
    latents = Latents(case, dtype)
    tolerance = TOLERANCE[dtype] * 2
    selected = reference.select(case.scores, case.index_top_k)
    allowed = torch.rand(case.scores.shape, generator=torch.Generator().manual_seed(shape[3])) < 0.5
    allowed[..., 0] = True
    # Planes of another layout are unpacked after the gather; here each number is stored halved.
    stored = latents.plane / 2
    for plane, extra in ((latents.plane, ()), (stored, (lambda tokens: tokens * 2,))):
        at = (plane, case.block_table)
        torch.testing.assert_close(
            kernels.latent_selected(latents.absorbed, *at, selected, RANK, 0.3, *extra),
            reference.latent_selected(latents.absorbed, *at, selected, RANK, 0.3, *extra),
            rtol=tolerance,
            atol=tolerance,
        )
        torch.testing.assert_close(
            kernels.latent_masked(latents.absorbed, *at, allowed, RANK, 0.3, *extra),
            reference.latent_masked(latents.absorbed, *at, allowed, RANK, 0.3, *extra),
            rtol=tolerance,
            atol=tolerance,
        )
        torch.testing.assert_close(
            kernels.latent_expanded(latents.query, *at, allowed, latents.expand, RANK, 0.3, *extra),
            reference.latent_expanded(latents.query, *at, allowed, latents.expand, RANK, 0.3, *extra),
            rtol=tolerance,
            atol=tolerance,
        )


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=10, deadline=None)
@given(shape=tile_shapes())
def test_absorbed_and_expanded_are_the_same_attention(backend: str, shape: tuple[int, int, int, int]) -> None:
    case, kernels = Case(shape, torch.float32), load_backend(backend)
    latents = Latents(case, torch.float32)
    selected = kernels.select(case.scores, case.index_top_k)
    allowed = selection_mask(selected, case.context)
    keys, values = latents.expand[:, :NOPE], latents.expand[:, NOPE:]
    plain = torch.einsum("rqhn,hnk->rqhk", latents.query[..., :NOPE], keys)
    absorbed = torch.cat((plain, latents.query[..., NOPE:]), dim=-1)
    at = (latents.plane, case.block_table)
    gathered = kernels.latent_selected(absorbed, *at, selected, RANK, 0.3)
    masked = kernels.latent_masked(absorbed, *at, allowed, RANK, 0.3)
    expanded = kernels.latent_expanded(latents.query, *at, allowed, latents.expand, RANK, 0.3)
    torch.testing.assert_close(gathered, masked, rtol=1e-5, atol=1e-5)
    made = torch.einsum("rqhk,hvk->rqhv", masked, values)
    torch.testing.assert_close(made, expanded, rtol=1e-4, atol=1e-5)
