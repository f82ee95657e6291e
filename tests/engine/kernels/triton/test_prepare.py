"""One launch against the three that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.triton.index_key import KeyForm, queries, store_keys
from engine.kernels.triton.prepare import IndexPart, prepare
from engine.kernels.triton.rotation import rotate_and_store
from engine.layers.rope import RotaryTable
from engine.memory.planes import PagedCache, PlaneSpec

ROWS, EPS = 5, 1e-6
CASES = [(9, 3, 64, 8, 64), (4, 1, 24, 3, 16), (12, 2, 128, 5, 36)]  # q and KV heads of D; index heads of d


class Given:
    """What a call takes."""

    def __init__(
        self, case: tuple[int, ...], form: KeyForm, device: torch.device, dtype: torch.dtype
    ) -> None:
        heads, kv_heads, dim, index_heads, index_dim = case
        g = torch.Generator().manual_seed(dim)

        def made(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(device, dtype)

        width = (heads + 2 * kv_heads) * dim
        sizes = [width, index_heads * index_dim, index_dim, index_heads]
        product = made(ROWS, sum(sizes) + 3)
        self.qkv, query, key, weights, _ = product.split([*sizes, 3], dim=1)
        self.at = (
            torch.tensor([3, 0, -1, 200, 64], dtype=torch.int32, device=device),
            torch.tensor([2, 1, 0, 3, 0], dtype=torch.int32, device=device),
            torch.tensor([3, 0, 0, 63, 17], dtype=torch.int32, device=device),
        )
        self.rotation = RotaryTable(dim, 1e4, 300, device=device).all()
        keys = PlaneSpec("key", (index_dim,), dtype)
        if form == "int8":
            keys = PlaneSpec("key", (index_dim + 4,), torch.uint8)
        self.cache = PagedCache(4, [PlaneSpec("kv", (kv_heads, 2, dim), dtype), keys], 1, device)
        self.plane = self.cache.plane(0, "kv")
        rotation = RotaryTable(index_dim // 4 * 2, 1e4, 300, device=device).all()
        self.index = IndexPart(
            query, key, weights, made(index_dim), made(index_dim), EPS, 0.25, rotation, self.cache.plane(0, "key"), form
        )  # fmt: skip
        self.bias = made(width)
        norms = (made(dim), made(dim))
        self.norms: dict[str, Any] = {"head_norms": norms, "eps": EPS} if kv_heads > 1 else {}

    def stored(self) -> list[Tensor]:
        return [self.plane.clone(), self.index.plane.clone()]

    def together(self) -> list[Tensor]:
        made = prepare(
            self.qkv, *self.at, self.rotation, self.plane, self.index, bias=self.bias, **self.norms
        )
        return [*(one[self.at[0] >= 0] for one in made), *self.stored()]

    def apart(self) -> list[Tensor]:
        i = self.index
        query = rotate_and_store(self.qkv, *self.at, self.rotation, self.plane, bias=self.bias, **self.norms)
        store_keys(i.key, i.norm_weight, i.norm_bias, i.eps, i.rotation, *self.at, i.plane, i.form)
        made = queries(i.query, i.head_weights, i.scale, i.rotation, self.at[0], "plain")
        return [*(one[self.at[0] >= 0] for one in (query, *made)), *self.stored()]


@pytest.mark.parametrize("form", ["plain", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_three_launches(
    device: torch.device, dtype: torch.dtype, case: tuple[int, ...], form: KeyForm
) -> None:
    given, other = (Given(case, form, device, dtype) for _ in range(2))
    for ours, theirs in zip(given.together(), other.apart(), strict=True):
        assert torch.equal(ours, theirs)
