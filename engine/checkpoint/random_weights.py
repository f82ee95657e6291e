"""A checkpoint of random weights, for benchmarks: a config.json says what there is, and the numbers are made when read.

It stands for files of the same model: the same tensors, stored in the same formats, so what loads and computes them is
what would load and compute the real ones. What the model says means nothing. The numbers of a tensor depend on its name
and on the kind of device alone, so ranks that hold the same tensor hold the same numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.loader import Weight
from engine.checkpoint.part import Slice
from engine.checkpoint.quantisation import check_quantisation, published_in_blocks
from engine.errors import CheckpointError
from engine.memory.blocks import E4M3, E4M3_MAX, BlockWeight, num_blocks

_SPREAD = 64.0
"""Standard deviation of stored FP8 numbers: the largest of a million is then about 320 of the 448 that fit."""
_AT_ONCE = 1 << 26
"""Numbers that are made at once, so that a large tensor is never held in a wider format."""


class RandomSource:
    """Random weights as an open checkpoint: an `engine.checkpoint.source.Source` that `HoldsBlocks`."""

    def __init__(self, config: Mapping[str, Any], weights: Iterable[Weight], device: torch.device) -> None:
        """Make a checkpoint; nothing is computed yet.

        Args:
            config: the object of config.json
            weights: all parameters of the model that it describes
            device: where `read` and `read_blocks` make tensors

        Raises:
            CheckpointError: the config describes quantised weights that cannot be read.
        """
        self.config = config
        self._blocks = check_quantisation(config, "config.json")
        self.description = f"random weights ({'FP8 blocks' if self._blocks else 'plain numbers'})"
        self._device = device
        self._shapes: dict[str, tuple[int, ...]] = {}
        for weight in weights:
            rows = weight.rows or _even(weight.shape[0], len(weight.names))
            self._shapes |= {
                name: (count, *weight.shape[1:]) for name, count in zip(weight.names, rows, strict=True)
            }

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise CheckpointError(f"{self.description} have no tensor {name}")
        return self._shapes[name]

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Make a tensor on the device.

        A vector is 1 where it is a norm's weight, else 0. A matrix has normal numbers that keep the size of what it
        multiplies: their variance is one over its columns.
        """
        shape = self.shape(name)
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("norm.weight")), dtype=dtype, device=self._device)
        if self.in_blocks(name):
            return self.read_blocks(name).dequantise(dtype)
        return self._normal(name, shape, dtype, shape[-1] ** -0.5)

    def read_part(self, name: str, part: Slice, dtype: torch.dtype) -> Tensor:
        """Make a tensor and keep a part of it, so that the parts of all ranks make the whole."""
        return self.read(name, dtype).narrow(part.dim, part.start, part.stop - part.start).contiguous()

    def in_blocks(self, name: str) -> bool:
        return self._blocks and len(self.shape(name)) == 2 and published_in_blocks(name)

    def read_blocks(self, name: str, part: Slice | None = None) -> BlockWeight:
        """Make a tensor in FP8 blocks on the device. All its scales are one power of two, as ue8m0 asks for."""
        rows, columns = self.shape(name)
        values = self._normal(name, (rows, columns), E4M3, _SPREAD)
        scale = 2.0 ** round(math.log2(columns**-0.5 / _SPREAD))
        whole = BlockWeight(
            values, torch.full((num_blocks(rows), num_blocks(columns)), scale, device=self._device)
        )
        if part is None:
            return whole
        return (whole.rows if part.dim == 0 else whole.columns)(part.start, part.stop)

    def _normal(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, spread: float) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        made = torch.empty(shape, dtype=dtype, device=self._device)
        flat = made.view(-1)
        wide = torch.float32 if dtype is torch.float32 else torch.bfloat16
        for first in range(0, flat.numel(), _AT_ONCE):
            part = flat[first : first + _AT_ONCE]
            numbers = torch.randn(part.shape, generator=generator, dtype=wide, device=self._device)
            part.copy_(numbers.mul_(spread).clamp_(-E4M3_MAX, E4M3_MAX))
        return made


def _even(total: int, parts: int) -> tuple[int, ...]:
    """Share rows where the table leaves open how many each tensor has."""
    each = total // parts
    return (each,) * (parts - 1) + (total - each * (parts - 1),)
