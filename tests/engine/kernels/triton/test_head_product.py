"""Products by heads against einsum."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.torchops.fp8 import VectorisedFp8
from engine.kernels.triton.head_product import absorb, expand_values, expand_values_rows


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    tolerance = 2e-5 if ours.dtype is torch.float32 else 2.0**-6
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("rows", "heads", "nope", "rope", "value", "rank"), [(1, 2, 128, 64, 128, 192), (70, 2, 16, 8, 24, 40)]
)
def test_absorbed(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    heads: int,
    nope: int,
    rope: int,
    value: int,
    rank: int,
) -> None:
    generator = torch.Generator().manual_seed(rank)
    query = torch.randn(rows, heads, nope + rope, generator=generator).to(device, dtype)
    latents = torch.randn(rows, heads, rank, generator=generator).to(device, dtype)
    expand = (torch.randn(heads, nope + value, rank, generator=generator) * rank**-0.5).to(device, dtype)
    keys, values = expand[:, :nope], expand[:, nope:]
    out = torch.full((rows, heads, rank + rope), 7.0, dtype=dtype, device=device)
    absorb(query[..., :nope], keys, out[..., :rank])
    close(out[..., :rank], torch.einsum("thn,hnr->thr", query[..., :nope], keys))
    assert (out[..., rank:] == 7.0).all()
    made = expand_values(latents, values)
    close(made, torch.einsum("thr,hvr->thv", latents, values))
    assert torch.equal(expand_values(latents[-1:], values), made[-1:])
    if value == 128:
        quantised = expand_values_rows(latents, values)
        wanted, scales = VectorisedFp8().quantise(made.flatten(1), "ue8m0")
        assert torch.equal(quantised.values.view(torch.uint8), wanted.view(torch.uint8))
        assert torch.equal(quantised.scales.T, scales)
        assert not quantised.turns.any()
    absorb(query[:0, :, :nope], keys, out[:0, :, :rank])
