"""Every backend's latent attention against the definition, and the forms against one another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from engine.attention.gqa import selection_mask
from engine.kernels.choice import load_backend
from lab.doctor.tiles import NOPE, RANK, TOLERANCE, LatentCase, TileCase, TileShape, check_latents
from tests.engine.kernels.test_attention import HERE, OTHERS, tile_shapes


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=15, deadline=None)
@given(shape=tile_shapes())
def test_conformance(backend: str, dtype: torch.dtype, shape: TileShape) -> None:
    check_latents(load_backend(backend), TileCase(shape, dtype))


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=10, deadline=None)
@given(shape=tile_shapes())
def test_absorbed_and_expanded_are_the_same_attention(backend: str, shape: TileShape) -> None:
    case, kernels = TileCase(shape, torch.float32), load_backend(backend)
    latents = LatentCase(case, torch.float32)
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
