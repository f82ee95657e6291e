"""A correction of low rank to a frozen product, on some rows only (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """What is added to x W^T: x A^T B^T, with r far below the sizes of W [out, in]."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]

    @property
    def rank(self) -> int:
        """r."""
        return len(self.a)

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """The correction: x [T, in], rows [T, 1] bool, True where it applies -> [T, out].

        Where `rows` is False the result is exactly 0.
        """
        return F.linear(F.linear(x, self.a) * rows, self.b)
