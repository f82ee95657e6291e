"""The paged cache: wiping pages keeps the others."""

from __future__ import annotations

import torch

from engine.memory.planes import PagedCache, PlaneSpec


def test_wiped_pages_are_zero_in_every_plane_and_layer_and_others_keep_theirs() -> None:
    specs = (PlaneSpec("kv", (2, 3), torch.float32), PlaneSpec("index_key", (5,), torch.bfloat16))
    cache = PagedCache(4, specs, 2, torch.device("cpu"))
    planes = [cache.plane(layer, spec.name) for layer in range(2) for spec in specs]
    for plane in planes:
        plane.fill_(float("nan"))
        plane[2] = 7
    cache.wipe((0, 3))
    for plane in planes:
        assert plane[0].eq(0).all()
        assert plane[3].eq(0).all()
        assert plane[1].isnan().all()
        assert plane[2].eq(7).all()
