"""The FP8 operations over whole tensors with torch's own kernels, for any torch device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.interface.fp8 import ACTIVATION_FLOOR, ScaleFormat
from engine.memory.blocks import BLOCK, E4M3, E4M3_MAX, BlockWeight, num_blocks
from engine.memory.layouts import IndexKeyLayout


class VectorisedFp8:
    """The FP8 operations. The formulas are in `engine.kernels.interface.fp8`."""

    def quantise(
        self, x: Tensor, scale_format: ScaleFormat, floor: float = ACTIVATION_FLOOR, block: int = BLOCK
    ) -> tuple[Tensor, Tensor]:
        """Quantise all blocks at once. A shorter last block is padded with zeros, which change no maximum."""
        size = x.shape[-1]
        count = num_blocks(size, block)
        blocks = F.pad(x.float(), (0, count * block - size)).view(*x.shape[:-1], count, block)
        # A tensor on the device divides; for a number of Python's CUDA multiplies with its inverse, which is not the same.
        largest = torch.full((), E4M3_MAX, device=x.device)
        scales = blocks.abs().amax(-1).clamp_(min=floor).div_(largest)
        if scale_format == "ue8m0":
            mantissa, exponent = torch.frexp(scales)
            scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
        values = blocks.div_(scales.unsqueeze(-1)).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
        return values.flatten(-2)[..., :size].contiguous(), scales

    def hadamard(self, x: Tensor) -> Tensor:
        """Use the fast transform: log2(n) rounds of sums and differences."""
        size = x.shape[-1]
        y = x.float()
        half = 1
        while half < size:
            first, second = y.view(*x.shape[:-1], -1, 2, half).unbind(-2)
            y = torch.stack((first + second, first - second), dim=-2).view(x.shape)
            half *= 2
        return y.mul(size**-0.5).to(x.dtype)

    def index_scores_fp8(
        self, query: Tensor, head_weights: Tensor, key_plane: Tensor, block_table: Tensor, positions: Tensor
    ) -> Tensor:
        """Use one matrix product for each request."""
        requests, rows, heads, dim = query.shape
        keys, scales = IndexKeyLayout(dim).read(key_plane, block_table)
        keys, scales = keys.flatten(1, 2).float(), scales.flatten(1, 2)  # [R, C, d], [R, C]
        context = keys.shape[1]
        per_head = torch.bmm(query.reshape(requests, rows * heads, dim).float(), keys.transpose(1, 2)).relu_()
        scores = torch.matmul(
            head_weights.unsqueeze(2), per_head.view(requests, rows, heads, context)
        ).squeeze(2)  # [R, Q, 1, H] @ [R, Q, H, C]
        future = torch.arange(context, device=query.device) > positions.unsqueeze(-1)
        return scores.mul_(scales.unsqueeze(1)).masked_fill_(future, -math.inf)

    def linear_fp8(self, x: Tensor, weight: BlockWeight, scale_format: ScaleFormat) -> Tensor:
        """Multiply all blocks in one batched product, which gives a sum for each block: [b, T, out] float32."""
        rows = x.reshape(-1, x.shape[-1])
        values, scales = self.quantise(rows, scale_format)
        pad = scales.shape[1] * BLOCK - rows.shape[1]
        left = F.pad(values.float(), (0, pad)).view(len(rows), -1, BLOCK).transpose(0, 1)  # [b, T, 128]
        right = F.pad(weight.values.float(), (0, pad)).view(weight.shape[0], -1, BLOCK).permute(1, 2, 0)
        sums = torch.bmm(left, right).mul_(scales.T.unsqueeze(-1))  # [b, T, out]
        spread = weight.scales.T.repeat_interleave(BLOCK, dim=-1)[:, : weight.shape[0]]  # [b, out]
        return sums.mul_(spread.unsqueeze(1)).sum(0).to(x.dtype).view(*x.shape[:-1], -1)
