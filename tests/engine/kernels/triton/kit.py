"""What tests of several kernels share."""

from __future__ import annotations

import torch

from engine.memory.blocks import E4M3, BlockWeight, num_blocks


def random_blocks(generator: torch.Generator, *shape: int, device: torch.device) -> BlockWeight:
    """A random weight in FP8 blocks of many sizes, whose outputs are about 1 for inputs about 1."""
    values = torch.randn(shape, generator=generator).to(E4M3)
    scales = torch.rand(*shape[:-2], num_blocks(shape[-2]), num_blocks(shape[-1]), generator=generator) + 0.5
    return BlockWeight(values.to(device), (scales * shape[-1] ** -0.5).to(device))
