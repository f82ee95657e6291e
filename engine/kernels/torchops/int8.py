"""The operations on 8-bit index keys over whole tensors with torch's own kernels, for any torch device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.memory.layouts import Int8KeyLayout


class VectorisedInt8:
    """The operations on 8-bit index keys. The formulas are in `engine.kernels.interface.int8`."""

    def store_index_keys(self, plane: Tensor, pages: Tensor, offsets: Tensor, keys: Tensor) -> None:
        """Quantise and store all keys at once."""
        numbers, scales = _quantised(keys)
        Int8KeyLayout(keys.shape[-1]).write(plane, pages, offsets, numbers, scales.squeeze(-1))

    def index_scores_int8(
        self, query: Tensor, head_weights: Tensor, key_plane: Tensor, block_table: Tensor, positions: Tensor
    ) -> Tensor:
        """Multiply the integers in float32, which is exact, in one product for each request; then apply the scales."""
        requests, rows, heads, dim = query.shape
        numbers, scales = Int8KeyLayout(dim).read(key_plane, block_table)
        keys, key_scales = numbers.flatten(1, 2), scales.flatten(1, 2)  # [R, C, d], [R, C]
        context = keys.shape[1]
        own, own_scales = _quantised(query)
        per_head = torch.bmm(own.view(requests, rows * heads, dim), keys.transpose(1, 2)).relu_()
        weights = (head_weights * own_scales.squeeze(-1)).unsqueeze(2)
        scores = torch.matmul(weights, per_head.view(requests, rows, heads, context)).squeeze(2)
        future = torch.arange(context, device=query.device) > positions.unsqueeze(-1)
        return scores.mul_(key_scales.unsqueeze(1)).masked_fill_(future, -math.inf)


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise vectors: [..., d] -> integers [..., d] and scales [..., 1], both float32."""
    wide = x.float()
    scales = wide.abs().amax(-1, keepdim=True) / 127
    return (wide / scales.where(scales > 0, 1.0)).round_(), scales
