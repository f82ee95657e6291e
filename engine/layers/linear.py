"""Products with weights that are plain, in FP8 blocks, or packed for the native CPU kernels.

A weight in FP8 blocks is made plain during the product only. Activations stay in the model's dtype. DeepSeek's kernels
round activations to FP8, too (arXiv 2412.19437, section 3.3.2), so these products are more precise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import EngineError
from engine.kernels.native.packed import PackedWeight
from engine.memory.blocks import BLOCK, Matrix

Held: TypeAlias = Tensor | PackedWeight
"""[out, in], plain, or packed for the native CPU kernels."""

PLAIN_AT_ONCE = 1 << 24
"""The most numbers of a block weight that are plain at the same time: some 200 MB, the conversion's memory included."""


def linear(x: Tensor, weight: Matrix | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute x weight^T + bias, in the dtype of `x`: [..., in] -> [..., out].

    `dequantise_blocks` makes a block weight plain, a group of rows at a time. So the result is that of the dequantised
    weight, up to the order of a sum.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if bias is not None:
        return linear(x, weight) + bias
    if isinstance(weight, PackedWeight):
        return weight.multiply(x, dtype=x.dtype)
    rows, columns = weight.shape
    step = max(PLAIN_AT_ONCE // columns // BLOCK, 1) * BLOCK
    parts = [
        F.linear(x, weight.rows(start, min(start + step, rows)).dequantise(x.dtype))
        for start in range(0, rows, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def linear_float32(x: Tensor, weight: Held) -> Tensor:
    """Compute x weight^T in float32, and return float32: [..., in] -> [..., out]."""
    if isinstance(weight, PackedWeight):
        return weight.multiply(x, dtype=torch.float32)
    return F.linear(x.float(), weight.float())


def embedding(ids: Tensor, weight: Held, dtype: torch.dtype) -> Tensor:
    """Return rows of a table: ids [T] -> [T, in] in `dtype`."""
    if isinstance(weight, PackedWeight):
        return weight.rows(ids).to(dtype)
    return F.embedding(ids, weight).to(dtype)


class Parameters:
    """A model's or a layer's parameters by name."""

    def __init__(self, weights: Mapping[str, Matrix], prefix: str = "") -> None:
        """Take the `weights` whose names begin with `prefix`, and remove the prefix from their names."""
        self._weights, self._prefix = weights, prefix

    def __call__(self, name: str) -> Tensor:
        """Return a plain tensor.

        Raises:
            EngineError: it was loaded in FP8 blocks.
        """
        weight = self.matrix(name)
        if not isinstance(weight, Tensor):
            raise EngineError(
                f"parameter {self._prefix}{name} is in FP8 blocks, but is used as a plain tensor"
            )
        return weight

    def matrix(self, name: str) -> Matrix:
        """Return a weight for `linear`, plain or in FP8 blocks."""
        return self._weights[self._prefix + name]
