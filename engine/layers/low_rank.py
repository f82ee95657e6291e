"""A correction of low rank to a frozen product, on some rows only (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The correction x A^T B^T, which is added to x W^T. Its rank r is far below the sizes of W [out, in]."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]

    @property
    def rank(self) -> int:
        """The rank r."""
        return len(self.a)

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """Compute the correction: x [T, in], rows [T, 1] bool -> [T, out]. It is exactly 0 where `rows` is False."""
        return F.linear(F.linear(x, self.a) * rows, self.b)
