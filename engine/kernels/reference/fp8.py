"""The definition of each FP8 operation in plain torch, one vector or one number at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.kernels.interface.fp8 import ACTIVATION_FLOOR, ScaleFormat
from engine.memory.blocks import BLOCK, E4M3, E4M3_MAX, BlockWeight, num_blocks
from engine.memory.layouts import IndexKeyLayout


class ReferenceFp8:
    """The FP8 operations. The formulas are in `engine.kernels.interface.fp8`."""

    def quantise(
        self, x: Tensor, scale_format: ScaleFormat, floor: float = ACTIVATION_FLOOR, block: int = BLOCK
    ) -> tuple[Tensor, Tensor]:
        """Quantise one block after the other."""
        rows = x.float().reshape(-1, x.shape[-1])
        values = torch.empty_like(rows, dtype=E4M3)
        scales = rows.new_empty(rows.shape[0], num_blocks(rows.shape[1], block))
        for r, row in enumerate(rows):
            for b, part in enumerate(row.split(block)):
                scale = part.abs().max().clamp(min=floor) / E4M3_MAX
                if scale_format == "ue8m0":
                    scale = torch.tensor(_power_of_two_above(float(scale)))
                scales[r, b] = scale
                values[r, b * block : (b + 1) * block] = (
                    (part / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
                )  # fmt: skip
        return values.view(x.shape), scales.view(*x.shape[:-1], -1)

    def hadamard(self, x: Tensor) -> Tensor:
        """Make the matrix entry by entry."""
        size = x.shape[-1]
        signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
        matrix = torch.tensor(signs, device=x.device)
        return torch.matmul(x.float(), matrix).mul(size**-0.5).to(x.dtype)

    def index_scores_fp8(
        self, query: Tensor, head_weights: Tensor, key_plane: Tensor, block_table: Tensor, positions: Tensor
    ) -> Tensor:
        """Score one position at a time."""
        requests, rows = positions.shape
        layout = IndexKeyLayout(query.shape[-1])
        context = block_table.shape[1] * key_plane.shape[1]
        scores = torch.full((requests, rows, context), -math.inf, device=query.device)
        for r in range(requests):
            keys, scales = (part.flatten(0, 1).float() for part in layout.read(key_plane, block_table[r]))
            for q in range(rows):
                last = int(positions[r, q]) + 1
                per_head = torch.relu(query[r, q].float() @ keys[:last].T)  # [H, c]
                scores[r, q, :last] = scales[:last] * (head_weights[r, q] @ per_head)
        return scores

    def linear_fp8(self, x: Tensor, weight: BlockWeight, scale_format: ScaleFormat) -> Tensor:
        """Sum one block after the other; scale each sum and add it."""
        rows = x.reshape(-1, x.shape[-1])
        values, scales = self.quantise(rows, scale_format)
        out = torch.zeros(rows.shape[0], weight.shape[0], device=x.device)
        for b in range(scales.shape[1]):
            at = slice(b * BLOCK, (b + 1) * BLOCK)
            partial = values[:, at].float() @ weight.values[:, at].float().T
            spread = weight.scales[:, b].repeat_interleave(BLOCK)[: weight.shape[0]]
            out += partial * scales[:, b : b + 1] * spread
        return out.to(x.dtype).view(*x.shape[:-1], -1)


def _power_of_two_above(number: float) -> float:
    """The smallest power of two that is at least `number`."""
    mantissa, exponent = math.frexp(number)  # number = mantissa * 2^exponent, mantissa in [1/2, 1)
    return 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)
